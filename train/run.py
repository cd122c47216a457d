"""``train-student``: cache -> student, from the first check to the report.

What a run needs to go on after a crash stands in its output folder: ``run.json`` (which run this is, and how good the
student was before it) and the Trainer's checkpoints. ``metrics.json`` is written last and says that it is finished.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from cache_format import CacheReader, Manifest, UserError
from cache_format.configuration import describe_difference
from cache_format.errors import ConfigError
from cache_format.writer import write_durably
from train import compat
from train.config import TrainConfig
from train.dataset import CachedDataset, HeldOut, collate
from train.evaluate import KL_KIND, evaluate, examples, teacher_reference
from train.losses.forward_kl import Tail, tail_of
from train.mixture import open_data
from train.objective import Objective
from train.report import write_report
from train.student import build_student, load_student_tokenizer
from train.trainer import DistillationTrainer

log = logging.getLogger(__name__)

_WHAT_A_RUN_WRITES = (
    *("metrics.json", "log.json", "examples.json", "report.html", "README.md"),
    *("config.json", "generation_config.json", "model.safetensors"),
    "run.json",
)
_TAILS: dict[Tail, str] = {
    "samples": "tail samples (unbiased)",
    "prior": "the cache's prior (a reconstruction; caches with tail samples are unbiased)",
    "ghost": "one cell of known mass (a lower bound; caches with tail samples are unbiased)",
}
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT}
_UNSUPPORTED = {
    "label_smoothing_factor": "the hard labels are a loss of their own: ce_weight",
    "save_only_model": "a run could not go on exactly",
    "group_by_length": "set data.group_by_length instead",
}


def train(config: TrainConfig, *, restart: bool = False) -> tuple[dict[str, Any], bool]:
    """Trains the student that ``config`` describes, or goes on with it, or finds it trained.

    Returns the content of metrics.json and whether it was there already. Raises UserError and its kinds.
    """
    output = config.output_dir
    with _exclusive(output):
        caches = [CacheReader(entry.cache) for entry in config.caches]
        run = {"config": _identity(config), "cache": _caches_identity(config, caches)}
        _refuse_other_files(output)
        before = None if restart else _begun(output, run)
        if before is not None and (output / "metrics.json").exists():
            return json.loads((output / "metrics.json").read_text()), True
        return _train(config, caches, run, before, restart=restart), False


def rewrite_report(output: Path) -> Path:
    """Writes ``report.html`` of a finished run again. Raises UserError where there is none."""
    try:
        metrics, history, shown = (
            json.loads((output / name).read_text()) for name in ("metrics.json", "log.json", "examples.json")
        )
    except FileNotFoundError as error:
        raise UserError(f"{output} holds no finished run (no {Path(error.filename).name}); train it first") from None
    write_report(output / "report.html", metrics, history, shown)
    return output / "report.html"


def _train(
    config: TrainConfig, caches: list[CacheReader], run: dict[str, Any], before: dict[str, Any] | None, *, restart: bool
) -> dict[str, Any]:
    manifests, output = [cache.manifest for cache in caches], config.output_dir
    arguments = _training_arguments(config)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    set_seed(arguments.seed)
    student = build_student(config.student, arguments.seed)
    tokenizer = load_student_tokenizer(config.student)
    compat.check_together([entry.cache for entry in config.caches], manifests)
    for entry, manifest in zip(config.caches, manifests, strict=True):
        compat.check(config, entry.cache, manifest, student, tokenizer)

    data, held_out = open_data(config, caches, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    objective = Objective(config)
    tail = _try_objective(objective, held_out)
    if restart:  # only now that nothing stands against a new run
        _remove_run(output)
    trainer = DistillationTrainer(
        student,
        arguments,
        objective,
        data,
        held_out,
        tokenizer,
        k=config.evaluation.k,
        logits_chunk=config.logits_chunk,
        data=config.data,
        selection=config.selection,
    )
    student.to(arguments.device)

    def measure() -> dict[str, float]:
        return evaluate(
            trainer.head,
            held_out,
            k=config.evaluation.k,
            batch_size=arguments.per_device_eval_batch_size,
            logits_chunk=config.logits_chunk,
        )

    def show() -> list[dict[str, Any]]:
        return examples(trainer.head, held_out, tokenizer) if tokenizer is not None else []

    if before is None:
        before = {"metrics": measure(), "examples": show()}
        write_durably(output / "run.json", json.dumps({**run, "before": before}, indent=2))
    checkpoint = _last_checkpoint(output)
    if checkpoint is not None:
        log.info("going on from %s", checkpoint)
    # Again: whether the evaluation above ran now or in an earlier start must not show in the training.
    set_seed(arguments.seed)
    trainer.run(None if checkpoint is None else str(checkpoint))

    after = measure()
    if not all(math.isfinite(value) for value in after.values()):
        raise UserError(
            f"the student has diverged: its held-out KL is {after['kl']}; lower training.learning_rate or set "
            "training.max_grad_norm, and begin afresh with --restart"
        )
    trainer.save_model(str(output))
    history = trainer.state.log_history
    metrics = {
        "before": before["metrics"],
        "after": after,
        "teacher": {
            "model": _joined(manifest.teacher.model for manifest in manifests),
            "engine": _joined(manifest.teacher.engine for manifest in manifests),
            **(reference := teacher_reference(held_out)),
        },
        "k": config.evaluation.k,
        "kl_tail": tail,
        "kl_kind": KL_KIND[tail],
        "steps": trainer.state.global_step,
        "final_loss": next((record["loss"] for record in reversed(history) if "loss" in record), None),
        "seconds": max((record.get("seconds", 0.0) for record in history), default=0.0),
        "positions_trained": int(max((record.get("positions", 0) for record in history), default=0)),
        "train_sequences": sum(len(source) for source in data.sources),
        "held_out_sequences": len(held_out),
        "held_out_positions": reference["positions"],
        "losses": [list(term) for term in objective.weights()],
        "student": {"parameters": student.num_parameters(), "architecture": type(student).__name__},
        "cache": _caches_described(config, manifests),
        "run": output.name,
        "seed": arguments.seed,
        "created_by": f"logitcask {version('logitcask')}",
        "config": run["config"],
    }
    shown = [
        {**then, "before": then["student"], "after": now["student"]}
        for then, now in zip(before["examples"], show(), strict=True)
    ]
    write_durably(output / "log.json", json.dumps(history, indent=1))
    write_durably(output / "examples.json", json.dumps(shown, indent=1, ensure_ascii=False))
    write_durably(output / "README.md", _model_card(metrics, manifests, config))
    write_report(output / "report.html", metrics, history, shown)
    write_durably(output / "metrics.json", json.dumps(metrics, indent=2))
    return metrics


def _training_arguments(config: TrainConfig) -> TrainingArguments:
    # Batches hold fields that no model signature knows; trackers are opted into, as everything that leaves the machine.
    # Without a GPU, pinned memory is a warning and nothing else.
    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    fields = {**defaults, **config.training, "remove_unused_columns": False}
    # YAML 1.1 reads an unquoted `no` as false.
    fields |= {name: "no" for name, value in fields.items() if name.endswith("_strategy") and value is False}
    for name in _UNSUPPORTED.keys() & {name for name, value in fields.items() if value}:
        raise ConfigError(
            f"training.{name} is {fields[name]}, which training from a cache does not support ({_UNSUPPORTED[name]}); remove it"
        )
    if (strategy := fields.get("train_sampling_strategy", "random")) != "random":
        raise ConfigError(
            f"training.train_sampling_strategy is {strategy!r}; the order of cached data is set by data.shuffle and "
            "data.group_by_length: remove it"
        )
    try:
        arguments = TrainingArguments(**fields)
        if arguments.device.type == "cuda" and arguments.n_gpu > 1:
            # Left alone, Trainer would wrap the student in nn.DataParallel, which cannot cut up cached batches.
            log.info("training on one of %d GPUs", arguments.n_gpu)
            arguments._n_gpu = 1
        return arguments
    except TypeError as error:
        unknown = str(error).rpartition(" ")[2]
        raise ConfigError(f"training.{unknown.strip(chr(39))} is no field of transformers.TrainingArguments") from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {str(error).strip().splitlines()[0]}") from error


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What makes two runs the same run; where the cache and the output lie does not."""
    identity = config.model_dump(mode="json", exclude={"cache", "cache_config"})
    identity["training"] = {key: value for key, value in config.training.items() if key != "output_dir"}
    return identity


