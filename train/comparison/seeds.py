"""Runs that differ in the seed alone, summarised."""

from __future__ import annotations

import json
import statistics
from typing import Any

SEED = "training.seed"


def without_seeds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each metric over the runs that differ in the seed alone; none
    if no seed varies.

    deviation: of a sample (n - 1); None for one run.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        if SEED in result["values"] and "after" in result:
            apart = {key: value for key, value in result["values"].items() if key != SEED}
            groups.setdefault(json.dumps(apart, sort_keys=True), []).append(result)
    return [
        {
            "values": {key: value for key, value in results[0]["values"].items() if key != SEED},
            "runs": len(results),
            "after": {
                name: {
                    "mean": statistics.fmean(numbers),
                    "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None,
                }
                for name in results[0]["after"]
                for numbers in [[result["after"][name] for result in results]]
            },
        }
        for results in groups.values()
    ]
