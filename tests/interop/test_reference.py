"""The reference's files: written as it writes them, by a class of its name, and by people who mean harm."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mxd
from mxd.errors import MxdError, RunError
from mxd.interop import reference
from tests.reliability.figures import note

D, H, N, K = 6, 9, 12, 3


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes what stands under "cfg": an object of a class that is not there when the file is read."""
    module = types.ModuleType("sae_training.config")

    class LanguageModelSAERunnerConfig:
        pass

    LanguageModelSAERunnerConfig.__module__, LanguageModelSAERunnerConfig.__qualname__ = reference.CONFIG
    module.LanguageModelSAERunnerConfig = LanguageModelSAERunnerConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
    monkeypatch.setitem(sys.modules, "sae_training.config", module)

    def make(**options: Any) -> Any:
        made = LanguageModelSAERunnerConfig()
        usual = {
            "use_conditional": True, "use_skip": False, "is_transcoder": True, "use_glu": False, "mlp_activation_fn": "relu", "topk": K,
            "d_in": D, "dtype": torch.float32, "device": torch.device("cpu"), "hook_point": "blocks.1.ln2.hook_normalized", "lr": 1e-3,
        }  # fmt: skip
        vars(made).update(usual | options)
        return made

    yield make


def tensors(*, conditional: bool = True, glu: bool = False, skip: bool = False, transcoder: bool = True) -> dict[str, Tensor]:
    """Random weights in the reference's names and shapes."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, H), "b_enc": (H,), "W_dec": (H, D), "b_dec": (D,)}
    shapes |= {"b_dec_out": (D,)} if transcoder else {}
    shapes |= {"gate": (N, D), "gate_bias": (N,), "W_cond": (D, N)} if conditional else {}
    shapes |= {"W_glu.weight": (H, D), "W_glu.bias": (H,)} if glu else {}
    shapes |= {"W_skip.weight": (D, D)} if skip else {}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def expected(w: dict[str, Tensor], x: Tensor, phi: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """What the reference computes, out of the paper's equations in its names."""

    def largest(a: Tensor) -> Tensor:
        return torch.zeros_like(a).scatter(1, a.topk(K).indices, a.topk(K).values)

    z = phi((x if "b_dec_out" in w else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    if "W_glu.weight" in w:
        z = z * (x @ w["W_glu.weight"].t() + w["W_glu.bias"])
    modulation = largest(F.relu(x @ w["gate"].t() + w["gate_bias"])) @ w["W_cond"].t() if "gate" in w else 1
    y = modulation * ((z if "gate" in w else largest(z)) @ w["W_dec"])
    return y + w.get("b_dec_out", w["b_dec"]) + (x @ w["W_skip.weight"].t() if "W_skip.weight" in w else 0)


def save(path: Path, cfg: Any, weights: dict[str, Tensor]) -> Path:
    state = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as nn.Module.state_dict has it
    torch.save({"cfg": cfg, "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "options", "phi"),
    [
        ("mxd", {}, F.relu),
        ("mxd", {"mlp_activation_fn": "gelu"}, F.gelu),
        ("mxd", {"mlp_activation_fn": "gelu_pytorch_tanh", "use_glu": True}, lambda u: F.gelu(u, approximate="tanh")),
        ("transcoder", {"use_conditional": False}, F.relu),
        ("skip-transcoder", {"use_conditional": False, "use_skip": True}, F.relu),
        ("topk-sae", {"use_conditional": False, "is_transcoder": False}, F.relu),
    ],
)
def test_each_kind_computes_what_the_reference_computes(
    config: Callable[..., Any], tmp_path: Path, kind: str, options: dict[str, Any], phi: Callable[[Tensor], Tensor]
) -> None:
    flags = {name.removeprefix("use_").removeprefix("is_"): value for name, value in options.items() if isinstance(value, bool)}
    weights = tensors(**flags)
    layer = reference.load(save(tmp_path / "layer.pt", config(**options), weights))
    x = torch.randn(20, D)
    assert torch.equal(mxd.load(tmp_path / "layer.pt")(x).y, layer(x).y)
    assert layer.kind == kind and layer.k == K and not layer.training
    torch.testing.assert_close(layer(x).y, expected(weights, x, phi), rtol=1e-5, atol=1e-5)


def test_what_is_read_is_what_was_written(config: Callable[..., Any], tmp_path: Path) -> None:
    weights = tensors()
    weights["gate"] = weights["W_cond"].t()  # tied, as the reference's transposed start leaves them
    weights["W_dec"] = weights["W_dec"].half()
    found = reference.read(save(tmp_path / "layer.pt", config(dataset=None), weights))
    assert found.tensors.keys() == weights.keys() and all(torch.equal(found.tensors[name], weights[name]) for name in weights)
    assert (
        found.options["hook_point"] == "blocks.1.ln2.hook_normalized" and found.options["lr"] == 1e-3 and found.options["dataset"] is None
    )
    assert "torch" not in found.options and found.options["use_conditional"] is True and found.options["dataset"] is None


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_folded_norm_is_put_back(config: Callable[..., Any], tmp_path: Path, biased: bool, glu: bool) -> None:
    path = save(tmp_path / "layer.pt", config(use_glu=glu), tensors(glu=glu))
    weight, bias = torch.rand(D) + 0.5, torch.randn(D) if biased else None
    normalised = torch.randn(20, D)
    whole = reference.load(path, norm_weight=weight, norm_bias=bias)(normalised * weight + (bias if bias is not None else 0)).y
    torch.testing.assert_close(whole, reference.load(path)(normalised).y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_skip": True}, "a mxd with relu, skip, which mxd does not have"),
        ({"is_transcoder": False}, "do not fit"),
        ({"use_conditional": False, "mlp_activation_fn": "gelu"}, "a transcoder with gelu, which mxd does not have"),
        ({"mlp_activation_fn": "sigmoid"}, "sigmoid"),
        ({"topk": "many"}, "do not fit"),
        ({"use_glu": True}, "W_glu.weight"),
    ],
)
def test_layers_that_are_none_of_ours_are_refused(config: Callable[..., Any], tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError, match=words):
        reference.load(save(tmp_path / "layer.pt", config(**options), tensors()))


class _Runs:
    """Whoever unpickles this calls something."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def malicious(mark: Path) -> list[Any]:
    return [
        _Runs(os.system, f"touch {mark}"),
        _Runs(eval, f"open({str(mark)!r}, 'w')"),
        _Runs(exec, f"open({str(mark)!r}, 'w')"),
        _Runs(open, str(mark), "w"),
        _Runs(getattr, "", "join"),
        _Runs(__import__, "os"),
        _Runs(bytearray, 2**45),
        _Runs(torch.hub.load, "x", "y"),
        _Runs(torch.load, str(mark)),
        _Runs(torch.empty, 2**45),
        Path(mark),
    ]


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("place", ["cfg", "state_dict", "inside", "option"])
def test_what_a_pickle_may_not_do_it_does_not(config: Callable[..., Any], tmp_path: Path, number: int, place: str) -> None:
    mark = tmp_path / "ran"
    evil = malicious(mark)[number]
    cfg, weights = config(), tensors()
    if place == "option":
        cfg.extra = evil
    saved: dict[str, Any] = {"cfg": cfg, "state_dict": {**weights, "b_dec": evil} if place == "inside" else weights}
    if place in saved:
        saved[place] = evil
    torch.save(saved, tmp_path / "layer.pt")
    with pytest.raises(RunError, match=r"holds something else than weights .* do not use this file"):
        reference.read(tmp_path / "layer.pt")
    assert not mark.exists()


def test_a_malicious_sample_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Runs(os.system, f"touch {tmp_path / 'ran'}")))
    assert (tmp_path / "ran").exists()


def build(path: Path, program: bytes, *, storage: bytes = bytes(64), compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("layer/data.pkl", program)
        archive.writestr("layer/data/0", storage)
    return path


def call(module: str, name: str, arguments: bytes) -> bytes:
    """Opcodes that call a name with a tuple of arguments."""
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
"""Opcodes that make the storage of 16 numbers in ``data/0``."""


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    pickled = [pickle.dumps(part, protocol=2)[2:-1] for part in (offset, size, stride)]
    body = STORAGE + b"".join(re.sub(rb"q[\x00-\x09]", b"", part) for part in pickled)  # without its notes for later
    return call("torch._utils", "_rebuild_tensor_v2", body)


def whole(one: bytes) -> bytes:
    """A file with that tensor as its only one."""
    options = b"csae_training.config\nLanguageModelSAERunnerConfig\n)\x81}X\x04\x00\x00\x00topkK\x03sb"
    state = b"ccollections\nOrderedDict\n)R" + b"X\x01\x00\x00\x00x" + one + b"s"
    return b"\x80\x02}(X\x03\x00\x00\x00cfg" + options + b"X\x0a\x00\x00\x00state_dict" + state + b"u."


def test_a_tensor_written_by_hand_is_read(tmp_path: Path) -> None:
    data = struct.pack("<16f", *range(16))
    found = reference.read(build(tmp_path / "a.pt", whole(tensor(2, (2, 3), (4, 1))), storage=data))
    assert found.options == {"topk": 3} and found.tensors["x"].tolist() == [[2, 3, 4], [6, 7, 8]]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (2**40, 2**40), (1, 1)),
        (0, (17,), (1,)),
        (1, (16,), (1,)),
        (0, (2, 2), (2**62, 1)),
        (0, (10**9,), (0,)),
        (-1, (2,), (1,)),
        (0, (-4,), (1,)),
        (0, (4,), (-1,)),
        (0, (0,), (1,)),
        (0, (4,), (1, 1)),
        (0, (1,) * 9, (1,) * 9),
    ],
)
def test_absurd_shapes_are_refused(tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        reference.read(build(tmp_path / "a.pt", whole(tensor(offset, size, stride))))


def test_archives_that_grow_or_are_none_are_refused(config: Callable[..., Any], tmp_path: Path) -> None:
    good = whole(tensor(0, (4,), (1,)))
    path = tmp_path / "a.pt"
    with pytest.raises(RunError, match="compressed files"):
        reference.read(build(path, good, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(RunError, match="1 pickles among"):
        reference.read(build(path, good + bytes(reference.PICKLE_BYTES)))
    with pytest.raises(RunError, match="16 numbers in 65 bytes"):
        reference.read(build(path, good, storage=bytes(65)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/weights", b"")
    with pytest.raises(RunError, match="0 pickles among 1 files"):
        reference.read(path)
    path.write_bytes(pickle.dumps({"cfg": None}))
    with pytest.raises(RunError, match=r"cannot be read .* not a zip file"):
        reference.read(path)
    with pytest.raises(RunError, match="no file"):
        reference.read(tmp_path / "none.pt")
    save(path, {"no": "class"}, tensors())
    with pytest.raises(RunError, match="cfg dict"):
        reference.read(path)


def test_tensors_cannot_multiply_one_storage(tmp_path: Path) -> None:
    once, name = whole(tensor(0, (16,), (1,))), b"X\x01\x00\x00\x00"
    start = once.index(name + b"x")
    twenty = b"".join(once[start:-2].replace(name + b"x", name + bytes([97 + i])) for i in range(20))
    repeated = once[:start] + twenty + b"u."
    with pytest.raises(RunError, match="20 tensors out of one storage"):
        reference.read(build(tmp_path / "a.pt", repeated))


def test_a_pickle_cannot_reach_into_the_reader(tmp_path: Path) -> None:
    """It sets attributes of all that it gets hold of; the next file is read as if nothing had been."""
    poison = b"\x80\x02csae_training.config\nLanguageModelSAERunnerConfig\nN}X\x0c\x00\x00\x00__setstate__ctorch\ndevice\ns\x86b."
    reach = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00ai\x31\x0asb."
    for program in (poison, reach):
        with pytest.raises(RunError, match="cannot be read"):
            reference.read(build(tmp_path / "a.pt", program))
        assert reference.read(build(tmp_path / "b.pt", whole(tensor(0, (4,), (1,))))).options == {"topk": 3}


DEEP = b"\x80\x02})" + b"\x85" * 900_000 + b"Ns."
"""A tuple 900,000 deep as a key: hashing it would end the process."""
DOUBLED = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00Ns."
"""A tuple of itself twice, sixty times over, as a key: hashing it would never end."""
COPIES = b"\x80\x02ccollections\nOrderedDict\nq\x00}q\x01" + b"h\x00h\x01\x85R0" * 1000 + b"."
"""An OrderedDict of another: each call would copy it."""
OPTIONS = (
    b"\x80\x02csae_training.config\nLanguageModelSAERunnerConfig\nq\x00}q\x01("
    + b"".join(b"M" + struct.pack("<H", number) + b"N" for number in range(65_536))
    + b"u0"
    + b"h\x00)\x81h\x01b" * 5_000
    + b"."
)
"""Many objects with the fields of one dict: 13 GB, if each had a copy."""
NOTES = b"\x80\x02}r\xff\xff\xff\xff."
"""A note with a number that Python's unpickler makes 32 GiB of room for."""


@pytest.mark.parametrize(
    "program", [DEEP, DOUBLED, COPIES, OPTIONS, NOTES, b"\x80\x02t.", b"\x80\x02R.", b"\x80\x02N.", b"\x80\x02h\x09.", b""]
)
def test_programs_that_hang_crash_or_fill_the_memory_of_others(tmp_path: Path, program: bytes) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RunError, match="cannot be read"):
        reference.read(build(tmp_path / "a.pt", program))
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "less than a GiB more, in KiB"


def test_a_name_is_refused_without_being_looked_up(tmp_path: Path) -> None:
    """torch imports some of its modules when they are asked for."""
    path = build(tmp_path / "a.pt", b"\x80\x02ctorch\n_dynamo\n.")
    program = "import sys; from mxd.interop import reference\ntry: reference.read(sys.argv[1])\nexcept Exception as e: print(e)\n"
    program += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "got torch._dynamo | next: do not use this file\nFalse\n" in done.stdout


def test_sizes_that_do_not_fit_together_take_no_memory(config: Callable[..., Any], tmp_path: Path) -> None:
    """From a wide encoder and many experts, a layer of 1.6 TB would follow."""
    weights = tensors() | {"W_enc": torch.zeros(400_000, 1), "gate": torch.zeros(1_000_000, 1)}
    with pytest.raises(RunError, match="do not fit its options"):
        reference.load(save(tmp_path / "a.pt", config(), weights))


@pytest.mark.parametrize(
    ("weights", "options", "norm"),
    [
        ({"W_dec": torch.zeros(9)}, {}, None),
        ({"gate": torch.tensor(1.0)}, {}, None),
        ({}, {"topk": 2.5}, None),
        ({}, {}, torch.ones(1)),
        ({}, {}, torch.ones(D + 1)),
        ({}, {"is_transcoder": False, "use_conditional": False}, torch.ones(D)),
    ],
)
def test_weights_and_norms_of_other_shapes_are_one_line(
    config: Callable[..., Any], tmp_path: Path, weights: dict[str, Tensor], options: dict[str, Any], norm: Tensor | None
) -> None:
    path = save(tmp_path / "a.pt", config(**options), tensors(conditional=options.get("use_conditional", True)) | weights)
    with pytest.raises(RunError, match="do not fit its options") as error:
        reference.load(path, norm_weight=norm)
    with pytest.raises(RunError, match="do not fit its options"):
        reference.load(path, norm_weight=torch.ones(D), norm_bias=torch.ones(D + 1))
    assert len(str(error.value).splitlines()) == 1


def fuzz(data: bytes, inputs: int, dice: random.Random, path: Path) -> None:
    for _ in range(inputs):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 6)):
            place = dice.randrange(len(changed))
            if dice.random() < 0.7:
                changed[place] = dice.randrange(256)
            else:
                del changed[place : place + dice.randint(1, 40)]
        build(path, bytes(changed))
        try:
            reference.read(path)
        except MxdError as error:
            assert len(str(error).splitlines()) == 1


def programs(config: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"cfg": config(), "state_dict": tensors()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def test_pickles_of_any_bytes(config: Callable[..., Any], tmp_path: Path) -> None:
    fuzz(programs(config), 400, random.Random(0), tmp_path / "a.pt")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pickles_of_any_bytes_many(config: Callable[..., Any], tmp_path: Path) -> None:
    fuzz(programs(config), 30_000, random.Random(1), tmp_path / "a.pt")
    note("pickles of other bytes", inputs=30_000, crashes=0)
