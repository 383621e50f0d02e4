"""The pretrained language model: find an MLP, read what goes in and comes out, replace it, put it back.

The only file that edits a model. It knows nothing of our layers: whatever maps [.., d_in] to [.., d_out] can stand in for an MLP.
MLPs are found by structure (see `mxd.sites`), so a new family of models needs no new code as long as its blocks hold a plain or gated MLP.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from . import assets, blocks, fingerprints, gguf_header, host_files, kept_tokenizer, products
from .decoding import Decoder, check_numbers
from .decoding import Generated as Generated
from .devices import find_device as find_device
from .errors import ConfigError, HostError, nearest
from .sites import Activations as Activations
from .sites import MLPSite as MLPSite
from .sites import MLPWeights as MLPWeights
from .sites import StandIn, find_sites, read_weights

BUILT_IN = "smollm2"
Memory = dict[str, Any]
"""What `Host.remember` collects: by hookpoint, what the block below it returned."""
KNOWN = (BUILT_IN, "gpt2", "EleutherAI/pythia-410m", "EleutherAI/pythia-1.4b", "meta-llama/Llama-3.2-3B")
"""Names suggested when another is not found: the built-in host and the paper's."""
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Host:
    """A causal language model in evaluation mode, without gradients, whose MLPs can be read and replaced.

    Attributes:
        name: what it was loaded by.
        revision: the git revision asked for, None if none was.
        model: the transformers model.
        tokenizer: its tokenizer.
        device, dtype: where and in what number format it runs.
        d_model: width of the residual stream.
        sites: its MLPs, in order of depth.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, revision: str | None = None, fingerprint: Callable[[], str] | None = None
    ) -> None:
        self.name, self.revision, self.model, self.tokenizer = name, revision, model, tokenizer
        model.eval().requires_grad_(False)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._fingerprint = fingerprint or (lambda: fingerprints.of_tensors(model.state_dict()))
        if self.device.type == "cpu" and self.dtype == torch.float32:
            products.route(model)
        found = find_sites(model, name)
        self.d_model: int = found.d_model
        self.sites: list[MLPSite] = [site for site, _ in found.sites]
        self._layouts = {site.hookpoint: layout for site, layout in found.sites}
        self._mlps: dict[str, nn.Module] = {site.hookpoint: model.get_submodule(site.module) for site in self.sites}
        self._decoder = Decoder(model, self._static_cache)

    @classmethod
    def load(cls, name: str, *, revision: str | None = None, device: str = "auto", dtype: str = "float32") -> Host:
        """Load a host by name.

        Args:
            name: ``smollm2`` (built in), a folder with a saved model and tokenizer, a ``.gguf`` file, or a Hugging Face id.
            revision: branch, tag or commit of a Hugging Face id.
            device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``; ``auto`` takes cuda when there is one.
            dtype: ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            HostError: no such host, unreadable, incomplete, or without separable MLPs.
            ConfigError: unknown or absent device, unknown dtype.
            AssetError: the built-in host could not be fetched.
        """
        if dtype not in DTYPES:
            raise ConfigError("unknown dtype", expected=nearest(dtype, DTYPES), got=dtype)
        where = find_device(device)
        source, gguf, local = _resolve(name)
        if local and revision is not None:
            raise ConfigError("a revision is only for hosts from the Hugging Face hub", got=f"revision {revision} for {name}")
        model, tokenizer, commit = _pretrained(name, source, gguf, revision, DTYPES[dtype])
        if local:
            files = [Path(source) / gguf] if gguf else fingerprints.weight_files(Path(source))
            return cls(model.to(where), tokenizer, name=name, fingerprint=lambda: fingerprints.of_files(files))
        return cls(model.to(where), tokenizer, name=name, revision=revision, fingerprint=(lambda: commit) if commit else None)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, *, name: str = "model") -> Host:
        """A host from a transformers causal LM already in memory, on its own device and in its own dtype.

        It is put in evaluation mode, its parameters stop requiring gradients, and on a float32 CPU `mxd.ops.gemm` multiplies.
        """
        return cls(model, tokenizer, name=name)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights: sha256 of the weight files if local, the commit if from the hub, sha256 of the tensors otherwise."""
        return self._fingerprint()

    @property
    def vocab_size(self) -> int:
        """Width of `logits`."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence the host can read, in tokens; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def site(self, key: int | str) -> MLPSite:
        """The MLP at `key`: a layer number (8, "8") or a hookpoint ("layers.8.mlp", "model.layers.8.mlp").

        Raises:
            HostError: there is no MLP there; names the nearest hookpoints.
        """
        text = str(key)
        for site in self.sites:
            if text in (str(site.layer), site.hookpoint, site.module):
                return site
        layers = [site.layer for site in self.sites]
        if re.fullmatch(r"-?\d+", text):
            whole = layers == list(range(layers[0], layers[-1] + 1))
            expected = f"a layer from {layers[0]} to {layers[-1]}" if whole else f"one of the layers {', '.join(map(str, layers))}"
        else:
            expected = nearest(text, [site.hookpoint for site in self.sites])
        raise HostError(f"host {self.name} has no MLP at {text}", expected=expected, next=f"mxd info {self.name} lists its MLPs")

    def mlp(self, key: int | str) -> nn.Module:
        """The host's own MLP module at `key`, also while another stands in for it."""
        return self._mlps[self.site(key).hookpoint]

    def weights(self, key: int | str) -> MLPWeights:
        """Float32 copies of the weights of the MLP at `key`, oriented so that the formula of `MLPWeights` holds."""
        site = self.site(key)
        return read_weights(self._mlps[site.hookpoint], self._layouts[site.hookpoint])

    def read(self, ids: Int64[Tensor, "sequence position"], keys: Iterable[int | str]) -> dict[str, Activations]:
        """Inputs and outputs of the MLPs at `keys`, float32 [sequence, position, d], by hookpoint.

        Stops after the deepest of them: later blocks and the LM head do not run. The tensors are ordinary ones (not
        inference tensors), fit for training on. Inside `replace`, they are what the stand-in receives and returns.
        """
        sites = list(dict.fromkeys(self.site(key) for key in keys))
        if not sites:
            return {}
        deepest = max(sites, key=lambda site: site.layer)
        found: dict[str, Activations] = {}

        def hook_of(site: MLPSite) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                found[site.hookpoint] = Activations(args[0].float(), output.float())
                if site is deepest:
                    raise _Stop

            return hook

        with torch.no_grad(), ExitStack() as hooks, suppress(_Stop):
            for site in sites:
                hooks.callback(self.model.get_submodule(site.module).register_forward_hook(hook_of(site)).remove)
            self.model.base_model(self._checked(ids), use_cache=False)
        return {site.hookpoint: found[site.hookpoint] for site in sites}

    def logits(self, ids: Int64[Tensor, "sequence position"]) -> Float[Tensor, "sequence position vocab"]:
        """Next-token scores, float32, without gradients."""
        with torch.no_grad():
            return self.model(self._checked(ids), use_cache=False).logits.float()

    @contextmanager
    def remember(self, keys: Iterable[int | str]) -> Iterator[Memory]:
        """Collects, while the host runs on some tokens, what the blocks below the MLPs at `keys` return: see `resume`."""
        last = {site.hookpoint: blocks.below(self.model, site.module)[-1:] for site in map(self.site, keys)}
        with blocks.recording([block for found in last.values() for block in found]) as given:
            memory: Memory = {}
            yield memory
        memory |= {hookpoint: given[found[0]] for hookpoint, found in last.items() if found}

    @contextmanager
    def resume(self, memory: Memory, key: int | str) -> Iterator[Host]:
        """Inside, the host must read *the same tokens* as when `memory` was made: the blocks below the MLP at `key` are not computed again.

        The same bits, as long as nothing below that block was replaced then or is now.
        """
        site = self.site(key)
        with blocks.giving(blocks.below(self.model, site.module) if site.hookpoint in memory else [], memory.get(site.hookpoint)):
            yield self

    @contextmanager
    def replace(self, modules: Mapping[int, nn.Module] | Mapping[str, nn.Module] | Mapping[int | str, nn.Module]) -> Iterator[Host]:
        """Put `modules` in the place of MLPs for as long as the context lasts; then the very same objects are back.

        A stand-in maps [.., d_in] to [.., d_out]; of a named tuple the field ``y`` is taken. One whose attribute ``reads``
        is ``"output"`` is fed what the host's own MLP returns (SAE(MLP(x))). It runs in its own dtype and on its own device;
        its result is cast back. Contexts nest: the inner one holds until it ends.

        Raises:
            HostError: unknown key, two modules for one MLP, no module, or (in use) a wrong output shape.
        """
        swaps = self._stand_ins(modules)
        before = {path: self.model.get_submodule(path) for path in swaps}
        try:
            for path, swap in swaps.items():
                self.model.set_submodule(path, swap)
            yield self
        finally:
            for path, module in before.items():
                self.model.set_submodule(path, module)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens, otherwise to the letter."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(
        self, prompt: str, *, new_tokens: int, temperature: float = 0.0, seed: int = 0, static: bool = False, compiled: bool = False
    ) -> Generated:
        """`generate_batch` of one prompt, with its options and errors."""
        how: dict[str, Any] = {"temperature": temperature, "seed": seed, "static": static, "compiled": compiled}
        return self.generate_batch([prompt], new_tokens=new_tokens, **how)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        top_p: float = 1.0,
        frequency_penalty: float = 0.0,
        static: bool = False,
        compiled: bool = False,
    ) -> list[Generated]:
        """Continue each prompt (BOS first where the tokenizer has one) until `new_tokens` or an end-of-text token, all in one batch.

        Temperature 0 takes the likeliest token. Above, argmax(logits / temperature + Gumbel noise) samples from the softmax;
        the noise depends on the seed (one, or one for each prompt) and the step only, so that two hosts with the same seed differ
        only where their logits do, and a prompt is continued in a batch as it is alone. For `top_p`, `frequency_penalty` and the modes
        `static` and `compiled` see `mxd.decoding`; in every mode the continuations are the same up to rounding.

        Raises:
            ConfigError: impossible numbers (`decoding.check_numbers`), an empty prompt without BOS, or nothing to compile with.
            HostError: longer than the host can read, or a step that cannot be compiled.
        """
        check_numbers(len(prompts), new_tokens, temperature, seed, top_p, frequency_penalty)
        bos = self.tokenizer.bos_token_id
        read = [([] if bos is None else [int(bos)]) + self.encode(prompt) for prompt in prompts]
        for ids in read:
            if not ids:
                raise ConfigError("the prompt is empty", expected="at least one token", next="give --prompt")
            self._check_length(len(ids) + new_tokens)
        if not read:
            return []
        how: dict[str, Any] = {"temperature": temperature, "seed": seed, "top_p": top_p, "frequency_penalty": frequency_penalty}
        how |= {"static": static, "compiled": compiled}
        made = self._decoder.extend(read, new_tokens=new_tokens, ends=self.end_ids(), **how)
        return [Generated(ids, new, self.decode(ids + new)[len(self.decode(ids)) :]) for ids, new in zip(read, made, strict=True)]

    def _stand_ins(self, modules: Mapping[Any, Any]) -> dict[str, StandIn]:
        """What `replace` puts in place, by path in the model, after checking it."""
        swaps: dict[str, StandIn] = {}
        for key, module in modules.items():
            site = self.site(key)
            if not isinstance(module, nn.Module):
                raise HostError(f"what replaces {site.hookpoint} must be a module", expected="torch.nn.Module", got=type(module).__name__)
            if site.module in swaps:
                raise HostError(f"two modules for {site.hookpoint}", expected="one module for each MLP", got=f"{key} a second time")
            swaps[site.module] = StandIn(module, self._mlps[site.hookpoint], site)
        return swaps

    def _static_cache(self, tokens: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=tokens)

    def end_ids(self) -> set[int]:
        """The tokens that end a text."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}

    def _checked(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise HostError("wrong token ids", expected="int64 [sequence, position]", got=f"{ids.dtype} {list(ids.shape)}")
        self._check_length(ids.shape[1])
        return ids.to(self.device)

    def _check_length(self, tokens: int) -> None:
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise HostError(f"too long for host {self.name}", expected=f"at most {self.max_tokens} tokens", got=f"{tokens}")

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {len(self.sites)} MLPs, d_model={self.d_model}, {self.device}, {self.dtype})"


class _Stop(Exception):
    """Raised by a hook when nothing deeper is wanted."""


def _resolve(name: str) -> tuple[str, str | None, bool]:
    """What transformers is to load (folder or hub id), the .gguf file in it if that is the host, and whether it is local."""
    if name == BUILT_IN:
        return str(assets.builtin_host(lambda line: print(f"mxd: {line}", file=sys.stderr, flush=True))), None, True
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise HostError(f"no file {name}", expected="a .gguf file, a folder, or a name", next=f"did you mean {nearest(name, KNOWN)}?")
        gguf_header.check(path)
        return str(path.parent), path.name, True
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HostError(f"folder {name} holds no model", expected="config.json, weights and a tokenizer in it", got="no config.json")
        host_files.check_index(name, path)
        return str(path), None, True
    kinds = "smollm2, a folder, a .gguf file, or a Hugging Face id (owner/name)"
    if path.is_file() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise HostError(f"no host {name}", expected=kinds, got="a file of another kind" if path.is_file() else name)
    return name, None, False


def _pretrained(name: str, source: str, gguf: str | None, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and, from the hub, the commit they came from."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import cached_file

    local = Path(source).is_dir()
    options: dict[str, Any] = {"revision": revision or "main", "local_files_only": local, **({"gguf_file": gguf} if gguf else {})}
    options["trust_remote_code"] = False  # left open, transformers asks on the terminal whether to run a host's own code
    config: str | None = None
    try:
        with _quiet(local):
            if not gguf:
                with suppress(OSError):  # of which the tokenizer says more
                    config = cached_file(source, "config.json", revision=options["revision"])
            if config:
                host_files.check_config(name, Path(config))
            if local and name != BUILT_IN:
                with torch.device("meta"):
                    described = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **options), trust_remote_code=False)
                host_files.check_size(name, described, [Path(source) / gguf] if gguf else fingerprints.weight_files(Path(source)))
            tokenizer = kept_tokenizer.load(source, gguf) if local else AutoTokenizer.from_pretrained(source, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
            model, info = loaded
    except HostError:
        raise
    except Exception as error:  # the loaders raise nearly everything: OSError, ValueError, KeyError, SafetensorError ...
        raise (host_files.code_refused(name, error) or _load_error(name, revision, error)) from error
    lacking = sorted(str(key) for key in info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise HostError(f"host {name} is incomplete", expected="all of its weights", got=f"none for {', '.join(lacking[:3])}{more}")
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", "" if local else str(config))
    return model, tokenizer, commit.group(1) if commit else None


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Keep transformers from talking while it loads; its progress bars stay for downloads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if local and bars:
            logging.enable_progress_bar()


def _load_error(name: str, revision: str | None, error: BaseException) -> HostError:
    kinds, link = set[str](), error
    while link is not None:
        kinds.add(type(link).__name__)
        link = link.__cause__ or link.__context__
    mean = f"did you mean {nearest(name, KNOWN)}?"
    if "GatedRepoError" in kinds:
        return HostError(f"host {name} asks for permission", next=f"accept its terms at hf.co/{name} and set HF_TOKEN")
    if "RevisionNotFoundError" in kinds:
        return HostError(f"host {name} has no revision {revision}", expected="a branch, tag or commit of it")
    if "RepositoryNotFoundError" in kinds:
        return HostError(f"no host {name} on the Hugging Face hub (or it is private)", next=mean)
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"}:
        what = f"host {name} is not built in, not a local path and not cached, and the Hugging Face hub cannot be reached"
        return HostError(what, next=f"{mean} Otherwise go online once, or pass a folder or a .gguf file")
    return HostError(f"host {name} could not be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else kinds}")
