"""Megatron-LM's archives: ranks, microbatches, both payloads, nuclei, and missing parts."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from logitcask.cache_format import UserError
from logitcask.pipeline.imports import megatron
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, ROWS, K, imported, make_texts, mean_kl

RANKS, MICRO, BATCHES, LENGTH = 2, 3, 2, 5
PER_ITERATION = RANKS * MICRO * BATCHES


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def payload(groups, *, whole, low=torch.uint16):
    """The bytes of an iteration: [tokens, samples, K] of each microbatch, or of all side by side."""
    parts = {"values": [], "indices_low": [], "bit_17": []}
    for group in groups:
        ids, values = (np.stack([s[at] for s in group], axis=1) for at in (0, 1))
        parts["values"].append(torch.tensor(values).half())
        parts["indices_low"].append(torch.tensor(ids & 0xFFFF).to(low))
        parts["bit_17"].append(torch.tensor((ids >> 16) != 0))
    if whole:
        parts = {name: torch.cat(tensors, dim=1) for name, tensors in parts.items()}
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    return zstandard.compress(buffer.getvalue())


def write(folder, samples, *, whole=False, cp="", meta=True):
    """Two archives a rank, the samples in the run's order over iterations, microbatches, ranks."""
    saver = {"format_version": 2, "mbs_save": MICRO} if meta else {}
    iterations = len(samples) // PER_ITERATION
    for rank in range(RANKS):
        for last, own in ((2, (1, 2)), (iterations, range(3, iterations + 1))):
            with tarfile.open(folder / f"{cp}dp{rank}__{last}.tar", "w") as archive:
                add(archive, "_meta.json", json.dumps({"saver": saver}).encode())
                for iteration in own:
                    base = (iteration - 1) * PER_ITERATION
                    groups = [
                        samples[base + m * MICRO * RANKS + rank * MICRO :][:MICRO]
                        for m in range(BATCHES)
                    ]
                    add(archive, f"{iteration}.pt.zst", payload(groups, whole=whole))


def make(rng, folder, count):
    """Samples (ids, values) [tokens, K] of texts, and the file of the texts' tokens."""
    texts = make_texts(rng, count, LENGTH + 1)
    rows = [{"input_ids": text.tokens.tolist()} for text in texts]
    pq.write_table(pa.Table.from_pylist(rows), folder / "tokens.parquet")
    return texts, [text.top(text.logprobs) for text in texts]


def held_of(samples):
    """What fp16 holds, masses above 1 scaled to it."""
    found = []
    for ids, values in samples:
        rounded = values.astype(np.float16).astype(float)
        there = rounded > -900
        mass = np.where(there, np.exp(rounded), 0).sum(axis=1, keepdims=True)
        found.append((np.where(there, ids, -1), rounded - np.log(np.maximum(mass, 1))))
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_a_run(whole, rng, tmp_path):
    texts, samples = make(rng, tmp_path, ROWS // 12 * 12 + 12 if whole else 60)
    write(tmp_path, samples, whole=whole, cp="" if whole else "cp0_")
    tokens = str(tmp_path / "tokens.parquet")
    reader = imported("megatron", tmp_path, tmp_path / "cache", tokens=tokens)
    assert mean_kl(held_of(samples), reader) < KL_BY_ROUNDING
    assert [s.input_ids.tolist() for s in reader] == [t.tokens.tolist() for t in texts]


def test_nuclei_and_samples_without_their_last_token(rng, tmp_path):
    texts, samples = make(rng, tmp_path, 36)
    rows = [{"input_ids": text.tokens[:-1].tolist()} for text in texts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tokens.parquet")
    cut = []
    for ids, values in samples:
        kept = np.arange(K) < rng.integers(1, K + 1, (len(ids), 1))
        cut.append((np.where(kept, ids, -1), np.where(kept, values, -1e4)))
    write(tmp_path, cut)
    tokens = str(tmp_path / "tokens.parquet")
    reader = imported("megatron", tmp_path, tmp_path / "cache", tokens=tokens)
    held = [tuple(part[: LENGTH - 1] for part in each) for each in held_of(cut)]
    assert mean_kl(held, reader) < KL_BY_ROUNDING
    assert reader.manifest.store.ragged
    assert (reader.manifest.store.min_k, reader.manifest.store.top_k) == (1, K)


def test_what_is_missing_is_named(rng, tmp_path):
    _, samples = make(rng, tmp_path, 36)
    write(tmp_path, samples)
    tokens = str(tmp_path / "tokens.parquet")

    def refused(said, **options):
        with pytest.raises(UserError, match=said):
            imported("megatron", tmp_path, tmp_path / "cache", **{"tokens": tokens, **options})

    refused("needs --tokens", tokens=None)
    (tmp_path / "dp1__3.tar").rename(tmp_path / "away")
    refused("rank 1 has fewer iterations than others")
    (tmp_path / "away").rename(tmp_path / "dp1__3.tar")
    (tmp_path / "cp1_dp0__9.tar").touch()
    refused("part of a context-parallel run")
    (tmp_path / "cp1_dp0__9.tar").rename(tmp_path / "dp0__9.tar")
    refused("cannot be read")
    (tmp_path / "dp0__9.tar").unlink()
    write(tmp_path, samples, whole=True, meta=False)
    refused("no _meta.json with mbs_save")
    write(tmp_path, samples)
    pq.write_table(pq.read_table(tokens).slice(0, 30), tokens)
    refused("--tokens has no rows left")


@pytest.mark.parametrize("low", [torch.uint16, torch.int16, torch.int32])
def test_ids_of_17_bits(low, rng):
    """In signed integers of 16 bits, the upper half of the low bits is negative."""
    ids = rng.integers(0, 1 << 17, (MICRO, LENGTH, K))
    values = -np.ones(ids.shape)
    data = zstandard.decompress(
        payload([list(zip(ids, values, strict=True))], whole=False, low=low)
    )
    found = torch.load(io.BytesIO(data), weights_only=True)
    (read,) = megatron._iteration(found, 1, None, "x").ids
    np.testing.assert_array_equal(read, ids.transpose(1, 0, 2))


def test_members_that_are_no_files(rng, tmp_path):
    """Links, folders and numbers without end are passed over."""
    _, samples = make(rng, tmp_path, 36)
    write(tmp_path, samples)
    with tarfile.open(tmp_path / "dp0__2.tar", "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "7.pt.zst"), (tarfile.DIRTYPE, "8.pt.zst")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "nowhere"
            archive.addfile(info)
        add(archive, "9" * 5000 + ".pt.zst", b"")
        add(archive, "_meta.json", b"[" * 100_000)
    tokens = str(tmp_path / "tokens.parquet")
    assert len(imported("megatron", tmp_path, tmp_path / "cache", tokens=tokens)) == 36
