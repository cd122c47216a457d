"""Mistakes of a user's that cost something unless they are found early: paths, restarts, folders
that change, permissions.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import logitcask.pipeline.builder.inputs
import logitcask.pipeline.builder.lazy_teacher
import logitcask.pipeline.builder.planner
import logitcask.pipeline.generate.answers
from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import main
from logitcask.pipeline.config import BuildConfig

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
ROWS = [{"text": "the teacher reads", "q": "why?", "messages": CHAT}] * 3


def written(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config_of(tmp_path: Path, teacher: dict[str, Any] | None = None, **data: Any) -> BuildConfig:
    return BuildConfig.model_validate(fields_of(tmp_path, teacher, **data))


def fields_of(tmp_path: Path, teacher: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        written(tmp_path, ROWS)
    return {
        "teacher": teacher or {"model": "synthetic", "backend": "synthetic", "vocab_size": 500},
        "data": {"path": str(path), "max_length": 64, **data},
        "store": {"top_k": 4},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
    }


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# --- configs


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("~/caches/one", "{home}/caches/one"),
        ("file://~/one", "{home}/one"),
        ("file:///tmp/one", "/tmp/one"),
        ("file://localhost/tmp/one", "/tmp/one"),
        ("local:///tmp/one", "/tmp/one"),
        ("localhost/one", "localhost/one"),
        (Path("~/one"), "{home}/one"),
    ],
)
def test_the_output_is_one_folder_for_all_who_read_the_config(
    tmp_path, monkeypatch, output, folder
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = BuildConfig.model_validate(
        {**fields_of(tmp_path), "output": output, "log": "~/log.jsonl"}
    )
    assert config.output == config.folder == Path(folder.format(home=tmp_path))
    assert config.log_file() == tmp_path / "log.jsonl"
    assert BuildConfig.model_validate_json(config.model_dump_json()) == config, (
        "as a worker reads it"
    )


def test_a_url_stays_one(tmp_path) -> None:
    assert (
        BuildConfig.model_validate({**fields_of(tmp_path), "output": "s3://b/~/x"}).output
        == "s3://b/~/x"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("output=''", "output: expected a folder"),
        ("output=file://", "output: expected a folder"),
        ("output=~nobody-of-this-name/x", "output: .*name the folder without ~"),
        ("data.path=~nobody-of-this-name/x", "data.path: .*name the folder without ~"),
        ("teacher.model=~nobody-of-this-name/x", "teacher.model: .*name the folder without ~"),
        ("data.path=''", "data.path: .*at least 1 character"),
        ("data.text_field=''", "data.text_field: .*at least 1 character"),
        ("data.messages_field=''", "data.messages_field: .*at least 1 character"),
        ("data.prompt_field=''", "data.prompt_field: .*at least 1 character"),
        ("data.id_field=''", "data.id_field: .*at least 1 character"),
        ("teacher.model=''", "teacher.model: .*at least 1 character"),
        ("teacher.seed=-1", "teacher.seed: .*greater than or equal to 0"),
    ],
)
def test_values_that_name_nothing_are_refused_by_the_config(tmp_path, override, says) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(fields_of(tmp_path)))
    with pytest.raises(ConfigError, match=says) as error:
        load_config(BuildConfig, file, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["[ab]", "a?*", "a::b"])
def test_every_path_of_a_build_is_taken_literally(tmp_path, model, name) -> None:
    here = tmp_path / name
    here.mkdir()
    model.rename(here / "model")
    fields = fields_of(here, {"model": str(here / "model"), "backend": "transformers"})
    config = BuildConfig.model_validate({**fields, "output": str(here / name)})
    build(config)
    assert build(config).reused
    assert [path.name for path in tmp_path.iterdir()] == [name]
    reader = CacheReader(config.output)
    assert len(reader) == 3
    assert reader[0].sequence_id == "train/0"


@pytest.mark.parametrize("name", ["m[ab]", "m?", "m*"])
def test_a_model_whose_folder_is_a_pattern_to_vllm(tmp_path, model, name) -> None:
    model = model.rename(tmp_path / name)
    build(config_of(tmp_path))
    config = config_of(tmp_path, {"model": str(model), "backend": "vllm"})
    with pytest.raises(UserError, match="for a pattern and reads the weights of other folders"):
        build(config, restart=True)
    assert build(config_of(tmp_path)).reused


# --- restarts


HOPELESS = {
    "no such template": (
        {},
        {"messages_field": "messages", "chat_template": "no.jinja"},
        "cannot read data.chat_template",
    ),
    "no chats": ({}, {"messages_field": "text"}, "none of its 3 rows can be used"),
    "no chats to answer": (
        {},
        {"messages_field": "text", "generate": {}},
        "none of its 3 rows can be used",
    ),
    "no prompts": (
        {},
        {"prompt_field": "q", "max_length": 8, "generate": {"max_new_tokens": 2}},
        "no prompt came out",
    ),
    "a first sequence too long": ({}, {"max_tokens": 3}, "data.max_tokens is 3"),
    "beyond the model": (
        {"backend": "transformers"},
        {"max_length": 257},
        "reads at most 256 tokens",
    ),
    "an argument with a field": (
        {"backend": "vllm", "engine_args": {"dtype": "half"}},
        {},
        "use teacher.dtype",
    ),
    "an argument with one value": (
        {"backend": "vllm", "engine_args": {"enable_prefix_caching": True}},
        {},
        "engine_args.enable_prefix_caching cannot be set",
    ),
}


@pytest.mark.parametrize("what", HOPELESS)
def test_a_restart_that_would_fail_at_once_removes_nothing(tmp_path, model, what) -> None:
    teacher, data, says = HOPELESS[what]
    manifest = build(config_of(tmp_path)).manifest
    named = {"model": str(model), **teacher} if teacher else None
    with pytest.raises(UserError, match=says):
        build(config_of(tmp_path, named, **data), restart=True)
    again = build(config_of(tmp_path))
    assert again.reused
    assert again.manifest == manifest


@pytest.mark.parametrize(
    "data",
    [{"messages_field": "messages"}, {"prompt_field": "q", "generate": {"max_new_tokens": 3}}],
)
def test_a_restart_that_can_work_does(tmp_path, data) -> None:
    build(config_of(tmp_path))
    assert not build(config_of(tmp_path, **data), restart=True).reused


# --- what changes under a build


@pytest.mark.parametrize("data", [{}, {"prompt_field": "q", "generate": {"max_new_tokens": 3}}])
@pytest.mark.parametrize("gone", [False, True])
def test_data_that_changes_while_it_is_read(tmp_path, monkeypatch, data, gone) -> None:
    """What is in the cache would otherwise pass for what the file holds now."""
    config = config_of(tmp_path, **data)
    file = Path(config.data.path)
    module, name = (
        (logitcask.pipeline.generate.answers, "sync")
        if data
        else (logitcask.pipeline.builder.planner, "write_sequences")
    )
    original = getattr(module, name)

    def then_changed(*arguments: Any) -> Any:
        result = original(*arguments)
        file.unlink()
        if not gone:
            written(tmp_path, [{"text": "something else", "q": "what else?"}] * 5)
        return result

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="has changed while it was read") as error,
    ):
        patch.setattr(module, name, then_changed)
        build(config)
    assert "\n" not in str(error.value)
    written(tmp_path, ROWS)
    build(config)
    assert build(config).reused


def edit_template(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|>the "))


def edit_rules(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}})
    )


EDITS: dict[str, Callable[[Path], None]] = {
    "its chat template": edit_template,
    "how it turns text into ids": edit_rules,
}
TEXTS = [{"messages_field": "messages"}, {"prompt_field": "q", "generate": {"max_new_tokens": 3}}]


@pytest.mark.parametrize("changes", EDITS)
@pytest.mark.parametrize("data", TEXTS)
def test_another_tokenizer_in_the_same_folder_is_noticed(
    tmp_path, model, monkeypatch, changes, data
) -> None:
    config = config_of(tmp_path, {"model": str(model), "backend": "transformers"}, **data)
    build(config)
    monkeypatch.setattr(
        logitcask.pipeline.builder.lazy_teacher,
        "open_teacher",
        lambda *_, **__: pytest.fail("the engine was started"),
    )
    assert build(config).reused
    EDITS[changes](model)
    with pytest.raises(
        UserError, match=rf"the tokenizer in .* \({changes}\); choose another output, or replace"
    ) as error:
        build(config)
    assert "\n" not in str(error.value)


def test_a_template_does_not_matter_to_documents(tmp_path, model) -> None:
    config = config_of(tmp_path, {"model": str(model), "backend": "transformers"})
    build(config)
    edit_template(model)
    assert build(config).reused


# --- what the operating system refuses


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``teacher-cache build`` in this process, which is left as it was: no handler, no logging
    for debugging.
    """
    handler = signal.getsignal(signal.SIGTERM)
    log = logging.getLogger("logitcask.pipeline")
    level = log.level

    def run(fields: dict[str, Any], *options: str) -> None:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(fields))
        monkeypatch.setattr(sys, "argv", ["teacher-cache", "build", str(file), *options])
        main()

    yield run
    signal.signal(signal.SIGTERM, handler)
    log.setLevel(level)


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied", "/secret/tokens.json")


@pytest.mark.parametrize("cause", ["permission", "name", "no words"])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys, command, cause) -> None:
    fields = fields_of(tmp_path)
    says = "/secret/tokens.json: Permission denied"
    if cause == "permission":
        monkeypatch.setattr(logitcask.pipeline.builder.inputs, "open_rows", refuse)
    elif cause == "name":
        fields["output"], says = str(tmp_path / ("x" * 300)), "File name too long"
    else:
        monkeypatch.setattr(
            logitcask.pipeline.builder.inputs,
            "open_rows",
            lambda *_: (_ for _ in ()).throw(OSError()),
        )
        says = "error: OSError; "
    with pytest.raises(SystemExit) as stop:
        command(fields)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert "run the same command again" in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_debugging_shows_where(tmp_path, monkeypatch, capsys, command) -> None:
    """And the exit code is the same."""
    monkeypatch.setattr(logitcask.pipeline.builder.inputs, "open_rows", refuse)
    with pytest.raises(SystemExit) as stop:
        command(fields_of(tmp_path), "--debug")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in refuse" in said
    assert said.splitlines()[-1].startswith("error: /secret/tokens.json: Permission denied")
