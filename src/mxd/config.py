"""Typed configurations, one per verb. They are the command line: every field is an option of the same name.

Light on purpose: no torch here, so that ``mxd --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KINDS: tuple[str, ...] = (
    "mxd",
    "mxd-pk",
    "cp-mumoe",
    "mov",
    "transcoder",
    "skip-transcoder",
    "topk-sae",
    "dense",
    "additive",
)
"""Every kind of layer, in the order of the tables; the last two are controls."""
CONTROLS: tuple[str, ...] = ("dense", "additive")
"""Kinds trained beside the others to show what the experts and the product add; no claim to sparsity."""

PARTS: tuple[str, ...] = ("generation_agreement", "probes", "steering", "anatomy", "selectivity", "cost")
"""Every part of the evaluation suite besides faithfulness and routing, in the order of the report."""
STORES: tuple[str, ...] = ("float32", "bfloat16", "float16")
"""Number formats in which activations can be cached."""


@dataclass(frozen=True)
class HarvestConfig:
    """Write what MLPs of a host receive and return on training text to disk, to train from as often as wanted (mxd train --activations)."""

    out: Path = Path("runs/activations")
    """Folder to write. Activations that are there are never overwritten unless --overwrite is given."""
    host: str = "smollm2"
    """Host model: the built-in `smollm2`, a Hugging Face id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Git revision of a Hugging Face host (branch, tag or commit)."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:N, mps; auto takes cuda when there is one."""
    dtype: str = "float32"
    """Number format in which the host runs: float32, bfloat16 or float16."""
    text: tuple[str, ...] = ("sotu", "wiki-en")
    """Training text: built-in corpora (sotu, wiki-en, wiki-fr, wiki-es, news), files or folders (.txt, .jsonl, .parquet),
    or Hugging Face datasets by name (streamed)."""
    text_column: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    tokens_per_sequence: int = 128
    """Length of the packed sequences, in tokens, BOS included."""
    layers: tuple[str, ...] = ("8",)
    """MLPs to harvest: layer numbers (8) or hookpoints (layers.8.mlp)."""
    tokens: int = 1_000_000
    """Training tokens to read from the host and store."""
    sequences_per_read: int = 8
    """Sequences the host reads at once."""
    seed: int = 0
    """Seed of the text order."""
    store: str = "float32"
    """Number format on disk: float32 (training from it gives the bits of streaming from the host), bfloat16 or float16 (half the disk)."""
    tokens_per_shard: int = 262_144
    """Tokens in one file, rounded down to whole reads of the host; what is lost, at most, when a harvest is interrupted."""
    overwrite: bool = False
    """Replace the activations in the same folder; they are removed before the first new one is written."""


