"""What a study keeps of a part: its figures, and nothing of any text."""

from __future__ import annotations

import json

from mxd.config import PARTS
from mxd.evals.brief import brief


def test_figures_stay_and_texts_go() -> None:
    means = {"f1": 0.5, "f1_ci95": [0.4, 0.6], "balanced_accuracy": 0.7, "balanced_accuracy_ci95": [0.6, 0.8]}
    # The class that was probed best on the choosing samples, not the one that came out best on test.
    chosen = {"class": "law", "units": [3], "chosen_f1": 0.9, "f1": 0.3, "f1_ci95": [0.2, 0.4]}
    lucky = {"class": "sport", "units": [4], "chosen_f1": 0.5, "f1": 0.7, "f1_ci95": [0.6, 0.8]}
    cell = {**means, "classes": [lucky, chosen]}
    student = {
        "name": "mxd-k32",
        "excess_ce": 0.1,
        "generation_agreement": {"shares": [1.0, 0.5], "samples": [{"prompt": "SECRET words"}], "documents": "SECRET"},
        "probes": {
            "tasks": {
                "topic": {
                    "figures": {"student": {"pre": {"k1": cell, "k5": cell}, "code": {}}, "dense": {"y": {"k0": cell}}},
                    "above": {"random": {}},
                    "floor": 0.2,
                    "about": "SECRET",
                }
            },
            "skipped": {},
        },
        "steering": {"coherence": {"value": 0.1}, "examples": ["SECRET"], "random": {"coherence": {"value": 0.0}, "units": ["SECRET"]}},
        "anatomy": {"firing": {"dead_fraction": 0.1, "histogram": [1]}, "token_types": {"examples": ["SECRET"]}},
        "selectivity": {"by_class": {"fr": {"tied": {"16": {"units": [1], "own": [0.1, 0.0, 0.2]}}}}},
        "cost": {"missing": "no clock"},
    }
    found = brief(student)
    assert list(found) == list(PARTS) and "SECRET" not in json.dumps(found)
    assert found["generation_agreement"] == {"shares": [1.0, 0.5]}
    short = {**means, "best": {"class": "law", "f1": 0.3, "f1_ci95": [0.2, 0.4]}}
    assert found["probes"]["tasks"]["topic"]["rows"] == {"student": {"pre": short}, "dense": {"y": short}}
    assert found["steering"] == {"coherence": {"value": 0.1}, "random": {"coherence": {"value": 0.0}}}
    assert found["anatomy"] == {"firing": {"dead_fraction": 0.1}}
    assert found["selectivity"]["by_class"]["fr"]["tied"]["16"] == {"own": [0.1, 0.0, 0.2]}
    assert found["cost"] == {"missing": "no clock"}
    assert brief({"name": "quick", "excess_ce": 0.1}) == {}
