"""The verbs about single units: collect, label, explore, export. What is heavy is imported inside them."""

from __future__ import annotations

import sys

from .options import CollectOptions, ExploreOptions, ExportOptions, LabelOptions, narrowed
from .unit_config import CollectConfig, ExploreConfig, ExportConfig, LabelConfig


def collect(options: CollectOptions) -> None:
    from . import pipeline

    print(pipeline.collect(options.run, narrowed(options, CollectConfig)))
    print(f"next: mxd explore {options.run}")


def explore(options: ExploreOptions) -> None:
    config = narrowed(options, ExploreConfig)
    if config.collect_only:
        return collect(CollectOptions(run=options.run, students=config.students, device=config.device))
    if config.export:
        return export(ExportOptions(run=options.run, students=config.students, out=config.export))
    from .explore.serve import serve

    serve(options.run, config, say=lambda line: print(line, flush=True))


def label(options: LabelOptions) -> None:
    from .checkpoint import Run
    from .explore import label as labelling
    from .explore.store import folder
    from .locks import only_writer
    from .progress import Bar

    run = Run.open(options.run)
    with only_writer(folder(run)):
        labelling.label(run, narrowed(options, LabelConfig), lambda what, total: Bar(what, total, "units"), say)


def export(options: ExportOptions) -> None:
    from .checkpoint import Run
    from .explore import features

    print(features.write(Run.open(options.run), narrowed(options, ExportConfig), say))


def say(line: str) -> None:
    print(f"mxd: {line}", file=sys.stderr, flush=True)