def _caches_identity(config: TrainConfig, caches: list[CacheReader]) -> Any:
    """The fingerprint of the cache; for a mixture, of each with its weight and name, which seeds and logs depend on."""
    if isinstance(config.cache, str):
        return caches[0].manifest.fingerprint
    return [
        {"fingerprint": cache.manifest.fingerprint, "weight": entry.weight, "name": entry.label}
        for entry, cache in zip(config.caches, caches, strict=True)
    ]


def _caches_described(config: TrainConfig, manifests: list[Manifest]) -> dict[str, Any]:
    """What reports say of the cache, or of all caches together."""
    tokens = sum(manifest.statistics.tokens for manifest in manifests)
    size = sum(manifest.statistics.tokens * manifest.statistics.bytes_per_token for manifest in manifests)
    return {
        "path": _joined(entry.cache for entry in config.caches),
        "fingerprint": _joined(manifest.fingerprint for manifest in manifests),
        "tokens": tokens,
        "bytes_per_token": size / tokens,
    }


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _refuse_other_files(output: Path) -> None:
    """Raises UserError where a folder that no run of ours was begun in has files that a run would replace or go on from."""
    if (output / "run.json").exists():
        return
    taken = [name for name in _WHAT_A_RUN_WRITES if (output / name).exists()]
    taken += [folder.name for folder in output.glob("checkpoint-*")]
    if taken:
        raise UserError(
            f"{output} has {', '.join(taken)} of its own, where a run puts its files; choose an empty or new folder as "
            "training.output_dir"
        )