@dataclass(frozen=True)
class TrainConfig:
    """Train sparse layers side by side in one pass of a host model: every kind x K x layer is one student."""

    out: Path = Path("runs/train")
    """Run folder to write. A finished run there is never overwritten unless --overwrite is given."""
    activations: Path | None = None
    """Folder that `mxd harvest` wrote: train from it instead of the host. Its host, text and sequences hold; of its layers, all are
    trained, or those that --layers names."""
    host: str = "smollm2"
    """Host model: the built-in `smollm2`, a Hugging Face id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Git revision of a Hugging Face host (branch, tag or commit)."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:N, mps; auto takes cuda when there is one."""
    dtype: str = "float32"
    """Number format of the host: float32, bfloat16 or float16. Students are always trained in float32."""
    text: tuple[str, ...] = ("sotu", "wiki-en")
    """Training text: built-in corpora (sotu, wiki-en, wiki-fr, wiki-es, news), files or folders (.txt, .jsonl, .parquet),
    or Hugging Face datasets by name (streamed)."""
    text_column: str = "text"
    """Field that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    tokens_per_sequence: int = 128
    """Length of the packed sequences, in tokens, BOS included."""
    layers: tuple[str, ...] = ()
    """MLPs to replace: layer numbers (8) or hookpoints (layers.8.mlp). Default: 8, or all that --activations holds."""
    kinds: tuple[str, ...] = ("mxd", "transcoder", "skip-transcoder", "topk-sae")
    """Kinds to train: mxd, mxd-pk (the same with a product-key gate), cp-mumoe (of any rank), mov (experts on the hidden side),
    transcoder, skip-transcoder, topk-sae, and the controls dense and additive."""
    k: tuple[int, ...] = (32,)
    """Units active per token; several values give one student each (controls with a K follow; dense has none)."""
    budget: str = "16x"
    """Parameters per student: `16x` means as many as a transcoder with 16 x d_in latents; a plain number is a count."""
    sizes: str = "matched"
    """matched: every kind gets --budget, by counting its parameters; published: the paper's own sizes (its four hosts only)."""
    recipe: tuple[str, ...] = ("ours",)
    """How students start and are optimised: paper, ours or host-encoder, and behind it modifiers, as in ours+muon or
    ours+lr=2e-3+width=0.25 (see docs/recipes.md); several give one student each."""
    tokens: int = 1_000_000
    """Training tokens to read from the host (a token trained on twice counts once; see --passes)."""
    passes: int = 1
    """Times each token of the shuffle buffer is trained on before it is replaced."""
    tokens_per_step: int = 1024
    """Tokens in one optimiser step."""
    buffer_tokens: int = 65_536
    """Size of the shuffle buffer, in tokens."""
    sequences_per_read: int = 8
    """Sequences the host reads at once."""
    lr: float | None = None
    """Learning rate (peak); default: the recipe's."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly; default: the recipe's."""
    schedule: str | None = None
    """After warm-up: constant, or linear (decay to zero at the last step); default: the recipe's."""
    loss: str = "norm-weighted"
    """norm-weighted: mean of |y - y_hat|^2 / |y| (the paper's); squared: mean of |y - y_hat|^2."""
    aux_weight: float | None = None
    """Weight of the auxiliary loss (AuxK), by which units that stopped firing learn from what is left of the error; 0: none;
    default: the recipe's. The dense control, mxd-pk, cp-mumoe and mov have no rows of their own to revive."""
    aux_k: int | None = None
    """Dead units that the auxiliary loss uses per token; default: half of the MLP's input width."""
    dead_after_tokens: int | None = None
    """A unit is dead once it has not fired for so many tokens; default: a tenth of the run's, at most ten million."""
    precision: str = "auto"
    """Of the dense products in training: fp32, tf32 or bf16 (operands rounded, sums and parameters float32); auto: bf16 on GPUs that
    have it, fp32 elsewhere."""
    gate: str = "full"
    """full: the K largest of all scores; screened: the same K units, found from bfloat16 bounds and proved."""
    scores_mib: float | None = None
    """Largest block of gate scores (tokens x units) held at once, in MiB; the tokens of a step are taken in slices to fit. Default: 32
    on a CPU, 512 on a GPU."""
    recompute: bool = False
    """Hold no hidden vectors of MxD and the controls between forward and backward pass; compute them again: less memory, more time."""
    deterministic: bool = False
    """On a GPU: same seed, same bits, at some cost in time. The CPU is always deterministic."""
    random_k: bool = False
    """Draw K uniformly from K/2 to 3K/2 at every training step (removes the shared expert)."""
    seed: int = 0
    """Seed of everything random: initialisation, text order, shuffling, random K."""
    log_every_steps: int = 20
    """Steps between two lines of metrics.jsonl per student."""
    probe_every_steps: int = 0
    """Steps between two measurements of the routing on validation text (0: twelve over the run)."""
    save_every_minutes: float = 10.0
    """Minutes between two states of the run, from which it goes on after whatever ended it (the last two are kept, of three times the
    size of the weights); 0: none but by --save-every-tokens and when it is stopped."""
    save_every_tokens: int | None = None
    """Token-steps between two states of the run, beside --save-every-minutes."""
    keep_state: bool = False
    """Keep the last state when the run is finished, so that it can be prolonged (--resume RUN --tokens N)."""
    resume: Path | None = None
    """Run to go on with, all its options as they were; of an unfinished one the same command does so too. Options given beside it: more
    --tokens prolong it (in a shuffle buffer and at learning rates of their own), more --kinds or --k of a finished one add students."""
    overwrite: bool = False
    """Replace a finished run in the same folder."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate every student of a run in the host, on held-out text, and write report.json."""

    suite: str = "quick"
    """quick: faithfulness and routing. full: also generation agreement, probes, steering, anatomy, selectivity and cost. paper: the same
    parts by the published protocols."""
    parts: tuple[str, ...] = ()
    """Only these parts besides faithfulness and routing: generation_agreement, probes, steering, anatomy, selectivity, cost. Default:
    those of the suite."""
    sequences: int = 200
    """Held-out sequences for cross-entropy; at least 200 for the intervals to mean something."""
    fit_tokens: int = 40_960
    """Training tokens on which the routing-free readout behind N_r is fitted."""
    split: str = "test"
    """Held-out text to measure on: test (the final numbers) or validation (to choose a recipe)."""
    students: tuple[str, ...] = ()
    """Only these students, by name; default: all."""
    edit: Path | None = None
    """Edit that `mxd edit` wrote: measure the student it belongs to with its units ablated, scaled or added to."""
    bootstrap: int = 2000
    """Bootstrap resamples behind every interval."""
    permutations: int = 10
    """Permutations of the experts behind ID."""
    agreement_prompts: int = 512
    """Held-out prompts of four words behind generation agreement."""
    agreement_tokens: int = 16
    """New tokens after each of them."""
    agreement_temperature: float = 0.0
    """Generation agreement at temperature 0 is greedy; above, tokens are sampled, host and students with the same noise."""
    steer_units: int | None = None
    """Units to steer; default: 24 that fire on validation text, from all frequencies; with --suite paper the first 100, firing or not."""
    steer_samples: int | None = None
    """Continuations of each; default: 4, with --suite paper 10."""
    steer_scale: float = 10.0
    """What is added to a unit's activation, as a multiple of its mean activation where it fires; --suite paper adds 100 instead."""
    judge_url: str | None = None
    """Have a language model judge the steered texts, behind this OpenAI-compatible address (https://HOST/v1); default: no judge. The
    texts, and the key that --judge-key-env names, are sent there."""
    judge_model: tuple[str, ...] = ()
    """Models that judge, by the names that --judge-url knows them by; the paper had two."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key for --judge-url; none is sent if it is empty."""
    selectivity_units: int = 16
    """Units ablated per class in the test of selectivity, which also ablates a quarter and four times as many."""
    selectivity_documents: int = 24
    """Test texts of each class (of 64 tokens) on which the loss under every ablation is measured; at least 8."""
    tasks: tuple[str, ...] = ()
    """Only these probing tasks, by name: language, topic, profession, profession-masked, surname-profession, sentiment-movie,
    sentiment-amazon, sentiment-tweets, programming-language, language-parliament; by the hub ag_news, github-code, amazon-reviews,
    europarl, bias_in_bios. Default: the first nine; with --suite paper those of the hub."""
    probe_samples_per_class: int = 150
    """Texts per class behind every probe: 60 % to fit, 20 % to choose, 20 % to test. The published sets have 5,000 with --suite paper."""
    probe_selection: str = "ours"
    """ours: unit and threshold chosen on validation texts. paper: the best of 100 units on the test texts (as published: optimistic);
    --suite paper implies it."""
    anatomy_tokens: int = 65_536
    """Held-out tokens over which anatomy counts which units fire (the window of dead units); fewer where there is less text."""
    jacobian_tokens: int = 128
    """Held-out tokens at which a student's Jacobian is compared with that of the host's MLP."""
    seed: int = 0
    """Seed of the sample of sequences, the bootstrap and the permutations."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:N, mps; auto takes cuda when there is one."""


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt by the host and by the host with each student in place, side by side."""

    prompt: str = "The President of the United States"
    """Text to continue."""
    new_tokens: int = 32
    """Tokens to add."""
    students: tuple[str, ...] = ()
    """Only these students, by name; default: all."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are sampled at this temperature, with the same noise in every lane."""
    seed: int = 0
    """Seed of the sampling; without effect at temperature 0."""
    static: bool = False
    """Keep to fixed shapes: a KV cache of a fixed size, the prompt padded to a multiple of 32 tokens."""
    compile: bool = False
    """Put the one-token step through torch.compile, with fixed shapes: minutes per lane at first, faster steps from then on."""
    edit: Path | None = None
    """Edit that `mxd edit` wrote: one more lane, with the student it belongs to edited."""
    device: str = "auto"
    """Where to run."""


