"""A small run of rounds: tiny models on disk, and stages that run in the test's own process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import logitcask.rounds.run as rounds_run
from logitcask.cache_format.cli.config_file import load_config
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import app
from logitcask.pipeline.config import BuildConfig
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.stage import Ended
from logitcask.train.config import TrainConfig
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.run import train

COMMANDS: list[list[str]] = []
"""The commands that ``in_process`` has run, in order."""


def in_process(command: list[str], options: list[str]) -> Ended:
    """As ``run_stage``, without processes, which need 10 seconds each to import torch."""
    COMMANDS.append(command)
    program, name, config, *overrides = command
    if name in ("prompts", "generations"):
        app([name, config, *overrides], standalone_mode=False)
        return Ended({}, 1.0, 1)
    if program == "teacher-cache":
        result = build(load_config(BuildConfig, Path(config), overrides))
        output = load_config(BuildConfig, Path(config), overrides).output
        times = {"seconds": result.seconds, "writing_seconds": result.writing_seconds}
        return Ended({"cache": str(output), **times}, 1.0, 1)
    train(load_config(TrainConfig, Path(config), overrides))
    return Ended({}, 1.0, 1)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    COMMANDS.clear()
    monkeypatch.setattr(rounds_run, "run_stage", in_process)


@pytest.fixture(scope="session")
def text(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Given text, scored by the tiny Llama: the cache, and the config that builds it."""
    folder = tmp_path_factory.mktemp("text")
    config = {
        "teacher": {"model": str(tiny_llama), "backend": "transformers"},
        "data": {"path": "python-docs", "max_length": 48, "max_tokens": 2500},
        "store": {"top_k": 8},
        "audit": {"sequences": 0},
        "output": str(folder / "cache"),
        "log": False,
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(config))
    build(BuildConfig.model_validate(config))
    return folder / "cache", folder / "text.yaml"


@pytest.fixture
def rounds(
    tmp_path: Path, tiny_llama: Path, text: tuple[Path, Path]
) -> Callable[..., RoundsConfig]:
    """``rounds(student={...}, teacher={...}, output=..., **rounds)``: a config, and its files."""

    def make(
        *,
        student: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        generate: dict[str, Any] | None = None,
        output: str = "run",
        **fields: Any,
    ) -> RoundsConfig:
        tmp_path.joinpath("prompts.jsonl").write_text(
            "".join(f'{{"q": "what is {n}?"}}\n' for n in range(10))
        )
        teachers = {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {
                "path": str(tmp_path / "prompts.jsonl"),
                "prompt_field": "q",
                "max_length": 48,
                "generate": {"max_new_tokens": 10, **(generate or {})},
            },
            "store": {"top_k": 8, "sample_logprobs": True},
            "audit": {"sequences": 0},
            "log": False,
            "output": "unused",
            **(teacher or {}),
        }
        training = {
            "output_dir": "unused",
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
        }
        changes = student or {}
        students = {
            "cache": str(text[0]),
            "student": {"init_from": str(tiny_llama), "keep_layers": [1]},
            "losses": [{"name": "forward_kl"}],
            "evaluation": {"held_out": 0.3, "max_sequences": 4},
            **changes,
            "training": {**training, **changes.get("training", {})},
        }
        (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teachers))
        (tmp_path / "student.yaml").write_text(yaml.safe_dump(students))
        settings = {"count": 2, "prompts": 4, "steps_per_round": 2, **fields}
        return RoundsConfig(
            teacher_config=tmp_path / "teacher.yaml",
            student_config=tmp_path / "student.yaml",
            rounds=settings,
            output=tmp_path / output,
        )

    return make


def kill_at(event: int) -> None:
    """Kills this process by SIGKILL at the ``event``-th fsync, rename or training step from now."""
    left = event

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    DistillationTrainer.compute_loss = counted(DistillationTrainer.compute_loss)  # type: ignore[method-assign]
