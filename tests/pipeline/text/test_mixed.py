"""Several sources as one: the order of their rows, their ids, counters and forms."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.estimate.run import estimate
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.mixed import open_rows
from logitcask.pipeline.text.rejects import Reject
from logitcask.pipeline.text.row_count import count_rows
from logitcask.train.data.held_out import row_of
from tests.pipeline.text.test_sources import json_lines


def write(tmp_path: Path, **texts: list[str]) -> None:
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([{"text": text} for text in rows]))


def config(tmp_path: Path, sources: list[dict[str, Any]], **data: Any) -> DataConfig:
    placed = [{**each, "path": str(tmp_path / each["path"])} for each in sources]
    return DataConfig.model_validate({"sources": placed, **data})


def ids(data: DataConfig) -> list[str]:
    return [row.row_id for row in open_rows(data)]


def test_rows_are_taken_in_turn_by_weight(tmp_path: Path) -> None:
    write(tmp_path, a=["a"] * 6, b=["b"] * 3)
    sources = [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl"}]
    found = ids(config(tmp_path, sources))
    assert found == [
        *("0/train/0", "1/train/0", "0/train/1"),
        *("0/train/2", "1/train/1", "0/train/3"),
        *("0/train/4", "1/train/2", "0/train/5"),
    ]


def test_any_beginning_has_the_shares_of_the_weights(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Within one row of each source, for as long as all have rows."""
    for _ in range(10):
        count = int(rng.integers(2, 5))
        weights = rng.integers(1, 9, count).tolist()
        write(tmp_path, **{f"s{i}": ["x"] * 400 for i in range(count)})
        sources = [{"path": f"s{i}.jsonl", "weight": w} for i, w in enumerate(weights)]
        taken: Counter[int] = Counter()
        for number, row_id in enumerate(ids(config(tmp_path, sources))[:400], 1):
            taken[int(row_id.split("/")[0])] += 1
            if max(taken.values()) < 400:
                for source, weight in enumerate(weights):
                    share = Fraction(weight * number, sum(weights))
                    assert abs(taken[source] - share) < count


def test_each_row_is_read_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, a=["a"], b=["b"] * 4)
    data = config(tmp_path, [{"path": "a.jsonl", "weight": 9}, {"path": "b.jsonl"}])
    caplog.set_level("INFO")
    source = open_rows(data)
    for _ in range(2):
        assert [row.row_id for row in source] == [
            "0/train/0",
            *(f"1/train/{number}" for number in range(4)),
        ]
        assert source.counters == {
            "rows_read": 5,
            "rows_of_source_0": 1,
            "rows_of_source_1": 4,
        }
    assert f"all 1 rows of {tmp_path / 'a.jsonl'} are used; the other sources go on" in caplog.text
    assert count_rows(data) == 5


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_sources_of_several_forms(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"messages": CHAT, "key": "k"}] * 1))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"conversations": sharegpt}, {}] * 2))
    (tmp_path / "c.jsonl").write_bytes(json_lines([{"p": "q", "c": "a"}] * 5))
    data = config(
        tmp_path,
        [
            {"path": "a.jsonl", "id_field": "key"},
            {"path": "b.jsonl", "messages_field": "conversations"},
            {
                "path": "c.jsonl",
                "prompt_field": "p",
                "completion_field": "c",
                "split": "train[-2:]",
            },
        ],
        messages_field="messages",
    )
    assert (data.kind, data.mask_policy, data.splits) == ("chats", "mixed", "mixed")
    source, rejects = open_rows(data), list[Reject]()
    source.report = rejects.append
    rows = list(source)
    assert [row.row_id for row in rows] == [
        "0/k",
        "1/train/0",
        "2/train/3",
        "1/train/2",
        "2/train/4",
    ]
    assert all(row.messages == CHAT for row in rows)
    assert rejects == [Reject("1/train/1", "null"), Reject("1/train/3", "null")]


def test_a_cache_of_several_sources(tmp_path: Path) -> None:
    write(tmp_path, a=["one two three " * 9, "x"], b=["four"])
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {
            "sources": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
            "max_length": 64,
        },
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }
    settings = BuildConfig.model_validate(fields)
    manifest = build(settings).manifest
    assert manifest.data.source == f"{tmp_path / 'a.jsonl'} + {tmp_path / 'b.jsonl'}"
    assert (manifest.data.split, manifest.data.mask_policy) == ("train", "all")
    assert manifest.data.counters["rows_of_source_0"] == 2
    names = [sequence.sequence_id for sequence in CacheReader(tmp_path / "cache")]
    assert names == ["0/train/0/0", "0/train/0/1", "1/train/0", "0/train/1"]
    rows = [row_of(name, manifest.data) for name in names]
    assert rows == ["0/train/0", "0/train/0", "1/train/0", "0/train/1"]
    assert estimate(settings).sample.tokens == manifest.statistics.tokens
    assert build(settings).reused
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"text": "other"}]))
    with pytest.raises(UserError, match=r"b\.jsonl has changed since"):
        build(settings)


def test_prompts_of_several_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"q": "why?"}, {"q": None}]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([{"messages": CHAT}]))
    fields = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {
            "sources": [
                {"path": str(tmp_path / "a.jsonl")},
                {"path": str(tmp_path / "b.jsonl"), "messages_field": "messages"},
            ],
            "prompt_field": "q",
            "max_length": 64,
            "generate": {"max_new_tokens": 4, "samples": 2},
        },
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }
    settings = BuildConfig.model_validate(fields)
    manifest = build(settings).manifest
    assert (manifest.data.mask_policy, manifest.data.kind) == ("generated", "chats")
    ids = [sequence.sequence_id for sequence in CacheReader(tmp_path / "cache")]
    assert ids == ["0/train/0/0", "0/train/0/1", "1/train/0/0", "1/train/0/1"]
    assert row_of(ids[-1], manifest.data) == "1/train/0"
    assert '"0/train/1", "reason": "null"' in settings.rejects_file().read_text()
    assert build(settings).reused


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "data: a data set has a path or sources, but neither is set"),
        ({"path": "x", "sources": [{"path": "y"}]}, "has a path or sources, but both are set"),
        ({"sources": [{"path": "y", "weight": 0}]}, r"data\.sources\.0\.weight: .*greater than 0"),
        ({"sources": [{"paht": "y"}]}, r"data\.sources\.0\.paht"),
        (
            {"sources": [{"path": "x"}, {"path": "y", "messages_field": "m"}]},
            "documents and chats; build a cache of each",
        ),
        (
            {"sources": [{"path": "x", "completion_field": "c"}]},
            r"sources\.0: completion_field is set, but not the column of the prompts",
        ),
        ({"sources": [{"path": "x", "split": "a["}]}, r"sources\.0\.split: 'a\[' is no split"),
    ],
)
def test_sources_that_cannot_be(data: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        yaml.safe_dump({"teacher": {"model": "synthetic"}, "data": data, "output": "x"})
    )
    with pytest.raises(ConfigError, match=says) as wrong:
        load_config(BuildConfig, file, [])
    assert "\n" not in str(wrong.value)