@dataclass(frozen=True)
class EditConfig:
    """Write down an edit of one student, units ablated, scaled or added to, for mxd generate, mxd eval and mxd.load_edit."""

    out: Path = Path("edit.json")
    """File to write; its name, without .json, becomes that of the edit."""
    student: str | None = None
    """The student to edit, by name; default: the run's only one."""
    ablate: tuple[int, ...] = ()
    """Units whose activation becomes 0; no other unit moves up in their place."""
    scale: tuple[str, ...] = ()
    """UNIT=FACTOR: the unit's activation, wherever it is among the K, is multiplied by the factor."""
    add: tuple[str, ...] = ()
    """UNIT=VALUE: the value is added to the unit's activation at every token, after --ablate and --scale (both hold it at the value)."""
    overwrite: bool = False
    """Replace the file if there is one."""


@dataclass(frozen=True)
class StudyConfig:
    """Run one of the studies behind docs/results.md: harvest, train, evaluate, and one JSON file with a command beside every number."""

    name: str = ""
    """Which study: tuning, comparison, routing, meaning, topk-or-l1, encoder, rank, random-k, n-or-k, mode-2."""
    out: Path = Path("runs/studies")
    """Folder for activations, runs and NAME.json. What is finished there is not run again."""
    tokens: int | None = None
    """Fewer training tokens than the study's own, to see that everything runs; the figures then mean little."""
    sequences: int = 200
    """Held-out sequences for cross-entropy."""
    precision: str = "auto"
    """Of the dense products in training: fp32, tf32 or bf16; auto: bf16 on GPUs that have it, fp32 elsewhere."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed: every rival in turn in one process, each result verified before it is timed; medians, as tables and as JSON."""

    names: tuple[str, ...] = ()
    """Benchmarks to run: gemm, ops, train_step, scaling, gate, frontier, cache, whole, generation, peers. Default: all that can run
    here."""
    out: Path | None = None
    """Folder for NAME-DEVICE.json; rows measured again replace the old ones. Default: benchmarks/results, and nothing with --quick."""
    device: str = "auto"
    """Where to run: cpu or cuda; auto takes cuda when there is one."""
    threads: int = 2
    """CPU threads, the same for all rivals."""
    runs: int = 5
    """Runs behind every median, after one or more that warm up."""
    quick: bool = False
    """Tiny shapes: shows within seconds that everything runs; the figures mean nothing."""
    host: str = "smollm2"
    """Host model of frontier, cache and generation: the built-in `smollm2`, a local folder, or a .gguf file."""
    text: tuple[str, ...] = ("sotu", "wiki-en")
    """Training text of frontier and cache: built-in corpora, files or folders."""
