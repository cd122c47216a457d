"""Writes the golden caches of the format's version 1, each with the values it must decode to, into
this folder.

    python tests/golden/write.py

Caches that are here stay as they are, and are read for ever; only new ones are written.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np

from logitcask.cache_format import CacheReader, CacheWriter
from logitcask.cache_format.shards.prior import TailPrior

HERE = Path(__file__).parent
UNKNOWN = ("tail", "targets", "ranks")
CACHES = {
    "head-1-byte": {"kind": "head", "vocab_size": 200, "prior": False},
    "head-3-bytes": {"kind": "head", "vocab_size": 1 << 24, "prior": False},
    "ragged-prior": {"kind": "ragged", "vocab_size": 5_000, "prior": True},
    "samples-prior": {"kind": "samples", "vocab_size": 5_000, "prior": True},
    "sample-logprobs": {"kind": "sample logprobs", "vocab_size": 70_000, "prior": False},
    "random-sampling": {"kind": "random sampling", "vocab_size": 5_000, "prior": True},
    "writer-logprobs": {"kind": "writer logprobs", "vocab_size": 200, "prior": False},
    "unknown-values": {"kind": "head", "vocab_size": 200, "prior": False, "unknown": UNKNOWN},
    "chosen-ids": {"kind": "chosen ids, draws", "vocab_size": 5_000, "prior": True},
}


def main() -> None:
    fixtures, minimal, unknown_values = (
        _load(HERE.parent / "cache_format" / name)
        for name in (
            *("conftest.py", "end_to_end/minimal_reader.py", "end_to_end/test_unknown_values.py"),
        )
    )
    for number, (name, about) in enumerate(CACHES.items()):
        if (HERE / name).exists():
            continue
        rng = np.random.default_rng(number)
        vocab_size, kind = about["vocab_size"], about["kind"]
        sequences = [
            fixtures.make_sequence(
                rng, f"sequence {i}", tokens=tokens, vocab_size=vocab_size, kind=kind, kept=kept
            )
            for i, (tokens, kept) in enumerate(
                [(1, 0.0), (12, 0.0), (20, 0.7), (9, 1.0), (2, 1.0), (15, 0.4)]
            )
        ]
        prior = TailPrior.estimate(sequences, vocab_size) if about["prior"] else None
        header = fixtures.make_header(vocab_size, kind=kind, step=1 / 16)
        if unknown := about.get("unknown"):
            sequences = [unknown_values.forget(each, unknown) for each in sequences]
            store = header.store.model_copy(update={"unknown": unknown})
            header = header.model_copy(update={"store": store, "required_features": store.features})
        with CacheWriter(HERE / name) as writer:
            header = writer.begin(header, prior)
            for shard, part in enumerate((sequences[:4], sequences[4:])):
                with writer.shard(shard) as open_shard:
                    for each in part:
                        open_shard.append(each)
            writer.finish(header, 2)
        for original, found in zip(sequences, CacheReader(HERE / name), strict=True):
            if not unknown:
                fixtures.assert_same(original, found, 1 / 16)
        values = json.dumps(minimal.read(HERE / name), separators=(",", ":"))
        (HERE / f"{name}.json").write_text(values + "\n", encoding="utf-8")


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
