"""The check that numbers of a training are finite. If one is not, the student has diverged."""

from __future__ import annotations

import math

from logitcask.cache_format.errors import UserError


def check_finite(values: dict[str, float], when: str) -> None:
    """Raises UserError if one of ``values`` is nan or infinite: the student has diverged."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"the student has diverged: {name} is {value} {when}; lower training.learning_rate or set "
                "training.max_grad_norm, and begin afresh with --restart"
            )
