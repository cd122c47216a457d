"""A second reader, written from SPEC.md alone with pyarrow and numpy, to show that the document is
enough.

It shares no line with cache_format and checks only what a reader must (section 8, hashes included).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa

KNOWN = {"writer_logprobs", "chosen_ids", "unknown_values"}


def read(folder: Path) -> list[dict]:
    """Every sequence of a cache as a dict of lists.

    A position's head is a list of (id, logprob), its samples are a list of sets, each a list of
    (id, count, logprob). Its chosen ids are a list of (id, logprob). A value that is not known is
    None.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if (
        manifest["format"] != "logitcask"
        or manifest["format_version"] > 1
        or set(manifest["required_features"]) - KNOWN
    ):
        raise ValueError("not a cache that this reader knows")
    store, id_at = manifest["store"], np.arange(manifest["store"]["vocab_size"])
    if manifest.get("tail_prior"):
        table = pa.ipc.open_file(
            checked(folder, manifest["tail_prior"], r"tail_prior\.arrow")
        ).read_all()
        id_at = np.argsort(table.column("step").to_numpy(), kind="stable")
    sequences = []
    for shard in manifest["shards"]:
        data = checked(folder, shard, r"data/[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow")
        sequences += [
            decode(row, store, id_at) for row in pa.ipc.open_file(data).read_all().to_pylist()
        ]
    return sequences


def checked(folder: Path, entry: dict, pattern: str) -> pa.BufferReader:
    if not re.fullmatch(pattern, entry["path"]):
        raise ValueError("a file outside the cache")
    data = (folder / entry["path"]).read_bytes()
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError("a damaged file")
    return pa.BufferReader(data)


def ranks_of(row: dict, prefix: str) -> np.ndarray:
    names = [name for name in (f"{prefix}_plane_{i}" for i in range(3)) if name in row]
    return sum(np.frombuffer(row[name], "u1").astype(int) << 8 * i for i, name in enumerate(names))


def steps_of(row: dict, prefix: str) -> list[int]:
    escapes = iter(row[f"{prefix}_escape"])
    steps = [next(escapes) if byte == 255 else byte for byte in row[f"{prefix}_plane"]]
    if next(escapes, None) is not None:
        raise ValueError("escapes and 255s disagree")
    return steps


def decode(row: dict, store: dict, id_at: np.ndarray) -> dict:
    """Sections 4 and 5, one row."""
    plain = ("sequence_id", "input_ids", "loss_mask", "positions", "target_logprob", "target_rank")
    if row["positions"] != [i for i in range(len(row["input_ids"]) - 1) if row["loss_mask"][i + 1]]:
        raise ValueError("positions and loss mask disagree")
    ids, steps = id_at[ranks_of(row, "head_id")], steps_of(row, "head_step")
    if not len(ids) == len(steps) == sum(row["head_size"]):
        raise ValueError("planes and head sizes disagree")
    heads, last, start = [], [], 0
    for size in row["head_size"]:
        grid = np.cumsum([0, *steps[start : start + size]])
        pairs = zip(ids[start : start + size], grid[1:], strict=True)
        heads.append([(int(i), -float(q) * store["logprob_step"]) for i, q in pairs])
        last.append(grid[-1])
        start += size
    tail = [-np.inf if q == 65535 else -q * store["scalar_step"] for q in row["tail_step"]]
    found = {name: row[name] for name in plain} | {"heads": heads, "tail_logprob": tail}
    unknown = store.get("unknown", ())
    if "tail" in unknown:
        if set(row["tail_step"]) - {65534}:
            raise ValueError("the mass of a tail in a cache without them")
        found["tail_logprob"] = [None] * len(tail)
    if "targets" in unknown:
        found["target_logprob"] = [None if x != x else x for x in row["target_logprob"]]
    if store["entropy"]:
        found["entropy"] = [q * store["scalar_step"] for q in row["entropy_step"]]
    if store.get("writer_logprobs"):
        found["writer_logprob"] = row["writer_logprob"]
    if store["tail_samples"]:
        found["samples"] = decode_samples(row, store, id_at, last)
    if store.get("chosen_ids"):
        found["chosen"] = decode_chosen(row, store, id_at, heads, last)
    return found


def decode_chosen(
    row: dict, store: dict, id_at: np.ndarray, heads: list, last: list[int]
) -> list[list[tuple]]:
    places, gaps = steps_of(row, "chosen_head"), ranks_of(row, "chosen_gap")
    steps, sizes = steps_of(row, "chosen_step"), row["chosen_head_size"]
    others = [size - inside for size, inside in zip(row["chosen_size"], sizes, strict=True)]
    if (len(places), len(gaps), len(steps)) != (sum(sizes), sum(others), sum(others)):
        raise ValueError("planes and sizes of chosen ids disagree")
    if max(row["chosen_size"], default=0) > store["chosen_ids"] or min([0, *others, *sizes]) < 0:
        raise ValueError("too many chosen ids")
    positions, at, start = [], 0, 0
    for head, end, inside, outside in zip(heads, last, sizes, others, strict=True):
        found = [head[place] for place in np.cumsum(places[at : at + inside], dtype=int)]
        ids = id_at[np.cumsum(gaps[start : start + outside], dtype=int)].tolist()
        logprobs = [-float(end + d) * store["logprob_step"] for d in steps[start : start + outside]]
        positions.append(found + list(zip(ids, logprobs, strict=True)))
        at, start = at + inside, start + outside
    return positions


def decode_samples(
    row: dict, store: dict, id_at: np.ndarray, last: list[int]
) -> list[list[list[tuple]]]:
    gaps, counts = ranks_of(row, "sample_gap"), row["sample_count_plane"]
    steps = steps_of(row, "sample_step") if store["sample_logprobs"] else [None] * len(counts)
    if not len(gaps) == len(counts) == len(steps) == sum(row["sample_size"]) or 0 in counts:
        raise ValueError("planes and sample sizes disagree")
    positions, start = [], 0
    for index, size in enumerate(row["sample_size"]):
        position, number = divmod(index, store["sample_sets"])
        part = slice(start, start + size)
        logprobs = [
            None if d is None else -(last[position] + d) * store["logprob_step"]
            for d in steps[part]
        ]
        ids = id_at[np.cumsum(gaps[part])].tolist()
        positions += [[]] if number == 0 else []
        positions[position].append(list(zip(ids, list(counts[part]), logprobs, strict=True)))
        start += size
    return positions
