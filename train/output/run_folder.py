"""The folder of a run: its files, its lock, and whether its run is the current one."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from logitcask.cache_format import UserError
from logitcask.cache_format.differences import describe_difference
from logitcask.cache_format.errors import cannot_write

ADAPTER = "adapter"
"""Where the adapters of a student that has some lie, apart from the merged student."""
TRIAL = ".trial"
"""Where the untrained student is saved, to see whether it can be."""
_WHAT_A_RUN_WRITES = (
    *("metrics.json", "log.json", "examples.json", "answers.json", "held_out.json"),
    *("report.html", "README.md"),
    *("config.json", "generation_config.json", "model.safetensors"),
    "run.json",
)


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Holds the run's lock. Raises UserError if another process trains into ``output`` or it
    cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(output / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(
            f"another process is training into {output}; wait for it, or choose another training.output_dir"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        # Messages of safetensors and torch.save for a full disk.
        if "/torch_" in str(error) or not any(
            sign in str(error)
            for sign in ("No space left", "failed writing file", "unexpected pos")
        ):
            raise
        raise UserError(
            f"no space left for {output}; make room, then run the same command again"
        ) from error
    except OSError as error:
        if not cannot_write(error) and error.errno != errno.ENOENT:
            raise
        raise UserError(
            f"cannot write to {error.filename or output}: {error.strerror or error}; make room or permit it, then run the "
            "same command again"
        ) from error


def refuse_other_files(output: Path) -> None:
    """Raises UserError if a folder without a run of ours has files with the names of a run's."""
    if (output / "run.json").exists():
        return
    taken = [name for name in _WHAT_A_RUN_WRITES if (output / name).exists()]
    taken += [folder.name for folder in (*output.glob("checkpoint-*"), *output.glob(ADAPTER))]
    if taken:
        raise UserError(
            f"{output} has {', '.join(taken)} of its own, where a run puts its files; choose an empty or new folder as "
            "training.output_dir"
        )


def begun(output: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The measurements before the first step, if this run was begun in ``output``, else None.

    Raises UserError if the folder holds another run.
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


def remove_run(output: Path) -> None:
    """Removes the files of a run, ``run.json`` last, because it identifies the checkpoints."""
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(output / ADAPTER, ignore_errors=True)
    shutil.rmtree(output / TRIAL, ignore_errors=True)
    for name in _WHAT_A_RUN_WRITES:
        (output / name).unlink(missing_ok=True)
