"""The exactness of losses and metrics (``logitcask.train.losses.base.Exactness``) in words. Imports no
torch, so that commands can print a finished run at once.
"""

from __future__ import annotations

IN_WORDS: dict[str, str] = {
    "exact": "exact",
    "unbiased": "unbiased over the draws",
    "lower": "a lower bound",
    "biased": "an approximation (docs/losses.md says of what kind)",
}
"""For sentences."""
IN_A_WORD: dict[str, str] = {
    "exact": "exact",
    "unbiased": "estimate",
    "lower": "lower bound",
    "biased": "approximation",
}
"""For the column of a table, beside the number."""
