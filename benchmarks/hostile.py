"""Mutated caches by the hundred thousand: the reader must refuse each of them in words, or give what the format allows.

    python benchmarks/hostile.py [--count 100000] [--seed N] [--out FILE.json]
    python benchmarks/hostile.py --seed N --case 4711          # one case again, with its traceback

Small caches of every kind are damaged (files changed, manifest as it was) and forged (every hash made to fit again, so that
nothing but the decoder stands between the bytes and the user). Each is opened, iterated, read by index and by column, and
verified deeply, in a child with a limit on its memory and its time. A failure is whatever is neither a LogitcaskError nor a
sequence that SPEC.md allows: another exception, a crash, a hang, memory over the limit, a damage that names no file, and
values that changed without a word. Case N of a seed is the same cache in every run.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from machine import cpu_name
from numpy.typing import NDArray

from cache_format import CachedSequence, CacheReader, CacheWriter, LogitcaskError, verify
from cache_format.codec import ContentHash
from cache_format.manifest import DataIdentity, Header, StoreSettings, TokenizerIdentity
from cache_format.prior import TailPrior
from cache_format.schema import MAX_DECODED_BYTES
from pipeline.config import StoreConfig, TeacherConfig
from pipeline.estimator import keep, keep_nothing
from pipeline.sequence import Sequence
from pipeline.teachers.synthetic import SyntheticTeacher

MEMORY_LIMIT = 5 << 29
"""Address space that reading may take beyond what the process had: a batch, a decoded head and samples, and working space."""

CPU_SECONDS, WALL_SECONDS = 20, 60
"""Of one case, in which a cache is read about four times over."""

CHUNK = 1000
"""Cases per child process."""

SPREAD = 2.0**-16  # what sums of fp32 probabilities may be off by
HASH, MANIFEST, DECODER, DEEP = "refused: hash", "refused: manifest", "refused: decoder", "refused: verify --deep"
IDENTICAL, VALID, FAILED = "identical", "accepted, valid", "FAILED"
OUTCOMES = (HASH, MANIFEST, DECODER, DEEP, IDENTICAL, VALID, FAILED)

KINDS: dict[str, dict[str, Any]] = {
    "head": {"top_k": 8, "min_probability": None, "tail_samples": 0},
    "fine head": {"top_k": 8, "min_probability": None, "tail_samples": 0, "logprob_step": 2.0**-12},  # escapes
    "ragged": {"top_k": 8, "min_k": 1, "min_probability": 0.01, "tail_samples": 0},
    "samples": {"top_k": 8, "min_k": 1, "tail_samples": 6, "sample_sets": 2},
    "sample logprobs": {"top_k": 8, "min_k": 1, "tail_samples": 6, "sample_logprobs": True, "logprob_step": 2.0**-9},
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
Columns = dict[str, tuple[NDArray[np.int64], NDArray[Any]]]
"""Of a shard's rows: how many values each has, and all the values."""


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
        """Makes sizes, hashes, totals and the fingerprint of the manifest fit the files, where its types let it."""
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
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Sound caches


def make_base(kind: str, vocab_size: int, with_prior: bool, folder: Path) -> Base:
    """Three shards of three sequences by the synthetic teacher, two rows to a batch; one sequence has no kept position."""
    rng = np.random.default_rng([vocab_size, *kind.encode()])
    config = StoreConfig(**KINDS[kind])
    store = config.settings(vocab_size)
    # Constructed unchecked: a config asks for the 258 ids of the synthetic tokenizer, which is not used here.
    teacher = SyntheticTeacher(
        TeacherConfig.model_construct(model="synthetic", vocab_size=vocab_size, seed=1), config.capture()
    )
    header = Header(
        created_by="hostile",
        teacher=teacher.identity(),
        tokenizer=TokenizerIdentity(name="t", sha256="0" * 64, vocab_sha256="0" * 64, vocab_size=vocab_size),
        data=DataIdentity(
            source="x", split="train", kind="documents", mask_policy="all", max_length=64, overlong="split", sha256="0"
        ),
        store=store,
    )
    sequences = []
    for index, tokens in enumerate((12, 1, 16, 9, 20, 7, 14, 2, 10)):
        mask = rng.random(tokens) < 0.8
        mask[0] = False
        plain = Sequence(f"sequence {index}", rng.integers(0, vocab_size, tokens).astype(np.int32), mask)
        (scored,) = teacher.score([plain])
        sequences.append(keep(plain, scored, store) if mask.any() else keep_nothing(plain, store))
    with CacheWriter(folder) as writer:
        started = writer.begin(header, TailPrior.estimate(sequences, vocab_size) if with_prior else None)
        for index in range(3):
            with writer.shard(index, sequences_per_batch=lambda _: 2) as shard:
                for sequence in sequences[3 * index : 3 * index + 3]:
                    shard.append(sequence)
        writer.finish(started, 3)
    assert verify(str(folder), deep=True) == []
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
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
    names = ("input_ids", "loss_mask", "positions", "ids", "logprobs", "tail_logprob", "target_logprob", "target_rank")
    found = {name: getattr(sequence, name) for name in names}
    if sequence.entropy is not None:
        found["entropy"] = sequence.entropy
    if sequence.samples is not None:
        found["sample ids"] = sequence.samples.ids
        if sequence.samples.logprobs is not None:
            found["sample logprobs"] = sequence.samples.logprobs
    return found


# Damage: files change, the manifest does not


def damage_bits(case: Case) -> None:
    path = case.pick(sorted(case.files))
    case.files[path] = flip_bits(case, case.base.files[path])


