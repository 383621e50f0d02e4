"""The ``.pt`` files of the paper's own code (github.com/james-oldfield/MxD): ``torch.save({"cfg": ..., "state_dict": ...})``, a pickle.

A pickle can run whatever its writer likes. Here nothing is run: the unpickler knows tensors, numbers, words and the one class of the
reference's options, of which it keeps the fields and none of the code, and refuses every other name before it is looked up. Sizes are
checked against the file before anything is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RunError
from ..layers import Sizes, SparseLayer, build

PICKLE_BYTES = 2**20
"""Of the pickle itself, which holds names and shapes and no numbers; the reference's takes a few thousand."""
CONFIG = ("sae_training.config", "LanguageModelSAERunnerConfig")
DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
}  # fmt: skip
"""Types of numbers that weights have, by the names of their storages."""
OPCODES = frozenset(
    {
        "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_TUPLE", "EMPTY_LIST", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINUNICODE",
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "BINPUT", "LONG_BINPUT", "BINGET",
        "LONG_BINGET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID",
    }
)  # fmt: skip
"""Of the pickle language, what protocol 2 writes such files with."""
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""φ by the reference's name and by ours."""


class Reference(NamedTuple):
    """What such a file holds."""

    options: dict[str, Any]
    """Fields of its configuration: numbers, words and None."""
    tensors: dict[str, Tensor]
    """Its weights by the reference's names, on the CPU."""


class _Storage(NamedTuple):
    """Numbers in the archive."""

    file: str
    dtype: torch.dtype
    size: int


class _Slice(NamedTuple):
    """A tensor that has not been read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Tensors (as `_Slice`), numbers, words and the reference's options; every other name is refused.

    What a name stands for is made anew for each file: a pickle can set attributes of whatever it gets hold of.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(_program(archive.read(f"{folder}/data.pkl"))), encoding="utf-8")
        self._path, self._archive, self._folder = path, archive, folder

        class Options:
            pass

        class Dict(dict[Any, Any]):
            pass

        self.options, self.dict = Options, Dict
        self._known: dict[tuple[str, str], Callable[..., Any]] = {
            CONFIG: Options,
            ("collections", "OrderedDict"): Dict,
            ("torch", "device"): lambda *_: None,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _slice(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda *args: args[0],
        }

    def find_class(self, module: str, name: str, /) -> Any:
        """What stands for a global name; nothing is imported."""
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and (name in DTYPES or isinstance(getattr(torch, name, None), torch.dtype)):
            return name
        raise RunError(
            f"{self._path} holds something else than weights",
            expected=f"tensors and {'.'.join(CONFIG)}",
            got=f"{module}.{name}"[:80],
            next="do not use this file",
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The storage that ("storage", its class, its file, a device, its size) names."""
        kind, name, file, _, size = pid
        if kind != "storage" or not isinstance(name, str) or name not in DTYPES or not isinstance(file, str) or type(size) is not int:
            raise ValueError("not a storage of floats")
        inside, dtype = f"{self._folder}/data/{file}", DTYPES[name]
        if size * dtype.itemsize != self._archive.getinfo(inside).file_size:
            raise ValueError(f"{size} numbers in {self._archive.getinfo(inside).file_size} bytes")
        return _Storage(inside, dtype, size)


def _program(data: bytes) -> bytes:
    """A pickle, if it keeps to what the reference's need.

    The notes that a pickle makes for later are numbered, and room is made for all numbers up to the largest: one of 2^32 would take
    32 GiB. What `torch.save` writes counts them.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES or (opcode.name.endswith("BINPUT") and int(argument or 0) > len(data)):
            raise ValueError(f"{opcode.name} {str(argument)[:20]} in a pickle")
    return data


def _slice(storage: Any, offset: Any, size: Any, stride: Any) -> _Slice:
    """What `torch._utils._rebuild_tensor_v2` is called with, checked."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without a storage or a shape")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 8 or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor whose shape is none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not 0 < math.prod(size) <= storage.size or last >= storage.size:
        raise ValueError(f"shape {size} from {storage.size} numbers")
    return _Slice(storage, offset, size, stride)


