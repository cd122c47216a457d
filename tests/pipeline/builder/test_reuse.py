"""A finished cache in the output's place: reused or refused, without an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.reuse import is_finished, reuse
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig


@pytest.fixture
def config(tmp_path: Path) -> BuildConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} of some text"}) + "\n" for i in range(9)))
    made = BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(rows)},
        audit={"sequences": 0},
        output=tmp_path / "cache",
    )
    build(made)
    return made


def test_what_was_asked_for_is_reused_and_tidied(config: BuildConfig) -> None:
    assert is_finished(config.output)
    left = Path(config.output) / BUILD_DIR  # by a crash right after the manifest
    left.mkdir()
    (left / "plan.json").touch()
    assert reuse(config, Inputs(config)) == CacheReader(config.output).manifest
    assert not left.exists()


def test_other_settings_are_named(config: BuildConfig) -> None:
    other = config.model_copy(update={"store": config.store.model_copy(update={"top_k": 5})})
    with pytest.raises(UserError, match=r"with other settings: store\.top_k: 32 -> 5; choose"):
        reuse(other, Inputs(other))


def test_a_touched_file_with_the_same_rows_is_the_same(config: BuildConfig) -> None:
    rows = Path(config.data.path)
    text = rows.read_text()
    rows.write_text(text + " ")  # its stamp is another, its rows are not
    reuse(config, Inputs(config))
    rows.write_text(text.replace("row 3", "raw 3"))
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since"):
        reuse(config, Inputs(config))


def test_a_cache_outlives_its_data(config: BuildConfig, caplog: pytest.LogCaptureFixture) -> None:
    Path(config.data.path).unlink()
    manifest = reuse(config, Inputs(config))
    assert manifest == CacheReader(config.output).manifest
    assert "whether the data has changed since cannot be checked: no data at" in caplog.text


def test_a_derived_cache_is_no_builds(config: BuildConfig, tmp_path: Path) -> None:
    derive(str(config.output), tmp_path / "small", DeriveOptions(top_k=4))
    shutil.rmtree(config.output)
    (tmp_path / "small").rename(config.output)
    with pytest.raises(UserError, match="holds a cache that `teacher-cache derive` made"):
        reuse(config, Inputs(config))


def test_what_is_not_finished_is_not_there(tmp_path: Path) -> None:
    (tmp_path / BUILD_DIR).mkdir()
    assert not is_finished(tmp_path)
    assert not is_finished(tmp_path / "nowhere")
    assert not is_finished("memory://nothing/there")
