"""A second reader, written from SPEC.md alone with pyarrow and numpy, to show that the document is enough.

It shares no line with cache_format and checks only what a reader must (section 7, hashes included).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa


def read(folder: Path) -> list[dict]:
    """Every sequence of a cache as a dict of lists; a position's head is a list of (id, logprob)."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if manifest["format"] != "logitcask" or manifest["format_version"] > 1 or manifest["required_features"]:
        raise ValueError("not a cache that this reader knows")
    vocab_size, step = manifest["store"]["vocab_size"], manifest["store"]["logprob_step"]
    sequences = []
    for shard in manifest["shards"]:
        if not re.fullmatch(r"data/[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow", shard["path"]):
            raise ValueError("a shard outside the cache")
        data = (folder / shard["path"]).read_bytes()
        if len(data) != shard["bytes"] or hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise ValueError("a damaged shard")
        rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
        sequences += [decode(row, vocab_size, step) for row in rows]
    return sequences


def decode(row: dict, vocab_size: int, step: float) -> dict:
    """Section 4 and 5, one row."""
    planes = [
        np.frombuffer(row[f"head_id_plane_{i}"], "u1").astype(int) for i in range(3) if f"head_id_plane_{i}" in row
    ]
    ids = sum(plane << 8 * i for i, plane in enumerate(planes))
    escapes = iter(row["head_step_escape"])
    steps = [next(escapes) if byte == 255 else byte for byte in row["head_step_plane"]]
    if next(escapes, None) is not None or not len(ids) == len(steps) == sum(row["head_size"]):
        raise ValueError("planes, escapes and head sizes disagree")
    if len(ids) and ids.max() >= vocab_size:
        raise ValueError("an id outside the vocabulary")
    heads, start = [], 0
    for size in row["head_size"]:
        grid = np.cumsum(steps[start : start + size])
        heads.append([(int(i), -float(q) * step) for i, q in zip(ids[start : start + size], grid, strict=True)])
        start += size
    plain = ("sequence_id", "input_ids", "loss_mask", "positions", "target_logprob", "target_rank", "tail_logprob")
    if row["positions"] != [i for i in range(len(row["input_ids"]) - 1) if row["loss_mask"][i + 1]]:
        raise ValueError("positions and loss mask disagree")
    return {name: row[name] for name in plain} | {"heads": heads}
