"""What goes wrong in real life, through the command line: one line that names the cause, exit
code 2, nothing lost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitcask.cache_format import CacheReader
from logitcask.pipeline.cli import main

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
SYNTHETIC = {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000}


def config_file(tmp_path: Path, teacher: dict[str, Any], data: dict[str, Any], **more: Any) -> Path:
    fields = {
        "teacher": teacher,
        "data": {"path": "python-docs", "max_length": 32, "max_tokens": 300, **data},
        "store": {"top_k": 4, "min_k": 1, "shard_tokens": 100},
        "audit": {"sequences": 0},
        "output": str(tmp_path / "cache"),
        **more,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def command(*arguments: Any) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from logitcask.pipeline.cli import main; main()",
        *map(str, arguments),
    ]


def build(file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command("build", file), capture_output=True, text=True, env=env)


@pytest.fixture
def build_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[Path], Any]]:
    """The same command in this process, which need not import everything again."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(file: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["teacher-cache", "build", str(file)])
        with pytest.raises(SystemExit) as stop:
            main()
        return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [
        line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")
    ]
    for word in words:
        assert word in error, error
    assert len(error) < 500, error


def test_a_path_that_no_system_takes(tmp_path: Path, build_here: Any) -> None:
    file = config_file(tmp_path, SYNTHETIC, {}, output="caches/a\0b")
    refused(build_here(file), "output holds a NUL character", "'caches/a\\x00b'")


