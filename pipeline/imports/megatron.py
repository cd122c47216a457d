"""Megatron-LM's offline distillation: tars of ``ITERATION.pt.zst``, one series for each rank.

An archive ``dpD__I.tar`` (``cp0_dpD__I.tar`` of older versions) holds iterations up to I of data
rank D: logprobs [tokens, samples, K], the low 16 bits of the ids and their 17th bit. The data holds
no tokens: samples are numbered by their place in the run, so ``--tokens`` has them in that order.
Row i of a sample is about its token i + 1.

In each iteration, rank d of D has, in its microbatch m of b samples, the samples from ``(m D + d)
b``.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, first_line
from logitcask.pipeline.imports.base import Held, Layout, Source
from logitcask.pipeline.imports.tables import token_rows, vector
from logitcask.pipeline.imports.torch_items import array, files_of, load

_TAR = re.compile(r"^(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<last>\d+)\.tar$")
_MEMBER = re.compile(r"^([0-9]{1,18})\.pt\.zst$")
_NOTHING = -900.0  # entries outside a nucleus have -1e3 or -1e4
_MAX_PAYLOAD = 16 << 30


class _Iteration(NamedTuple):
    """One iteration of a rank: [tokens, b, K] of each microbatch."""

    number: int
    values: list[NDArray[Any]]
    ids: list[NDArray[np.int64]]


def read(source: Source) -> Iterator[Held]:
    """The samples of a run, in its order."""
    ranks = [_iterations(files) for files in _by_rank(files_of(source))]
    tokens = token_rows(source)
    while True:
        found = [next(rank, None) for rank in ranks]
        parts = [part for part in found if part is not None]
        if not parts:
            return
        if len(parts) < len(found):
            raise UserError(
                f"{source.path}: rank {found.index(None)} has fewer iterations than others; some archives are missing"
            )
        if len({part.number for part in parts}) > 1:
            raise UserError(
                f"{source.path}: the ranks do not hold the same iterations ({', '.join(str(p.number) for p in parts)}); some "
                "archives are missing"
            )
        if len({len(part.values) for part in parts}) > 1:
            raise UserError(f"{source.path}: ranks have unequal microbatches in one iteration")
        for batch in range(len(parts[0].values)):
            for part in parts:
                values, ids = part.values[batch], part.ids[batch]
                for sample in range(values.shape[1]):
                    yield _held(tokens, part.number, ids[:, sample], values[:, sample])


def _held(
    tokens: Iterator[Any], iteration: int, ids: NDArray[np.int64], values: NDArray[Any]
) -> Held:
    found_row = next(tokens, None)
    if found_row is None:
        raise UserError(
            f"iteration {iteration}: --tokens has no rows left; it needs a row for every sample of the run"
        )
    place, row = found_row
    found = vector(row["input_ids"], np.int64, f"{place}: input_ids")
    # A sample of the run has one more token than rows, its last target; without it, the last row
    # is about no token.
    if len(found) not in (len(ids), len(ids) + 1):
        raise UserError(
            f"iteration {iteration}: a sample has {len(ids)} rows, but {place} has {len(found)} tokens; expected as many, or "
            "one more: the tokens of the run, in its order"
        )
    logprobs = values.astype(np.float64)
    ids = np.where(logprobs > _NOTHING, ids, -1)
    keep = len(found) - 1
    return Held(f"iteration {iteration}, {place}", found, 0, ids[:keep], logprobs[:keep])


def _by_rank(files: list[Path]) -> list[list[Path]]:
    """The archives of each data rank, by their last iteration."""
    found = []
    for file in files:
        match = _TAR.match(file.name)
        if match is None:
            raise UserError(
                f"{file} is not in the layout megatron: expected the name dpRANK__ITERATION.tar"
            )
        if int(match["cp"] or 0):
            raise UserError(
                f"{file} is a part of a context-parallel run (cp{match['cp']}), which cannot be imported; score the run "
                "without context parallelism, or with a Megatron-LM that joins the parts"
            )
        found.append((int(match["dp"]), int(match["last"]), file))
    found.sort()
    ranks = {rank: [file for *_, file in some] for rank, some in groupby(found, lambda e: e[0])}
    if sorted(ranks) != list(range(len(ranks))):
        raise UserError(f"{files[0].parent} has archives of the ranks {sorted(ranks)}, not of all")
    return [ranks[rank] for rank in sorted(ranks)]


def _iterations(files: list[Path]) -> Iterator[_Iteration]:
    import zstandard

    before = -1
    for file in files:
        try:
            with tarfile.open(file) as archive:
                micro_batch: int | None = None
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() else None
                    if member.name == "_meta.json" and content is not None:
                        micro_batch = _micro_batch(content.read(1 << 20))
                    match = _MEMBER.match(member.name)
                    if match is None or content is None:
                        continue
                    with zstandard.ZstdDecompressor().stream_reader(content) as unpacked:
                        data = unpacked.read(_MAX_PAYLOAD)
                    number = int(match[1])
                    if number <= before:
                        raise UserError(f"{file} has iteration {number} after {before}")
                    before = number
                    name = f"{file.name}, {member.name}"
                    yield _iteration(load(io.BytesIO(data), name), number, micro_batch, name)
        except (tarfile.TarError, zstandard.ZstdError, EOFError, OSError) as error:
            raise UserError(
                f"{file} cannot be read: {first_line(error)}; fetch it again"
            ) from error


def _micro_batch(text: bytes) -> int | None:
    """Samples of a microbatch, from the archive's ``_meta.json``; None if it does not say."""
    import json

    try:
        size = json.loads(text).get("saver", {}).get("mbs_save")
    except (ValueError, AttributeError, RecursionError):
        return None
    return size if isinstance(size, int) and size > 0 else None


def _iteration(found: Any, number: int, micro_batch: int | None, name: str) -> _Iteration:
    """Microbatches from a list of tensors, or from one tensor of all of them side by side."""
    fields = ("values", "indices_low", "bit_17")
    if not isinstance(found, dict) or not set(fields) <= set(found):
        raise UserError(f"{name} is not in the layout megatron: expected {', '.join(fields)}")
    lists = {
        field: found[field] if isinstance(found[field], list) else [found[field]]
        for field in fields
    }
    whole = not isinstance(found["values"], list)
    values, low, high = ([array(each, name) for each in lists[field]] for field in fields)
    if any(
        v.ndim != 3 or not v.shape == b.shape == h.shape
        for v, b, h in zip(values, low, high, strict=True)
    ):
        raise UserError(f"{name} has tensors of other shapes than [tokens, samples, entries]")
    # Signed integers hold the upper half of the low bits as negative numbers.
    ids = [
        (h.astype(np.int64) << 16) | (b.astype(np.int64) & 0xFFFF)
        for b, h in zip(low, high, strict=True)
    ]
    if whole:
        samples = values[0].shape[1]
        if micro_batch is None or samples % micro_batch:
            raise UserError(
                f"{name} holds {samples} samples in one tensor, but its archive has no _meta.json with mbs_save that divides "
                "them, so their order is not known"
            )
        cuts = list(range(micro_batch, samples, micro_batch))
        values, ids = np.split(values[0], cuts, axis=1), np.split(ids[0], cuts, axis=1)
    return _Iteration(number, values, ids)


LAYOUT = Layout(
    name="megatron",
    summary="Megatron-LM: tars of ITERATION.pt.zst, with the run's tokens in --tokens",
    read=read,
    suffix=".tar",
    values="logprobs",
    needs=("tokens",),
)
