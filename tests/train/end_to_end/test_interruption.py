"""What stops a training before its end, and what it goes on from: a scheduler's signal, a folder
that has moved.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from logitcask.cache_format.errors import UserError
from logitcask.cache_format.runtime.interruption import Stopped
from logitcask.train.cli import main
from logitcask.train.config import TrainConfig
from logitcask.train.loop.checkpoints import last_checkpoint
from logitcask.train.loop.stop import StopOnSignal
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.run import train
from tests.train.conftest import scratch


@pytest.fixture
def cache(write_cache):
    return str(write_cache("sound", shards=1).path)


def _signal_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends a signal inside a step, before its end."""
    compute_loss = DistillationTrainer.compute_loss

    def compute(self: DistillationTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return compute_loss(self, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute)


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


_NO_STEP_SECONDS = 300
_RANKS = ([0], [1], [0, 1], [1, 0])
"""The processes that get a signal, in each start of the training of two."""
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("step", "training"),
    [
        (3, {"save_steps": 2, **EVALUATED}),
        # An evaluation that finds no better student does not prevent the checkpoint.
        (4, {"save_strategy": "best", "greater_is_better": True, **EVALUATED}),
        (3, {"save_strategy": "no", "enable_jit_checkpoint": True}),
        (6, {"save_strategy": "no"}),
    ],
    ids=["steps", "best", "no", "last"],
)
def test_a_training_that_a_signal_stops_has_not_finished(
    cache, scratch_config, monkeypatch, tmp_path, number, step, training
):
    """Run again, it ends as if nothing had stopped it: weights (with dropout), positions, the
    last loss.
    """
    training = {"max_steps": 6, "logging_steps": 4, "save_total_limit": 1, **training}

    def config(name):
        student = scratch(attention_dropout=0.2)
        return scratch_config(
            cache=cache, student=student, training={**training, "output_dir": str(tmp_path / name)}
        )

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    expected, _ = train(config("whole"))
    with monkeypatch.context() as patch:
        _signal_at(step, number, patch)
        with pytest.raises(Stopped) as stopped:
            train(config("run"))
    assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    output = tmp_path / "run"
    assert not (output / "metrics.json").exists()
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == step
    found, _ = train(config("run"))
    assert (found["steps"], found["positions_trained"]) == (6, expected["positions_trained"])
    assert found["after"] == expected["after"]
    weights, whole = _weights(output), _weights(tmp_path / "whole")
    assert all(weights[name].equal(whole[name]) for name in whole)


