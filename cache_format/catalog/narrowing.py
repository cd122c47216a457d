"""The options of ``derive`` that make one store of another, if it contains it."""

from __future__ import annotations

from typing import Any

from logitcask.cache_format.derive.derive import DeriveOptions, derived_settings
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.manifest import StoreSettings

_OF_HEADS = ("top_k", "min_k", "top_p", "min_probability", "logprob_step")
_OF_DRAWS = ("sample_sets", "mass_per_sample", "draws", "seed", "sample_logprobs")
_SMALLER = ("top_k", "tail_samples", "sample_sets", "top_p", "min_k")
_LARGER = ("logprob_step", "min_probability", "mass_per_sample")


def narrowing(had: StoreSettings, wanted: StoreSettings) -> dict[str, Any] | None:
    """The fields of ``DeriveOptions`` that make ``wanted`` of ``had``; empty if both are equal.

    None if ``had`` does not contain ``wanted``: it has less, or draws of another seed or method.
    Settings of draws do not count in a store without draws.
    """
    names = (*_OF_HEADS, "tail_samples", *(_OF_DRAWS if wanted.tail_samples else ()))
    changes = {}
    for name in names:
        before, after = getattr(had, name), getattr(wanted, name)
        if before == after or (name == "min_k" and _least(had) == _least(wanted)):
            continue
        if not _is_less(name, before, after) and not (name == "min_k" and not had.ragged):
            return None
        changes[name] = after
    if not changes:
        return changes if had == wanted else None
    try:
        found = derived_settings(had, DeriveOptions.model_validate(changes), "the cache")
    except (UserError, ValueError):
        return None
    return changes if _content(found) == _content(wanted) else None


def _is_less(name: str, before: Any, after: Any) -> bool:
    """Whether a store with ``after`` keeps less than one with ``before``, where both differ."""
    if after is None:
        return False
    if name in _SMALLER:
        return before is None or bool(after < before)
    if name in _LARGER:
        return before is None or bool(after > before)
    return name == "sample_logprobs" and not after  # a seed or a method means other draws


def _least(store: StoreSettings) -> int:
    """Entries that every head has, as far as ``min_k`` decides it."""
    return min(store.min_k, store.top_k)


def _content(store: StoreSettings) -> dict[str, Any]:
    """The settings that matter to a reader of the cache."""
    fields = store.model_dump(exclude={"capture_k", "logprob_error", "min_k"})
    if not store.tail_samples:
        fields = {name: value for name, value in fields.items() if name not in _OF_DRAWS}
    return {**fields, "min_k": _least(store)}
