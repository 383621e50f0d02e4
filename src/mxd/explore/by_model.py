"""Labels by a language model: several units at a time, each written as soon as it is there, within what may be spent."""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..checkpoint import Run
from ..endpoint import Endpoint, NoAnswer, Pace, Refused
from ..errors import RunError
from ..unit_config import LabelConfig
from . import explain
from .asking import Asker, Limits, Replies, Spent, Stopped, Usage, tokens_of
from .explain import Made
from .labelling import Bars, Student, Subject, chosen, labels, spread, write, writing
from .store import folder

SILENT, FAILED = 3, 10
"""Units in a row without any reply, and without a usable one, after which an endpoint is not asked again."""
SAMPLE = 10
"""Units whose questions are made to estimate those of all."""


class _Tally:
    """What became of the units that a model was asked about."""

    def __init__(self) -> None:
        self.labelled = 0
        self.scores: list[float] = []
        self.why: Counter[str] = Counter()
        self._silent = self._failed = 0
        self._last: NoAnswer | None = None

    def made(self, made: Made) -> None:
        self.labelled += 1
        if made.detection is not None:
            self.scores.append(made.detection)
        if made.why:
            self.missing(made.why)
        else:
            self._silent = self._failed = 0

    def missing(self, error: NoAnswer) -> None:
        self.why[_reason(error)] += 1
        if str(error) == explain.TOO_FEW:
            return
        self._last = error
        self._failed += 1
        self._silent = self._silent + 1 if error.silent else 0

    def check(self) -> None:
        """
        Raises:
            RunError: the endpoint is to be left alone.
        """
        if self._last is None:
            return
        if isinstance(self._last, Refused):
            raise RunError(self._last.what, got=self._last.got, next=self._last.next)
        if self._silent >= SILENT or self._failed >= FAILED:
            what = (
                f"no reply for {self._silent} units in a row" if self._silent >= SILENT else f"no usable reply for {FAILED} units in a row"
            )
            raise RunError(what, got=str(self._last), next="see that the endpoint is well; the same command goes on from here")


def by_model(run: Run, subject: Subject, config: LabelConfig, bars: Bars, say: Callable[[str], None]) -> None:
    """Labels by a model for the units chosen that have none, or none that was tested."""
    todo = [(student, unit) for student in subject.students for unit in _wanted(student, config)]
    say(_estimate(subject, config, todo))
    if config.dry_run or not todo:
        return
    replies = Replies(folder(run) / "label-cache.sqlite")
    key = os.environ.get(config.key_env) or None
    endpoint = Endpoint(str(config.endpoint), str(config.model), key, timeout=config.timeout, reply_tokens=config.reply_tokens)
    limits = Limits(config.max_tokens, config.max_cost, config.price_in, config.price_out)
    asker = Asker(endpoint, replies, Pace(config.requests_per_minute), limits)
    tally, spent = _Tally(), None
    try:
        with contextlib.ExitStack() as stack:
            databases = {student.name: stack.enter_context(writing(student)) for student in subject.students}
            bar = stack.enter_context(bars(f"labels by {config.model}", len(todo)))
            work = stack.enter_context(
                contextlib.closing(_each(todo, lambda one: _ask(asker, subject, config, *one), config.parallel, asker.ended))
            )
            for number, ((student, unit), found) in enumerate(work, 1):
                if isinstance(found, (Spent, Stopped)):
                    spent = found if isinstance(found, Spent) else spent
                    asker.ended.set()  # what is being answered is paid for: it is waited for
                    continue
                _take(databases[student.name], unit, str(config.model), found, tally)
                bar.update(number, f"{tally.labelled} labelled, {asker.spent.requests:,} requests")
    finally:
        say(_told(config, len(todo), tally, asker.spent))
        replies.close()
    if spent is not None:
        raise spent


def _ask(asker: Asker, subject: Subject, config: LabelConfig, student: Student, unit: int) -> Made:
    tokens, values = student.codes.active(unit)
    shown = explain.draw(subject.text, subject.held_out, tokens, values, seed=config.seed, unit=unit)
    return explain.make(asker.ask, subject.store, subject.text, shown)


def _take(database: sqlite3.Connection, unit: int, model: str, found: Made | BaseException, tally: _Tally) -> None:
    """Write a label, or count why there is none."""
    if isinstance(found, Made):
        row = (unit, model, found.text, "model", model, found.detection, found.detection_n, found.fuzzing, found.fuzzing_n)
        write(database, [row])
        tally.made(found)
    elif isinstance(found, NoAnswer):
        tally.missing(found)
    else:
        raise found
    tally.check()


def _each(todo: Sequence[Any], work: Callable[[Any], Any], parallel: int, ended: threading.Event) -> Generator[tuple[Any, Any]]:
    """Each of `todo` and what `work` made of it, or the error it raised, as they come; `parallel` at a time.

    None are begun after `ended`, which is set when nobody wants more. The threads are daemons: Ctrl-C ends the program at once, whatever
    they wait for.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
    for one in todo:
        waiting.put(one)

    def run() -> None:
        while not ended.is_set() and not waiting.empty():
            with contextlib.suppress(queue.Empty):
                one = waiting.get_nowait()
                try:
                    done.put((one, work(one)))
                except BaseException as error:
                    done.put((one, error))
        done.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(parallel, len(todo)))]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            found = done.get()
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        ended.set()


def _wanted(student: Student, config: LabelConfig) -> list[int]:
    """The units that a model is to label, the first by --by first."""
    rows = [] if config.overwrite else labels(student, "unit, detection_n", str(config.model))
    have = {unit for unit, n in rows if n is not None}
    return [unit for unit in chosen(student, config) if unit not in have]


def _estimate(subject: Subject, config: LabelConfig, todo: Sequence[tuple[Student, int]]) -> str:
    """What labelling these units will take, from the questions about some of them."""
    sample = todo[:: max(1, len(todo) // SAMPLE)][:SAMPLE]
    total = Usage()
    for student, unit in sample:
        shown = explain.draw(subject.text, subject.held_out, *student.codes.active(unit), seed=config.seed, unit=unit)
        for question, reply in explain.questions(subject.store, subject.text, shown):
            total = Usage(total.requests + 1, total.tokens_in + tokens_of(question), total.tokens_out + reply)
    scale = len(todo) / max(len(sample), 1)
    about = Usage(*(round(count * scale) for count in total))
    line = f"{len(todo):,} units to label by {config.model}: about {about.requests:,} requests, {_tokens(about)}"
    cost = about.cost(config.price_in, config.price_out)
    if cost is not None:
        line += f", {cost:,.2f} in the currency of the prices"
    if config.requests_per_minute:
        line += f", at least {about.requests / config.requests_per_minute:,.0f} minutes"
    return line


def _told(config: LabelConfig, asked: int, tally: _Tally, spent: Usage) -> str:
    """What was done, in one line."""
    line = f"{config.model}: {tally.labelled:,} of {asked:,} units labelled, {spread(tally.scores)}"
    if tally.why:
        line += "; missing: " + ", ".join(f"{times} × {reason}" for reason, times in tally.why.most_common(6))
    line += f"; {spent.requests:,} requests, {_tokens(spent)}"
    cost = spent.cost(config.price_in, config.price_out)
    return line if cost is None else f"{line}, {cost:,.2f} in the currency of the prices"


def _tokens(usage: Usage) -> str:
    return f"{usage.tokens_in:,} tokens read and {usage.tokens_out:,} written"


def _reason(error: NoAnswer) -> str:
    """An error without what differs from unit to unit."""
    said = error.got or error.what
    return said.split(": '")[0].split(': "')[0]
