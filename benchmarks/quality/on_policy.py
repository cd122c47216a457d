"""Ways to learn from what students write, at equal tokens of the teacher and equal steps of the
student: the study of rounds.

    python benchmarks/quality/on_policy.py [PART ...]

run     every student: a line in runs.jsonl each; runs that stand there are not repeated
tables  benchmarks/results/on-policy.json and the table in docs/rounds.md, from what has been run

Both by default. Seeds are the outermost loop. A seed has its own pre-trained student, sampling and
order of the data. The rounds are those of the command, except that their stages run in this
process, which saves the imports of each. Everything can be stopped and run again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from on_policy_arms import ARMS, Arm
from on_policy_judge import Judge
from on_policy_material import Size, make, student
from student import Schedule
from tables import fill

import logitcask.rounds.run as rounds_run
from logitcask.cache_format import CacheReader
from logitcask.cache_format.cli.config_file import load_config
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.cli import app
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.rounds.config import RoundsConfig
from logitcask.rounds.stage import Ended
from logitcask.train.config import TrainConfig
from logitcask.train.run import train

PARTS = ("run", "tables")
SCALES = {
    "cpu": Size(
        vocab=4096,
        prompt=12,
        length=60,
        rounds=4,
        prompts=96,
        steps=36,
        batch=8,
        lr=1e-3,
        held_out=64,
        documents=True,
        student=(128, 3),
        pretraining=Schedule(steps=1000, batch=16, lr=3e-3),
        pretraining_texts=16_000,
    ),
    "smoke": Size(
        vocab=400,
        prompt=6,
        length=16,
        rounds=2,
        prompts=8,
        steps=2,
        batch=2,
        lr=1e-3,
        held_out=3,
        documents=False,
        student=(32, 1),
        pretraining=Schedule(steps=2, batch=4, lr=1e-3),
        pretraining_texts=32,
    ),
}
START = "at the start"
METRICS = {
    "own_nll": "teacher's NLL of its samples",
    "own_kl": "KL(student \\|\\| teacher) on them",
    "rouge_l": "Rouge-L with the teacher",
    "ce": "CE, documents",
    "kl": "KL(teacher \\|\\| student), documents",
}
PAGE = Path(__file__).parents[2] / "docs" / "rounds.md"
RESULTS = Path(__file__).parents[1] / "results" / "on-policy.json"


class Study:
    """The work folder, and what is run in it."""

    def __init__(self, work: Path, scale: str, strong: str) -> None:
        self.folder, self.size = work / scale, SCALES[scale]
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["LOGITCASK_HOME"] = str(self.folder / "home")
        make(self.folder, Path(resolve_model(strong).location), self.size)
        self.records = self.folder / "runs.jsonl"

    def run(self, seeds: int) -> None:
        """Every student that has not been run, but for those that another process is at."""
        judge = Judge(self.folder, self.size.length)
        (self.folder / "work").mkdir(exist_ok=True)
        for arm, seed in [(arm, seed) for seed in range(seeds) for arm in (None, *ARMS)]:
            name = START if arm is None else arm.name
            with suppress(Timeout), FileLock(self._work(name, seed, ".lock"), timeout=0):
                if any((each["arm"], each["seed"]) == (name, seed) for each in self.found()):
                    continue
                begun = time.perf_counter()
                start = student(self.folder, self.size, seed)
                made, tokens, facts = (
                    (start, 0, {}) if arm is None else self._learn(arm, seed, start)
                )
                record = {
                    "arm": name,
                    "seed": seed,
                    "teacher_tokens": tokens,
                    **judge.figures(made),
                    **facts,
                    "seconds": round(time.perf_counter() - begun, 1),
                }
                with self.records.open("a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)

    def _work(self, name: str, seed: int, ending: str = "") -> Path:
        return self.folder / "work" / f"{name}-{seed}{ending}".replace(" ", "-").replace("'", "")

    def found(self) -> list[dict[str, Any]]:
        """What has been run."""
        lines = self.records.read_text().splitlines() if self.records.exists() else []
        return [json.loads(line) for line in lines]

    def _learn(self, arm: Arm, seed: int, start: Path) -> tuple[Path, int, dict[str, Any]]:
        """Trains a student: its folder, tokens that the teacher has read, and further facts."""
        folder = self._work(arm.name, seed)
        if folder.exists():
            shutil.rmtree(folder)  # of a run that was stopped
        folder.mkdir(parents=True)
        stages = Stages()
        # Given text: of the arm, or a little for the evaluations in between.
        text = self._teacher(folder, seed, "documents", max(arm.given, 0.25), folder / "text")
        build(BuildConfig.model_validate(text))
        given = CacheReader(text["output"]).manifest.statistics.tokens if arm.given else 0
        (folder / "student.yaml").write_text(yaml.safe_dump(self._student(arm, seed, start, text)))
        if arm.text == "rounds":
            teacher = self._teacher(folder, seed, "prompts", 1.0, folder / "unused", **arm.generate)
            (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher))
            settings = {
                "count": self.size.rounds,
                "prompts": round(self.size.prompts * arm.prompts),
                "steps_per_round": self.size.steps,
                **arm.rounds,
            }
            config = RoundsConfig(
                teacher_config=folder / "teacher.yaml",
                student_config=folder / "student.yaml",
                rounds=settings,
                output=folder / "rounds",
            )
            rounds_run.run_stage = stages
            rounds_run.run_rounds(config, [])
            last = folder / "rounds" / f"round-{self.size.rounds:03d}" / "student"
            report = json.loads((folder / "rounds" / "rounds.json").read_text())
            rejected = [each["cache"].get("rejection_rate") for each in report["rounds"][1:]]
            facts = {"rejection_rate": rejected} if "skd" in arm.rounds else {}
            return last, given + stages.tokens, facts
        if arm.text == "teacher":
            text = self._teacher(folder, seed, "prompts", arm.prompts, folder / "answers")
            build(BuildConfig.model_validate(text))
            given = CacheReader(text["output"]).manifest.statistics.tokens
        changes = [
            f"cache={json.dumps(text['output'])}",
            f"training.output_dir={json.dumps(str(folder / 'out'))}",
            f"training.max_steps={self.size.rounds * self.size.steps}",
        ]
        train(load_config(TrainConfig, folder / "student.yaml", changes))
        return folder / "out", given, {}

    def _teacher(
        self, folder: Path, seed: int, kind: str, share: float, output: Path, **generate: Any
    ) -> dict[str, Any]:
        """A teacher-cache config for a share of the documents or of the prompts."""
        lines = (self.folder / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(lines[: round(share * len(lines))]))
        asked = {
            "max_new_tokens": self.size.length - self.size.prompt,
            "seed": 1000 * seed,
            **generate,
        }
        return {
            "teacher": {"model": str(self.folder / "teacher"), "backend": "transformers"},
            "data": {
                "path": str(data),
                "text_field": "text",
                "max_length": self.size.length,
                **({"generate": asked} if kind == "prompts" else {}),
            },
            "store": {"sample_logprobs": True, "seed": seed},
            "audit": {"sequences": 0},
            "log": False,
            "output": str(output),
        }

    def _student(self, arm: Arm, seed: int, start: Path, text: dict[str, Any]) -> dict[str, Any]:
        return {
            "cache": text["output"],
            "student": {"init_from": str(start)},
            "losses": list(arm.losses),
            "evaluation": {"max_sequences": 4},
            "training": {
                "output_dir": "unused",
                "per_device_train_batch_size": self.size.batch // (2 if arm.pairs else 1),
                "learning_rate": self.size.lr,
                "lr_scheduler_type": "linear",
                "warmup_steps": 4,
                "max_grad_norm": 1.0,
                "save_strategy": "steps" if arm.text == "rounds" else "no",
                "save_steps": 10_000,
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": seed,
            },
        }


class Stages:
    """Commands of rounds in this process. ``tokens``: those that the teacher has read or written;
    an answer that a further pass of SKD has left as it was is not read again.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, command: list[str], options: list[str]) -> Ended:
        program, name, file, *overrides = command
        if program == "train-student":
            train(load_config(TrainConfig, Path(file), overrides))
            return Ended({}, 0.0, 0)
        if name != "build":  # prompts, generations: no model reads anything
            app([name, file, *overrides], standalone_mode=False)
            return Ended({}, 0.0, 0)
        config = load_config(BuildConfig, Path(file), overrides)
        result = build(config)
        before = {}
        if config.splice is not None:
            before = {
                s.sequence_id: s.input_ids.tobytes() for s in CacheReader(config.splice.cache)
            }
        self.tokens += sum(
            len(s.input_ids)
            for s in CacheReader(config.output)
            if before.get(s.sequence_id) != s.input_ids.tobytes()
        )
        times = {"seconds": result.seconds, "writing_seconds": result.writing_seconds}
        return Ended({"cache": str(config.output), **times}, 0.0, 0)


