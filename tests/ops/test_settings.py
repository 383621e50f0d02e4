"""The settings of the ops: what is refused, what holds for how long, and that a precision is a precision."""

from __future__ import annotations

import importlib

import pytest
import torch

from mxd.errors import ConfigError
from mxd.ops import Settings, backend, current, expert_mix, linear, topk_gate, using


def test_settings_hold_for_the_context_alone() -> None:
    before = current()
    with pytest.raises(RuntimeError, match="inside"), using(precision="bf16", scores_mib=1):
        assert (current().precision, current().scores_mib) == ("bf16", 1)
        raise RuntimeError("inside")
    assert current() is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, r"unknown precision \| expected .*fp32.* \| got fp16"),
        ({"backend": "tritn"}, r"unknown backend \| expected .*triton.* \| got tritn"),
        ({"gate": "fast"}, r"unknown gate"),
        ({"scores_mib": 0.0}, r"scores_mib must be positive .* got 0"),
        ({"scores_mib": float("nan")}, r"scores_mib must be positive"),
    ],
)
def test_unknown_values_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message), using(**change):
        pass


def test_tokens_at_once() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Settings(scores_mib=1).tokens_at_once(1024, cpu) == Settings(scores_mib=1).tokens_at_once(1024, gpu) == 256
    assert Settings(scores_mib=1e-6).tokens_at_once(10**6, cpu) == 1
    assert Settings().tokens_at_once(1024, gpu) == 16 * Settings().tokens_at_once(1024, cpu) == 131_072
    assert Settings().product(torch.device("cpu")) == "fp32"
    assert Settings(precision="auto").product(torch.device("cpu")) == "fp32"


def test_a_bf16_product_rounds_its_operands_forward_and_backward() -> None:
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(33, 64, requires_grad=True), torch.randn(17, 64, requires_grad=True), torch.randn(33, 17)
    bias = torch.randn(17, requires_grad=True)
    with using(precision="bf16"):
        out = linear(x, weight, bias)
    out.backward(upstream)  # outside of the context: the backward pass keeps the precision of its forward pass
    assert out.dtype == torch.float32 and x.grad is not None and weight.grad is not None and bias.grad is not None

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.detach().bfloat16().double()

    for found, right, exact in (
        (out - bias, rounded(x) @ rounded(weight).t(), x.double() @ weight.double().t()),
        (x.grad, rounded(upstream) @ rounded(weight), upstream.double() @ weight.double()),
        (weight.grad, rounded(upstream).t() @ rounded(x), upstream.double().t() @ x.double()),
    ):
        assert (found - right).norm() / right.norm() < 3e-3, "one rounding of the result, no more"
        assert (found - exact).norm() / exact.norm() > 5e-4, "it is not the float32 product"
    assert torch.allclose(bias.grad, upstream.sum(0))


def test_the_backend_decides_which_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 3), torch.randn(5, 3), torch.zeros(5)
    ran: list[str] = []
    for name in ("eager", "triton"):
        module = importlib.import_module(f"mxd.ops.topk_gate.{name}")
        monkeypatch.setattr(module, "topk_gate", lambda *args, name=name: ran.append(name))
        module = importlib.import_module(f"mxd.ops.expert_mix.{name}")
        monkeypatch.setattr(module, "expert_mix", lambda *args, name=name: ran.append(name))
    for name in ("eager", "triton", "auto"):
        with using(backend=name):
            topk_gate(x, weight, bias, 1)
            expert_mix(x[:, :1], torch.zeros(2, 1, dtype=torch.int64), weight)
    assert ran == ["eager", "eager", "triton", "triton", "eager", "eager"], "auto is eager on the CPU"
    assert backend.takes_triton(torch.device("cuda")), "and Triton on a GPU"


def test_triton_asked_for_and_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert not backend.takes_triton(torch.device("cuda"))
    with using(backend="triton"), pytest.raises(ConfigError, match="backend triton needs the triton package"):
        topk_gate(torch.randn(2, 3), torch.randn(5, 3), torch.zeros(5), 1)
