"""The documents keep their word: README's Python runs, commands parse, links lead somewhere, docs/cli.md is what --help says."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from mxd import assets, cli, sources
from mxd.bench import BENCHMARKS
from mxd.options import OPTIONS
from tests import small

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDERS = {"RUN", "NAME", "VERB", "HOST", "DIR"}


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    """Line of the opening fence, counted from 1."""
    language: str
    runs: str
    """What the comment above says: ``yes`` (no comment), ``slow`` or ``no``."""
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks; ``<!-- runs: no -->`` or ``<!-- runs: slow -->`` on the line above says how a block is treated."""
    found = re.finditer(
        r"^(?:<!--\s*runs:\s*(?P<runs>\w+)\s*-->\n+)?(?P<fence>```)(?P<language>\w*)\n(?P<text>.*?)^```$",
        page.read_text(encoding="utf-8"),
        flags=re.M | re.S,
    )
    for match in found:
        line = match.string.count("\n", 0, match.start("fence")) + 1
        yield Block(page, line, match["language"], match["runs"] or "yes", match["text"])


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a bash block, as lists of words without comments; a backslash joins lines."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


ALL = [block for page in PAGES for block in blocks(page)]
MXD_COMMANDS = [(block, words) for block in ALL if block.language == "bash" for words in commands(block) if words[0].endswith("mxd")]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """For a host this small, a second thread only waits for the first."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_host(tmp_path_factory.mktemp("host"))


@pytest.fixture
def built_in(host_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The built-in host and texts are tiny ones; the working folder is an empty one."""
    monkeypatch.setattr(assets, "builtin_host", lambda progress=None: host_folder)
    monkeypatch.setattr(sources, "read_built_in", lambda name: iter(small.documents(name)))
    monkeypatch.setattr(sources.assets, "fetch", lambda name, progress=None: pytest.fail(f"asked for {name}"))
    monkeypatch.chdir(tmp_path)


def execute(found: list[Block]) -> None:
    """Python blocks in one namespace, bash blocks through the command line of this process, in the order of the page."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in found:
        where = f"{block.page.name}:{block.line}"
        if block.language == "python":
            # Empty lines before the code, so that a traceback names the page's own line.
            exec(compile("\n" * block.line + block.text, str(block.page), "exec"), namespace)
            continue
        for words in commands(block):
            assert words[0] == "mxd", f"{where}: only mxd commands are run here; mark the block with <!-- runs: no -->: {words}"
            assert cli.main(words[1:]) == 0, f"{where}: {' '.join(words)}"


def runnable(*kinds: str) -> list[Block]:
    return [block for block in blocks(README) if block.language in ("python", "bash") and block.runs in kinds]


@pytest.mark.usefixtures("built_in")
@pytest.mark.filterwarnings("default")
def test_readme_runs() -> None:
    found = runnable("yes")
    assert any(block.language == "python" for block in found), "README.md shows no Python that runs"
    execute(found)


@pytest.mark.slow
@pytest.mark.usefixtures("built_in")
@pytest.mark.filterwarnings("default")
def test_readme_runs_slow_blocks_too() -> None:
    if not runnable("slow"):
        pytest.skip("README.md has no slow block")
    execute(runnable("yes", "slow"))


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_blocks_say_how_they_run() -> None:
    assert {block.runs for block in ALL} <= {"yes", "no", "slow"}
    assert MXD_COMMANDS, "the walk must find commands"


@pytest.mark.parametrize(("block", "words"), MXD_COMMANDS, ids=[f"{b.page.name}:{' '.join(w)[:60]}" for b, w in MXD_COMMANDS])
def test_every_mxd_command_in_the_documents_parses(block: Block, words: list[str]) -> None:
    verb = words[1]
    if verb in PLACEHOLDERS or verb.startswith("--"):
        return
    assert verb in OPTIONS, f"{block.page.name}:{block.line}"
    if "--help" not in words:
        cli.parse(verb, words[2:])


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda b: f"{b.page.name}:{b.line}")
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, str(block.page), "exec")


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for block in ALL:
        for words in commands(block) if block.language == "bash" else ():
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, f"{block.page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def generator(name: str = "gen_cli_docs") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    page = generator().render()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "run `make docs`"
    for verb in OPTIONS:
        assert f"## mxd {verb}\n" in page
    assert "\x1b" not in page, "no colour"
    assert str(Path.home()) not in page, "nothing of this machine"


def test_tables_and_plots_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    made = generator("results_tables").render()
    assert {path.name for path in made} >= {"README.md", "results.md"}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make docs`"
    benchmarks = made[ROOT / "benchmarks" / "README.md"]
    for name in BENCHMARKS:
        assert f"<!-- {name} -->" in benchmarks
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"results/{path.name}" in benchmarks, "a file of results that no table shows"


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "61")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert generator().render() == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_blocks_are_read_as_written(tmp_path: Path) -> None:
    """The harness itself, by hand."""
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n\n<!-- runs: no -->\n```bash\nmake demo  # c\nmxd a \\\n  b\n```\n\n```\nplain\n```\n")
    first, second, third = blocks(page)
    assert (first.line, first.language, first.runs, first.text) == (3, "python", "yes", "x = 1\n")
    assert (second.line, second.language, second.runs) == (8, "bash", "no")
    assert list(commands(second)) == [["make", "demo"], ["mxd", "a", "b"]]
    assert (third.language, third.text) == ("", "plain\n")
    with pytest.raises(ZeroDivisionError):
        execute([first, first._replace(text="x / 0\n")])
    with pytest.raises(AssertionError, match="only mxd commands"):
        execute([second])
