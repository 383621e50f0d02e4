"""Text that an exported file holds once comes back as it was: split characters, large vocabularies, parts of sequences."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from mxd.explore import export
from mxd.explore.packing import Packing, letters, pieces, ranked
from mxd.explore.store import Sequence_, TextStore

EOS = 258


class Texts:
    """A text store of what it is given: by sequence, the tokens as (id, text). `EOS` ends a document."""

    meta: ClassVar = {"eos": str(EOS)}

    def __init__(self, *sequences: list[tuple[int, str]]) -> None:
        self._sequences = sequences

    def sequence(self, seq: int) -> Sequence_:
        tokens = self._sequences[seq]
        cuts = np.cumsum([0, *(len(text.encode("utf-16-le")) // 2 for _, text in tokens)]).astype(np.uint32)
        ids = np.array([token for token, _ in tokens], np.uint32)
        return Sequence_(seq, ids, "".join(text for _, text in tokens), cuts, np.zeros(len(ids), np.float32), 5 * seq)

    def document(self, sequence: Sequence_, position: int) -> tuple[str, str]:
        return f"doc {sequence.doc + int((sequence.ids[:position] == EOS).sum())}", "sotu"


def shown(texts: Texts, seq: int, start: int, end: int, peak: int = 0) -> dict[str, Any]:
    """A context as the server answers it."""
    sequence = texts.sequence(seq)
    cuts = sequence.cuts[start : end + 1].astype(int)
    text = "".join(list(pieces(sequence.text, sequence.cuts.tolist()))[start:end])
    document = dict(zip(("name", "source"), texts.document(sequence, start + peak), strict=True))
    about = {"a": 1.5, "delta": None, "rank": 0, "repeats": 1, "levels": [[0, 255]], "peak": peak}
    ids = sequence.ids[start:end].tolist()
    return {**about, "seq": seq, "start": start, "text": text, "cuts": (cuts - cuts[0]).tolist(), "ids": ids, "doc": document}


SMALL = Texts(
    [(9, "a"), (256, ""), (257, ""), (258, "\U0001f600"), (9, "a"), (5, " law")],
    [(5, " law"), (256, ""), (300, "\u00e9"), (5, " law"), (7, "\u2028<b>"), (256, "\ufffd")],
)
CONTEXTS = [shown(SMALL, 0, 1, 5), shown(SMALL, 0, 3, 6, peak=2), shown(SMALL, 1, 1, 6), shown(SMALL, 1, 1, 2)]


def large(n: int = 70_000) -> tuple[Texts, list[dict[str, Any]]]:
    """A vocabulary that reaches beyond the surrogates, each token once."""
    texts = Texts([(token, f" {token}") for token in range(n)])
    return texts, [shown(texts, 0, n - 20_000, n)]


def packed(texts: Texts, contexts: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    made = Packing(cast("TextStore", texts))
    short = [made.context(context) for context in contexts]
    return json.loads(json.dumps(made.tables())), short


def test_the_tables_hold_what_is_needed_and_the_commonest_token_first() -> None:
    tables, short = packed(SMALL, CONTEXTS[1:])
    assert tables["vocabulary"] == {"ids": [5, 256, 7, 9, 258, 300], "texts": [" law", "", "\u2028<b>", "a", "\U0001f600", "\u00e9"]}
    assert tables["docs"] == [["doc 1", "sotu"], ["doc 5", "sotu"]] and [context["doc"] for context in short] == [0, 1, 1]
    assert tables["sequences"] == {"0": [3, letters([4, 3, 0])], "1": [1, letters([1, 5, 0, 2, 1]), [[4, "\ufffd"]]]}
    assert short[0] == {name: CONTEXTS[1][name] for name in short[0] if name not in ("n", "doc")} | {"n": 3, "doc": 0}
    assert not {"text", "cuts", "ids"} & set(short[0])


def test_letters_pass_over_surrogates() -> None:
    text = letters([0, 1, 0xD7FF - 0x20, 0xD800 - 0x20, 200_000])
    assert [ord(letter) for letter in text] == [0x20, 0x21, 0xD7FF, 0xE000, 200_000 + 0x20 + 0x800]
    assert text.encode("utf-8").decode("utf-8") == text


def test_tokens_are_ranked_by_how_often_they_occur() -> None:
    assert ranked([np.array([3, 9, 9], np.uint32), np.array([9, 1, 3], np.uint32)]).tolist() == [9, 3, 1]
    assert ranked([]).tolist() == []


def test_pieces_are_cut_in_utf16() -> None:
    assert list(pieces("a\U0001f600\u00e9", [0, 1, 1, 3, 4])) == ["a", "", "\U0001f600", "\u00e9"]
    assert list(pieces("abc", [0, 1, 3])) == ["a", "bc"]


def test_a_sample_of_the_sequences() -> None:
    made = Packing(cast("TextStore", SMALL))
    for context in CONTEXTS:
        made.context(context)
    assert made.spans() == {0: (1, 6), 1: (1, 6)}
    assert made.counts() == (7, 3), "documents: the first, the one behind its end, and that of the second sequence"
    assert made.documents(1) == [("doc 0", "sotu"), ("doc 5", "sotu")] and made.documents(2) == [("doc 0", "sotu")]
    assert list(made.tables(2)["sequences"]) == ["0"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
@pytest.mark.parametrize("case", ["small", "large"])
def test_the_page_gets_the_contexts_back(case: str) -> None:
    texts, contexts = (SMALL, CONTEXTS) if case == "small" else large()
    tables, short = packed(texts, contexts)
    unit = {"unit": 3, "bands": [{"band": 0, "contexts": short}]}
    data = {**tables, "students": {"s": {"units": {"3": unit}, "rows": {"3": {"unit": 3, "best": short[0]}, "4": {"best": None}}}}}
    script = (export.PAGE / export.UNPACK).read_text(encoding="utf-8")
    program = f"""
        globalThis.window = {{ mxd: {{}} }};
        {script}
        const data = window.mxd.unpacked(JSON.parse(require("fs").readFileSync(0, "utf8")));
        const {{ units, rows }} = data.students.s;
        console.log(JSON.stringify({{ unit: units[3], again: units["3"] === units["3"], keys: Object.keys(units), rows }}));
    """
    done = subprocess.run(["node", "-e", program], input=json.dumps(data), capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found["unit"] == {"unit": 3, "bands": [{"band": 0, "contexts": contexts}]}
    assert found["again"] is True and found["keys"] == ["3"]
    assert found["rows"] == {"3": {"unit": 3, "best": contexts[0]}, "4": {"best": None}}
