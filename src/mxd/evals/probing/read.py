"""What the probes read: labelled texts through the host, and per text the mean of what a unit received, or did, over its tokens.

Scores before ReLU and TopK are linear in the gate's input, so their mean over a text is the gate of the mean input: exact, and all that
has to be kept of a text is one vector. Sparse codes are not; every token goes through the layer once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from ...labelled import Sample, Task
from ...layers import SparseLayer
from ...layers.encoder import ACTIVATIONS

if TYPE_CHECKING:
    from ...host import Host

TOKENS = 128
"""Tokens of a text that the host reads, BOS apart (published protocol: 128 with BOS)."""
LEAST_TOKENS = 5
"""Shorter texts are left out (published code)."""
TOKENS_PER_READ = 8192
"""Tokens, padding included, that the host reads at once."""
KEPT_BYTES = 2_500_000_000
"""Activations of single tokens are kept for the next student up to this size; above, the host reads again."""

Array = NDArray[np.float64]
Side = Literal["input", "output"]


class Piece(NamedTuple):
    """A text as the host reads it."""

    ids: tuple[int, ...]
    """Token ids, BOS first where the tokenizer has one."""
    begin: int
    """First position that counts."""
    end: int
    """The position behind the last one that counts."""


def piece_of(host: Host, task: Task, sample: Sample, *, paper: bool) -> Piece | None:
    """The tokens of a sample and those of them that count; None when there are too few.

    Ours: BOS and 128 tokens of text; the first position does not count (its norm, tens of times that of any other, would drown the
    rest). `paper`, as in the published code: BOS and 127 tokens, of which BOS and the last do not count. Token-level tasks: the tokens
    of the span, the text cut behind them.
    """
    bos = host.tokenizer.bos_token_id
    head = () if bos is None else (int(bos),)
    room = min(TOKENS - (len(head) if paper else 0), (host.max_tokens or TOKENS + 1) - len(head))
    if sample.span is not None:
        ids = host.encode(sample.text[: sample.span[1]])
        own = max(1, len(ids) - len(host.encode(sample.text[: sample.span[0]].rstrip())))
    else:
        ids, own = host.encode(sample.text), 0
    if len(ids) < LEAST_TOKENS:
        return None
    ids = ids[-room:] if task.keep == "last" else ids[:room]
    whole = (*head, *ids)
    if own:
        return Piece(whole, max(1, len(whole) - own), len(whole))
    return Piece(whole, 1, len(whole) - 1 if paper else len(whole))


class Reading:
    """Every distinct piece once: what the host's MLP at one hookpoint received and returned there.

    Attributes:
        x, y: mean input and output of the MLP over the tokens that count, float64 [piece, d].
        neurons: mean of the MLP's own hidden vector over them, float64 [piece, d_hidden].
    """

    def __init__(
        self, host: Host, hookpoint: str, pieces: Sequence[Piece], sides: Sequence[Side], say: Callable[[float], None] | None = None
    ) -> None:
        """
        Args:
            host, hookpoint: the MLP.
            pieces: what to read; those that are there twice are read once.
            sides: which of input and output will be asked for token by token (`tokens`).
            say: called with the share that is read.
        """
        self.host, self.hookpoint, self.sides = host, hookpoint, sides
        self.pieces = list(dict.fromkeys(pieces))
        self.row = {piece: row for row, piece in enumerate(self.pieces)}
        self._batches = list(_batches(self.pieces))
        site, counted = host.site(hookpoint), sum(p.end - p.begin for p in self.pieces)
        self._keep = 4 * counted * sum(site.d_in if side == "input" else site.d_out for side in sides) <= KEPT_BYTES
        self._kept: dict[Side, list[Tensor]] = {side: [] for side in sides}
        weights = host.weights(hookpoint)
        phi = ACTIVATIONS[site.activation]
        n = len(self.pieces)
        self.x, self.y, self.neurons = (np.zeros((n, d)) for d in (site.d_in, site.d_out, site.d_hidden))
        for number, rows in enumerate(self._batches):
            given = dict(zip(("input", "output"), self._read(rows), strict=True))
            of = self._of(rows)
            hidden = F.linear(given["input"], weights.E.t(), weights.b_E)
            if weights.E_gate is not None:
                hidden = phi(F.linear(given["input"], weights.E_gate.t(), weights.b_gate)) * hidden
            else:
                hidden = phi(hidden)
            for store, values in ((self.x, given["input"]), (self.y, given["output"]), (self.neurons, hidden)):
                store[rows] = _means(values, of, len(rows))
            for side in sides if self._keep else ():
                self._kept[side].append(given[side])
            if say is not None:
                say((number + 1) / len(self._batches))

    def tokens(self, side: Side) -> Iterator[tuple[NDArray[np.int64], Float[Tensor, "token d"]]]:
        """All tokens that count, some at a time: the row of each, and what the MLP received (or returned) there."""
        for number, rows in enumerate(self._batches):
            of = np.asarray(rows)[self._of(rows).numpy()]
            if self._keep and side in self._kept:
                yield of, self._kept[side][number]
            else:
                yield of, self._read(rows)[side == "output"]

    def mean(self, side: Side) -> Float64[np.ndarray, "piece d"]:
        """`x` or `y`."""
        return self.x if side == "input" else self.y

    def _of(self, rows: Sequence[int]) -> Int64[Tensor, " token"]:
        """For every token of a batch that counts, which of the batch's pieces it belongs to."""
        lengths = torch.tensor([self.pieces[row].end - self.pieces[row].begin for row in rows])
        return torch.arange(len(rows)).repeat_interleave(lengths)

    def _read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Input and output at the tokens that count. Padding stands on the right, where a causal model does not see it."""
        ids = torch.zeros(len(rows), max(len(self.pieces[row].ids) for row in rows), dtype=torch.int64)
        counts = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            piece = self.pieces[row]
            ids[i, : len(piece.ids)] = torch.tensor(piece.ids)
            counts[i, piece.begin : piece.end] = True
        found = self.host.read(ids, [self.hookpoint])[self.hookpoint]
        where = counts.to(found.x.device)
        return found.x[where], found.y[where]


def _batches(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Numbers of pieces of about the same length, as many as fill `TOKENS_PER_READ`."""
    batch: list[int] = []
    for row in sorted(range(len(pieces)), key=lambda i: (-len(pieces[i].ids), i)):
        if batch and (len(batch) + 1) * len(pieces[batch[0]].ids) > TOKENS_PER_READ:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _means(values: Float[Tensor, "token d"], of: Int64[Tensor, " token"], n: int) -> Array:
    sums = torch.zeros(n, values.shape[1], dtype=torch.float64).index_add_(0, of, values.double().cpu())
    return (sums / torch.bincount(of, minlength=n)[:, None]).numpy()


