"""``kill -9`` at random moments of ``student-rounds``: started again by the same command, it must
end with the student and the caches of an undisturbed run.

    python benchmarks/kills_rounds.py [--kills 30] [--seed N] [--out FILE.json]

Three rounds of a tiny Llama, with given text, replay and checkpoints, each stage in a process of
its own as always. A kill hits the command, the process of a stage, or both, at a moment that is
uniformly random in the seconds that the run still needs, or within half a second of a hand-over. A
run that gets through before all kills are done is compared and begun again.

Compared: the weights of every student byte for byte, the content of every cache, and the finished
stages, each once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from kills import environment, tiny_llama
from machine import machine

from logitcask.cache_format import CacheReader

COMMAND = [sys.executable, "-c", "from logitcask.rounds.cli import main; main()"]
ROUNDS = 3
TARGETS = ("command", "stage", "both")


class Run:
    """One run of rounds: its command, and its state on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.output = folder, folder / name
        self.log = folder / f"{name}.log"
        self.home = folder / f"{name}-home"  # no cache of another run is found and taken

    def start(self) -> subprocess.Popen[bytes]:
        command = [*COMMAND, str(self.folder / "rounds.yaml"), f"output={self.output}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment() | {"LOGITCASK_HOME": str(self.home)},
                process_group=0,
            )

    def stages(self) -> list[str]:
        """The finished stages."""
        try:
            return [
                each["stage"]
                for each in json.loads((self.output / "state.json").read_text())["done"]
            ]
        except FileNotFoundError:
            return []

    def facts(self) -> dict[str, Any]:
        """What must be the same in every run."""
        found: dict[str, Any] = {"stages": self.stages()}
        for number in range(ROUNDS + 1):
            of_round = self.output / f"round-{number:03d}"
            weights = (of_round / "student" / "model.safetensors").read_bytes()
            found[f"student {number}"] = hashlib.sha256(weights).hexdigest()
            if number:
                manifest = CacheReader(of_round / "cache").manifest
                found[f"cache {number}"] = [manifest.content_sha256, manifest.fingerprint]
        return found


def configure(folder: Path) -> None:
    """The configs of all runs."""
    model = str(tiny_llama(folder / "model"))
    questions = "".join(json.dumps({"q": f"what is {n}?"}) + "\n" for n in range(40))
    (folder / "prompts.jsonl").write_text(questions)
    common = {
        "teacher": {"model": model, "backend": "transformers"},
        "audit": {"sequences": 0},
        "log": False,
    }
    text = {
        **common,
        "data": {"path": "python-docs", "max_length": 48, "max_tokens": 4000},
        "store": {"top_k": 8, "shard_tokens": 1000},
        "output": str(folder / "text"),
    }
    teacher = {
        **common,
        "data": {
            "path": str(folder / "prompts.jsonl"),
            "text_field": "q",
            "max_length": 64,
            "generate": {"max_new_tokens": 32},
        },
        "store": {"top_k": 8, "sample_logprobs": True, "shard_tokens": 200},
        "output": "unused",
    }
    student = {
        "cache": str(folder / "text"),
        "cache_config": str(folder / "text.yaml"),
        "student": {"init_from": model, "keep_layers": [1]},
        "losses": [{"name": "jsd", "beta": 0.5}],
        "evaluation": {"held_out": 0.2, "max_sequences": 4},
        "training": {
            "output_dir": "unused",
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_steps": 4,
            "save_total_limit": 2,
            "use_cpu": True,
            "seed": 3,
        },
    }
    rounds = {
        "teacher_config": str(folder / "teacher.yaml"),
        "student_config": str(folder / "student.yaml"),
        "rounds": {
            "count": ROUNDS,
            "prompts": 24,
            "steps_per_round": 16,
            "warmup_steps": 16,
            "on_policy_fraction": 0.5,
            "replay": 0.25,
        },
        "output": "unused",
    }
    for name, config in (
        ("text", text),
        ("teacher", teacher),
        ("student", student),
        ("rounds", rounds),
    ):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def stage_of(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The process of the stage that runs now."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            if "logitcask.rounds.child" in child.cmdline():
                return child
    return None


def disturb(
    run: Run, rng: np.random.Generator, seconds: float, aim: str, target: str
) -> str | None:
    """Starts the run and kills it. Returns where it was; None if it ended before."""
    process = run.start()
    before = len(run.stages())
    moment = time.monotonic() + rng.uniform(0.5, seconds)
    while process.poll() is None:
        if aim == "hand-over" and len(run.stages()) > before:
            time.sleep(rng.uniform(0, 0.5))
            break
        if aim == "any" and time.monotonic() > moment:
            break
        time.sleep(0.02)
    if process.poll() is not None:
        if process.returncode:
            raise RuntimeError(f"the run does not go on: {run.log.read_text()[-2000:]}")
        return None
    stage = stage_of(process)
    where = "starting" if stage is None else " ".join(stage.cmdline()).split("child ")[1].split()[1]
    if target != "stage" or stage is None:
        os.kill(process.pid, signal.SIGKILL)
    if target != "command" and stage is not None:
        with suppress(psutil.NoSuchProcess):
            stage.kill()
    process.wait()
    # A command that is killed takes its stage with it; one whose stage is killed says so and ends.
    if stage is not None:
        psutil.wait_procs([stage], timeout=30)
    return where


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    began = time.monotonic()
    kills: Counter[str] = Counter()
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        configure(folder)
        whole = Run(folder, "whole")
        started = time.monotonic()
        if whole.start().wait():
            raise SystemExit(whole.log.read_text()[-2000:])
        seconds = time.monotonic() - started
        expected = whole.facts()
        print(f"{len(expected['stages'])} stages in {seconds:.0f} s, undisturbed", flush=True)
        runs = 0
        while kills.total() < arguments.kills:
            # With a cache of given text that stands, a run would find it done.
            shutil.rmtree(folder / "text")
            run, runs = Run(folder, f"run-{runs}"), runs + 1
            ended = False
            while kills.total() < arguments.kills and not ended:
                left = seconds * (1 - len(run.stages()) / len(expected["stages"]))
                aim = "hand-over" if rng.random() < 0.3 else "any"
                target = TARGETS[rng.integers(3)]
                where = disturb(run, rng, max(2.0, min(left, 30.0)), aim, target)
                ended = where is None
                if where is not None:
                    kills[f"{where}, {target}"] += 1
                    print(f"kill {kills.total()}: {where}, {target}; {run.stages()}", flush=True)
            if not ended and run.start().wait():
                raise SystemExit(run.log.read_text()[-2000:])
            found = run.facts()
            new = [
                f"run {runs}: another {name}" for name in expected if found[name] != expected[name]
            ]
            problems += new
            print(f"run {runs} compared: {new or 'the same'}", flush=True)
    result = {
        "machine": machine(),
        "seed": arguments.seed,
        "rounds": ROUNDS,
        "kills": kills.total(),
        "by_stage_and_target": dict(sorted(kills.items())),
        "runs": runs,
        "problems": problems,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
