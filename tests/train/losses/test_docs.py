"""docs/losses.md says what the losses say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

from logitcask.train.losses import LOSSES, SPECS
from logitcask.train.losses.__main__ import _ORDER, markdown

DOCS = Path(__file__).parents[3] / "docs" / "losses.md"


def test_the_tables_are_in_sync() -> None:
    text = DOCS.read_text()
    shown = text.partition("<!-- python -m logitcask.train.losses -->\n")[2].partition(
        "<!-- end -->"
    )[0]
    assert shown.strip() == markdown().strip(), (
        "run python -m logitcask.train.losses and put its output into docs/losses.md"
    )


def test_the_order_names_modules_of_losses() -> None:
    modules = {loss.__module__.rpartition(".")[2] for loss in LOSSES.values()}
    assert set(_ORDER) <= modules


def test_docstrings_agree_with_the_metadata() -> None:
    """Each names its paper, where it has one, and the words for what it is from a sparse head."""
    words = {"lower": "lower bound", "unbiased": "unbiased", "exact": "exact", "biased": "biased"}
    for name, loss in LOSSES.items():
        said = " ".join((loss.__doc__ or "").lower().split())
        spec = SPECS[name]
        for kind in {spec.from_head, spec.from_samples} - {None}:
            if name != "random_sampling" or kind != "biased":
                assert words[kind] in said, f"{name}: {kind}"
        module = re.sub(r"\s+", " ", __import__(loss.__module__, fromlist=["x"]).__file__)
        for number in re.findall(r"\d{4}\.\d{5}", spec.source):
            assert number in Path(module).read_text()
