"""Progress without a terminal: a line every ten seconds with speed and time left."""

from __future__ import annotations

import pytest

from mxd import progress
from mxd.progress import Bar


def test_lines_count_speed_and_time_left_from_the_first_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Bar("training", 1000, "tokens") as bar:
        now = 160.0  # setting up takes a minute, which is nobody's speed
        bar.update(100)
        now = 165.0
        bar.update(150)
        now = 180.0
        bar.update(500, "mxd 1.25")
    assert capsys.readouterr().err.splitlines() == [
        "training: 100 of 1,000 tokens",
        "training: 500 of 1,000 tokens, 20 tokens/s, 25 s left · mxd 1.25",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training", 10, "tokens", quiet=True) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bar("training", 10, "tokens") as bar:
        bar.update(5, "note")
        bar.update(10, "the end")
    said = capsys.readouterr().err
    assert "training" in said and "the end" in said


def test_a_note_that_costs_is_asked_for_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 100.0, list[float]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Bar("training", 1000, "tokens", quiet=True) as bar:

        def note() -> str:
            asked.append(now)
            return "a note"

        for _ in range(20):
            bar.update(1, note)
            now += 0.125
        bar.update(1000, note)
    assert asked == pytest.approx([100.0, 100.5, 101.0, 101.5, 102.0, 102.5])