def table(found: list[dict[str, Any]]) -> str:
    """A row per arm: mean and standard deviation over seeds."""
    lines = [
        "| arm | teacher's tokens | " + " | ".join(METRICS.values()) + " |",
        "| --- |" + " --- |" * (1 + len(METRICS)),
    ]
    for name in [START, *(arm.name for arm in ARMS)]:
        runs = [each for each in found if each["arm"] == name]
        if not runs:
            continue
        cells = [f"{mean(each['teacher_tokens'] for each in runs):,.0f}"]
        for metric in METRICS:
            values = [each[metric] for each in runs]
            digits = 1 if metric == "rouge_l" else 3
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_in_processes(workers: int) -> None:
    """This command's ``run`` in so many processes. Exits as the first that fails does."""
    options = [each for each in sys.argv[1:] if each not in PARTS]
    command = [sys.executable, str(Path(__file__)), "run", *options, "--workers", "1"]
    started = [subprocess.Popen(command) for _ in range(workers)]
    codes = [process.wait() for process in started]
    if failed := [code for code in codes if code]:
        sys.exit(failed[0])


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="smoke is a test")
    parser.add_argument("--seeds", type=int, default=3, help="students per arm")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each"
    )
    parser.add_argument("--strong", default="smollm2-135m", help="a built-in name or a folder")
    parser.add_argument("--work", type=Path, default=Path("caches/benchmark-on-policy"))
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    wanted = arguments.parts or PARTS
    study = Study(arguments.work, arguments.scale, arguments.strong)
    if "run" in wanted and arguments.workers == 1:
        torch.set_num_threads(1)
        study.run(arguments.seeds)
    elif "run" in wanted:
        run_in_processes(arguments.workers)
    if "tables" in wanted:
        found = study.found()
        print(table(found))
        if arguments.scale == "cpu":
            facts = {
                "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
                "size": asdict(study.size),
            }
            RESULTS.write_text(json.dumps({**facts, "runs": found}, indent=1) + "\n")
            fill(PAGE, {"on-policy": table(found)})


if __name__ == "__main__":
    main()
