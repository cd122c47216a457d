"""The request: what decides what a cache holds, and nothing else of a config."""

from __future__ import annotations

from datetime import date

import pytest

from logitcask.pipeline.builder.request import as_of_today, dated, request_of
from logitcask.pipeline.config import BuildConfig


def config_of(**parts):
    fields = {
        "teacher": {"model": "m", "backend": "server", "server": {"url": "http://h:1"}},
        "data": {"path": "d"},
        "store": {"tail_samples": 0},
        "output": "cache",
    }
    return BuildConfig.model_validate(
        {
            name: {**fields[name], **parts.get(name, {})}
            if isinstance(fields.get(name), dict)
            else parts.get(name, fields.get(name))
            for name in {*fields, *parts}
        }
    )


@pytest.mark.parametrize(
    "parts",
    [
        {"output": "elsewhere"},
        {"log": False},
        {"audit": {"sequences": 9}},
        {"teacher": {"route": "flat", "batch_tokens": 99, "tensor_parallel_size": 2}},
        {"teacher": {"server": {"url": "http://other:2"}}},
        {"store": {"shard_tokens": 77, "compression_level": 3}},
    ],
)
def test_what_changes_no_number_is_no_part_of_it(parts):
    assert request_of(config_of(**parts)) == request_of(config_of())


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        ({"teacher": {"dtype": "bfloat16"}}, ("teacher", "dtype")),
        ({"data": {"max_length": 77}}, ("data", "max_length")),
        ({"store": {"top_k": 7}}, ("store", "top_k")),
    ],
)
def test_what_changes_one_is(parts, where):
    before, now = request_of(config_of()), request_of(config_of(**parts))
    part, field = where
    assert before[part][field] != now[part][field]
    now[part][field] = before[part][field]
    assert before == now


def test_a_template_file_is_its_content(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_text("{{ messages }}")
    same.write_text("{{ messages }}")
    other.write_text("{{ messages }}!")

    def request(file):
        return request_of(config_of(data={"messages_field": "m", "chat_template": file}))

    assert request(one) == request(same) != request(other)


def test_a_resumed_build_writes_the_day_that_it_began_with():
    config = config_of(data={"messages_field": "m"})
    written = {"data": {"template_date": "2031-05-06"}}
    assert dated(config, written).data.template_date == date(2031, 5, 6)
    assert dated(config, {}) == config
    own = config_of(data={"messages_field": "m", "template_date": date(2000, 1, 1)})
    assert dated(own, written) == own


def test_an_earlier_request_gets_the_defaults_of_fields_added_since():
    config = config_of()
    earlier = request_of(config)
    del earlier["store"]["min_k"]
    del earlier["teacher"]["seed"]
    assert as_of_today(earlier, config) == request_of(config)
    earlier["store"]["min_k"] = 3
    assert as_of_today(earlier, config)["store"]["min_k"] == 3
    unreadable = {"teacher": {"modell": "m"}}
    assert as_of_today(unreadable, config) == unreadable