class Dense:
    """Features that are there as a matrix [sample, unit]."""

    def __init__(self, values: Float64[np.ndarray, "sample n_units"]) -> None:
        self.values, self.n_units = values, values.shape[1]

    def means(self, rows: Int64[np.ndarray, " row"]) -> Float64[np.ndarray, " n_units"]:
        return self.values[rows].mean(0)

    def columns(self, rows: Int64[np.ndarray, " row"], units: Int64[np.ndarray, " unit"]) -> Float64[np.ndarray, "row unit"]:
        return self.values[np.ix_(rows, units)]


class Linear:
    """Scores of a linear gate: of one map, or, for product keys, the sums u_i + v_j of two, unit i n + j."""

    def __init__(self, inputs: Float64[np.ndarray, "sample d"], gates: Sequence[tuple[Array, Array]]) -> None:
        """
        Args:
            inputs: what the gate multiplies, mean over the text.
            gates: weight [row, d] and bias of one map, or of two.
        """
        self.inputs, self.gates = inputs, gates
        self.n_units = int(np.prod([len(weight) for weight, _ in gates]))

    def means(self, rows: Int64[np.ndarray, " row"]) -> Float64[np.ndarray, " n_units"]:
        mean = self.inputs[rows].mean(0)
        first, *rest = [weight @ mean + bias for weight, bias in self.gates]
        return first if not rest else (first[:, None] + rest[0]).ravel()

    def columns(self, rows: Int64[np.ndarray, " row"], units: Int64[np.ndarray, " unit"]) -> Float64[np.ndarray, "row unit"]:
        index = [units] if len(self.gates) == 1 else np.divmod(units, len(self.gates[1][0]))
        parts = [self.inputs[rows] @ w[i].T + b[i] for (w, b), i in zip(self.gates, index, strict=True)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Codes:
    """Mean sparse codes, kept sparse.

    Attributes:
        l0: mean number of units active at a token.
    """

    def __init__(self, values: sparse.csr_array, l0: float = 0.0) -> None:
        self.values, self.n_units, self.l0 = values, cast("tuple[int, int]", values.shape)[1], l0
        self._by_unit = values.tocsc()

    def means(self, rows: Int64[np.ndarray, " row"]) -> Float64[np.ndarray, " n_units"]:
        return np.asarray(self.values[rows].sum(0)).ravel() / len(rows)

    def columns(self, rows: Int64[np.ndarray, " row"], units: Int64[np.ndarray, " unit"]) -> Float64[np.ndarray, "row unit"]:
        return self._by_unit[:, units].toarray()[rows]


def scores(layer: SparseLayer, mean: Float64[np.ndarray, "sample d_in"]) -> Linear | None:
    """The mean scores of a layer's units before ReLU and TopK; None for a layer that does not say where its scores come from, or whose
    gate is not linear in what it reads."""
    like = next(layer.parameters())

    def given(x: Array) -> Tensor:
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)

    gates = [(w.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()) for w, b in layer.gates()]
    if len(gates) not in (1, 2) or int(np.prod([len(w) for w, _ in gates])) != layer.n_units:
        return None
    with torch.no_grad():
        ends, middle = layer.gate_input(given(mean[[0, -1]])), layer.gate_input(given(mean[[0, -1]].mean(0, keepdims=True)))
        if not torch.allclose(ends.mean(0, keepdim=True), middle, rtol=1e-3, atol=1e-4):
            return None
        return Linear(layer.gate_input(given(mean)).double().cpu().numpy(), gates)


