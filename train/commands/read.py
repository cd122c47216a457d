"""``train-student read``: the options, and the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import ConfigError, UserError, first_line


def read(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model (folder or hub name), the folder of a run, a checkpoint, or adapters.",
        ),
    ],
    cache: Annotated[str, typer.Option("--cache", help="Folder or URL of the cache to read.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The file of the readings (.npz).")
    ],
    sequences: Annotated[
        str | None,
        typer.Option(
            "--sequences",
            help="Sequences to read, by index: START:STOP or START:STOP:STEP. Default: all.",
        ),
    ] = None,
    indices: Annotated[
        Path | None,
        typer.Option("--indices", metavar="FILE", help="Or a file with a JSON list of indices."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences in a batch.")
    ] = 8,
) -> None:
    """Writes what a saved model predicts at the positions of a cache: its logprobs of the stored ids
    and of the next token, and the KL to the teacher. `teacher-cache report --student FILE` shows it.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out is {out}, expected a file in a folder that exists")
    if sequences is not None and indices is not None:
        raise ConfigError("--sequences and --indices both choose sequences; give one of them")
    from logitcask.cache_format import CacheReader
    from logitcask.cache_format.derive.derive import parse_slice
    from logitcask.train.evaluation.read import read_cache

    chosen: list[int] | None = None
    if sequences is not None:
        try:
            chosen = [*range(len(CacheReader(cache)))[parse_slice(sequences)]]
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
    if indices is not None:
        chosen = _listed(indices)
    found = read_cache(model, cache, out, chosen, batch_size)
    kl = (
        ""
        if found.kl is None
        else f", KL(teacher || model) {found.kl:.4f} nats ({found.exactness})"
    )
    print_result(
        {
            "file": out,
            "sequences": found.sequences,
            "positions": found.positions,
            "kl": found.kl,
            "exactness": found.exactness,
        },
        f"{out}: {found.positions:,} positions of {found.sequences:,} sequences{kl}",
    )


def _listed(file: Path) -> list[int]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--indices is {file}, which cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise UserError(f"--indices is {file}, expected a JSON list of numbers of sequences")
    return found
