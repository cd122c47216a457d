"""The quality study itself: its sizes, its jobs, and the work folder in which they are done."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import (
    FULL,
    PRETRAINED,
    SCRATCH,
    STORES,
    TEXT,
    Arm,
    bytes_arms,
    losses_arms,
    ranking_arms,
    tails_arms,
    text_arm,
)
from curves import draw
from filelock import FileLock
from student import Schedule, evaluate, from_cache, from_full_logits, hard_labels, train
from tables import summarise, update_page
from teachers import (
    OutOfTime,
    Teacher,
    cache_of,
    load_teacher,
    read_cache,
    score,
    scored_rows,
    sharpness,
    small_llama,
    strong_model,
    write_cache,
)
from text import Text, TextSize, load_text, native_sequences
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitcask.pipeline.teachers.model import resolve_model

TEACHERS = ("strong", "weak")
DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[1] / "results" / "quality.json"


@dataclass(frozen=True)
class Scale:
    """How large everything is. The default suits two CPU cores; ``gpu`` wants one."""

    text: TextSize
    student: tuple[int, int]  # width, layers
    schedule: Schedule
    pretraining: Schedule
    fine_tuning: Schedule
    weak: tuple[int, int]
    weak_training: Schedule
    native: tuple[int, int]  # sequences and their length, for bytes with the teacher's own ids


SCALES = {
    "cpu": Scale(
        text=TextSize(vocab=4096, length=128, train=800, held_out=150, other=8000),
        student=(64, 2),
        schedule=Schedule(steps=500, batch=4, lr=3e-3),
        pretraining=Schedule(steps=1000, batch=8, lr=3e-3),
        fine_tuning=Schedule(steps=200, batch=4, lr=1e-3),
        weak=(192, 3),
        weak_training=Schedule(steps=500, batch=16, lr=2e-3),
        native=(40, 512),
    ),
    "gpu": Scale(
        text=TextSize(vocab=8192, length=128, train=3000, held_out=600, other=14000),
        student=(384, 4),
        schedule=Schedule(steps=1500, batch=16, lr=1.5e-3),
        pretraining=Schedule(steps=3000, batch=32, lr=1.5e-3),
        fine_tuning=Schedule(steps=600, batch=16, lr=3e-4),
        weak=(512, 6),
        weak_training=Schedule(steps=2000, batch=32, lr=1e-3),
        native=(200, 512),
    ),
    "smoke": Scale(
        text=TextSize(vocab=320, length=16, train=24, held_out=6, other=32, docstrings=False),
        student=(32, 1),
        schedule=Schedule(steps=3, batch=4, lr=1e-3),
        pretraining=Schedule(steps=2, batch=4, lr=1e-3),
        fine_tuning=Schedule(steps=2, batch=4, lr=1e-3),
        weak=(32, 1),
        weak_training=Schedule(steps=2, batch=4, lr=1e-3),
        native=(2, 16),
    ),
}


@dataclass(frozen=True)
class Job:
    """One student. Normally init, order and draws are all the seed; the noise arms move one of
    them.
    """

    arm: Arm
    teacher: str | None
    init: int
    order: int
    draws: int

    @property
    def key(self) -> str:
        """What decides the result: the same in every table that shows it."""
        arm = {
            name: value for name, value in asdict(self.arm).items() if name not in ("group", "name")
        }
        return json.dumps([arm, self.teacher, self.init, self.order, self.draws], sort_keys=True)


def jobs(seeds: int) -> Iterator[Job]:
    """Everything that is run, the most telling first."""
    for arms in (studied(), with_hard_labels("weak")):
        for seed in range(seeds):
            yield from (Job(arm, teacher, seed, seed, seed) for arm, teacher in arms)
            if seed == 0 and arms == studied():
                yield from noise()


def studied() -> list[tuple[Arm, str | None]]:
    """Every arm of every table with its teacher, but for what comes last."""
    found: list[tuple[Arm, str | None]] = [(text_arm(SCRATCH), None), (text_arm(PRETRAINED), None)]
    for arms in (bytes_arms(), ranking_arms(PRETRAINED), ranking_arms(SCRATCH), tails_arms()):
        found += [(arm, teacher) for arm in arms for teacher in TEACHERS]
    found += [(arm, "strong") for arm in losses_arms()]
    last = with_hard_labels("weak")
    return [each for each in found if each not in last]


def with_hard_labels(teacher: str) -> list[tuple[Arm, str | None]]:
    """The bytes arms that mix in hard labels."""
    return [(arm, teacher) for arm in bytes_arms() if arm.ce]


def noise() -> Iterator[Job]:
    """What moves a result where nothing that is studied has changed: first weights, order of the
    data, draws.
    """
    full, draws = (
        replace(arm, group="noise") for arm in bytes_arms() if arm.name in (FULL, "12 draws")
    )
    for arm, teacher in ((text_arm(SCRATCH), None), (full, "strong"), (draws, "strong")):
        for other in (1, 2):
            yield Job(arm, teacher, other, 0, 0)
            yield Job(arm, teacher, 0, other, 0)
            if arm is draws:
                yield Job(arm, teacher, 0, 0, other)


class Study:
    """The work folder of one scale, and what is made in it."""

    def __init__(self, work: Path, scale: str, strong: str, deadline: float) -> None:
        self.folder, self.scale, self.deadline = work / scale, SCALES[scale], deadline
        self.strong = Path(resolve_model(strong).location)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs = self.folder / "runs.jsonl"

    def text(self) -> Text:
        with FileLock(self.folder / "text.lock"):
            return load_text(
                self.folder / "text.npz", self.strong / "tokenizer.json", self.scale.text
            )

    def prepare(self, seeds: int) -> None:
        """Teachers' distributions and a pre-trained student per seed. Raises OutOfTime."""
        text = self.text()
        if not (self.folder / "strong-held_out.npy").exists():
            rows = torch.from_numpy(text.vocabulary).long()
            score(
                self.folder,
                "strong",
                strong_model(str(self.strong), self.device),
                text,
                rows,
                self.deadline,
            )
        if not (self.folder / "weak-held_out.npy").exists():
            weak = self._trained("weak-model", self.scale.weak, self.scale.weak_training, text)
            score(self.folder, "weak", weak, text, None, self.deadline)
        for seed in range(seeds):
            self._pretrained(seed, text)

    def _pretrained(self, seed: int, text: Text) -> PreTrainedModel:
        return self._trained(
            f"student-{seed}", self.scale.student, self.scale.pretraining, text, seed
        )

    def _trained(
        self, name: str, size: tuple[int, int], schedule: Schedule, text: Text, seed: int = 0
    ) -> PreTrainedModel:
        """A small Llama trained on the ``other`` text, once."""
        folder = self.folder / name
        if not folder.exists():
            if time.monotonic() > self.deadline:
                raise OutOfTime
            torch.manual_seed(seed)
            model = small_llama(len(text.vocabulary), *size, text.train.shape[1]).to(self.device)
            seconds = train(
                model, hard_labels(text.other, self.device), len(text.other), schedule, order=seed
            )
            print(f"{name}: {seconds:.0f} s", flush=True)
            scratch = self.folder / f"{name}.tmp"
            model.save_pretrained(scratch)
            scratch.rename(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)

    def run(self, seeds: int, part: int, parts: int) -> None:
        """Every job of this part that has not been run. Raises OutOfTime."""
        text = self.text()
        teachers = {name: load_teacher(self.folder, name) for name in TEACHERS}
        done = self.records()
        unique = list({job.key: job for job in jobs(seeds)}.values())
        waiting = [job for job in unique[part::parts] if job.key not in done]
        for number, job in enumerate(waiting):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            record = self._run(job, text, teachers)
            with self.runs.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(record) + "\n")
            ce = next(iter(record["metrics"].values()))["ce"]
            print(
                f"{number + 1}/{len(waiting)} seed {job.init} {job.teacher or '-'} {job.arm.start} {job.arm.name}: "
                f"ce {ce:.4f}, {record['seconds']:.1f} s",
                flush=True,
            )

    def records(self) -> dict[str, dict[str, Any]]:
        """What has been run, by key."""
        lines = self.runs.read_text().splitlines() if self.runs.exists() else []
        return {record["key"]: record for record in map(json.loads, lines)}

    def _run(self, job: Job, text: Text, teachers: dict[str, Teacher]) -> dict[str, Any]:
        arm, size, objective = job.arm, None, None
        torch.manual_seed(job.init)
        if arm.start == PRETRAINED:
            model = self._pretrained(job.init, text)
            schedule = self.scale.fine_tuning
        else:
            model = small_llama(len(text.vocabulary), *self.scale.student, text.train.shape[1]).to(
                self.device
            )
            schedule = self.scale.schedule
        if arm.source == TEXT:
            batch_of = hard_labels(text.train, self.device)
        elif arm.source == FULL:
            batch_of = from_full_logits(arm, teachers[job.teacher or ""], text.train, self.device)
        else:
            teacher = teachers[job.teacher or ""]
            path, size = cache_of(
                self.folder / "caches",
                teacher,
                text,
                STORES[arm.source],
                name=arm.source,
                seed=job.draws,
            )
            batch_of, objective = from_cache(
                arm, *read_cache(path), len(text.vocabulary), self.device
            )
        seconds = train(
            model, batch_of, len(text.train), schedule, order=job.order, objective=objective
        )
        judges = [job.teacher] if job.teacher else TEACHERS
        metrics = {
            name: evaluate(model, teachers[name], text.held_out, self.device) for name in judges
        }
        return {
            "key": job.key,
            "metrics": metrics,
            "bytes_per_token": size,
            "seconds": round(seconds, 2),
        }

    def native_bytes(self) -> None:
        """Bytes per token of every store where the teacher has all of its ids."""
        file = self.folder / "native-bytes.json"
        if file.exists():
            return
        count, length = self.scale.native
        ids = native_sequences(self.strong / "tokenizer.json", length=length, count=count)
        model = strong_model(str(self.strong), self.device).eval()
        vocab_size = model.config.vocab_size
        scored: dict[str, list[Any]] = {name: [] for name in STORES}
        for row in ids:
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.from_numpy(row[None]).long().to(self.device), use_cache=False
                ).logits
                dense = torch.log_softmax(logits[:, :-1].float(), -1).cpu().numpy()
            for name, store in STORES.items():
                scored[name] += scored_rows(dense, row[None], store)
        sizes = {}
        for name, store in STORES.items():
            path = self.folder / "caches" / "native" / name.replace(" ", "-")
            write_cache(path, ids, iter(scored[name]), store, vocab_size=vocab_size, model="strong")
            shards = sum(shard.stat().st_size for shard in (path / "data").iterdir())
            heads = np.concatenate([s.draws.head_size for s in scored[name]]).mean()
            draws = np.concatenate(
                [(s.draws.samples >= 0).sum((1, 2)) for s in scored[name]]
            ).mean()
            sizes[name] = {
                "bytes_per_token": round(shards / ids.size, 2),
                "head": round(float(heads), 1),
                "draws": round(float(draws), 1),
            }
        file.write_text(
            json.dumps({"tokens": int(ids.size), "vocabulary": vocab_size, "stores": sizes})
        )

    def tables(self, seeds: int, *, publish: bool) -> None:
        """Results, tables and plot, from what has been run."""
        text = self.text()
        records = self.records()
        found = [(job, records[job.key]) for job in jobs(seeds) if job.key in records]
        sharp = {
            name: sharpness(load_teacher(self.folder, name), text.held_out) for name in TEACHERS
        }
        native = self.folder / "native-bytes.json"
        results = {
            "machine": machine(self.device),
            "scale": asdict(self.scale),
            "text": text.facts,
            "teachers": sharp,
            "native": json.loads(native.read_text()) if native.exists() else None,
            **summarise(found),
        }
        target, plot = (
            (RESULTS, DOCS / "quality.svg")
            if publish
            else (self.folder / "quality.json", self.folder / "quality.svg")
        )
        target.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, plot)
        if publish:
            update_page(results, DOCS / "quality.md")


def machine(device: torch.device) -> dict[str, Any]:
    """Where this ran."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}
