"""One training run, from configuration to run folder, begun or gone on with: the only place that knows stream, students and states.

activations -> shuffled steps -> every student -> a state now and then -> run folder
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from . import course as courses
from . import ops, resume
from .cache import Cache
from .checkpoint import STATE, Run
from .clock import Clock
from .config import TrainConfig
from .course import Course
from .errors import ConfigError
from .evals import routing
from .feed import Feed, open_feed, until
from .footprint import check_memory, footprint
from .harvest import Batch, length
from .locks import only_writer
from .one_pass import train as train_students
from .plan import check, check_disk, op_settings, plan, settled
from .progress import Bar
from .run_info import describe, record
from .run_writer import RunWriter, put_back
from .shuffle import resumed
from .signals import stop_requests
from .tracking import Metrics
from .train import SAMPLE_TOKENS, Student, StudentSpec

log = logging.getLogger("mxd")

PROBES_PER_RUN = 12


def train(config: TrainConfig, *, quiet: bool = False) -> Run:
    """Train every kind x K x layer of `config` in one pass of the host, or of cached activations, and write the run folder.

    Everything that can be wrong with the configuration is found before the host reads its first token, and before anything
    in the run folder is touched. A run that was broken off, by whatever, goes on where its last state was kept, to the same bits on a
    CPU; so does one that ``config.resume`` names, which may also be prolonged or given more students.

    Raises:
        ConfigError, TextError, HostError, LayerError, RunError, AssetError: see their messages.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a message; what was trained so far is saved.
    """
    going_on = config.resume is not None
    if going_on and config.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other", next="leave one of them out")
    if going_on and config.out not in (TrainConfig.out, config.resume):
        raise ConfigError(
            "--resume and --out name different folders", expected=str(config.resume), got=str(config.out), next="leave --out out"
        )
    # A command line names the run in both; from Python, what is at its default counts as not given.
    config = dataclasses.replace(courses.merged(config) if going_on and config.out != config.resume else config, resume=None)
    cache = Cache.open(config.activations) if config.activations is not None else None
    config = settled(dataclasses.replace(config, out=Path(config.out)), cache.info["config"] if cache else None)
    check(config)
    with only_writer(config.out):
        put_back(config.out)
        found = courses.course(config, going_on=going_on)
        return _train(found, cache, quiet) if found is not None else Run.open(config.out)


def _train(found: Course, cache: Cache | None, quiet: bool) -> Run:
    config, clock = found.config, Clock()
    with clock("text and host"):
        feed = open_feed(config, cache)
        specs = plan(config, feed.sites)
        courses.check_students(found, specs)
        if found.info is not None:
            feed.pin(found.info["text"])
        feed.prepare()
        source = feed.describe()
        courses.check_source(found, source)
    info = describe(config, feed.device, source) | {"legs": found.legs, "resumed": (found.info or {}).get("resumed", [])}
    courses.warn_of_other_bits(found, info)
    left = found.left(specs)
    check_disk(config.out, left)
    needed = footprint(config, left, feed.sites, feed.device)
    check_memory(needed, feed.device)
    if not quiet:
        print(f"mxd: {len(left)} {'student' if len(left) == 1 else 'students'}, {needed.line()}", file=sys.stderr, flush=True)
    writer = RunWriter(config.out, overwrite=config.overwrite, going_on=found.info is not None)
    try:
        return _Session(found, feed, specs, writer, info, clock, quiet).run(left)
    except BaseException:
        writer.abandon()
        raise


class _Session:
    """Training from where a run stands to its end, or to where it is broken off."""

    def __init__(
        self, found: Course, feed: Feed, specs: Sequence[StudentSpec], writer: RunWriter, info: dict[str, Any], clock: Clock, quiet: bool
    ) -> None:
        self.course, self.feed, self.writer, self.info, self.clock, self.quiet = found, feed, writer, info, clock, quiet
        self.config = found.config
        self._names = [spec.name for spec in specs]
        self._held_out: dict[str, Batch] | None = None
        self._saved_step, self._saved_at = found.step, time.monotonic()
        if found.state is not None:
            info["resumed"] = [*info["resumed"], found.step]
            for part, seconds in found.state.info["seconds"].items():
                clock.seconds[part] = round(clock.seconds.get(part, 0.0) + seconds, 3)
        self._began = time.monotonic() - (found.state.info["elapsed"] if found.state else 0.0)

    def run(self, specs: list[StudentSpec]) -> Run:
        """Train the students of `specs` and write the run."""
        students = [Student(spec, total_steps=self.course.steps, device=self.feed.device) for spec in specs]
        if self.course.state is not None:
            for student in students:
                self.course.state.restore(student)
            resume.drop_after(self.writer.path, self.course.step)
        else:
            resume.drop(self.writer.path)
        adding = [spec.name for spec in specs] if self.course.kept else []
        kept = [dataclasses.asdict(record) for record in self.course.kept]
        self.writer.write_info({**self.info, "students": kept, "adding": adding, "finished": False})
        with self.clock("probe text"):
            self._held_out = self.feed.held_out()
        names, step = set(self._names_of(students)), self.course.step
        metrics = Metrics(
            self.writer.path / "metrics.jsonl", keep=lambda row: row.get("student") not in names or row.get("step", 0) <= step
        )
        stopped: BaseException | None = None
        try:
            self._loop(students, metrics)
        except (Exception, KeyboardInterrupt) as error:
            stopped = error
        finally:
            metrics.close()
        return self._end(students, stopped)

    def _loop(self, students: list[Student], metrics: Metrics) -> None:
        """Shuffle, start new students on the first tokens, train."""
        config, total = self.config, self.course.steps
        probe = self._probe if self._held_out else None
        every = config.probe_every_steps or max(1, total // PROBES_PER_RUN)
        bar = Bar("training", total * config.tokens_per_step, "tokens", quiet=self.quiet)
        with ops.using(**op_settings(config)), bar, stop_requests() as stop, closing(self._stream(students)) as stream:

            def on_step(step: int, students: list[Student]) -> None:
                bar.update(step * config.tokens_per_step, lambda: _losses(students))
                if self._is_due(step) and step < total:
                    self._save(students, step)
                if stop.asked:
                    raise KeyboardInterrupt

            train_students(
                students,
                stream,
                metrics=metrics,
                log_every_steps=config.log_every_steps,
                probe=probe,
                probe_every_steps=every,
                on_step=on_step,
                first_step=self.course.step + 1,
                began=self._began,
            )

    def _stream(self, students: list[Student]) -> Generator[dict[str, Batch]]:
        """The steps that are left, leg by leg; new students are set up on the first tokens before the first step."""
        behind, first = 0, 0
        for number, leg in enumerate(self.course.legs):
            # Of the last leg the end is the feed's: a text that is streamed need not be counted through before it is trained on.
            is_last = number == len(self.course.legs) - 1
            end = None if is_last else first + sum(1 for _ in until(itertools.islice(self.feed.lengths(), first, None), leg.tokens, int))
            done = min(max(self.course.step - behind, 0), leg.steps)
            if done < leg.steps:
                lengths = itertools.islice(self.feed.lengths(), first, end)
                with closing(_Reads(self, students, first, end)) as reads:
                    yield from itertools.islice(self._shuffled(reads, lengths, done, number), leg.steps - done)
            behind, first = behind + leg.steps, end or first

    def _shuffled(self, reads: _Reads, lengths: Iterator[int], done: int, leg: int) -> Iterator[dict[str, Batch]]:
        config = self.config
        return resumed(
            lengths,
            reads,
            done,
            tokens_per_step=config.tokens_per_step,
            buffer_tokens=config.buffer_tokens,
            passes=config.passes,
            generator=torch.Generator().manual_seed(_leg_seed(config.seed, leg)),
        )

    def _probe(self, student: Student) -> dict[str, Any]:
        assert self._held_out is not None
        batch = self._held_out[student.spec.hookpoint]
        with self.clock("probes"):
            keep = ~batch.first
            return routing.probe(student.layer, batch.x[keep], batch.y[keep])

    def _is_due(self, step: int) -> bool:
        """Whether it is time for a state."""
        config = self.config
        tokens = (step - self._saved_step) * config.tokens_per_step
        by_tokens = config.save_every_tokens is not None and tokens >= config.save_every_tokens
        by_time = config.save_every_minutes > 0 and time.monotonic() - self._saved_at >= 60 * config.save_every_minutes
        return by_tokens or by_time

    def _save(self, students: list[Student], step: int) -> None:
        with self.clock("states"):
            about = {"seconds": self.clock.seconds, "elapsed": round(time.monotonic() - self._began, 3)}
            resume.save(self.writer.path, students, step, about)
        self._saved_step, self._saved_at = step, time.monotonic()
        self.writer.finish()  # from here on this run is worth more than the one that it replaces

    def _end(self, students: list[Student], stopped: BaseException | None) -> Run:
        """Save what there is, and say how to go on if that is not all."""
        done, path = max(student.steps for student in students), self.writer.path
        by_hand = isinstance(stopped, KeyboardInterrupt)
        if not done and self.course.info is not None:
            self.writer.write_info(self.course.info)
        if by_hand and not done:
            raise KeyboardInterrupt("stopped before the first step; nothing was written")
        if stopped is not None and (not done or (self.writer.replaces and not by_hand)):
            raise stopped  # nothing worth keeping, or a finished run to put back
        self.info["seconds"] = self.clock.seconds
        self.info["train_tokens"] = min(self.config.tokens, max(student.tokens for student in students))
        step = _common_step(students)
        if step is not None and step > self._saved_step and (stopped is not None or self.config.keep_state):
            self._save(students, step)
        with self.clock("saving"):
            self._write(students, finished=stopped is None)
        self.writer.finish()
        if stopped is None and not self.config.keep_state:
            resume.drop(path)
        resumable = (path / STATE).is_dir()
        if by_hand:
            how = f"mxd train --resume {path}" if resumable else "the same command with --overwrite to train from the start"
            raise KeyboardInterrupt(
                f"stopped at step {done:,} of {self.course.steps:,}; the students are saved as they are | next: {how}, or mxd eval {path}"
            )
        if stopped is not None:
            log.warning("stopped at step %s of %s; the students are saved as they are in %s", f"{done:,}", f"{self.course.steps:,}", path)
            if resumable:
                log.warning("once it is mended: mxd train --resume %s", path)
            raise stopped
        return Run.open(path)

    def _write(self, students: list[Student], *, finished: bool) -> None:
        adding = self._names_of(students) if self.course.kept and not finished else []
        self.writer.save(
            [student.layer for student in students],
            [record(student) for student in students],
            {
                **self.info,
                "adding": adding,
                "metrics_sha256": hashlib.sha256((self.writer.path / "metrics.jsonl").read_bytes()).hexdigest(),
            },
            finished=finished,
            kept=self.course.kept,
            order=self._names,
        )

    @staticmethod
    def _names_of(students: Sequence[Student]) -> list[str]:
        return [student.name for student in students]


class _Reads:
    """The reads of one leg, wanted ones only; the first of them set up the students that have not begun."""

    def __init__(self, session: _Session, students: list[Student], first: int, end: int | None) -> None:
        self._session, self._students, self._first, self._end = session, students, first, end
        self._open: Any = None

    def __call__(self, wanted: Callable[[int], bool]) -> Iterator[dict[str, Batch]]:
        first, end, session = self._first, self._end, self._session
        self._open = session.feed.batches(lambda read: first <= read and (end is None or read < end) and wanted(read - first))
        harvested = session.clock.timed("harvest", self._open)
        if session.course.step or first:
            return harvested
        config = session.config
        front = list(until(harvested, min(SAMPLE_TOKENS, config.buffer_tokens, config.tokens), length))
        with session.clock("warm start"):
            _start(self._students, front, session.feed)
        return itertools.chain(front, harvested)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


def _start(students: list[Student], first: list[dict[str, Batch]], feed: Feed) -> None:
    """Set up every student from the batches at the front of the text."""
    sample = {h: Batch(*(torch.cat(parts) for parts in zip(*(batch[h] for batch in first), strict=True))) for h in first[0]}
    for student in students:
        needs_host = student.spec.recipe.encoder != "fresh"
        student.start(sample[student.spec.hookpoint], feed.weights(student.spec.hookpoint) if needs_host else None)


def _leg_seed(seed: int, leg: int) -> int:
    """Of the order of a leg: the run's own for the first."""
    return seed if leg == 0 else int.from_bytes(hashlib.sha256(f"{seed}/leg {leg}".encode()).digest()[:8], "little") >> 1


def _common_step(students: Sequence[Student]) -> int | None:
    """The step at which all that are not stopped stand; None in the middle of one."""
    steps = {student.steps for student in students if student.stopped is None}
    whole = len(steps) == 1 and not any(student.in_step for student in students)
    return steps.pop() if whole else None


def _losses(students: list[Student]) -> str:
    return "  ".join(f"{s.name} {'stopped' if s.stopped else format(s.last_loss, '.3f')}" for s in students[:8])
