"""Configurations of what is done with single units: collecting, looking, naming, exporting. See `mxd.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CollectConfig:
    """Read held-out text once and keep what every unit does: how often it fires, in which contexts, with which others, to what effect."""

    students: tuple[str, ...] = ()
    """Only these students, by name; default: all that have units. Others can be added later."""
    tokens: int = 131_072
    """Tokens of held-out text to read, at most; the first of every sequence counts, but its firings are left out."""
    effect_tokens: int = 16_384
    """Of these, the tokens on which the host's loss and its gradient are taken as well, for the effect of every unit; 0: none."""
    contexts: int = 10
    """Contexts kept of every unit and band of activations, 1 to 50."""
    split: str = "validation"
    """Which held-out text: validation, so that choosing units never sees the text they are tested on, or test."""
    seed: int = 0
    """Of the draw of contexts."""
    device: str = "auto"
    """Where to run."""
    overwrite: bool = False
    """Collect anew, from the start. Labels of the same weights, and notes, stay."""


@dataclass(frozen=True)
class ExploreConfig:
    """Serve the page of a run on this machine: what its units do, which text they fire on, what they are worth, and what edits change."""

    students: tuple[str, ...] = ()
    """Collect only what is missing about these students, by name; default: all that have units."""
    port: int = 8008
    """Port to serve at; the next free one if it is taken, 0 for any."""
    host: str = "127.0.0.1"
    """Address to serve at. Any but the default can be reached from other machines, without encryption."""
    allow_host: tuple[str, ...] = ()
    """More names by which browsers may call this machine, behind a proxy for example."""
    no_browser: bool = False
    """Only print the link."""
    collect_only: bool = False
    """Collect what is missing, as mxd collect does, and end."""
    export: Path | None = None
    """Write the page with the 300 units of the largest effect to this HTML file, as mxd export does, and end."""
    veil: bool = False
    """Blur texts until they are looked at, for shared screens."""
    device: str = "auto"
    """Where the host runs."""


@dataclass(frozen=True)
class LabelConfig:
    """Name units and score the names: by the tokens and contexts they fire on, or by a language model behind an endpoint."""

    students: tuple[str, ...] = ()
    """Only these students, by name; default: all of which something was collected."""
    units: tuple[int, ...] = ()
    """Only these units, by number."""
    top: int | None = None
    """Only so many units of each student, of those that fire 30 times or more, the first by --by; default: 200 for a model, all units for
    statistical labels."""
    by: str = "effect"
    """Column that decides which are the first, the largest value leading: effect, fires, max_a, share, …"""
    endpoint: str | None = None
    """Have a language model explain units and test its words, behind this OpenAI-compatible address (https://HOST/v1, or a local
    http://127.0.0.1:PORT/v1). Excerpts of the texts, and the key that --key-env names, are sent there. Default: no model, statistical
    labels only."""
    model: str | None = None
    """The model, by the name that --endpoint knows it by."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key for --endpoint; none is sent if it is empty."""
    max_tokens: int | None = None
    """Stop before more tokens than this are read and written by the model."""
    max_cost: float | None = None
    """Stop before it costs more than this, in the currency of the prices."""
    price_in: float | None = None
    """Price of a million tokens that the model reads."""
    price_out: float | None = None
    """Price of a million tokens that it writes."""
    requests_per_minute: float | None = None
    """Requests a minute, at most, evenly spread."""
    parallel: int = 4
    """Units that the model is asked about at the same time."""
    reply_tokens: int = 1024
    """Tokens of one reply, at most, where the endpoint takes such a limit; what a model thinks aloud counts."""
    timeout: float = 60.0
    """Seconds for one reply."""
    seed: int = 0
    """Of the draw of the excerpts."""
    dry_run: bool = False
    """Say how many requests and tokens it would take, and at what cost; ask and write nothing."""
    overwrite: bool = False
    """Label also what has a label by this author. Replies that are kept are not asked for again."""


@dataclass(frozen=True)
class ExportConfig:
    """Write what was collected about units for others: a page in one file, dashboards for Neuronpedia, or the firings for delphi."""

    format: str = "html"
    """html: the page of `mxd explore` in one file that opens without a server. neuronpedia: SAEDashboard's batch-*.json.
    delphi: its cache of latents, to have units explained and scored."""
    out: Path | None = None
    """File (html) or folder to write; default: NAME.html, or NAME-FORMAT, after the run, in the current folder."""
    students: tuple[str, ...] = ()
    """Only these students, by name; default: all of which something was collected."""
    units: tuple[int, ...] = ()
    """Only these units, by number, of one student."""
    starred: bool = False
    """Only units with a star."""
    top: int | None = None
    """Only so many units of each student, the first by --by; default: 300 for html, else all that fired."""
    by: str = "effect"
    """Column that decides which are the first, the largest value leading: effect, fires, max_a, share, score, …"""
    contexts: int | None = None
    """Contexts of each band, at most; default: 10. None are in delphi's cache."""
    overwrite: bool = False
    """Replace an export of the same name."""