class Child:
    """``train-student`` in a forked process. It tells the number of steps it has made."""

    def __init__(self, fork: Any, file: Path, environment: dict[str, str] | None = None) -> None:
        self.said = file.with_name(f"said{(environment or {}).get('RANK', '')}.txt")
        self._steps, steps = multiprocessing.get_context("fork").Pipe(duplex=False)
        self.made = 0

        def work() -> None:
            os.environ.update(environment or {})
            # As in a process that has trained nothing yet.
            AcceleratorState._reset_state(reset_partial_state=True)
            sys.stdout = sys.stderr = open(self.said, "w", buffering=1)  # noqa: SIM115
            logging.root.handlers.clear()
            on_step_end = StopOnSignal.on_step_end

            def tell(stop: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
                steps.send(state.global_step)
                on_step_end(stop, args, state, control, **more)

            StopOnSignal.on_step_end = tell
            sys.argv = ["train-student", str(file)]
            main()

        self.process = fork(work)
        steps.close()

    def wait_for(self, step: int) -> None:
        """Returns after that step, or at the process's end."""
        while self.made < step and self._receive():
            pass

    def end(self) -> int | None:
        """The exit code; ``made`` is then the last step."""
        while self._receive():
            pass
        self.process.join()
        return self.process.exitcode

    def _receive(self) -> bool:
        if not self._steps.poll(_NO_STEP_SECONDS):
            self.process.kill()  # else processes that wait for each other would hold up all tests
        try:
            self.made = self._steps.recv()
        except EOFError:
            return False
        return True


def _last(output: Path) -> int:
    folder = last_checkpoint(output)
    return int(folder.name.partition("-")[2]) if folder else 0


def _written(config: TrainConfig, file: Path) -> Path:
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


def test_sigterm_at_20_random_moments(cache, scratch_config, tmp_path, fork, rng):
    """Each time the step at hand is saved, and the exit code is 143. At the end the weights are
    those of an undisturbed training.
    """

    def config(name):
        return scratch_config(
            cache=cache,
            student=scratch(attention_dropout=0.2),
            training={"max_steps": 80, "output_dir": str(tmp_path / name)},
        )

    train(config("whole"))
    file, output = _written(config("run"), tmp_path / "run.yaml"), tmp_path / "run"
    stops = 0
    while stops < 20:
        child, begin = Child(fork, file), _last(output)
        child.wait_for(begin + int(rng.integers(1, 4)))
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(child.process.pid, signal.SIGTERM)
        code = child.end()
        if child.made == 80:  # the signal came too late to stop it: from the start again
            shutil.rmtree(output)
            continue
        stops += 1
        assert code == 143, child.said.read_text()
        assert begin < _last(output) == child.made
        assert child.said.read_text().splitlines()[-2:] == [
            f"SIGTERM: the checkpoint of step {child.made} of 80 is saved",
            "stopped by SIGTERM; run the same command again to go on",
        ]
        assert len(list(output.glob("checkpoint-*"))) <= 2
    assert Child(fork, file).end() == 0
    weights, whole = _weights(output), _weights(tmp_path / "whole")
    assert all(weights[name].equal(whole[name]) for name in whole)


def test_two_processes_stop_at_the_same_step(cache, scratch_config, tmp_path, fork, rng, two_ranks):
    """At random moments, also if only one of them has the signal. Both exit with its code, and at
    the end the weights are those of an undisturbed training.
    """

    def config(name):
        training = {"max_steps": 30, "output_dir": str(tmp_path / name)}
        return scratch_config(cache=cache, student=scratch(), training=training)

    def start(file):
        return [Child(fork, file, environment) for environment in two_ranks()]

    whole = start(_written(config("whole"), tmp_path / "whole.yaml"))
    assert [child.end() for child in whole] == [0, 0], whole[1].said.read_text()
    file, output = _written(config("run"), tmp_path / "run.yaml"), tmp_path / "run"
    for ranks in _RANKS:
        children, begin = start(file), _last(output)
        children[1].wait_for(begin + int(rng.integers(1, 3)))
        time.sleep(float(rng.uniform(0, 0.05)))
        number = signal.SIGINT if rng.integers(2) else signal.SIGTERM
        for rank in ranks:
            os.kill(children[rank].process.pid, number)
        codes = [child.end() for child in children]
        assert codes == [128 + number] * 2, children[0].said.read_text()
        step = children[0].made
        assert begin < _last(output) == step == children[1].made < 30
        assert f"the checkpoint of step {step} of 30 is saved" in children[0].said.read_text()
        assert len(children[1].said.read_text().splitlines()) == 1
    assert [child.end() for child in start(file)] == [0, 0]
    weights, expected = _weights(output), _weights(tmp_path / "whole")
    assert all(weights[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("moment", "made"),
    [
        ("preparation.build_student", 0),
        ("run._measure_before", 0),
        ("run.save_student", 3),
        ("results.model_card", 3),
    ],
)
def test_outside_the_training_a_signal_takes_effect_at_once(
    cache, scratch_config, tmp_path, fork, monkeypatch, moment, made
):
    expected, _ = train(
        scratch_config(cache=cache, training={"output_dir": str(tmp_path / "whole")})
    )
    file = _written(scratch_config(cache=cache), tmp_path / "run.yaml")

    def stop(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it has waited")

    with monkeypatch.context() as patch:
        patch.setattr(f"logitcask.train.{moment}", stop)
        child = Child(fork, file)
        assert child.end() == 143, child.said.read_text()
    assert (child.made, _last(tmp_path / "run")) == (made, made)
    assert child.said.read_text().splitlines()[-1].startswith("stopped by SIGTERM")
    assert Child(fork, file).end() == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["after"] == expected["after"]


def test_a_second_signal_ends_at_once(cache, scratch_config, tmp_path, fork, monkeypatch):
    """Nothing is saved, and the run goes on from its last checkpoint."""
    training = {"max_steps": 6, "save_steps": 2}
    file = _written(scratch_config(cache=cache, training=training), tmp_path / "run.yaml")
    on_step_begin = StopOnSignal.on_step_begin

    def begin(stop: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_begin(stop, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_begin", begin)
        child = Child(fork, file)
        assert child.end() == 143, child.said.read_text()
    assert (child.made, _last(tmp_path / "run")) == (3, 2)
    assert Child(fork, file).end() == 0


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_readable_for_whom_the_umask_lets(cache, scratch_config, tmp_path, mask):
    before = os.umask(mask)
    try:
        train(scratch_config(cache=cache, training={"save_steps": 2}))
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"model.safetensors", "optimizer.pt"} <= {file.name for file in files}
    wrong = {
        file.name: oct(file.stat().st_mode & 0o777)
        for file in files
        if file.stat().st_mode & 0o777 != 0o666 & ~mask
    }
    assert not wrong


@pytest.mark.parametrize("last", [6, 8], ids=["inside", "after the last step"])
def test_the_best_student_is_found_in_a_folder_that_has_moved(
    cache, scratch_config, tmp_path, last
):
    """Of the largest and the smallest KL, one is found before the last step. It is the best here."""
    training = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8}
    training |= {"load_best_model_at_end": True, "save_total_limit": None}
    run, moved = tmp_path / "run", tmp_path / "moved"
    for greater in (True, False):
        training["greater_is_better"] = greater
        expected, _ = train(scratch_config(cache=cache, training=training))
        state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
        best = Path(state["best_model_checkpoint"]).name
        if best != "checkpoint-8":
            break
        shutil.rmtree(run)
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
