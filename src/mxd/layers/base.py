"""What every sparse layer promises: the one interface the trainer, the evaluations and the host rely on.

Shapes: ``d_in`` is the width of what the layer reads, ``d_out`` of what it returns; leading dimensions are free.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import LayerError
from ..ops.settings import current
from ..ops.transpose import Plan


class Code(NamedTuple):
    """What a layer holds between reading and writing: the sparse units and, for some kinds, a dense hidden vector."""

    values: Float[Tensor, "*batch k"]
    """Activation of each active unit, after ReLU and TopK: never negative. ``k`` is 0 for the dense control."""
    indices: Int[Tensor, "*batch k"]
    """Which unit each value belongs to, int64, in no particular order."""
    hidden: Float[Tensor, "*batch d_hidden"] | None
    """The dense vector z of MxD and of the controls; None for transcoders and SAEs."""


class Output(NamedTuple):
    """What a layer returns."""

    y: Float[Tensor, "*batch d_out"]
    """The reconstruction of the host MLP's output."""
    code: Code
    """The code it was made from."""


class Units(NamedTuple):
    """The parameters that belong to single units, one row each."""

    weight: Float[Tensor, "n_units d_in"]
    """The gate's (encoder's) rows."""
    bias: Float[Tensor, " n_units"]
    """Its bias."""
    table: Float[Tensor, "n_units d_out"]
    """What the units write: C of MxD, W_dec of transcoders and SAEs."""


class SparseLayer(nn.Module, ABC):
    """A drop-in for a host's MLP: reads the MLP's input (or its output, see `reads`), returns its output.

    Class attributes:
        kind: the name used in options, folders and tables.
        reads: ``"input"`` if `forward` takes the MLP's input x, ``"output"`` if it takes the MLP's output y (SAE).
        is_control: True for the two controls, which have no claim to sparsity.
        unit: the word for one unit: ``"expert"``, ``"latent"``, or ``"none"``.
    """

    kind: str
    reads: Literal["input", "output"] = "input"
    is_control: bool = False
    unit: str = "latent"

    config: Any
    """The frozen dataclass that this layer was built from; `dataclasses.asdict` of it rebuilds the layer."""
    d_in: int
    d_out: int
    n_units: int
    """Number of experts or latents; 0 for the dense control."""
    k: int
    """Units active per token; 0 for the dense control."""

    @abstractmethod
    def _select(self, x: Tensor, k: int, plan: Plan) -> tuple[Tensor, Tensor]:
        """Values and indices [token, k] of the active units of x [token, d_in]."""

    def _dense(self, x: Tensor) -> Tensor | None:
        """The dense hidden vector of x [token, d_in], for kinds that have one."""
        return None

    def _encode(self, x: Tensor, k: int, plan: Plan) -> Code:
        return Code(*self._select(x, k, plan), self._dense(x))

    @abstractmethod
    def _decode(self, code: Code, x: Tensor | None, plan: Plan) -> Tensor:
        """The output [token, d_out] of a code whose tensors are [token, ..]; a hidden vector that is missing is made of x."""

    def units(self) -> Units | None:
        """The parameters of single units; None for a layer without units, or whose units share theirs."""
        return None

    def gates(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every linear map that scores come from: one, for most kinds."""
        units = self.units()
        return [] if units is None else [(units.weight, units.bias)]

    def gate_input(self, x: Tensor) -> Tensor:
        """What the gate multiplies, made from what the layer reads."""
        return x

    def unit_scale(self, code: Code, x: Tensor | None = None) -> Tensor | None:
        """What multiplies the sum of the units' table rows in the output [token, d_out]; None for 1."""
        return None

    def encode(self, x: Float[Tensor, "*batch d_in"], k: int | None = None) -> Code:
        """The code of x. `k` overrides the layer's own k for this call (random-K training).

        Raises:
            LayerError: x is not [.., d_in].
        """
        return _reshape_code(self._encode(self._flat(x), self._active(k), Plan()), x.shape[:-1])

    def decode(self, code: Code, x: Float[Tensor, "*batch d_in"] | None = None) -> Output:
        """The output made from `code`. A skip transcoder also needs `x`."""
        lead = code.values.shape[:-1]
        flat = _reshape_code(code, (lead.numel(),))
        y = self._decode(flat, None if x is None else self._flat(x), Plan())
        return Output(y.view(*lead, self.d_out), code)

    def forward(self, x: Float[Tensor, "*batch d_in"], k: int | None = None) -> Output:
        """`decode(encode(x), x)`, with the sorted index of the active pairs shared by all gradients.

        With ``Settings.recompute`` and gradients the code comes without its hidden vector, which is then never held whole.
        """
        flat, plan = self._flat(x), Plan()
        if current().recompute and torch.is_grad_enabled():
            code = Code(*self._select(flat, self._active(k), plan), None)
        else:
            code = self._encode(flat, self._active(k), plan)
        y = self._decode(code, flat, plan)
        return Output(y.view(*x.shape[:-1], self.d_out), _reshape_code(code, x.shape[:-1]))

    def _active(self, k: int | None) -> int:
        return self.k if k is None else max(1, min(k, self.n_units))

    def _flat(self, x: Tensor) -> Tensor:
        self._check_width(x)
        return x.reshape(-1, self.d_in)

    def budget(self) -> int:
        """Number of parameters, biases included, counted on the object."""
        return sum(p.numel() for p in self.parameters())

    def describe(self) -> dict[str, Any]:
        """``kind`` and the sizes: what a checkpoint stores to rebuild the layer."""
        return {"kind": self.kind, **dataclasses.asdict(self.config)}

    def _check_unit(self, n: int) -> int:
        if not 0 <= n < self.n_units:
            raise LayerError(
                f"no {self.unit} {n} in this {self.kind}",
                expected=f"a number from 0 to {self.n_units - 1}" if self.n_units else "a kind that has units",
                got=str(n),
            )
        return n

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise LayerError(
                f"wrong width for this {self.kind}",
                expected=f"[..., {self.d_in}]",
                got=str(list(x.shape)),
                next=f"pass the MLP's {self.reads}",
            )


def _reshape_code(code: Code, lead: Sequence[int]) -> Code:
    """`code` with other leading dimensions of the same number of tokens."""
    values, indices, hidden = code
    shape = (*lead, values.shape[-1])
    return Code(values.reshape(shape), indices.reshape(shape), None if hidden is None else hidden.reshape(*lead, hidden.shape[-1]))


def check_sizes(kind: str, n_units: int, k: int, **widths: int) -> None:
    """Raise `LayerError` unless 1 <= k <= n_units and every width is positive."""
    for name, width in widths.items():
        if width < 1:
            raise LayerError(f"{kind}: {name} must be positive", expected="at least 1", got=str(width))
    if n_units < 1:
        raise LayerError(f"{kind}: too few units", expected="at least 1", got=str(n_units), next="raise --budget")
    if not 1 <= k <= n_units:
        raise LayerError(
            f"{kind}: k must be between 1 and the number of units",
            expected=f"1 <= k <= {n_units}",
            got=f"k = {k}",
            next="lower --k or raise --budget",
        )


def no_units(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices of a layer without units: none."""
    shape = (*x.shape[:-1], 0)
    return x.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=x.device)
