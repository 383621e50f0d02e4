"""The ``.pt`` files of the paper's own code (github.com/james-oldfield/MxD): ``torch.save({"cfg": ..., "state_dict": ...})``, a pickle.

A pickle is a program that can do whatever its writer likes. Python's unpickler is not used here: the few instructions that such files
need are carried out by `_Machine`, which knows tensors, numbers, words and the one class of the reference's options, of which it keeps the
fields; any other name, and any other instruction, ends it. Sizes are compared with the file before anything is allocated.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RunError
from ..layers import Sizes, SparseLayer, build

PICKLE_BYTES = 2**20
"""Of the pickle itself, which holds names and shapes and no numbers; the reference's takes a few thousand."""
CONFIG = ("sae_training.config", "LanguageModelSAERunnerConfig")
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
}  # fmt: skip
"""Types of numbers that weights have, by the names of their storages."""
DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
"""Types of numbers that options name."""
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


class _Name(NamedTuple):
    """A name that the pickle calls."""

    module: str
    name: str


class _Options:
    """An object of the reference's configuration class."""

    fields: Mapping[Any, Any] = MappingProxyType({})


class _Machine:
    """Carries out a pickle's program, as far as it makes tensors, numbers, words and the reference's options out of what is in it.

    Python's own unpickler cannot be kept from copying dicts, hashing tuples of tuples or making room for 2^32 notes; here each instruction
    takes as little as it looks, and none calls anything.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        self._path, self._archive, self._folder = path, archive, folder
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._notes: dict[int, Any] = {}

    def run(self) -> Any:
        """What the program makes."""
        for opcode, argument, _ in pickletools.genops(self._archive.read(f"{self._folder}/data.pkl")):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in PUSHED:
                self._stack.append(argument)
            elif name in CONSTANTS:
                self._stack.append(CONSTANTS[name])
            elif name in EMPTY:
                self._stack.append(EMPTY[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._notes[int(str(argument))] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._notes[int(str(argument))])
            elif name == "MARK":
                self._marks.append(len(self._stack))
            elif name == "GLOBAL":
                self._stack.append(self._known(str(argument)))
            elif name in MAKERS:
                MAKERS[name](self)
            elif name != "PROTO":
                raise ValueError(f"{name} in a pickle")

    def _take(self, number: int | None = None) -> list[Any]:
        """The last `number` values, or those behind the last mark, off the stack."""
        start = self._marks.pop() if number is None else len(self._stack) - number
        if start < 0:
            raise ValueError("a pickle that takes what it has not made")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _known(self, argument: str) -> Any:
        module, _, name = argument.partition(" ")
        found = _Name(module, name)
        if found in KNOWN:
            return found
        if module == "torch" and (name in STORAGES or name in DTYPES):
            return name
        raise RunError(
            f"{self._path} holds something else than weights",
            expected=f"tensors and {'.'.join(CONFIG)}",
            got=f"{module}.{name}"[:80],
            next="do not use this file",
        )

    def tuple_of(self, number: int | None = None) -> None:
        """TUPLE…: the last values as one."""
        self._stack.append(tuple(self._take(number)))

    def append(self, number: int | None = None) -> None:
        """APPEND, APPENDS: values to a list."""
        values = self._take(number)
        if not isinstance(self._stack[-1], list):
            raise ValueError("values added to something else than a list")
        self._stack[-1].extend(values)

    def set_items(self, number: int | None = None) -> None:
        """SETITEM, SETITEMS: keys, which are words or numbers, and values to a dict."""
        items = self._take(number)
        if not isinstance(self._stack[-1], dict) or any(type(key) not in (str, int) for key in items[::2]) or len(items) % 2:
            raise ValueError("keys that are neither words nor numbers, or nothing to put them in")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def call(self) -> None:
        """REDUCE, NEWOBJ: what a known name makes of arguments."""
        name, arguments = self._take(2)
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that has no name")
        self._stack.append(KNOWN[name](*arguments))

    def build(self) -> None:
        """BUILD: the fields of the options; what else an OrderedDict says of itself is left out."""
        (state,) = self._take(1)
        made = self._stack[-1]
        if isinstance(made, _Options) and isinstance(state, dict):
            made.fields = state  # not a copy: a program can ask for many
        elif not isinstance(made, dict):
            raise ValueError("fields of something else than options")

    def persistent(self) -> None:
        """BINPERSID: the storage that ("storage", its class, its file, a device, its size) names."""
        (pid,) = self._take(1)
        kind, name, file, _, size = pid
        if kind != "storage" or not isinstance(name, str) or name not in STORAGES or not isinstance(file, str) or type(size) is not int:
            raise ValueError("not a storage of floats")
        inside, dtype = f"{self._folder}/data/{file}", STORAGES[name]
        if size * dtype.itemsize != self._archive.getinfo(inside).file_size:
            raise ValueError(f"{size} numbers in {self._archive.getinfo(inside).file_size} bytes")
        self._stack.append(_Storage(inside, dtype, size))


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


PUSHED = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
MAKERS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": _Machine.tuple_of, **{f"TUPLE{n}": partial(_Machine.tuple_of, number=n) for n in (1, 2, 3)},
    "APPENDS": _Machine.append, "APPEND": partial(_Machine.append, number=1),
    "SETITEMS": _Machine.set_items, "SETITEM": partial(_Machine.set_items, number=2),
    "REDUCE": _Machine.call, "NEWOBJ": _Machine.call, "BUILD": _Machine.build, "BINPERSID": _Machine.persistent,
}  # fmt: skip
"""Of the pickle language, what protocol 2 writes such files with."""
KNOWN: dict[_Name, Callable[..., Any]] = {
    _Name(*CONFIG): _Options,
    _Name("collections", "OrderedDict"): lambda: {},
    _Name("torch", "device"): lambda *_: None,
    _Name("torch._utils", "_rebuild_tensor_v2"): lambda *args: _slice(*args[:4]),
    _Name("torch._utils", "_rebuild_parameter"): lambda *args: args[0],
}
"""What may be called, and what stands for it here."""


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
            found = _Machine(path, archive, _folder(path, archive)).run()
            options, slices = found["cfg"], found["state_dict"]
            if not isinstance(options, _Options) or not isinstance(slices, dict):
                raise ValueError(f"cfg {type(options).__name__}, state_dict {type(slices).__name__}")
            fields = {name: value for name, value in options.fields.items() if value is None or isinstance(value, (bool, int, float, str))}
            return Reference(fields, _tensors(archive, {name: one for name, one in slices.items() if isinstance(one, _Slice)}))
    except RunError:
        raise
    except Exception as error:  # zipfile and pickletools raise what their input makes them raise
        got = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RunError(f"{path} cannot be read", expected="what the reference MxD saves", got=got, next="download it again") from None


def _tensors(archive: zipfile.ZipFile, slices: Mapping[str, _Slice]) -> dict[str, Tensor]:
    """The tensors, each with numbers of its own; storages are read once, and two tensors at most may share one (tied weights)."""
    shared = Counter(one.storage.file for one in slices.values())
    if shared and max(shared.values()) > 2:
        raise ValueError(f"{max(shared.values())} tensors out of one storage")
    data = {
        storage: torch.frombuffer(bytearray(archive.read(storage.file)), dtype=storage.dtype)
        for storage in {one.storage for one in slices.values()}
    }
    return {name: data[one.storage].as_strided(one.size, one.stride, one.offset).clone() for name, one in slices.items()}


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
        layer.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, assign=True)
        if norm_weight is not None:
            _unfold(layer, norm_weight.float(), None if norm_bias is None else norm_bias.float())
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise RunError(f"the weights in {path} do not fit its options", expected="those of a reference MxD", got=got) from None
    return layer.eval().requires_grad_(False)


def _layer(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[SparseLayer, dict[str, Tensor]]:
    """A layer of the file's kind and sizes, and its weights under our names."""
    conditional, skip, transcoder = (bool(options[name]) for name in ("use_conditional", "use_skip", "is_transcoder"))
    phi, glu = ACTIVATIONS.get(options["mlp_activation_fn"]), bool(options["use_glu"])
    kind = "mxd" if conditional else "topk-sae" if not transcoder else "skip-transcoder" if skip else "transcoder"
    d_in, d_hidden = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    units = tensors["gate"].shape[0] if conditional else d_hidden
    if type(options["topk"]) is not int:
        raise ValueError(f"topk {options['topk']}")
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
    # Without memory: that is only taken by weights whose shapes fit together.
    return build(kind, Sizes(d_in, d_out, units, k, d_hidden, phi, glu), device="meta"), state


@torch.no_grad()
def _unfold(layer: SparseLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Make everything that reads x̂ read x̂ * weight + bias: matrices along d_in, and the bias that belongs to each."""
    if layer.reads == "output" or any(part is not None and part.shape != (layer.d_in,) for part in (weight, bias)):
        raise ValueError(f"a norm of {tuple(weight.shape)} in front of a {layer.kind} that reads {layer.d_in} of the {layer.reads}")
    names = {"G": "b_G", "W_enc": "b_enc", "W_skip": "b_dec", "encoder.E": "encoder.b_E", "encoder.E_gate": "encoder.b_gate"}
    parameters = dict(layer.named_parameters())
    for matrix, offset in names.items():
        if parameters.get(matrix) is None:
            continue
        rows = parameters[matrix].t() if matrix.startswith("encoder") else parameters[matrix]
        rows /= weight
        if bias is not None:
            parameters[offset].sub_(rows @ bias)
