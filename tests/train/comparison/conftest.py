"""Folders of finished runs with random numbers, as train-student writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest

NAMES = ["kl", "reverse_kl", "ce", "top1_agreement", "mor@5", "cr@5", "spearman@5"]
KINDS = dict.fromkeys([*NAMES, "perplexity", "ece"], "exact")
KINDS |= {"kl": "unbiased", "reverse_kl": "lower", "spearman@5": "biased"}
ORDER = ["kl", "reverse_kl", "ce", "perplexity", "top1_agreement", "mor@5", "cr@5", "spearman@5", "ece"]  # fmt: skip


@pytest.fixture
def make_run(tmp_path, rng):
    """``make_run(name, level=..., config=..., seed=..., reference=..., sequences=..., old=...)``: the
    folder of a run whose metrics by sequence are random around ``level``.

    old: without values by sequence and exactness, as runs of older versions.
    """

    def make(
        name,
        *,
        level=1.0,
        config=None,
        seed=0,
        reference="r" * 64,
        sequences=20,
        old=False,
        fingerprint="c" * 64,
        log=None,
        **changes,
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        positions = np.arange(sequences) % 7 + 3
        sums = {each: positions * (level + rng.normal(0, 0.2, sequences)) for each in NAMES}
        ece = float(rng.random())
        means = {each: float(values.sum() / positions.sum()) for each, values in sums.items()}
        means |= {"perplexity": float(np.exp(means["ce"])), "ece": ece}
        after = {each: means[each] for each in ORDER}
        settings = {
            "student": {"model": "m"},
            "losses": [{"name": "forward_kl", "weight": 1.0}],
            "evaluation": {"held_out": 0.0, "max_sequences": None},
            "training": {"seed": seed, "max_steps": 6},
        }
        for key, value in (config or {}).items():
            at = settings
            *way, last = key.split(".")
            for step in way:
                at = at[step]
            at[last] = value
        metrics = {
            "before": {each: value + 1 for each, value in after.items()},
            "after": after,
            "teacher": {"ce": 0.5, "perplexity": 1.6, "model": "t", "engine": "e", "positions": 9},
            "kinds": KINDS,
            "steps": 6,
            "seconds": 12.5,
            "positions_trained": 600,
            "held_out_sequences": sequences,
            "held_out_positions": int(positions.sum()),
            "losses": [["forward_kl", "1.0"]],
            "student": {"parameters": 1234567, "trained": 1, "architecture": "A"},
            "cache": {
                "path": "caches/c",
                "fingerprint": fingerprint,
                "source": "s",
                "tokens": 4321,
                "bytes_per_token": 40.5,
            },
            "run": name,
            "seed": seed,
            "created_by": "logitcask",
            "config": settings,
            **changes,
        }
        if reference is not None:
            metrics["reference"] = {
                "path": "caches/r",
                "fingerprint": reference,
                "teacher": "t",
                "not_learnt_from": 0,
            }
        if log is None:
            log = [
                *({"step": s, "loss": level + 1 / s, "loss_forward_kl": level + 0.5 / s, "loss_ce": 2.0,
                   "learning_rate": 1e-3 / s, "grad_norm": float(s), "seconds": 2.0 * s} for s in (1, 2, 3)),
                {"step": 3, "eval_kl": 1.75, "eval_ce": 2.25},
                {"step": 4, "eval_kl": 1.5},
            ]  # fmt: skip
        files = {
            "metrics": metrics,
            "log": log,
            "run": {"config": settings, "cache": fingerprint, "before": {}},
        }
        if old:
            del metrics["kinds"]
        else:
            bins = {"calibration": [[0.0] * 15] * 3, "entropy": {}, "entropy_kind": None}
            parts = [
                {
                    "fingerprint": reference or fingerprint,
                    "ids": 60,
                    "sequences": [*range(sequences)],
                }
            ]
            files["held_out"] = {
                "parts": parts,
                "positions": positions.tolist(),
                "sums": {each: values.tolist() for each, values in sums.items()},
                "ece": ece,
                "after": bins,
                "teacher_calibration": None,
            }
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return folder

    return make
