"""Made-up things to keep: a bench run, and a sentence that was read, as the page and the server make them."""

from __future__ import annotations

from typing import Any


def bench_run(prompt: str = "a", text: str = "b", note: str = "", *, token: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request and result: one edit, one lane, one token."""
    edits = [{"unit": 2, "op": "add", "value": 1, "at": "all"}]
    how = {"greedy": True, "temperature": 1, "top_p": 1, "seed": 0, "tokens": 4, "special": False}
    stats = {"nats_per_token": 1.0, "repeats": 0, "splits_at": None, "tokens": 1}
    result = {"lanes": [{"lane": "host", "note": note, "stats": stats, "tokens": [[token, text, 0.5, 1.0]]}]}
    return {"prompt": prompt, "edits": edits, "lanes": ["host"], **how}, result


def sentence(text: str, students: tuple[str, ...], label: str = "") -> dict[str, Any]:
    """An answer about a text of two tokens, its characters but the last and that; unit 2 of each student is active at the second."""
    n, cut = 2, len(text.encode("utf-16-le")) // 2
    read = {"loss": [None, 2.0], "p": [None, 0.1], "kl": [0.1, 0.2], "top": [[["x", 0.5]]] * n}
    units = {"from": [0, 0, 1], "unit": [2], "a": [1.5], "share": [0.25], "effect": [0.5]}
    about = {"hookpoint": "layers.1.mlp", "word": "expert", "k": 2, "units": units, "labels": {"2": label} if label else {}}
    return {
        "tokens": {"text": text, "cuts": [0, cut - 1, cut], "ids": [5, 6], "special": [], "names": {}},
        "host": {"loss": [None, 1.0], "p": [None, 0.4], "top": [[["y", 0.5]]] * n},
        "students": [{"name": name, **read, **about} for name in students],
        "mean_from": 1,
    }
