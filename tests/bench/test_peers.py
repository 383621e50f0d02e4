"""`mxd bench peers` with stand-ins for sparsify and SAELens: small modules with the names and maths that the benchmark relies on.

The real ones run under `make bench-peers`; here it is checked that the benchmark drives them, compares results, and refuses wrong ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mxd import cli
from mxd.bench import peers, run
from mxd.config import BenchConfig
from mxd.errors import MxdError

PACKAGES = ("sparsify", "sae_lens", "sae_lens.saes", "sae_lens.saes.topk_sae", "sae_lens.saes.sae")

SPARSIFY = """
from collections import namedtuple
import torch

print("noise at import")

class SparseCoderConfig:
    def __init__(self, num_latents, k, transcode, normalize_decoder):
        assert transcode and not normalize_decoder
        self.num_latents, self.k = num_latents, k

Out = namedtuple("Out", "fvu auxk_loss latent_indices")

class SparseCoder(torch.nn.Module):
    def __init__(self, d_in, cfg, device):
        super().__init__()
        self.cfg = cfg
        self.encoder = torch.nn.Linear(d_in, cfg.num_latents)
        self.W_dec = torch.nn.Parameter(torch.zeros(cfg.num_latents, d_in))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))

    def forward(self, x, y, dead_mask, total_variance):
        scores = self.encoder(x).relu()
        values, indices = scores.topk(self.cfg.k, -1)
        e = y - FACTOR * (torch.zeros_like(scores).scatter(-1, indices, values) @ self.W_dec) - self.b_dec
        auxk = e.new_tensor(0.0)
        if dead_mask is not None:
            k_aux = min(y.shape[-1] // 2, int(dead_mask.sum()))
            top = torch.where(dead_mask[None], scores.detach(), -torch.inf).topk(k_aux, -1)
            e_hat = torch.zeros_like(scores).scatter(-1, top.indices, top.values) @ self.W_dec
            auxk = (e_hat - e.detach()).pow(2).sum() / total_variance
        return Out(e.pow(2).sum() / total_variance, auxk, indices)
"""

TOPK_SAE = """
from collections import namedtuple
from types import SimpleNamespace
import torch

TopKTrainingSAEConfig = SimpleNamespace
Out = namedtuple("Out", "loss feature_acts")

class TopKTrainingSAE(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.W_enc = torch.nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae))
        self.b_enc = torch.nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = torch.nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_dec = torch.nn.Parameter(torch.zeros(cfg.d_in))

    def training_forward_pass(self, step_input):
        x, dead = step_input.sae_in, step_input.dead_neuron_mask
        scores = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = scores.topk(self.cfg.k, -1)
        acts = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        e = x - acts @ self.W_dec - self.b_dec
        loss = e.pow(2).sum(-1).mean()
        if dead is not None:
            top = torch.where(dead[None], scores, -torch.inf).topk(x.shape[-1] // 2, -1)
            e_hat = torch.zeros_like(scores).scatter(-1, top.indices, top.values) @ self.W_dec
            loss = loss + self.cfg.aux_loss_coefficient * (e_hat - e.detach()).pow(2).sum(-1).mean()
        return Out(loss, acts.detach().to_sparse() if self.cfg.use_sparse_activations else acts)
"""

SAE = """
from collections import namedtuple
TrainStepInput = namedtuple("TrainStepInput", "sae_in coefficients dead_neuron_mask n_training_steps is_logging_step")
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put the stand-ins, and what pip would know of them, on the import path; a factor other than 1 makes sparsify's wrong."""

    def put(factor: float = 1.0) -> None:
        files = {
            "sparsify/__init__.py": SPARSIFY.replace("FACTOR", str(factor)),
            "sae_lens/__init__.py": "",
            "sae_lens/saes/__init__.py": "",
            "sae_lens/saes/topk_sae.py": TOPK_SAE,
            "sae_lens/saes/sae.py": SAE,
            "eai_sparsify-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: eai-sparsify\nVersion: 0.1\n",
            "sae_lens-0.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: sae-lens\nVersion: 0.2\n",
        }
        for name, text in files.items():
            path = tmp_path / "peers" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name in PACKAGES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path / "peers"))

    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "0")
    checks = torch.sparse.check_sparse_tensor_invariants.is_enabled()
    yield put
    (torch.sparse.check_sparse_tensor_invariants.enable if checks else torch.sparse.check_sparse_tensor_invariants.disable)()
    for name in PACKAGES:
        sys.modules.pop(name, None)


CONFIG = BenchConfig(names=("peers",), device="cpu", threads=1, runs=2, quick=True)


def test_both_peers_with_and_without_auxk(stand_ins, capsys: pytest.CaptureFixture[str]) -> None:
    stand_ins()
    rows = run.run(CONFIG, quiet=True)["peers"]
    said = [(r["case"], r["rival"].split(",")[0], r["shape"]["dead"]) for r in rows]
    with_, without = "AuxK on", "without AuxK"
    assert said == [
        (f"transcoder step, {with_}", "sparsify 0.1", 51),
        (f"transcoder step, {without}", "sparsify 0.1", 0),
        (f"topk-sae step, {with_}", "SAELens 0.2", 51),
        (f"topk-sae step, {with_}", "SAELens 0.2", 51),
        (f"topk-sae step, {without}", "SAELens 0.2", 0),
        (f"topk-sae step, {without}", "SAELens 0.2", 0),
    ]
    # sparsify's auxiliary loss gives its encoder no gradient: there the decoder alone is compared.
    assert [r["check"].split("(")[1][:6] for r in rows] == ["1 of 2", *["2 of 2"] * 5]
    assert len({r["rival"] for r in rows}) == 3, "dense and sparse activations of SAELens are two rivals"
    assert capsys.readouterr().out == "", "what a peer prints at import is not ours to show"
    assert peers.os.environ["SPARSIFY_DISABLE_TRITON"] == "1", "its Triton decoder cannot run on a CPU"
    assert "peers" in run.check(BenchConfig())


def test_a_peer_that_computes_something_else_is_not_timed(stand_ins) -> None:
    stand_ins(factor=1.01)
    with pytest.raises(MxdError, match="do not agree, so nothing is timed"):
        run.run(CONFIG, quiet=True)


def test_without_peers_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = peers.importlib.util.find_spec
    there = {"sparsify", "sae_lens"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name, *rest: None if name in there else real(name, *rest))
    assert cli.main(["bench", "peers", "--quick", "--device", "cpu"]) == 1
    assert "neither sparsify nor SAELens is installed beside mxd | next: make bench-peers" in capsys.readouterr().err
