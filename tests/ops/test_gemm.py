"""Both float32 products give the same numbers, and the override chooses between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mxd.errors import ConfigError
from mxd.ops import gemm


@pytest.fixture(params=["mkl", "onednn"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MXD_GEMM", request.param)
    gemm.uses_onednn.cache_clear()
    yield request.param
    monkeypatch.undo()
    gemm.uses_onednn.cache_clear()


@pytest.mark.parametrize("shape", [(1, 3, 5), (17, 31, 13), (64, 48, 96)])
def test_linear_and_its_gradients_equal_float64(product: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    torch.manual_seed(0)
    leaves = [torch.randn(*s, requires_grad=True) for s in ((2, m, k), (n, k), (n,))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(2, m, n)
    out, right = gemm.linear(*leaves), torch.nn.functional.linear(*exact)  # pyright: ignore[reportArgumentType]
    out.backward(upstream)
    right.backward(upstream.double())
    assert ((out - right).norm() / right.norm()) < 1e-6
    for leaf, twin in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        assert (leaf.grad - twin.grad).norm() / twin.grad.norm() < 1e-6


def test_transposed_and_empty_operands(product: str) -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 3)
    assert torch.allclose(gemm.mm(a.t(), b), a.t() @ b, atol=1e-5)
    assert torch.allclose(gemm.linear(b, torch.randn(3, 4).t()), torch.nn.functional.linear(b, torch.zeros(4, 3))) is False
    assert gemm.linear(torch.empty(0, 3), torch.randn(4, 3)).shape == (0, 4)


def test_the_override_chooses_the_product(product: str) -> None:
    available = torch.backends.mkldnn.is_available()
    assert gemm.uses_onednn() is (product == "onednn" and available)


def test_other_dtypes_take_the_ordinary_product(product: str) -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(gemm.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_an_unknown_override_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXD_GEMM", "blas")
    gemm.uses_onednn.cache_clear()
    with pytest.raises(ConfigError, match=r"expected auto, mkl or onednn \| got blas"):
        gemm.uses_onednn()
    monkeypatch.undo()
    gemm.uses_onednn.cache_clear()


@pytest.mark.parametrize(("precision", "held"), [("tf32", "tf32"), ("fp32", "ieee")])
def test_on_cuda_a_product_has_its_precision_whatever_the_process_has(precision: str, held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        """Stands in for ``torch.backends.cuda.matmul``, which a CPU has no use for."""

        def __init__(self) -> None:
            self.seen = ["the process's own"]

        @property
        def fp32_precision(self) -> str:
            return self.seen[-1]

        @fp32_precision.setter
        def fp32_precision(self, value: str) -> None:
            self.seen.append(value)

    backend = Backend()
    monkeypatch.setattr(torch.backends.cuda, "matmul", backend)
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    assert torch.equal(gemm._cuda_mm(a, b, precision), a @ b)
    assert backend.seen == ["the process's own", held, "the process's own"]
    with pytest.raises(RuntimeError):
        gemm._cuda_mm(a, a, precision)
    assert backend.fp32_precision == "the process's own", "also after an error"
