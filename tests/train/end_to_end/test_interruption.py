"""What stops a training before its end, and what it goes on from: a scheduler's signal, a folder
that has moved.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from logitcask.cache_format.errors import UserError
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.run import train
from tests.train.conftest import scratch


@pytest.fixture
def cache(write_cache):
    return str(write_cache("sound", shards=1).path)


def _signal_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends SIGTERM at the end of a step; transformers then waits three seconds, which here pass
    at once.
    """
    end_step = DistillationTrainer.end_step

    def end(self: DistillationTrainer) -> None:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(self)

    monkeypatch.setattr(DistillationTrainer, "end_step", end)
    monkeypatch.setattr(threading, "Timer", lambda wait, call: SimpleNamespace(start=call))


def test_a_training_that_a_signal_stops_has_not_finished(
    cache, scratch_config, monkeypatch, tmp_path
):
    """Run again, it ends as if nothing had stopped it: weights (with dropout), positions, the
    last loss.
    """
    training = {
        "enable_jit_checkpoint": True,
        "max_steps": 6,
        "logging_steps": 4,
        "save_total_limit": 1,
    }
    training |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
    }

    def config(name):
        student = scratch(attention_dropout=0.2)
        return scratch_config(
            cache=cache, student=student, training={**training, "output_dir": str(tmp_path / name)}
        )

    before = signal.getsignal(signal.SIGTERM)
    expected, _ = train(config("whole"))
    with monkeypatch.context() as patch:
        _signal_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config("run"))
    assert signal.getsignal(signal.SIGTERM) == before
    output = tmp_path / "run"
    assert not (output / "metrics.json").exists()
    assert (
        json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    )
    found, _ = train(config("run"))
    assert (found["steps"], found["positions_trained"]) == (6, expected["positions_trained"])
    assert found["after"] == expected["after"]
    weights, whole = (
        load_file(Path(folder) / "model.safetensors") for folder in (output, tmp_path / "whole")
    )
    assert all(weights[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize("last", [6, 8], ids=["inside", "after the last step"])
def test_the_best_student_is_found_in_a_folder_that_has_moved(
    cache, scratch_config, tmp_path, last
):
    """The largest KL counts as the best here, so that the first student is the best."""
    training = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8}
    training |= {"load_best_model_at_end": True, "greater_is_better": True}
    expected, _ = train(scratch_config(cache=cache, training=training))
    run, moved = tmp_path / "run", tmp_path / "moved"
    best = Path(
        json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())[
            "best_model_checkpoint"
        ]
    ).name
    assert best == "checkpoint-2"
    (run / "metrics.json").unlink()
    for step in range(last + 2, 10, 2):
        shutil.rmtree(run / f"checkpoint-{step}")
    run.rename(moved)
    config = scratch_config(cache=cache, training={**training, "output_dir": str(moved)})
    (moved / best).rename(tmp_path / "aside")
    with pytest.raises(
        UserError, match=f"saved in {best}, which is no complete checkpoint in .*moved; put it back"
    ):
        train(config)
    (tmp_path / "aside").rename(moved / best)
    found, _ = train(config)
    assert found["after"] == expected["after"]
