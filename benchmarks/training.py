"""What a training step from a cache costs, beside fine-tuning without a teacher and beside a
teacher that is loaded live.

    python benchmarks/training.py [--rounds N] [--steps N] [--batch N] [--length N]

All arms train the same student (some layers of SmolLM2-135M) on the same sequences with
``transformers.Trainer``'s loop:

sft       plain Trainer with labels: next-token cross-entropy over whole logits
kd        from a cache: forward KL from head and draws
kd+rank   from a cache: forward KL + 2 x ranking + 0.5 x cross-entropy, the quick start's losses
live      Trainer with the teacher beside the student: forward KL over whole logits

Rounds are interleaved: each arm takes ``--steps`` steps and a first one that does not count, then
the next arm. What is printed are ratios of medians. ``live`` should take longer than ``kd`` by the
teacher's forward pass, which is timed inside it. Results go to benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from logitcask.cache_format import CachedSequence, CacheReader
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import StudentConfig, TrainConfig
from logitcask.train.data.mixture import open_data
from logitcask.train.loop.objective import Objective
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.model.student import build_student, find_model

RESULTS = Path(__file__).parent / "results" / "training.json"
LAYERS = [0, 1, 2, 10, 20, 27, 28, 29]
TERMS = {
    "kd": {"losses": [{"name": "forward_kl"}]},
    "kd+rank": {
        "losses": [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
        "ce_weight": 0.5,
    },
}


def _now() -> float:
    """Seconds, once a GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepTimes(TrainerCallback):
    """Seconds from the end of each step to the end of the next, loading of data included; the
    first step is left out.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = _now()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


class LiveTeacher(Trainer):
    """What distillation costs with the teacher in memory: its forward pass, and whole logits of
    both.
    """

    def __init__(self, *, teacher: torch.nn.Module, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device)
        self.teacher_seconds: list[float] = []

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        began = _now()
        with torch.no_grad():
            theirs = self.teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
        self.teacher_seconds.append(_now() - began)
        ours = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        kept = inputs["labels"][:, 1:] >= 0
        return kl_div(
            log_softmax(ours[:, :-1][kept], -1),
            log_softmax(theirs[:, :-1][kept], -1),
            reduction="batchmean",
            log_target=True,
        )


def as_labels(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """The same sequences as any causal language model is fine-tuned on them."""
    ids = [torch.from_numpy(sequence.input_ids).long() for sequence in sequences]
    labels = [
        torch.where(torch.from_numpy(sequence.loss_mask), row, -100)
        for sequence, row in zip(sequences, ids, strict=True)
    ]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--cache", default="caches/benchmark-train", help="Made where it is missing."
    )
    options = parser.parse_args()
    cache = make_cache(options)
    times, waits, teacher_seconds = measure(options, cache)
    report(options, times, waits, teacher_seconds)


def make_cache(options: argparse.Namespace) -> CacheReader:
    """Whole sequences of the asked length: batches of every arm have the same number of tokens."""
    build(
        BuildConfig.model_validate(
            {
                "teacher": {"model": "smollm2-135m"},
                "data": {"path": "python-docs", "max_length": options.length, "max_tokens": 20_000},
                "output": options.cache,
            }
        )
    )
    return CacheReader(options.cache)


Measured = tuple[dict[str, list[float]], dict[str, list[float]], list[float]]
"""Seconds of each step by arm, shares of the time in which cached arms waited for data, and the
live teacher's seconds.
"""


def measure(options: argparse.Namespace, cache: CacheReader) -> Measured:
    student = build_student(StudentConfig(init_from="smollm2-135m", keep_layers=LAYERS), seed=0)
    teacher = AutoModelForCausalLM.from_pretrained(
        find_model("smollm2-135m", None), dtype=torch.float32
    ).eval()
    return measure_arms(options, cache, student, teacher)


def measure_arms(
    options: argparse.Namespace,
    cache: CacheReader,
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    **more: Any,
) -> Measured:
    """``more``: fields of transformers.TrainingArguments."""
    whole = [sequence for sequence in cache if len(sequence) == options.length]
    needed = options.batch * (options.steps + 1)
    if len(whole) < needed:
        raise SystemExit(
            f"the cache has {len(whole)} sequences of {options.length} tokens; {needed} are needed"
        )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "output_dir": scratch,
            "max_steps": options.steps + 1,
            "per_device_train_batch_size": options.batch,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": options.steps + 1,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **more,
        }
        arms: dict[str, tuple[Trainer, StepTimes]] = {}
        plain = {
            "args": TrainingArguments(**arguments, remove_unused_columns=False),
            "train_dataset": whole,
            "data_collator": as_labels,
        }
        arms["sft"] = _timed(Trainer(model=copy.deepcopy(student), **plain))
        arms["live"] = _timed(LiveTeacher(model=copy.deepcopy(student), teacher=teacher, **plain))
        for name, terms in TERMS.items():
            arms[name] = _timed(_from_cache(cache, copy.deepcopy(student), arguments, terms))
        for number in range(options.rounds):
            for name, (trainer, _) in arms.items():
                trainer.train()
                print(f"round {number + 1}: {name}", flush=True)
    times = {name: timer.seconds for name, (_, timer) in arms.items()}
    waits = {
        name: [
            record["data_wait"]
            for record in arms[name][0].state.log_history
            if "data_wait" in record
        ]
        for name in TERMS
    }
    live = arms["live"][0]
    assert isinstance(live, LiveTeacher)
    return times, waits, live.teacher_seconds


def _from_cache(
    cache: CacheReader, student: Any, arguments: dict[str, Any], terms: dict[str, Any]
) -> Trainer:
    config = TrainConfig.model_validate(
        {
            "cache": cache.path,
            "student": {"init_from": "smollm2-135m"},
            **terms,
            "training": arguments,
        }
    )
    data, held_out = open_data(config, [cache], seed=0)
    return DistillationTrainer(
        student,
        TrainingArguments(**arguments, remove_unused_columns=False),
        Objective(config),
        data,
        held_out,
        None,
        k=5,
        logits_chunk=config.logits_chunk,
        data=config.data,
        selection=config.selection,
    )


def _timed(trainer: Trainer) -> tuple[Trainer, StepTimes]:
    timer = StepTimes()
    trainer.add_callback(timer)
    return trainer, timer


def report(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    waits: dict[str, list[float]],
    teacher_seconds: list[float],
) -> None:
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    teacher = statistics.median(teacher_seconds)
    found = {
        "machine": machine(),
        "sizes": {
            "student": f"{len(LAYERS)} layers of SmolLM2-135M",
            "teacher": "SmolLM2-135M, float32",
            "batch": options.batch,
            "length": options.length,
            "rounds": options.rounds,
            "steps": options.steps,
        },
        "step_over_sft": {name: seconds / median["sft"] for name, seconds in median.items()},
        "spread": {
            name: [min(seconds) / median[name], max(seconds) / median[name]]
            for name, seconds in times.items()
        },
        "data_wait": {name: max(shares, default=None) for name, shares in waits.items()},
        "live_over_kd": median["live"] / median["kd"],
        "predicted_live_over_kd": (median["kd"] + teacher) / median["kd"],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
