"""What units write, against the model itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from mxd.explore.bands import text_of
from mxd.explore.codes import Codes
from mxd.explore.directions import Unembedding, unembedding, written
from mxd.host import Host
from tests.conftest import build_model, build_tokenizer


def made_codes(tokens: list[int], units: list[int], values: list[float], n_units: int, length: int, scales: Any = None) -> Codes:
    """Codes of firings given in the order of the text."""
    counts = np.bincount(tokens, minlength=length)
    codes = object.__new__(Codes)
    codes.tokens_per_sequence, codes.sequences, codes.n_units, codes.tokens, codes.scales = length, 1, n_units, length, scales
    codes._ends = np.concatenate([[0], np.cumsum(counts)])
    codes._arrays = {"counts": counts, "units": np.array(units), "values": np.array(values, np.float32)}
    return codes


TEXT = text_of(np.arange(8)[None], np.zeros(1, np.int64), 0)


def test_a_latent_promotes_the_token_it_points_at() -> None:
    unembed = Unembedding(torch.eye(4), torch.ones(4), False, 2.0)
    codes = made_codes([1, 2, 3, 4], [0, 1, 0, 1], [1.0, 2.0, 3.0, 2.0], 3, 8)
    table = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    found = written(codes, TEXT, table, unembed)
    # Means are 2 e_0 and 2 e_1, their common mean is (1, 1, 0, 0); a half of what is left is promoted.
    assert found.promoted[0]["token"][0] == 0 and found.promoted[0]["mean"][0] == pytest.approx(0.5)
    assert found.suppressed[0]["token"][0] == 1 and found.suppressed[0]["mean"][0] == pytest.approx(-0.5)
    assert found.promoted[0]["sd"][0] == pytest.approx(np.std([0.5, 1.5], ddof=1)), "its activations were 1 and 3"
    assert found.promoted[1]["sd"][0] == 0
    assert found.steadiness[:2].tolist() == [1, 1] and np.isnan(found.steadiness[2]), "a direction is steady; of the dead nothing is known"
    assert len(found.promoted[2]) == 0


def test_an_expert_is_averaged_over_where_it_fires() -> None:
    scales = np.zeros((8, 4), np.float16)
    scales[1], scales[2], scales[3], scales[4] = [1, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [-2, 0, 0, 0]
    codes = made_codes([1, 2, 3, 4], [0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0], 2, 8, scales)
    found = written(codes, TEXT, torch.ones(2, 4), Unembedding(torch.eye(4), torch.ones(4), False, 1.0))
    assert found.steadiness[0] == pytest.approx(np.sqrt(0.5)), "two directions at right angles"
    assert found.steadiness[1] == pytest.approx(0, abs=1e-6), "two that cancel"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "phi"])
def test_unembedding_is_the_hosts_own_last_step(family: str) -> None:
    host = Host.from_model(build_model(family), build_tokenizer())
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    unembed = unembedding(host, ids)
    head = host.model.get_output_embeddings()
    caught: list[Any] = []
    handle = head.register_forward_hook(lambda _m, args, _out: caught.append(args[0]))
    host.logits(ids)
    handle.remove()
    # What the head was given, undone to the residual stream's direction, must give its logits without bias again.
    given = caught[0][0, 3].float()
    direction = given * unembed.size / unembed.gain
    if unembed.centred:
        norm_bias = next(m.bias for m in reversed(list(host.model.base_model.modules())) if isinstance(m, nn.LayerNorm))
        direction = (given - norm_bias) * unembed.size / unembed.gain
        given = given - norm_bias
        assert abs(float(direction.mean())) < 1e-4
    assert torch.allclose(unembed.logits(direction[None])[0], given @ head.weight.T.float(), atol=1e-4)
    assert unembed.size > 0


def test_a_host_without_final_norm() -> None:
    model = SimpleNamespace(base_model=nn.Linear(3, 3), get_output_embeddings=lambda: nn.Linear(4, 9))
    host = cast(Host, SimpleNamespace(model=model, d_model=4))
    unembed = unembedding(host, torch.zeros(1, 2, dtype=torch.int64))
    assert unembed.size == 1 and unembed.gain.tolist() == [1] * 4
