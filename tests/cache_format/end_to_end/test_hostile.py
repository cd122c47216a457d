"""Caches from people one does not know: a short run of ``benchmarks/hostile``, and one test per
hole that it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from logitcask.cache_format import CacheReader, DamagedCacheError, Manifest, verify
from logitcask.cache_format.manifest import MAX_MANIFEST_VALUES
from logitcask.cache_format.shards.bounded_file import BoundedFile
from logitcask.cache_format.shards.codec import Codec
from logitcask.cache_format.shards.prior import TailPrior

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "hostile"
MODULES = ("cases", "shards", "bombs")


def test_hundreds_of_mutated_caches():
    """No crash, hang, excessive allocation or silently different value; a failure prints the
    command that repeats it.
    """
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--count", "400"], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def hostile():
    """The benchmark's modules, which are a script's and no package's."""
    sys.path.insert(0, str(BENCHMARK))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARK))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def case(hostile, tmp_path, rng):
    """Makes a sound cache of a kind, to be mutated."""

    def make(kind="samples", vocab_size=1000, with_prior=True):
        return hostile.cases.Case(
            hostile.cases.make_base(kind, vocab_size, with_prior, tmp_path / "sound"), rng
        )

    return make


@pytest.fixture
def laid_out(hostile, tmp_path):
    """Puts the files of a case into a folder, as they are, and returns that."""

    def lay(case):
        folder = tmp_path / "hostile"
        folder.mkdir()
        hostile.cases.lay_out(folder, case.files, {})
        return str(folder)

    return lay


def refused(folder, match):
    """Reading and deep verification both refuse the cache in ``folder``."""
    with pytest.raises(DamagedCacheError, match=match):
        list(CacheReader(folder))
    with suppress(DamagedCacheError):
        assert verify(folder, deep=True) != []


