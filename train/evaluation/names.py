"""The names of the metrics, and the cap of a perplexity. Imports no torch, so that commands on
finished runs start at once.
"""

from __future__ import annotations

MOST_NATS = 700.0
"""Cross-entropy at which a perplexity is capped, so that it does not overflow."""


def metric_names(k: int) -> list[str]:
    """All metrics, in the order of reports."""
    return [
        "kl",
        "reverse_kl",
        "ce",
        "perplexity",
        "top1_agreement",
        f"mor@{k}",
        f"cr@{k}",
        f"spearman@{k}",
        "ece",
    ]