def read(path: str | Path) -> Reference:
    """What the file at `path` holds.

    Raises:
        RunError: it is no such file, it holds anything else than tensors and options, or sizes in it cannot be.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RunError(f"no file {path}", expected="a .pt file of the reference MxD")
    try:
        with zipfile.ZipFile(path) as archive:
            unpickler = _Unpickler(path, archive, _folder(path, archive))
            found = unpickler.load()
            options, slices = found["cfg"], found["state_dict"]
            if not isinstance(options, unpickler.options) or not isinstance(slices, unpickler.dict):
                raise ValueError(f"cfg {type(options).__name__}, state_dict {type(slices).__name__}")
            fields = {name: value for name, value in vars(options).items() if value is None or isinstance(value, (bool, int, float, str))}
            return Reference(fields, _tensors(archive, {name: one for name, one in dict.items(slices) if isinstance(one, _Slice)}))
    except RunError:
        raise
    except Exception as error:  # an unpickler raises what its input makes it raise
        got = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RunError(f"{path} cannot be read", expected="what the reference MxD saves", got=got, next="download it again") from None


def _tensors(archive: zipfile.ZipFile, slices: Mapping[str, _Slice]) -> dict[str, Tensor]:
    """The tensors, each with numbers of its own; storages are read once, and two tensors at most may share one (tied weights)."""
    files = [one.storage.file for one in slices.values()]
    if len(files) > 2 * len(set(files)):
        raise ValueError(f"{len(files)} tensors out of {len(set(files))} storages")
    data = {
        storage.file: torch.frombuffer(bytearray(archive.read(storage.file)), dtype=storage.dtype)
        for storage in {one.storage for one in slices.values()}
    }
    return {name: data[file.file].as_strided(size, stride, offset).clone() for name, (file, offset, size, stride) in slices.items()}


def _folder(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder of the archive that all its files lie in; they are stored, not compressed, so that none grows when it is read."""
    entries = archive.infolist()
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len(entries) > 10_000 or pickles[0].file_size > PICKLE_BYTES:
        raise ValueError(f"{len(pickles)} pickles among {len(entries)} files")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed files")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("files that overlap")
    return pickles[0].filename.removesuffix("/data.pkl")


def load(path: str | Path, *, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None) -> SparseLayer:
    """The layer of a reference file, float32, in evaluation mode.

    The reference trains on hosts whose layer norm is folded into the next weights: as it stands, the layer reads x̂, normalised without
    weight and bias. Given those of the norm in front of the host's MLP, w and β, it reads what the MLP reads, x = x̂ * w + β:
    G' = G / w, b_G' = b_G − G'β, and the encoder likewise. The mean over d_out, which the folding takes from what the MLP writes, does
    not come back; behind it a LayerNorm makes no difference, an RMSNorm does.

    Args:
        path: the ``.pt`` file.
        norm_weight: [d_in], w.
        norm_bias: [d_in], β; None where the norm has none.

    Raises:
        RunError: as `read`; a kind of layer that mxd does not have; or weights that do not fit together.
    """
    options, tensors = read(path)
    try:
        layer, state = _layer(options, tensors)
        layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RunError(f"the weights in {path} do not fit its options", expected="those of a reference MxD", got=got) from None
    if norm_weight is not None:
        _unfold(layer, norm_weight.float(), None if norm_bias is None else norm_bias.float())
    return layer.eval().requires_grad_(False)


def _layer(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[SparseLayer, dict[str, Tensor]]:
    """A layer of the file's kind and sizes, and its weights under our names."""
    conditional, skip, transcoder = (bool(options[name]) for name in ("use_conditional", "use_skip", "is_transcoder"))
    phi, glu = ACTIVATIONS.get(options["mlp_activation_fn"]), bool(options["use_glu"])
    kind = "mxd" if conditional else "topk-sae" if not transcoder else "skip-transcoder" if skip else "transcoder"
    d_in, d_hidden = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    units = tensors["gate"].shape[0] if conditional else d_hidden
    k = options["topk"] if options["topk"] > 0 else units
    if phi is None or (conditional and (skip or not transcoder)) or (not conditional and (glu or phi != "relu")):
        raise ValueError(f"a {kind} with {options['mlp_activation_fn']}{', glu' * glu}{', skip' * skip}, which mxd does not have")
    bias = tensors["b_dec_out" if transcoder else "b_dec"]
    if conditional:
        state = {
            "encoder.E": tensors["W_enc"], "encoder.b_E": tensors["b_enc"], "D": tensors["W_dec"], "b": bias,
            "G": tensors["gate"], "b_G": tensors["gate_bias"], "C": tensors["W_cond"].t(),
        }  # fmt: skip
        if glu:  # the reference's φ is on W_enc, ours on E_gate
            state |= {"encoder.E_gate": state["encoder.E"], "encoder.b_gate": state["encoder.b_E"]}
            state |= {"encoder.E": tensors["W_glu.weight"].t(), "encoder.b_E": tensors["W_glu.bias"]}
    else:
        state = {"W_enc": tensors["W_enc"].t(), "b_enc": tensors["b_enc"], "W_dec": tensors["W_dec"], "b_dec": bias}
        state |= {"W_skip": tensors["W_skip.weight"]} if skip else {}
    return build(kind, Sizes(d_in, d_out, units, k, d_hidden, phi, glu)), state


@torch.no_grad()
def _unfold(layer: SparseLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Make everything that reads x̂ read x̂ * weight + bias: matrices along d_in, and the bias that belongs to each."""
    names = {"G": "b_G", "W_enc": "b_enc", "W_skip": "b_dec", "encoder.E": "encoder.b_E", "encoder.E_gate": "encoder.b_gate"}
    parameters = dict(layer.named_parameters())
    for matrix, offset in names.items():
        if parameters.get(matrix) is None:
            continue
        rows = parameters[matrix].t() if matrix.startswith("encoder") else parameters[matrix]
        rows /= weight
        if bias is not None:
            parameters[offset].sub_(rows @ bias)