EDITS = {
    "logprob_step": lambda m: m["store"].update(logprob_step=m["store"]["logprob_step"] / 2),
    "scalar_step": lambda m: m["store"].update(scalar_step=2.0**-9),
    "no prior": lambda m: m.update(tail_prior=None),
    "shards in another order": lambda m: m["shards"].reverse(),
    "a shard left out": lambda m: m["shards"].pop(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_would_change_values_is_refused(case, laid_out, edit):
    """Each of these fits every shard's hash and schema."""
    mutated = case()
    EDITS[edit](mutated.manifest)
    mutated.put_manifest()
    refused(laid_out(mutated), "contradicts itself")


FORGED = {
    "version": lambda m: m.update(format_version=True),
    "step that is no power of two": lambda m: m["store"].update(logprob_step=0.1),
    "step that is 0 in float32": lambda m: m["store"].update(scalar_step=1e-300),
    "count beyond 64 bits": lambda m: m["shards"][0].update(sequences=10**30),
    "bytes beyond floats": lambda m: m["shards"][0].update(bytes=10**400),
    "sum beyond 64 bits": lambda m: [shard.update(sequences=2**62) for shard in m["shards"]],
    "not a number": lambda m: m["shards"][0].update(head_mass_sum=float("nan")),
    "number in quotes": lambda m: m["shards"][0].update(sequences="3"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_refused(case, laid_out, what):
    mutated = case()
    FORGED[what](mutated.manifest)
    mutated.seal()
    refused(laid_out(mutated), "not valid at|format_version")


@pytest.mark.parametrize("name", ["head_mass_sum", "target_nll_sum"])
def test_sums_that_are_beyond_floats_together(case, laid_out, name):
    mutated = case()
    for shard in mutated.manifest["shards"]:
        shard[name] = 1e308
    mutated.put_manifest()
    refused(laid_out(mutated), f"the {name} of all shards together is more than a float holds")


def test_a_key_that_occurs_twice(case, laid_out):
    mutated = case()
    text = mutated.base.files["manifest.json"].decode()
    mutated.put_manifest(text.replace('"format_version"', '"format_version": 2, "format_version"'))
    refused(laid_out(mutated), "occurs twice")


def test_json_that_takes_many_times_its_size_in_memory():
    with pytest.raises(DamagedCacheError, match="values"):
        Manifest.from_json(
            b'{"format": "logitcask", "x": [' + b"[]," * MAX_MANIFEST_VALUES + b"1]}",
            "manifest.json",
        )


def test_sums_may_be_rounded_otherwise(case, laid_out):
    """Python 3.12 adds floats up more exactly than 3.11: caches travel between the two."""
    mutated = case()
    totals = mutated.manifest["statistics"]
    totals["teacher_ce"] = float(np.nextafter(totals["teacher_ce"], 9))
    mutated.put_manifest()
    assert verify(laid_out(mutated), deep=True) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", ["data/shard-00001.arrow", "tail_prior.arrow"])
def test_a_pipe_is_not_waited_for(case, laid_out, path):
    mutated = case()
    mutated.files[path] = os.mkfifo
    refused(laid_out(mutated), f"{path} is no file")


def test_an_empty_file(case, laid_out):
    mutated = case()
    mutated.files["data/shard-00001.arrow"] = b""
    mutated.seal()
    refused(laid_out(mutated), "shard-00001")


NUMBERS = {
    "target logprob is above 0 or not": ("target_logprob", np.nan),
    "target logprob is above": ("target_logprob", 1.0),
    "target rank": ("target_rank", 1000),
    "positions are not": ("loss_mask", True),
    "more than the vocabulary": ("head_size", 1001),
    "a head is empty|sizes|negative": ("head_size", -1),
    "sample": ("sample_size", -(2**31)),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_no_writer_writes(hostile, case, laid_out, what):
    name, value = NUMBERS[what]
    mutated = case()
    entry, data = mutated.shard()
    schema, names, columns = hostile.shards.columns_of(data)
    columns[name][1][0] = value
    hostile.shards.put_columns(mutated, entry, schema, names, columns, 2)
    mutated.seal()
    refused(laid_out(mutated), what)


@pytest.mark.parametrize("column", ["input_ids", "loss_mask", "head_size"])
def test_nulls_inside_of_lists(hostile, case, laid_out, column):
    mutated = case()
    entry, data = mutated.shard()
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    at = table.schema.get_field_index(column)
    values = [[None, *each[1:]] for each in table.column(at).to_pylist()]
    mutated.files[entry["path"]] = hostile.shards.written_with_nulls(table, at, values, "zstd")
    mutated.seal()
    refused(laid_out(mutated), "nulls|Invalid|cannot be read")


def test_columns_are_validated_before_anything_follows_their_offsets(hostile, case, laid_out):
    mutated = case(with_prior=False)
    entry = mutated.manifest["shards"][0]
    table = (
        pa.ipc.open_file(pa.BufferReader(mutated.files[entry["path"]])).read_all().combine_chunks()
    )
    lengths = table.column("input_ids").combine_chunks().value_lengths().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i4")
    entry["sequences_per_batch"] = len(lengths)
    data = hostile.shards.written(table.to_batches(), table.schema, None)
    forged = data.replace(offsets.tobytes(), (offsets + 2**30).astype("<i4").tobytes())
    assert forged != data
    mutated.files[entry["path"]] = forged
    mutated.seal()
    folder = laid_out(mutated)
    refused(folder, "shard-00000")
    with pytest.raises(DamagedCacheError, match="shard-00000"):
        list(CacheReader(folder).iter_column("input_ids"))


@pytest.mark.parametrize("places", [1, -1], ids=["message", "message and footer"])
def test_a_body_that_claims_more_than_the_file(hostile, case, laid_out, places):
    """Arrow allocates it before it looks when some columns are read alone."""
    mutated = case()
    entry, data = mutated.shard()
    # After the footer and the schema: two record batches.
    first, second = hostile.shards.metadata_of(data)[2:4]
    body = (second[0] - first[1]).to_bytes(8, "little")
    assert data.count(body) >= 2, "in the message and in the footer"
    mutated.files[entry["path"]] = data.replace(body, (1 << 44).to_bytes(8, "little"), places)
    mutated.seal()
    folder = laid_out(mutated)
    refused(folder, "its body leaves the file")
    with pytest.raises(DamagedCacheError, match="its body leaves the file"):
        list(CacheReader(folder).iter_column("sequence_id"))


def of_version_4(batches, schema, *, hidden):
    """An Arrow file whose messages have metadata version V4; ``hidden``: only custom metadata
    says that it is compressed.
    """
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4, compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as file:
        for batch in batches:
            file.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    data = bytearray(sink.getvalue().to_pybytes())
    if hidden:
        for start, _ in metadata_of_batches(data):
            message = table_at(data, start + 8)
            batch = table_at(data, field_at(data, message, 2))
            vtable = batch - int.from_bytes(data[batch : batch + 4], "little", signed=True)
            data[vtable + 4 + 2 * 3 : vtable + 4 + 2 * 3 + 2] = bytes(2)
    return bytes(data)


def table_at(data, at):
    """The flatbuffer table that the offset at ``at`` refers to."""
    return at + int.from_bytes(data[at : at + 4], "little")


def field_at(data, table, number):
    slot = table - int.from_bytes(data[table : table + 4], "little", signed=True) + 4 + 2 * number
    return table + int.from_bytes(data[slot : slot + 2], "little")


def metadata_of_batches(data):
    footer = table_at(data, len(data) - 10 - int.from_bytes(data[-10:-6], "little"))
    blocks = table_at(data, field_at(data, footer, 3))
    for index in range(int.from_bytes(data[blocks : blocks + 4], "little")):
        at = blocks + 4 + 24 * index
        yield (
            int.from_bytes(data[at : at + 8], "little"),
            int.from_bytes(data[at + 8 : at + 12], "little"),
        )


@pytest.mark.parametrize("what", ["shard", "prior"])
@pytest.mark.parametrize("hidden", [True, False])
def test_metadata_that_hides_compression(hostile, case, laid_out, what, hidden):
    """In V4, Arrow decompresses where custom metadata says so: the sizes that are checked would
    be those on disk.
    """
    mutated = case()
    path = mutated.shard()[0]["path"] if what == "shard" else "tail_prior.arrow"
    with pa.ipc.open_file(
        pa.BufferReader(mutated.files.get(path) or mutated.base.files[path])
    ) as file:
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
    forged = of_version_4(batches, batches[0].schema, hidden=hidden)
    with pa.ipc.open_file(pa.BufferReader(forged)) as file:
        assert file.get_batch(0).equals(batches[0]), "what Arrow makes of it"
    mutated.files[path] = forged
    mutated.seal()
    folder = laid_out(mutated)
    with pytest.raises(DamagedCacheError, match=r"its metadata has version V4; expected V5"):
        list(CacheReader(folder))


def test_only_the_message_of_a_batch_is_old(hostile, case, laid_out):
    """A footer of V5 does not vouch for the messages."""
    mutated = case()
    entry, data = mutated.shard()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        batches = [file.get_batch(index) for index in range(file.num_record_batches)]
    forged = bytearray(of_version_4(batches, batches[0].schema, hidden=True))
    footer = table_at(forged, len(forged) - 10 - int.from_bytes(forged[-10:-6], "little"))
    version = field_at(forged, footer, 0)
    forged[version : version + 2] = (4).to_bytes(2, "little")
    mutated.files[entry["path"]] = bytes(forged)
    mutated.seal()
    folder = laid_out(mutated)
    refused(folder, "batch 0, cannot be read: its metadata has version V4; expected V5")
    with pytest.raises(DamagedCacheError, match="expected V5"):
        list(CacheReader(folder).iter_column("sequence_id"))


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_record_batches_too_few_or_too_many(hostile, case, laid_out, batches):
    mutated = case()
    entry, data = mutated.shard()
    with pa.ipc.open_file(pa.BufferReader(data)) as file:
        found = [file.get_batch(0), file.get_batch(1), file.get_batch(1).slice(0, 0)]
    mutated.files[entry["path"]] = hostile.shards.written(found[:batches], found[0].schema, "zstd")
    mutated.seal()
    folder = laid_out(mutated)
    refused(folder, "record batches")
    with pytest.raises(DamagedCacheError, match="record batches"):
        list(CacheReader(folder).iter_column("sequence_id"))


def test_a_prior_with_fewer_bytes_than_rows(hostile):
    """Where the file says 5000 rows of a buffer of 1000 bytes, nothing is read behind that."""
    schema = pa.schema([pa.field("step", pa.uint8(), nullable=False)])
    data = hostile.shards.written(
        [pa.record_batch([pa.array(np.ones(1000, np.uint8))], schema=schema)], schema, None
    )
    forged = data.replace(
        (1000).to_bytes(8, "little") + bytes(8), (5000).to_bytes(8, "little") + bytes(8)
    )
    assert forged != data
    with pytest.raises(DamagedCacheError):
        TailPrior.from_bytes(forged, 5000, "tail_prior.arrow")


@pytest.mark.parametrize("ids", [0, 999, 1001])
def test_a_prior_over_another_vocabulary(case, laid_out, ids):
    mutated = case()
    mutated.files["tail_prior.arrow"] = TailPrior(np.ones(ids, np.uint8)).to_bytes()
    mutated.seal()
    refused(laid_out(mutated), "not a prior over 1000 ids")


def test_flags_take_no_more_memory_than_tokens(hostile, case, laid_out):
    mutated = case("head", with_prior=False)
    entry, data = mutated.shard()
    names, columns = hostile.bombs.one_row(hostile.shards.columns_of(data)[0], 2, 0)
    columns["loss_mask"] = np.array([1000]), np.zeros(1000, np.bool_)
    hostile.shards.put_columns(
        mutated, entry, hostile.shards.columns_of(data)[0], names, columns, 1
    )
    mutated.seal()
    refused(laid_out(mutated), "more flags")


def test_padded_samples_are_bounded(hostile, case, laid_out):
    """One set of 255 draws among a million empty ones would take more than 256 MiB."""
    mutated = case("random sampling", with_prior=False)
    entry, data = mutated.shard()
    schema, kept = hostile.shards.columns_of(data)[0], 270_000
    names, columns = hostile.bombs.one_row(schema, kept + 1, kept)
    columns["sample_size"][1][5] = 1
    hostile.bombs.fill(columns, "sample_", 1)
    columns["sample_count_plane"] = np.array([1]), np.array([255], np.uint8)
    hostile.shards.put_columns(mutated, entry, schema, names, columns, 1)
    mutated.seal()
    with pytest.raises(DamagedCacheError, match="samples would take"):
        list(CacheReader(laid_out(mutated)))


def test_the_bytes_of_another_machine_are_refused(case):
    """Arrow would swap all of them before it validates a single offset."""
    mutated = case()
    codec = Codec(mutated.base.store)
    data = bytearray(mutated.shard()[1])
    footer = len(data) - 10 - int.from_bytes(data[-10:-6], "little")

    def table(at):
        at += int.from_bytes(data[at : at + 4], "little")
        return at, at - int.from_bytes(data[at : at + 4], "little", signed=True)

    def field_at(place, number):
        at, vtable = place
        slot = vtable + 4 + 2 * number
        return slot, at + int.from_bytes(data[slot : slot + 2], "little")

    schema = table(field_at(table(footer), 1)[1])
    slot = field_at(schema, 0)[0]
    # The field is left out where it is 0: let it be any two bytes of the table that read 1.
    start = schema[0]
    one = next(at for at in range(4, 200) if data[start + at : start + at + 2] == b"\1\0")
    data[slot : slot + 2] = one.to_bytes(2, "little")
    with pytest.raises(DamagedCacheError, match="little-endian"):
        BoundedFile(pa.py_buffer(bytes(data)), "shard", codec.schema)


@pytest.mark.parametrize("kind", ["head", "samples"])
def test_large_heads_are_verified_in_parts(hostile, case, laid_out, monkeypatch, kind):
    monkeypatch.setattr(sys.modules["logitcask.cache_format.verify"], "_PART_ENTRIES", 20)
    mutated = case(kind)
    folder = laid_out(mutated)
    assert verify(folder, deep=True) == []
    store = mutated.base.store.model_copy(update={"logprob_step": 2.0**-9})
    parts = list(sys.modules["logitcask.cache_format.verify"]._parts(CacheReader(folder)[0]))
    assert len(parts) > 1
    assert (
        np.concatenate([part.positions for part in parts]).tolist()
        == CacheReader(folder)[0].positions.tolist()
    )
    with pytest.raises(DamagedCacheError):
        for part in parts:
            sys.modules["logitcask.cache_format.verify"]._check_sequence(
                replace(part, tail_logprob=part.tail_logprob - 3), store, "shard"
            )


def test_messages_are_short(hostile, case, laid_out):
    mutated = case("head")
    entry, data = mutated.shard()
    schema, names, columns = hostile.shards.columns_of(data)
    names[:] = ["x" * 100_000] * len(names)
    hostile.shards.put_columns(mutated, entry, schema, names, columns, 2)
    mutated.seal()
    problems = verify(laid_out(mutated), deep=True)
    assert "occurs twice" in problems[0]
    assert max(map(len, problems)) < 1000


def test_the_seed_and_the_counts_are_printed(tmp_path):
    out = tmp_path / "hostile.json"
    command = [sys.executable, str(BENCHMARK), "--count", "10", "--seed", "7", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "10 cases, 0 failures" in done.stdout
    assert "seed 7" in done.stdout
    result = json.loads(out.read_text())
    assert (
        result["seed"],
        result["cases"],
        sum(sum(each.values()) for each in result["outcomes"].values()),
    ) == (
        7,
        10,
        10,
    )