def flip_bits(case: Case, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(case.pick([1, 1, 1, 2, 8])):
        changed[int(case.rng.integers(len(changed)))] ^= 1 << int(case.rng.integers(8))
    return bytes(changed)


def damage_bytes(case: Case) -> None:
    path = case.pick(sorted(case.files))
    case.files[path] = change_bytes(case, case.base.files[path])


def change_bytes(case: Case, data: bytes) -> bytes:
    """A run of bytes overwritten, cut out, inserted, repeated, or everything after it cut off."""
    start, stop = sorted(int(each) for each in case.rng.integers(0, len(data) + 1, 2))
    if case.rng.random() < 0.5:
        stop = min(stop, start + int(case.rng.integers(1, 65)))
    run = case.rng.bytes(stop - start)
    return {
        "random": lambda: data[:start] + run + data[stop:],
        "zero": lambda: data[:start] + bytes(stop - start) + data[stop:],
        "ones": lambda: data[:start] + b"\xff" * (stop - start) + data[stop:],
        "cut": lambda: data[:start] + data[stop:],
        "insert": lambda: data[:start] + run + data[start:],
        "repeat": lambda: data[:stop] + data[start:],
        "truncate": lambda: data[:start],
        "few bytes lost": lambda: data[: -int(case.rng.integers(1, 17))],
    }[case.pick(["random", "zero", "ones", "cut", "insert", "repeat", "truncate", "few bytes lost"])]()


def damage_places(case: Case) -> None:
    """Shards swapped, doubled, missing, or something there that is no file."""
    first, second = (entry["path"] for entry in case.rng.permutation(case.manifest["shards"])[:2])
    path = case.pick([first, *(path for path in case.files if path != "manifest.json")])
    there = case.base.files[path]
    changes: list[dict[str, Content | None]] = [
        {first: case.base.files[second], second: case.base.files[first]},
        {first: case.base.files[second]},
        {path: None},
        {path: b""},
        {path: Path.mkdir},
        {path: os.mkfifo},
        {path: lambda at: at.symlink_to("/dev/zero")},
        {path: lambda at: at.symlink_to("/etc/passwd")},
        {path: lambda at: at.symlink_to(at)},
        {path: lambda at: at.symlink_to("nowhere")},
        {path: lambda at: (at.parent / "elsewhere").write_bytes(there) and at.symlink_to("elsewhere")},
        {"data/shard-99999.arrow": case.base.files[second]},
        {".build/header.json": b"{"},
    ]
    for at, content in case.pick(changes).items():
        if content is None:
            del case.files[at]
        else:
            case.files[at] = content


# Edited manifests

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    255,
    256,
    257,
    2**16,
    2**24,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
]
NUMBERS += [-(2**63), 2**64, 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, 3.0, 1e-300, 5e-324, 1e300]
NUMBERS += [2.0**-20, 2.0**-16, 2.0**-3, 0.1, float("nan"), float("inf"), float("-inf")]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "1",
    "logitcask",
    "\0",
    "\ud800",
    "x" * 70_000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]
PATHS = ["../shard.arrow", "data/../../x.arrow", "/etc/passwd", "data/../manifest.json", "data\\shard-00000.arrow"]
PATHS += ["data/shard-00000.arrow\0", "data/shard-00000.arrow\n", "data/.arrow", "data//x.arrow", "data/nowhere.arrow"]
PATHS += ["data/" + "x" * 300 + ".arrow", "data/SHARD-00000.ARROW", "file:///etc/passwd", "tail_prior.arrow", "."]


def edit_manifest(case: Case) -> None:
    """One to three values, keys or entries changed."""
    for _ in range(case.pick([1, 1, 1, 2, 3])):
        edit = case.pick([edit_value, edit_value, edit_value, edit_store, edit_shards, edit_path])
        try:
            edit(case)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            continue  # an earlier edit has removed what this one is about
    case.put_manifest()


def edit_value(case: Case) -> None:
    holder, key = case.pick(list(places_in(case.manifest)))
    value = holder[key]
    changes: list[Callable[[], Any]] = [
        lambda: case.pick(NUMBERS),
        lambda: copy.deepcopy(case.pick(OTHERS)),  # a later edit may change what is inside
        lambda: {"nested": [value]},
        lambda: str(value),
    ]
    if isinstance(value, int | float):
        changes += [lambda: value + 1, lambda: value - 1, lambda: -value, lambda: value * 2, lambda: value / 2]
    if isinstance(value, str) and value:
        changes += [lambda: value[:-1], lambda: value + "0", lambda: value[::-1], lambda: value.upper()]
    what = case.pick(["change", "change", "change", "delete", "rename"])
    if what == "change":
        holder[key] = case.pick(changes)()
    elif what == "delete" or isinstance(holder, list):
        del holder[key]
    else:
        holder[key + "_"] = holder.pop(key)