def codes(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    reading: Reading,
    side: Side,
    n_units: int,
    say: Callable[[float], None] | None = None,
) -> Codes:
    """The mean code of every piece.

    Args:
        encode: values and indices [token, k] of the active units of what the MLP received or returned [token, d].
        reading, side: the tokens.
        n_units: number of units.
        say: called with the share that is done.
    """
    total = sparse.csr_array((len(reading.pieces), n_units), dtype=np.float64)
    lengths = np.array([piece.end - piece.begin for piece in reading.pieces])
    done = active = 0
    parts: list[sparse.coo_array] = []
    for of, tokens in reading.tokens(side):
        with torch.no_grad():
            values, indices = encode(tokens)
        active += int((values > 0).sum())
        value = values.double().cpu().numpy() / lengths[of][:, None]
        rows = np.repeat(of, value.shape[1])
        made = sparse.coo_array((value.ravel(), (rows, indices.cpu().numpy().ravel())), shape=total.shape)
        made.sum_duplicates()
        parts.append(made)
        done += len(of)
        if say is not None:
            say(done / lengths.sum())
    whole = sparse.coo_array(
        (np.concatenate([p.data for p in parts]), tuple(np.concatenate([p.coords[axis] for p in parts]) for axis in (0, 1))),
        shape=total.shape,
    )
    return Codes(whole.tocsr(), active / max(done, 1))


def layer_codes(layer: SparseLayer, reading: Reading, say: Callable[[float], None] | None = None) -> Codes:
    """The mean codes of a layer; those of an edited one as edited."""
    like = next(layer.parameters())

    def encode(tokens: Tensor) -> tuple[Tensor, Tensor]:
        code = layer.encode(tokens.to(like))
        return code.values, code.indices

    return codes(encode, reading, layer.reads, layer.n_units, say)