def _begun(output: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured before the first step, if this very run was begun in ``output``; None if nothing was.

    Raises UserError where the folder holds another run.
    """
    if not (output / "run.json").exists():
        return None
    earlier = json.loads((output / "run.json").read_text())
    before = earlier.pop("before")
    if earlier != run:
        raise UserError(
            f"{output} holds a run with other settings or another cache: {describe_difference(earlier, run)}; "
            "begin afresh with --restart, or choose another training.output_dir"
        )
    return before


def _last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end; any that was not is removed.

    Trainer writes trainer_state.json after everything else in a checkpoint, so one that parses vouches for the rest.
    """
    last: tuple[int, Path] | None = None
    for folder in output.glob("checkpoint-*"):
        try:
            step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder)
            continue
        last = max(last or (step, folder), (step, folder))
    return last[1] if last else None


def _remove_run(output: Path) -> None:
    """Removes what a run has written; ``run.json``, which says whose checkpoints these are, goes last."""
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in _WHAT_A_RUN_WRITES:
        (output / name).unlink(missing_ok=True)


def _try_objective(objective: Objective, data: HeldOut) -> Tail:
    """Tries the losses on a few positions of every cache, and says how much of the teacher's tail there is for them.

    That is the least that any of the caches has. Raises UserError or ConfigError for loss options that a cache cannot
    serve, before anything is written.
    """
    tails = [_try_on(objective, part) for part in data.parts]
    return min(tails, key=list(reversed(_TAILS)).index)


def _try_on(objective: Objective, data: CachedDataset) -> Tail:
    teacher = data.teacher(collate([data[0]]))
    rows = slice(0, min(4, len(teacher)))
    try:
        objective.per_chunk(teacher)(torch.zeros(rows.stop, teacher.vocab_size), rows)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"losses: {str(error).strip().splitlines()[0]}; see the options in train/losses/") from error
    tail = tail_of(teacher)
    log.info("beyond the heads stored in %s, KL uses %s", data.cache.path, _TAILS[tail])
    return tail


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Holds the run's lock. Raises UserError if another process trains into ``output`` or it cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(output / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(
            f"another process is training into {output}; wait for it, or choose another training.output_dir"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        # How safetensors and torch.save say that a disk is full.
        if "/torch_" in str(error) or not any(
            sign in str(error) for sign in ("No space left", "failed writing file", "unexpected pos")
        ):
            raise
        raise UserError(f"no space left for {output}; make room, then run the same command again") from error
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to {error.filename or output}: {error.strerror or error}; make room or permit it, then run the "
            "same command again"
        ) from error


def _model_card(metrics: dict[str, Any], manifests: list[Manifest], config: TrainConfig) -> str:
    before, after, k = metrics["before"], metrics["after"], metrics["k"]
    losses = " + ".join(f"{weight:g} x {name}" for name, weight in metrics["losses"])
    rows = "\n".join(
        f"| {name} | {before[name]:.4f} | {after[name]:.4f} |"
        for name in ("kl", "ce", "perplexity", "top1_agreement", f"mor@{k}", f"cr@{k}", f"spearman@{k}", "ece")
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- knowledge-distillation
- logitcask
---
# {metrics["run"]}

{metrics["student"]["architecture"]} of {metrics["student"]["parameters"]:,} parameters, distilled from {metrics["teacher"]["model"]}
through a cache of its next-token distributions on {_joined(m.data.source for m in manifests)} (fingerprint `{metrics["cache"]["fingerprint"]}`), with
[Logitcask](https://pypi.org/project/logitcask/): {losses}, {metrics["steps"]} steps, seed {metrics["seed"]}.

On {metrics["held_out_positions"]:,} held-out positions ({metrics["kl_kind"]}):

| metric | before | after |
| --- | --- | --- |
{rows}

The teacher's own cross-entropy there is {metrics["teacher"]["ce"]:.4f} nats. `report.html` shows the curves.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{config.output_dir}")
```
"""
