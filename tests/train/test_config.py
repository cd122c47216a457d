"""docs/config.md says what the configs say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.pipeline.config import BuildConfig
from logitcask.rounds.config import RoundsConfig
from logitcask.train.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("logitcask.pipeline.config", BuildConfig),
        ("logitcask.train.config", TrainConfig),
        ("logitcask.rounds.config", RoundsConfig),
    ],
)
def test_the_tables_are_in_sync(command, model):
    shown = (
        DOCS.read_text()
        .partition(f"<!-- python -m {command} -->\n")[2]
        .partition("<!-- end -->")[0]
    )
    assert shown.strip() == markdown(model).strip(), (
        f"run python -m {command} and put its output into docs/config.md"
    )


@pytest.mark.parametrize("model", [BuildConfig, TrainConfig])
def test_nothing_is_without_a_word(model):
    fields = [line.split(" | ") for line in markdown(model).splitlines() if line.startswith("| `")]
    assert len(fields) > 40
    assert [row[0] for row in fields if not row[-1].strip(" |") and "see below" not in row[1]] == []