def changed(tmp_path: Path, tiny_llama: Path, vocab_size: int | None = None, **fields: Any) -> Path:
    """A copy of the tiny Llama with other config fields, or with embeddings of another size."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    if vocab_size is not None:
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
            rows = torch.randn(vocab_size, weights[name].shape[1]) * 0.05
            common = min(vocab_size, len(weights[name]))
            rows[:common] = weights[name][:common]
            weights[name] = rows
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        fields["vocab_size"] = vocab_size
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


# --- data


def test_rows_of_all_kinds(tmp_path: Path, build_here: Any) -> None:
    rows = [
        None,
        "",
        "  \n",
        5,
        ["x"],
        {"a": 1},
        True,
        "fine",
        "\ud83d",
        "z" * 2_000_000,
        "the end",
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    done = build_here(config_file(tmp_path, SYNTHETIC, {"path": str(data), "overlong": "drop"}))
    assert done.returncode == 0, done.stderr
    cache = CacheReader(tmp_path / "cache")
    assert [sequence.sequence_id for sequence in cache] == ["train/7", "train/10"]
    counters = cache.manifest.data.counters
    reasons = ("null", "empty", "not_a_string", "broken_unicode")
    assert [counters[f"rows_skipped_{reason}"] for reason in reasons] == [1, 2, 4, 1]
    assert counters["dropped_overlong"] == 1


def test_an_enormous_row(tmp_path: Path, build_here: Any) -> None:
    """5 MB in one row, to be cut to 32 tokens."""
    data = tmp_path / "rows.jsonl"
    with data.open("w") as file:
        for text in ("before", "the teacher reads " * 280_000, "after"):
            file.write(json.dumps({"text": text}) + "\n")
    done = build_here(config_file(tmp_path, SYNTHETIC, {"path": str(data), "overlong": "truncate"}))
    assert done.returncode == 0, done.stderr
    assert [len(sequence) for sequence in CacheReader(tmp_path / "cache")] == [7, 32, 6]


@pytest.mark.parametrize("rows", [[None, ""], [3, 4], []])
def test_data_without_text(tmp_path: Path, build_here: Any, rows: list[Any]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    refused(
        build_here(config_file(tmp_path, SYNTHETIC, {"path": str(data)})),
        "empty data set",
        str(data),
    )


def test_nothing_fits(tmp_path: Path, build_here: Any) -> None:
    refused(
        build_here(config_file(tmp_path, SYNTHETIC, {"max_length": 1})),
        "no token to learn",
        "raise data.max_length (1)",
    )


# --- models

UNLOADABLE = {
    "truncated weights": (
        lambda f: _cut(f / "model.safetensors"),
        ["cannot load", "damaged", "fetch it again"],
    ),
    "garbage for weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 5000),
        ["cannot load", "damaged"],
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ["cannot load", "no file named model.safetensors"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["is not a model folder", "config.json"]),
    "a config that is not JSON": (
        lambda f: (f / "config.json").write_text("{not"),
        ["config.json", "cannot be read"],
    ),
    "an unknown architecture": (
        lambda f: _edit(f, model_type="foo", architectures=["FooForCausalLM"]),
        ["config.json", "cannot be read", "`foo`"],
    ),
    "weights of another size": (lambda f: _edit(f, vocab_size=512), ["cannot load", "shapes"]),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        ["the tokenizer of", "there is no tokenizer.json, nor", "beside the weights"],
    ),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("what", UNLOADABLE)
def test_models_that_do_not_load(
    tmp_path: Path, tiny_llama: Path, build_here: Any, what: str
) -> None:
    model = changed(tmp_path, tiny_llama)
    spoil, words = UNLOADABLE[what]
    spoil(model)
    refused(
        build_here(config_file(tmp_path, {"model": str(model), "backend": "transformers"}, {})),
        *words,
        str(model),
    )


def test_a_tokenizer_larger_than_the_model(
    tmp_path: Path, tiny_llama: Path, build_here: Any
) -> None:
    model = changed(tmp_path, tiny_llama, vocab_size=300)
    done = build_here(config_file(tmp_path, {"model": str(model), "backend": "transformers"}, {}))
    refused(done, "the tokenizer gives id", "the teacher knows ids below 300", "not this teacher's")


def test_a_model_larger_than_its_tokenizer(
    tmp_path: Path, tiny_llama: Path, build_here: Any
) -> None:
    """Padded embeddings, as Qwen's: the teacher can predict ids that no text has, and its
    distribution is stored as it is.
    """
    model = changed(tmp_path, tiny_llama, vocab_size=448)
    done = build_here(config_file(tmp_path, {"model": str(model), "backend": "transformers"}, {}))
    assert done.returncode == 0, done.stderr
    manifest = CacheReader(tmp_path / "cache").manifest
    assert (manifest.teacher.vocab_size, manifest.tokenizer.vocab_size) == (448, 384)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_max_length_above_the_models_context(
    tmp_path: Path, tiny_llama: Path, build_here: Any, backend: str
) -> None:
    done = build_here(
        config_file(tmp_path, {"model": str(tiny_llama), "backend": backend}, {"max_length": 300})
    )
    refused(done, "reads at most 256 tokens", "data.max_length is 300")


@needs_vllm
def test_an_engine_argument_with_a_field_of_its_own(
    tmp_path: Path, tiny_llama: Path, build_here: Any
) -> None:
    teacher = {"model": str(tiny_llama), "backend": "vllm", "engine_args": {"max_model_len": 8}}
    done = build_here(config_file(tmp_path, teacher, {}))
    refused(done, "engine_args.max_model_len cannot be set", "use data.max_length")


@needs_vllm
def test_an_engine_argument_that_cannot_work(
    tmp_path: Path, tiny_llama: Path, build_here: Any
) -> None:
    teacher = {
        "model": str(tiny_llama),
        "backend": "vllm",
        "engine_args": {"kv_cache_memory_bytes": 1000},
    }
    refused(build_here(config_file(tmp_path, teacher, {})), "vLLM cannot start")


@needs_vllm
def test_vllm_with_damaged_weights(tmp_path: Path, tiny_llama: Path) -> None:
    model = changed(tmp_path, tiny_llama)
    _cut(model / "model.safetensors")
    refused(
        build(config_file(tmp_path, {"model": str(model), "backend": "vllm"}, {})),
        "vLLM cannot start",
        str(model),
    )