def places_in(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from places_in(value)


def edit_store(case: Case) -> None:
    case.manifest["store"][case.pick(sorted(case.manifest["store"]))] = copy.deepcopy(case.pick([*NUMBERS, *OTHERS]))


def edit_shards(case: Case) -> None:
    shards = case.manifest["shards"]
    first, second = (int(each) for each in case.rng.permutation(len(shards))[:2])
    what = case.pick(["swap", "drop", "double", "number", "number", "number", "no prior"])
    if what == "swap":
        shards[first], shards[second] = shards[second], shards[first]
    elif what == "drop":
        del shards[first]
    elif what == "double":
        shards.append(copy.deepcopy(shards[first]))
    elif what == "no prior":
        case.manifest["tail_prior"] = None
    else:
        keys = ["sequences", "sequences_per_batch", "bytes", "tokens", "positions", "entries", "draws"]
        shards[first][case.pick(keys)] = case.pick(NUMBERS)


def edit_path(case: Case) -> None:
    holder = case.pick([*case.manifest["shards"], *filter(None, [case.manifest["tail_prior"]])])
    holder["path"] = case.pick(PATHS)


def edit_text(case: Case) -> None:
    """Documents that a JSON parser should not be shown."""
    text = case.base.files["manifest.json"]
    key = case.pick([b"format_version", b"sequences", b"logprob_step", b"path", b"shards", b"vocab_size", b"bytes"])
    at = text.index(b'"' + key + b'"')
    nested = int(case.pick([100, 300, 10_000, 200_000]))
    case.files["manifest.json"] = case.pick(
        [
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode().encode("utf-16"),
            lambda: text.replace(b"train", b"tr\xff\xfein"),
            lambda: text.replace(b"train", b"tr\\ud800in"),
            lambda: text.replace(b"train", b"tr\0in"),
            lambda: text[:at] + b'"%s": %s, ' % (key, case.pick([b"0", b"2", b"null", b'"x"'])) + text[at:],
            lambda: text.replace(b'"config": {', b'"config": {"x": ' + b"[" * nested + b"]" * nested, 1),
            lambda: text.replace(b'"config": {', b'"config": {"x": ' + b'{"x":' * nested + b"1" + b"}" * nested, 1),
            lambda: b"[" * nested,
            lambda: text.replace(b'"logprob_step": ', b'"logprob_step": 1e999 , "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": 1' + b"0" * 5000 + b', "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": 0' + b"0" * 10 + b', "x":', 1),
            lambda: text.replace(b'"seed": ', b'"seed": Infinity, "x":', 1),
            lambda: b" " * (1 << 10) + text,
            lambda: text + b"}",
            lambda: text + text,
            lambda: case.pick([b"", b"null", b"[]", b"{}", b'"logitcask"', b"1", b"\0" * 100]),
        ]
    )()


def forge_manifest(case: Case) -> None:
    edit_manifest(case)
    case.seal()


# Forged bytes


def forge_bytes(case: Case) -> None:
    entry, data = case.shard()
    case.files[entry["path"]] = case.pick([flip_bits, change_bytes])(case, data)
    case.seal()


def forge_metadata(case: Case) -> None:
    """Words of the footer's and the messages' flatbuffers: offsets, vtables, lengths, counts, types."""
    entry, data = case.shard()
    changed = bytearray(data)
    for _ in range(case.pick([1, 1, 1, 2, 4])):
        start, stop = case.pick(metadata_of(data))
        put_word(case, changed, start, stop)
    case.files[entry["path"]] = bytes(changed)
    case.seal()


def put_word(case: Case, data: bytearray, start: int, stop: int) -> None:
    width = int(case.pick([1, 2, 4, 4, 8, 8]))
    at = start + width * int(case.rng.integers(0, max(1, (stop - start) // width)))
    if at + width > len(data):
        return
    old = int.from_bytes(data[at : at + width], "little")
    near = old + int(case.pick([-64, -24, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 24, 64]))
    new = case.pick([near, near, 0, 1, -1, -2, 2**7, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, old ^ 8])
    data[at : at + width] = (new % 256**width).to_bytes(width, "little")


def metadata_of(data: bytes) -> list[tuple[int, int]]:
    """[start, stop) of the messages' metadata and of the footer."""
    (size,) = struct.unpack_from("<i", data, len(data) - 10)
    found = [(len(data) - 10 - size, len(data) - 6)]
    for at in range(8, len(data) - 8, 8):
        mark, length = struct.unpack_from("<ii", data, at)
        if mark == -1 and 0 < length < 8192:
            found.append((at, at + 8 + length))
    return found


def forge_sizes(case: Case) -> None:
    """The eight bytes before compressed buffers, which say what they decompress to."""
    entry, data = case.shard()
    changed = bytearray(data)
    places = []
    for at in range(metadata_of(data)[1][1], len(data) - 8, 8):
        (value,) = struct.unpack_from("<q", data, at)
        if value == -1 or 0 < value < 1 << 20:
            places.append(at)
    for _ in range(case.pick([1, 1, 2, 40])):
        at = case.pick(places)
        (old,) = struct.unpack_from("<q", data, at)
        new = case.pick(
            [old + 1, old - 1, old * 2, 0, 1, -1, -2, -(2**63), 2**20, 2**28, 2**31, 2**34, 2**62, 2**63 - 1, 8]
        )
        struct.pack_into("<q", changed, at, new)
    case.files[entry["path"]] = bytes(changed)
    case.seal()


def forge_prior(case: Case) -> None:
    """Another prior, or none, or one for a cache that had none."""
    size = case.base.store.vocab_size
    steps = case.rng.integers(0, 256, size).astype(np.uint8)
    sound = TailPrior(steps).to_bytes()
    column = pa.array(steps)
    data: bytes = case.pick(
        [
            lambda: sound,
            lambda: TailPrior(np.zeros(size, np.uint8)).to_bytes(),
            lambda: TailPrior(case.pick([steps[:-1], steps[:0], np.append(steps, 1).astype(np.uint8)])).to_bytes(),
            lambda: flip_bits(case, sound),
            lambda: change_bytes(case, sound),
            lambda: case.shard()[1],
            lambda: arrow_file([("step", pa.array([None, *steps[1:].tolist()], pa.uint8()))]),
            lambda: arrow_file([("step", column.cast(pa.int32()))]),
            lambda: arrow_file([("step", column), ("more", column)]),
            lambda: arrow_file([("step", column.dictionary_encode())]),
            lambda: arrow_file([("step", column)], batches=case.pick([0, 2])),
            lambda: forged_words(case, sound),
            lambda: forged_words(case, sound),
            lambda: forged_words(case, sound),
        ]
    )()
    case.files["tail_prior.arrow"] = data
    case.manifest["tail_prior"] = {"path": "tail_prior.arrow", "bytes": 0, "sha256": "0" * 64}
    case.seal()


def forged_words(case: Case, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(case.pick([1, 2])):
        put_word(case, changed, *case.pick(metadata_of(data)))
    return bytes(changed)


def arrow_file(columns: list[tuple[str, pa.Array]], batches: int = 1) -> bytes:
    schema = pa.schema([pa.field(name, each.type, nullable=False) for name, each in columns])
    batch = pa.RecordBatch.from_arrays([each for _, each in columns], schema=schema)
    return written([batch] * batches, schema, "zstd")


def written(batches: list[pa.RecordBatch], schema: pa.Schema, compression: str | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch)
    result: bytes = sink.getvalue().to_pybytes()
    return result


# Forged Arrow structure


def forge_structure(case: Case) -> None:
    """Valid Arrow files that are not shards, or shards of other rows than the manifest says."""
    entry, data = case.shard()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
    schema, first = batches[0].schema, batches[0]
    table = pa.Table.from_batches(batches).combine_chunks()
    compression = case.pick(["zstd", "zstd", "lz4", None])
    at = int(case.rng.integers(len(schema)))
    name = schema.names[at]

    def with_column(array: pa.Array, *, nullable: bool = False) -> bytes:
        changed = pa.schema([*list(schema)[:at], pa.field(name, array.type, nullable), *list(schema)[at + 1 :]])
        arrays = [*table.columns[:at], pa.chunked_array([array]), *table.columns[at + 1 :]]
        return whole(pa.Table.from_arrays(arrays, schema=changed))

    def whole(changed: pa.Table) -> bytes:
        cut = changed.to_batches(max_chunksize=2)
        return written(cut, changed.schema, compression)

    column = table.column(at).combine_chunks()
    values = column.to_pylist()
    with_null = [None, *values[1:]]
    inner_null = [[None, *each[1:]] if isinstance(each, list) and each else each for each in values]
    larger = {
        "list": lambda kind: pa.large_list(kind.value_type),
        "binary": lambda _: pa.large_binary(),
        "string": lambda _: pa.large_string(),
    }["list" if pa.types.is_list(column.type) else str(column.type)](column.type)
    choices: list[Callable[[], bytes]] = [
        lambda: with_column(column.cast(larger)),
        lambda: with_column(pa.array(with_null, column.type), nullable=True),
        lambda: written_with_nulls(table, at, with_null, compression),
        lambda: written_with_nulls(table, at, inner_null, compression),
        lambda: written_with_nulls(table, at, inner_null, compression),
        lambda: with_column(pa.array([[each] for each in values], pa.list_(column.type))),
        lambda: with_column(pa.array([{"x": each} for each in values], pa.struct([("x", column.type)]))),
        lambda: with_column(pa.array([str(each) for each in values]).dictionary_encode()),
        lambda: with_column(pa.array(range(len(values)), pa.int64())),
        lambda: with_column(pa.nulls(len(values)), nullable=True),
        lambda: with_column(pa.array([str(each) for each in values], pa.string_view())),
        lambda: whole(table.append_column("more", [pa.array(range(len(table)))])),
        lambda: whole(table.drop_columns([name])),
        lambda: whole(table.select(list(reversed(schema.names)))),
        lambda: whole(table.rename_columns([each + "_" if each == name else each for each in schema.names])),
        lambda: whole(table.replace_schema_metadata({"a": "b" * 1000})),
        lambda: written(table.to_batches(), schema, compression),
        lambda: written(table.to_batches(max_chunksize=1), schema, compression),
        lambda: written([*batches, first.slice(0, 0)], schema, compression),
        lambda: written([first.slice(0, 0), *batches], schema, compression),
        lambda: written([*batches, batches[-1]], schema, compression),
        lambda: written(batches[:-1], schema, compression),
        lambda: written([], schema, compression),
        lambda: written([first] * 300, schema, compression),
        lambda: written(list(reversed(batches)), schema, compression),
        lambda: written(batches, schema, compression),
        lambda: stream_of(batches),
    ]
    case.files[entry["path"]] = case.pick(choices)()
    if case.rng.random() < 0.3:
        entry["sequences"] = int(case.pick([0, 1, 2, 4, 600]))
    case.seal()


def written_with_nulls(table: pa.Table, at: int, values: list[Any], compression: str | None) -> bytes:
    """As the schema of a shard has it, with nulls in a column whose field allows none."""
    schema = table.schema
    arrays = [column.combine_chunks() for column in table.columns]
    arrays[at] = pa.array(values, schema.types[at])
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    return written([batch.slice(start, 2) for start in range(0, len(batch), 2)], schema, compression)


def stream_of(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    result: bytes = sink.getvalue().to_pybytes()
    return result


# Forged columns


def forge_columns(case: Case) -> None:
    """Numbers in valid Arrow columns, with every count and hash of the shard made to fit them."""
    entry, data = case.shard()
    schema, names, columns = columns_of(data)
    for _ in range(case.pick([1, 1, 1, 2, 3])):
        edit = case.pick([edit_numbers, edit_numbers, edit_lengths, edit_bytes, edit_rows, edit_mask, edit_names])
        edit(case, names, columns)
    put_columns(case, entry, schema, names, columns, rows_per_batch=2)
    case.seal()


def columns_of(data: bytes) -> tuple[pa.Schema, list[str], Columns]:
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        table = file.read_all().combine_chunks()
    columns = {}
    for name in table.schema.names[1:]:
        column = table.column(name).combine_chunks()
        if pa.types.is_binary(column.type):
            values = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
            lengths = np.array([len(each) for each in column.to_pylist()], np.int64)
        else:
            values = column.flatten().to_numpy(zero_copy_only=False)
            lengths = column.value_lengths().to_numpy().astype(np.int64)
        columns[name] = (lengths, values.copy())
    return table.schema, table.column("sequence_id").to_pylist(), columns


def edit_numbers(case: Case, names: list[str], columns: Columns) -> None:
    name = case.pick([name for name, (_, values) in columns.items() if values.dtype != np.uint8])
    _, values = columns[name]
    if not len(values):
        return
    at = case.rng.integers(0, len(values), case.pick([1, 1, 3, len(values)]))
    vocab_size = case.base.store.vocab_size
    if values.dtype == np.float32:
        values[at] = case.pick([np.nan, np.inf, -np.inf, 1.0, 1e-4, -0.0, -1e38, 3.4e38, -9000.123])
    elif values.dtype == np.bool_:
        values[at] ^= True
    else:
        limits = np.iinfo(values.dtype)
        near = [int(values[at[0]]) + each for each in (-1, 1, 7)]
        special = [0, 1, 254, 255, 256, vocab_size - 1, vocab_size, vocab_size + 1, 2**16, 2**24, 2**30, -1]
        value = case.pick([*near, *special, limits.min, limits.max, limits.max - 1])
        values[at] = np.clip(value, limits.min, limits.max)


def edit_bytes(case: Case, names: list[str], columns: Columns) -> None:
    name = case.pick([name for name, (_, values) in columns.items() if values.dtype == np.uint8])
    _, values = columns[name]
    if len(values):
        at = case.rng.integers(0, len(values), case.pick([1, 1, 3, len(values)]))
        values[at] = case.pick([0, 1, 254, 255, int(case.rng.integers(256))])


def edit_lengths(case: Case, names: list[str], columns: Columns) -> None:
    """A value moves to the next row, disappears, or is added."""
    name = case.pick(sorted(columns))
    lengths, values = columns[name]
    row = int(case.rng.integers(len(lengths))) if len(lengths) else 0
    what = case.pick(["move", "drop", "add"])
    if what == "move" and len(lengths) > 1 and lengths[row]:
        lengths[row] -= 1
        lengths[row - 1] += 1
    elif what == "drop" and len(values) and lengths[row]:
        columns[name] = lengths, np.delete(values, int(lengths[: row + 1].sum()) - 1)
        lengths[row] -= 1
    elif what == "add" and len(lengths):
        value = case.pick([0, 1, 255])
        columns[name] = lengths, np.insert(values, int(lengths[: row + 1].sum()), value)
        lengths[row] += 1


def edit_rows(case: Case, names: list[str], columns: Columns) -> None:
    """Rows in another order, twice, or left out."""
    rows = len(names)
    order = case.pick([case.rng.permutation(rows), case.rng.integers(0, max(rows, 1), rows), np.arange(rows)[1:]])
    if not len(order):
        return
    names[:] = [names[row] for row in order]
    for name, (lengths, values) in columns.items():
        parts = np.split(values, np.cumsum(lengths)[:-1])
        columns[name] = lengths[order], np.concatenate([parts[row] for row in order])


def edit_mask(case: Case, names: list[str], columns: Columns) -> None:
    """Flags of the loss mask together with the positions that follow from them; all else stays."""
    lengths, mask = columns["loss_mask"]
    if not len(mask):
        return
    mask[int(case.rng.integers(len(mask)))] ^= True
    kept = [np.flatnonzero(part[1:]) for part in np.split(mask, np.cumsum(lengths)[:-1])]
    columns["positions"] = (
        np.array([len(each) for each in kept], np.int64),
        np.concatenate([*kept, np.empty(0, np.int64)]).astype(np.int32),
    )


def edit_names(case: Case, names: list[str], columns: Columns) -> None:
    if names:
        others = ["", names[0], "sequence 0", "x" * 100_000, "\0", "\x1b[2J", "\U0001f600" * 99, "a\nb"]
        names[int(case.rng.integers(len(names)))] = case.pick(others)


def put_columns(
    case: Case, entry: dict[str, Any], schema: pa.Schema, names: list[str], columns: Columns, rows_per_batch: int
) -> None:
    """Writes the columns as the shard of ``entry``, and into that what they add up to."""
    arrays = [pa.array(names, pa.string())]
    for each in [*schema][1:]:
        lengths, values = columns[each.name]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        if pa.types.is_binary(each.type):
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
            arrays.append(pa.Array.from_buffers(pa.binary(), len(lengths), buffers))
        else:
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, each.type.value_type)))
    whole = pa.RecordBatch.from_arrays(arrays, schema=schema)
    batches = [whole.slice(start, rows_per_batch) for start in range(0, len(whole), rows_per_batch)]
    case.files[entry["path"]] = data = written(batches, schema, "zstd")
    content = ContentHash()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        for index in range(file.num_record_batches):
            content.update(file.get_batch(index))
    u = case.base.store.scalar_step
    tail, target = columns["tail_step"][1], columns["target_logprob"][1]
    counts = columns.get("sample_count_plane", (None, np.empty(0, np.uint8)))[1]
    entry |= {
        "sequences": len(names),
        "sequences_per_batch": rows_per_batch,
        "content_sha256": content.hexdigest(),
        "tokens": len(columns["input_ids"][1]),
        "positions": len(columns["positions"][1]),
        "entries": max(0, int(columns["head_size"][1].sum(dtype=np.int64))),
        "draws": int(counts.sum(dtype=np.int64)),
        "head_mass_sum": float((1 - np.where(tail == 65535, 0, np.exp(-u * tail))).sum()),
        "target_nll_sum": float(-np.where(np.isfinite(target), target, 0).sum(dtype=np.float64)),
    }


# Bombs: small files that ask for a great deal


def forge_bomb(case: Case) -> None:
    entry, data = case.shard()
    case.pick([bomb_planes, bomb_padding, bomb_samples, bomb_mask, bomb_name, bomb_manifest, bomb_prefixes])(
        case, entry, data
    )


def one_row(schema: pa.Schema, tokens: int, kept: int) -> tuple[list[str], Columns]:
    """A row of ``tokens`` tokens whose last ``kept`` are learnt; everything but the mask and the positions is 0."""
    mask = np.zeros(tokens, np.bool_)
    mask[tokens - kept :] = True
    per_position = ("target_logprob", "target_rank", "tail_step", "head_size", "entropy_step", "sample_size")
    columns: Columns = {}
    for each in [*schema][1:]:
        length = tokens if each.name == "input_ids" else kept if each.name in per_position else 0
        kind = np.uint8 if pa.types.is_binary(each.type) else each.type.value_type.to_pandas_dtype()
        columns[each.name] = np.array([length]), np.zeros(length, kind)
    columns["loss_mask"] = np.array([tokens]), mask
    columns["positions"] = np.array([kept]), np.arange(tokens - kept - 1, tokens - 1, dtype=np.int32)
    return ["bomb"], columns


def fill(columns: Columns, prefix: str, entries: int, value: int = 0) -> None:
    for name in columns:
        if name.startswith(prefix) and "plane" in name:
            columns[name] = np.array([entries]), np.full(entries, value, np.uint8)


def bomb_planes(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Heads that take hundreds of MiB on disk, below and above what a batch may have."""
    schema = columns_of(data)[0]
    kept = int(case.pick([1, 7, 300]))
    names, columns = one_row(schema, kept + 1, kept)
    each = int(case.pick([10_000_000, 60_000_000, 90_000_000, 200_000_000])) // kept
    columns["head_size"][1][:] = each
    fill(columns, "head_", each * kept, int(case.pick([0, 1])))
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_padding(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """One wide head among narrow ones: little on disk, up to the limit and more once it is padded."""
    schema = columns_of(data)[0]
    width = min(case.base.store.vocab_size, 65_000)
    kept = int(MAX_DECODED_BYTES * case.pick([0.2, 0.99, 1.01, 40]) / 8 / width)
    kept = min(kept, 3_000_000)
    names, columns = one_row(schema, kept + 1, kept)
    columns["head_size"][1][:] = 1
    columns["head_size"][1][kept // 2] = width
    fill(columns, "head_", width + kept - 1)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_samples(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """One large set of draws among empty ones."""
    schema = columns_of(data)[0]
    sets, kept = case.base.store.sample_sets, int(case.pick([1000, 200_000, 300_000, 3_000_000]))
    names, columns = one_row(schema, kept + 1, kept)
    if "sample_size" in columns:
        columns["sample_size"] = np.array([kept * sets]), np.zeros(kept * sets, np.int32)
        columns["sample_size"][1][5] = 1
        fill(columns, "sample_", 1)
        columns["sample_count_plane"] = np.array([1]), np.array([255], np.uint8)
    else:
        columns["head_size"][1][:] = 1
        fill(columns, "head_", kept)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_mask(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Flags take a bit in the file and a byte in memory."""
    schema = columns_of(data)[0]
    names, columns = one_row(schema, 2, 0)
    flags = int(case.pick([10_000_000, 800_000_000]))
    columns["loss_mask"] = np.array([flags]), np.zeros(flags, np.bool_)
    put_columns(case, entry, schema, names, columns, 1)
    case.seal()


def bomb_name(case: Case, entry: dict[str, Any], data: bytes) -> None:
    schema = columns_of(data)[0]
    _, columns = one_row(schema, 2, 1)
    name = "x" * int(case.pick([1_000_000, 100_000_000])) + case.pick(["", "\U0001f600"])
    put_columns(case, entry, schema, [name], columns, 1)
    case.seal()


def bomb_manifest(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """Up to 65 MiB of JSON whose values take many times that in memory."""
    text = case.base.files["manifest.json"]
    size = int(case.pick([1 << 20, 63 << 20, 65 << 20]))
    unit = case.pick([b"[],", b"{},", b"1.5,", b'"",', b"1,", b" ", b'{"a":[]},', b"[[[]]],"])
    filler = unit * (size // len(unit))
    case.files["manifest.json"] = text.replace(b'"config": {', b'"config": {"x": [' + filler + b"1],", 1)


def bomb_prefixes(case: Case, entry: dict[str, Any], data: bytes) -> None:
    """All buffers together claim to decompress to about what a batch may have."""
    changed = bytearray(data)
    for at in range(metadata_of(data)[1][1], len(data) - 8, 8):
        (value,) = struct.unpack_from("<q", data, at)
        if 0 < value < 1 << 20 and data[at + 8 : at + 12] == b"\x28\xb5\x2f\xfd":  # zstd's magic number
            struct.pack_into("<q", changed, at, int(case.pick([1 << 20, 10 << 20, 20 << 20, 200 << 20])))
    case.files[entry["path"]] = bytes(changed)
    case.seal()


MUTATIONS: list[tuple[str, float, bool, Callable[[Case], None]]] = [
    ("damaged: bit flips", 14, False, damage_bits),
    ("damaged: runs, cuts, insertions", 12, False, damage_bytes),
    ("damaged: swapped, missing, no files", 4, False, damage_places),
    ("damaged: manifest edited", 16, False, edit_manifest),
    ("damaged: manifest no JSON", 3, False, edit_text),
    ("forged: bytes of shards", 12, True, forge_bytes),
    ("forged: Arrow metadata", 14, True, forge_metadata),
    ("forged: decompressed sizes", 5, True, forge_sizes),
    ("forged: Arrow structure", 5, True, forge_structure),
    ("forged: columns", 12, True, forge_columns),
    ("forged: tail prior", 3, True, forge_prior),
    ("forged: manifest", 8, True, forge_manifest),
    ("forged: bombs", 0.15, True, forge_bomb),
]
"""(name, weight, whether the hashes fit, what it does)."""


# Judging


def judge(folder: str, case: Case, forged: bool) -> tuple[str, str]:
    """(outcome, what was wrong) of reading the cache in ``folder`` in every way there is."""
    before, after = case.base.files, case.files
    changed = {path for path in before.keys() | after.keys() if before.get(path) is not after.get(path)}
    try:
        cache = CacheReader(folder)
    except LogitcaskError as error:
        return refusal(error, changed, forged)
    store, refused = cache.manifest.store, None
    values, small = [], []
    try:
        for sequence in cache:
            if problem := broken(sequence, store, deep=False):
                return FAILED, f"reading gives {problem}"
            values.append(digest(sequence))
            if sequence.ids.nbytes < 1 << 20:
                small.append(sequence)
            del sequence
    except LogitcaskError as error:
        refused = error
    try_the_rest(cache)
    del cache
    problems = deep_problems(folder)
    if refused is not None:
        if not problems:
            return FAILED, f"verify --deep passes what reading refuses: {refused}"
        return refusal(refused, changed, forged)
    if values != case.base.values and not forged:
        return FAILED, "values changed, and reading does not say so"
    if problems:
        return DEEP, problems[0]
    for sequence in small:
        if problem := broken(sequence, store, deep=True):
            return FAILED, f"verify --deep passes {problem}"
    return IDENTICAL if values == case.base.values else VALID, ""


def try_the_rest(cache: CacheReader) -> None:
    """By index and by column; refusals are as good as answers here."""
    for index in (0, 4, -1, len(cache) // 2):
        if -len(cache) <= index < len(cache):
            with suppress(LogitcaskError):
                cache[index]
    for name in ("sequence_id", "input_ids", "loss_mask", "positions"):
        with suppress(LogitcaskError):
            for column in cache.iter_column(name):
                if column.nbytes < 1 << 20:
                    column.to_pylist()


def deep_problems(folder: str) -> list[str]:
    try:
        return verify(folder, deep=True)
    except LogitcaskError as error:
        return [str(error)]


def refusal(error: LogitcaskError, changed: set[str], forged: bool) -> tuple[str, str]:
    """The kind of refusal; a failure where damage is put down to no file, or to another than the one that has it."""
    message = str(error)
    if "manifest.json" in changed:
        changed = changed | {"data/", "tail_prior.arrow"}  # a number in it may contradict any file
    if len(message) > 10_000:
        return FAILED, f"a message of {len(message)} characters"
    if not forged and not any(path in message for path in changed):
        return FAILED, f"the damage is in {sorted(changed)}, but it says: {message}"
    if "is damaged: " in message or "is missing" in message:
        return HASH, message
    return (MANIFEST if "manifest.json" in message else DECODER), message


def broken(sequence: CachedSequence, store: StoreSettings, *, deep: bool) -> str | None:
    """Which rule of SPEC.md a sequence breaks, if any; ``deep``: also of those that only ``verify --deep`` checks."""
    n, p, vocab_size = len(sequence.input_ids), len(sequence.positions), store.vocab_size
    ids, logprobs, samples, entropy = sequence.ids, sequence.logprobs, sequence.samples, sequence.entropy
    stored = ids >= 0
    size = stored.sum(axis=1)
    target, tail, mask = sequence.target_logprob, sequence.tail_logprob, sequence.loss_mask
    rules: dict[str, Any] = {
        "no tokens": n >= 1,
        "another mask than tokens": mask.shape == (n,) and mask.dtype == np.bool_,
        "a token outside the vocabulary": ((sequence.input_ids >= 0) & (sequence.input_ids < vocab_size)).all(),
        "a first token that is learnt": not mask[:1].any(),
        "positions that are not the mask's": np.array_equal(sequence.positions, np.flatnonzero(mask[1:])),
        "heads of another shape": ids.shape == logprobs.shape and len(ids) == p and ids.dtype == np.int32,
        "scalars of another shape": target.shape == tail.shape == sequence.target_rank.shape == (p,),
        "a head id outside the vocabulary": (ids >= -1).all() and (ids < vocab_size).all(),
        "padding between entries": (stored[:, 1:] <= stored[:, :-1]).all(),
        "padding that is not -inf": np.isneginf(logprobs[~stored]).all(),
        "a logprob that is not finite": np.isfinite(logprobs[stored]).all(),
        "a logprob above 0": (logprobs <= 0).all(),
        "logprobs that rise": (logprobs[:, 1:] <= logprobs[:, :-1]).all(),
        "an empty head": store.tail_samples > 0 or (size >= 1).all(),
        "a tail that is no logprob": (tail <= 0).all(),
        "a target that is no logprob": np.isfinite(target).all() and (target <= 1e-3).all(),
        "a rank outside the vocabulary": ((sequence.target_rank >= 0) & (sequence.target_rank < vocab_size)).all(),
        "entropy where there is none": (entropy is not None) == store.entropy,
        "samples where there are none": (samples is not None) == (store.tail_samples > 0),
    }
    if entropy is not None:
        rules["an entropy that is none"] = entropy.shape == (p,) and np.isfinite(entropy).all() and (entropy >= 0).all()
    if samples is not None:
        drawn, of_draws = samples.ids >= 0, samples.logprobs
        rules |= {
            "samples of another shape": drawn.shape[:2] == (p, store.sample_sets) and drawn.shape[2] <= 255,
            "a sample outside the vocabulary": (samples.ids >= -1).all() and (samples.ids < vocab_size).all(),
            "padding between samples": (drawn[..., 1:] <= drawn[..., :-1]).all(),
            "logprobs of samples where there are none": (of_draws is not None) == store.sample_logprobs,
        }
        if of_draws is not None:
            rules["samples that are no logprobs"] = (
                np.isfinite(of_draws[drawn]).all()
                and (of_draws <= 0).all()
                and np.isneginf(of_draws[~drawn]).all()
                and of_draws.shape == drawn.shape
            )
    wrong = next((what for what, holds in rules.items() if not holds), None)
    return wrong or (broken_deeply(sequence, store, size) if deep else None)


def broken_deeply(sequence: CachedSequence, store: StoreSettings, size: NDArray[np.int64]) -> str | None:
    with np.errstate(over="ignore"):
        mass = np.exp(sequence.logprobs.astype(np.float64)).sum(axis=1) + np.exp(
            sequence.tail_logprob.astype(np.float64)
        )
    if (np.abs(mass - 1) > store.logprob_step + store.scalar_step + SPREAD).any():
        return "masses that do not add up to 1"
    if (np.isneginf(sequence.tail_logprob) != (size == store.vocab_size)).any():
        return "a tail without mass beside a head that is not everything"
    for row, head in enumerate(sequence.ids):
        named = head[head >= 0].tolist()
        if len(set(named)) < len(named):
            return "an id twice in a head"
        if sequence.samples is not None:
            sets = sequence.samples.ids[row]
            if set(named) & set(sets[sets >= 0].tolist()):
                return "a sample that is in the head"
            if len({int((each >= 0).sum()) for each in sets}) > 1:
                return "sets with different numbers of draws"
    return None


# Running


def make_case(seed: int, index: int, bases: list[Base]) -> tuple[Case, str, bool]:
    """Case ``index`` of a run, its mutation's name, and whether its hashes fit."""
    rng = np.random.default_rng([seed, index])
    name, _, forged, mutate = MUTATIONS[mutation_of(rng)]
    case = Case(bases[int(rng.integers(len(bases)))], rng)
    mutate(case)
    return case, name, forged


def lay_out(folder: Path, wanted: dict[str, Content], there: dict[str, Content]) -> None:
    """Makes ``folder``, which holds ``there``, hold ``wanted``."""
    for path in there.keys() - wanted.keys() | {path for path in wanted if wanted[path] is not there.get(path)}:
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


def run_case(seed: int, index: int, bases: list[Base], folder: Path) -> tuple[str, str, str]:
    """(mutation, outcome, what was wrong) of one case. Raises what reading raises beyond LogitcaskError."""
    case, name, forged = make_case(seed, index, bases)
    place = folder / str(bases.index(case.base))
    if not place.exists():
        place.mkdir(parents=True)
        lay_out(place, dict(case.base.files), {})
    lay_out(place, case.files, dict(case.base.files))
    try:
        with memory_limited():
            outcome, problem = judge(str(place), case, forged)
    finally:
        if all(isinstance(content, bytes) for content in case.files.values()):
            lay_out(place, dict(case.base.files), case.files)
        else:
            shutil.rmtree(place)
    return name, outcome, problem


@contextmanager
def memory_limited() -> Iterator[None]:
    """MEMORY_LIMIT on top of the address space there is; beyond it, allocations fail with a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def run_chunk(seed: int, indices: range, bases: list[Base], folder: Path, results: int) -> None:
    """In a child: one line of JSON per case into the file descriptor ``results``, whatever happens."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for index in indices:
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            name, outcome, problem = run_case(seed, index, bases, folder)
        except Exception as error:  # what is looked for
            name, outcome = "", FAILED
            problem = f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
        os.write(results, (json.dumps([index, name, outcome, problem[:1000]]) + "\n").encode())
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def run(count: int, seed: int, bases: list[Base], folder: Path, processes: int) -> Iterator[tuple[int, str, str, str]]:
    """(index, mutation, outcome, what was wrong) of every case, chunk by chunk as they finish."""
    waiting = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)][::-1]
    running: dict[int, tuple[range, IO[bytes]]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            chunk = waiting.pop()
            results = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its child has ended
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_chunk(seed, chunk, bases, folder / str(chunk.start), results.fileno())
                    code = 0
                finally:
                    os._exit(code)
            running[child] = chunk, results
        child, status = os.wait()
        chunk, results = running.pop(child)
        with results:
            results.seek(0)
            lines = [json.loads(line) for line in results]
        shutil.rmtree(folder / str(chunk.start), ignore_errors=True)
        for index, name, outcome, problem in lines:
            yield index, name or name_of(seed, index), outcome, problem
        if status:
            index = chunk.start + len(lines)
            how = signal.Signals(status & 127).name if status & 127 else f"exit status {status >> 8}"
            hang = " (a hang)" if how in ("SIGALRM", "SIGPROF") else ""
            yield index, name_of(seed, index), FAILED, f"the process died of {how}{hang}"
            if index + 1 < chunk.stop:
                waiting.append(range(index + 1, chunk.stop))


def mutation_of(rng: np.random.Generator) -> int:
    weights = np.array([weight for _, weight, _, _ in MUTATIONS])
    return int(rng.choice(len(MUTATIONS), p=weights / weights.sum()))


def name_of(seed: int, index: int) -> str:
    """The mutation of a case that did not live to tell."""
    return MUTATIONS[mutation_of(np.random.default_rng([seed, index]))][0]


def main() -> int:
    """Prints the table; 0 if no case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="a fresh one by default")
    parser.add_argument("--case", type=int, help="run this case alone, in this process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if arguments.seed is None else arguments.seed
    pa.set_cpu_count(1)
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as temporary:
        folder = Path(temporary)
        bases = [make_base(*each, folder / f"base {index}") for index, each in enumerate(BASES)]
        if arguments.case is not None:
            print(*run_case(seed, arguments.case, bases, folder), sep="\n")
            return 0
        print(f"seed {seed}", flush=True)
        started = time.monotonic()
        cases = list(run(arguments.count, seed, bases, folder, arguments.processes))
    counts = Counter((name, outcome) for _, name, outcome, _ in cases)
    failures = [each for each in cases if each[2] == FAILED]
    print_table(counts)
    for index, name, _, problem in failures[:50]:
        print(f"--seed {seed} --case {index}  {name}: {problem}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    print(f"{arguments.count:,} cases, {len(failures)} failures, {time.monotonic() - started:.0f} s, seed {seed}")
    if arguments.out:
        result = {
            "seed": seed,
            "cases": arguments.count,
            "failures": len(failures),
            "outcomes": {
                name: {outcome: counts[name, outcome] for outcome in OUTCOMES if counts[name, outcome]}
                for name, *_ in MUTATIONS
            },
            "limits": {"address_space_bytes": MEMORY_LIMIT, "cpu_seconds": CPU_SECONDS, "wall_seconds": WALL_SECONDS},
            "highest_resident_bytes_of_a_child": peak,
            "caches": [base.name for base in bases],
            "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__},
            "cpu": cpu_name(),
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failures else 0


def print_table(counts: Counter[tuple[str, str]]) -> None:
    widths = [max(9, len(outcome) + 2) for outcome in OUTCOMES]
    print(f"{'':38}" + "".join(f"{outcome:>{width}}" for outcome, width in zip(OUTCOMES, widths, strict=True)))
    for name in [*(name for name, *_ in MUTATIONS), "all"]:
        row = [sum(n for key, n in counts.items() if name in (key[0], "all") and key[1] == each) for each in OUTCOMES]
        print(f"{name:38}" + "".join(f"{n:>{width},}" for n, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
