"""Configs of a build: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from logitcask.cache_format import UserError
from logitcask.cache_format.cli.config_file import load_config
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.text.config import DataConfig


def test_every_config_that_comes_along_is_valid():
    root = Path(__file__).parents[2]
    files = sorted((root / "pipeline" / "configs").glob("*.yaml"))
    assert files
    for file in files:
        load_config(BuildConfig, file, [])


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    given = BuildConfig(
        teacher={"model": "synthetic"}, data={"path": "python-docs", "max_tokens": 9}, output="c"
    )
    file.write_text(yaml.safe_dump(given.model_dump(mode="json")))
    config = load_config(
        BuildConfig,
        file,
        ["store.top_k=3", "data.max_tokens=null", "teacher.engine_args={a: [1, 2], b: 1e-4}"],
    )
    assert (config.store.top_k, config.data.max_tokens, config.teacher.engine_args) == (
        3,
        None,
        {"a": [1, 2], "b": 1e-4},
    )
    for wrong in (
        "store.top_k",
        "=3",
        "store.top_kk=3",
        "store.top_k.x=3",
        "store.top_k=[unclosed",
    ):
        with pytest.raises(UserError):
            load_config(BuildConfig, file, [wrong])


@pytest.mark.parametrize("stages", [0, "two", 1.5, True, None])
def test_stages_of_a_pipeline_are_a_number(stages):
    with pytest.raises(
        ValueError, match=r"pipeline_parallel_size is .*; expected a whole number of 1 or more"
    ):
        TeacherConfig(model="m", engine_args={"pipeline_parallel_size": stages})


def test_trust_is_yes_or_no() -> None:
    with pytest.raises(ValueError, match="trust_remote_code is 'no'; expected true or false"):
        TeacherConfig(model="m", engine_args={"trust_remote_code": "no"})
    served = TeacherConfig(
        model="m",
        backend="server",
        server={"url": "http://h:1"},
        engine_args={"trust_remote_code": True},
    )
    assert served.trust_remote_code


MISTAKES = {
    "prompts without generate": (
        {"prompt_field": "q"},
        "prompt_field is set, but neither generate nor",
    ),
    "nothing to answer": (
        {"generate": {}},
        "generate is set, but not what to answer; set prompt_field",
    ),
    "two of a kind": (
        {"prompt_field": "q", "text_field": "t", "generate": {}},
        "text_field and prompt_field are both",
    ),
    "no room": (
        {"prompt_field": "q", "generate": {"max_new_tokens": 512}},
        "leaves no room for a prompt",
    ),
    "an empty stop": (
        {"prompt_field": "q", "generate": {"stop": ["", "x"]}},
        "stop holds an empty string",
    ),
    "a system without a chat": (
        {"text_field": "q", "generate": {"system_prompt": "x"}},
        "use prompt_field",
    ),
    "less than greedy": (
        {"prompt_field": "q", "generate": {"temperature": -1}},
        "greater than or equal to 0",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_configs_that_make_no_sense(what: str) -> None:
    data, message = MISTAKES[what]
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"path": "x", **data})
