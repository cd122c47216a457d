"""Sound caches of every kind, and copies of them on their way to becoming hostile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format import CachedSequence, CacheReader, CacheWriter, verify
from logitcask.cache_format.manifest import DataIdentity, Header, StoreSettings, TokenizerIdentity
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.config import StoreConfig, TeacherConfig
from logitcask.pipeline.distribution.keep import keep, keep_nothing
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.types import Sequence

KINDS: dict[str, dict[str, Any]] = {
    "head": {"top_k": 8, "min_probability": None, "tail_samples": 0},
    "fine head": {
        "top_k": 8,
        "min_probability": None,
        "tail_samples": 0,
        "logprob_step": 2.0**-12,
    },  # escapes
    "ragged": {"top_k": 8, "min_k": 1, "min_probability": 0.01, "tail_samples": 0},
    "samples": {"top_k": 8, "min_k": 1, "tail_samples": 6, "sample_sets": 2},
    "sample logprobs": {
        "top_k": 8,
        "min_k": 1,
        "tail_samples": 6,
        "sample_logprobs": True,
        "logprob_step": 2.0**-9,
    },
    "random sampling": {"top_k": 0, "min_k": 0, "tail_samples": 40},
}
BASES = [
    ("head", 200, True),
    ("head", 70_000, False),
    ("fine head", 1000, False),
    ("ragged", 1000, True),
    ("ragged", 200, False),
    ("samples", 1000, False),
    ("samples", 70_000, True),
    ("sample logprobs", 1000, True),
    ("sample logprobs", 200, False),
    ("random sampling", 70_000, False),
    ("random sampling", 1000, True),
]
"""(kind, vocabulary, whether there is a prior); ids take 1, 2 and 3 bytes."""

Content = bytes | Callable[[Path], object]
"""What is to lie at a path: these bytes, or whatever the function puts there."""


@dataclass(frozen=True)
class Base:
    """A sound cache: its files, and the digests of its sequences."""

    name: str
    files: dict[str, bytes]
    store: StoreSettings
    values: list[bytes]


@dataclass
class Case:
    """A copy of ``base`` on its way to becoming hostile."""

    base: Base
    rng: np.random.Generator
    files: dict[str, Content] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = dict(self.base.files)
        self.manifest = json.loads(self.base.files["manifest.json"])

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def shard(self) -> tuple[dict[str, Any], bytes]:
        """The entry and the bytes of one shard."""
        entry = self.pick(self.manifest["shards"])
        return entry, self.base.files[entry["path"]]

    def put_manifest(self, text: str | None = None) -> None:
        self.files["manifest.json"] = (json.dumps(self.manifest) if text is None else text).encode()

    def seal(self) -> None:
        """Makes sizes, hashes, totals and the fingerprint of the manifest fit the files, where
        its types let it.
        """
        try:
            listed = [*self.manifest["shards"], *filter(None, [self.manifest["tail_prior"]])]
            for entry in listed:
                data = self.files.get(entry["path"])
                if isinstance(data, bytes) and data is not self.base.files.get(entry["path"]):
                    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            shards, totals = self.manifest["shards"], self.manifest["statistics"]
            for key in ("sequences", "tokens", "positions"):
                totals[key] = sum(entry[key] for entry in shards)
            totals["bytes"] = sum(entry["bytes"] for entry in listed)
            totals["bytes_per_token"] = totals["bytes"] / totals["tokens"]
            for key, of in (
                ("mean_head_size", "entries"),
                ("mean_draws", "draws"),
                ("head_mass", "head_mass_sum"),
                ("teacher_ce", "target_nll_sum"),
            ):
                totals[key] = sum(entry[of] for entry in shards) / totals["positions"]
            digests = b"".join(bytes.fromhex(entry["content_sha256"]) for entry in shards)
            self.manifest["content_sha256"] = hashlib.sha256(digests).hexdigest()
            self.manifest["fingerprint"] = fingerprint(self.manifest)
        except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError):
            pass  # a manifest too broken to be made to fit
        self.put_manifest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """As SPEC.md section 3 says it."""
    teacher = {key: value for key, value in manifest["teacher"].items() if key != "route"}
    if teacher.get("weights_sha256") is not None:
        del teacher["model"]
    identity = {
        "teacher": teacher,
        "tokenizer": {key: value for key, value in manifest["tokenizer"].items() if key != "name"},
        "data": {key: manifest["data"][key] for key in ("sha256", "mask_policy")},
        "store": manifest["store"],
    }
    if manifest.get("derived_from") is not None:
        identity["derived_from"] = manifest["derived_from"]
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def make_base(kind: str, vocab_size: int, with_prior: bool, folder: Path) -> Base:
    """Three shards of three sequences by the synthetic teacher, two rows to a batch; one
    sequence has no kept position.
    """
    rng = np.random.default_rng([vocab_size, *kind.encode()])
    config = StoreConfig(**KINDS[kind])
    store = config.settings(vocab_size)
    # Constructed unchecked: a config asks for the 258 ids of the synthetic tokenizer, which is not
    # used here.
    teacher = SyntheticTeacher(
        TeacherConfig.model_construct(model="synthetic", vocab_size=vocab_size, seed=1),
        config.capture(),
    )
    header = Header(
        created_by="hostile",
        teacher=teacher.identity(),
        tokenizer=TokenizerIdentity(
            name="t", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=vocab_size
        ),
        data=DataIdentity(
            source="x",
            split="train",
            kind="documents",
            mask_policy="all",
            max_length=64,
            overlong="split",
            sha256="0",
        ),
        store=store,
    )
    sequences = []
    for index, tokens in enumerate((12, 1, 16, 9, 20, 7, 14, 2, 10)):
        mask = rng.random(tokens) < 0.8
        mask[0] = False
        plain = Sequence(
            f"sequence {index}", rng.integers(0, vocab_size, tokens).astype(np.int32), mask
        )
        (scored,) = teacher.score([plain])
        sequences.append(keep(plain, scored, store) if mask.any() else keep_nothing(plain, store))
    with CacheWriter(folder) as writer:
        started = writer.begin(
            header, TailPrior.estimate(sequences, vocab_size) if with_prior else None
        )
        for index in range(3):
            with writer.shard(index, sequences_per_batch=lambda _: 2) as shard:
                for sequence in sequences[3 * index : 3 * index + 3]:
                    shard.append(sequence)
        writer.finish(started, 3)
    assert verify(str(folder), deep=True) == []
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    name = f"{kind}, {vocab_size} ids{', prior' if with_prior else ''}"
    return Base(name, files, store, [digest(each) for each in CacheReader(folder)])


def digest(sequence: CachedSequence) -> bytes:
    """Of every value of a sequence."""
    sha = hashlib.sha256(sequence.sequence_id.encode())
    for array in arrays_of(sequence).values():
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array))
    return sha.digest()


def arrays_of(sequence: CachedSequence) -> dict[str, NDArray[Any]]:
    names = (
        "input_ids",
        "loss_mask",
        "positions",
        "ids",
        "logprobs",
        "tail_logprob",
        "target_logprob",
        "target_rank",
    )
    found = {name: getattr(sequence, name) for name in names}
    if sequence.entropy is not None:
        found["entropy"] = sequence.entropy
    if sequence.samples is not None:
        found["sample ids"] = sequence.samples.ids
        if sequence.samples.logprobs is not None:
            found["sample logprobs"] = sequence.samples.logprobs
    return found


def lay_out(folder: Path, wanted: dict[str, Content], there: dict[str, Content]) -> None:
    """Makes ``folder``, which holds ``there``, hold ``wanted``."""
    for path in there.keys() - wanted.keys() | {
        path for path in wanted if wanted[path] is not there.get(path)
    }:
        at = folder / path
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        elif os.path.lexists(at):
            at.unlink()
        content = wanted.get(path)
        if content is not None:
            at.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                at.write_bytes(content)
            else:
                content(at)
