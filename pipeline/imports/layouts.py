"""The table of all layouts, and the recognition of a table's layout by its columns."""

from __future__ import annotations

from collections.abc import Iterable

from logitcask.pipeline.imports import (
    axolotl,
    distillkit_legacy,
    distillkit_packed,
    distillkit_raw,
    megatron,
    probabilities,
    sidecar,
    torch_items,
)
from logitcask.pipeline.imports.base import Layout

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        distillkit_raw.LAYOUT,
        distillkit_packed.LAYOUT,
        distillkit_legacy.LAYOUT,
        axolotl.LAYOUT,
        axolotl.PREPARED,
        sidecar.LAYOUT,
        probabilities.LAYOUT,
        torch_items.LAYOUT,
        megatron.LAYOUT,
    )
}


def recognised(columns: Iterable[str]) -> str | None:
    """The name of the layout whose columns a table has; None for none."""
    there = set(columns)
    return next(
        (each.name for each in LAYOUTS.values() if each.columns and there >= set(each.columns)),
        None,
    )
