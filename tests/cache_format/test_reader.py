"""Reading: by index, across processes, with the light dependencies only; damage is found and
named.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import pyarrow as pa
import pytest

from logitcask.cache_format import (
    CacheError,
    CacheNotFoundError,
    CacheReader,
    CacheWriter,
    DamagedCacheError,
    Manifest,
    UnsupportedCacheError,
    verify,
)
from logitcask.cache_format.manifest import MAX_MANIFEST_BYTES


@pytest.fixture
def path(tmp_path, rng, header, sequence):
    with CacheWriter(tmp_path / "c") as writer:
        started = writer.begin(header())
        for index in range(2):
            with writer.shard(index) as shard:
                for i in range(5):
                    shard.append(sequence(rng, f"{index}-{i}"))
        writer.finish(started, 2)
    return tmp_path / "c"


def edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_random_access_equals_iteration(path):
    cache = CacheReader(path)
    in_order = [each.sequence_id for each in cache]
    assert in_order == [f"{s}-{i}" for s in range(2) for i in range(5)]
    assert [cache[i].sequence_id for i in reversed(range(10))] == in_order[::-1]
    with pytest.raises(IndexError):
        cache[10]


def test_columns_are_read_alone(path):
    cache = CacheReader(path)
    assert pa.concat_arrays(list(cache.iter_column("sequence_id"))).to_pylist() == [
        s.sequence_id for s in cache
    ]
    lengths = pa.concat_arrays(
        [c.value_lengths() for c in cache.iter_column("positions")]
    ).to_pylist()
    assert lengths == [len(s.positions) for s in cache]


def first_id(cache):
    return cache[7].sequence_id


def test_a_reader_travels_to_other_processes(path):
    cache = CacheReader(path)
    expected = first_id(cache)
    assert first_id(pickle.loads(pickle.dumps(cache))) == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_id, (cache,)) == expected


def test_any_fsspec_url(path):
    assert CacheReader(f"file://{path}")[3].sequence_id == "0-3"


def test_one_flipped_byte_is_found_and_the_shard_named(path, rng):
    shard = path / "data" / "shard-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    shard.write_bytes(data)
    (problem,) = verify(str(path))
    assert "data/shard-00001.arrow is damaged" in problem
    cache = CacheReader(path)
    assert cache[0].sequence_id == "0-0"
    with pytest.raises(DamagedCacheError, match=r"shard-00001\.arrow"):
        cache[5]


def test_a_truncated_or_missing_shard(path):
    shard = path / "data" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "bytes" in verify(str(path))[0]
    shard.unlink()
    (problem,) = verify(str(path))
    assert problem.endswith("data/shard-00000.arrow is missing; fetch or build the cache again")
    with pytest.raises(DamagedCacheError, match="missing"):
        CacheReader(path)[0]


def test_swapped_shards_are_damage(path):
    a, b = path / "data/shard-00000.arrow", path / "data/shard-00001.arrow"
    bytes_a = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(bytes_a)
    assert len(verify(str(path))) == 2


def test_a_pipe_is_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DamagedCacheError, match="is no file"):
        CacheReader(tmp_path)


def test_no_cache_there(tmp_path):
    with pytest.raises(CacheNotFoundError, match="holds no cache"):
        CacheReader(tmp_path)
    with pytest.raises(CacheNotFoundError):
        CacheReader(tmp_path / "nowhere")


def test_a_newer_format_is_refused_before_anything_else(path):
    edit(path, format_version=2, shards="something else entirely")
    with pytest.raises(UnsupportedCacheError, match=r"format version 2.*upgrade"):
        CacheReader(path)


def test_unknown_features_are_refused_and_unknown_keys_kept(path):
    edit(path, colour="blue")
    manifest = CacheReader(path).manifest
    assert json.loads(manifest.to_json())["colour"] == "blue"
    edit(path, required_features=["telepathy"])
    with pytest.raises(UnsupportedCacheError, match="telepathy"):
        CacheReader(path)


@pytest.mark.parametrize(
    "name",
    [
        "../secrets.arrow",
        "data/../../x.arrow",
        "/etc/passwd",
        "data/x.txt",
        "data/.arrow",
        "data//x.arrow",
    ],
)
def test_shards_may_not_leave_the_cache(path, name):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["path"] = name
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCacheError, match=r"shards\.0\.path"):
        CacheReader(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"{}", b"[]", b"null"])
def test_rubbish_is_no_manifest(path, text):
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CacheError):
        CacheReader(path)


def test_an_enormous_manifest_is_refused():
    with pytest.raises(DamagedCacheError, match="at most"):
        Manifest.from_json(bytes(MAX_MANIFEST_BYTES + 1), "manifest.json")


def test_the_manifest_says_how_many_rows_a_batch_has(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["sequences_per_batch"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCacheError, match="1 record batches; the manifest asks for 3"):
        CacheReader(path)[0]


def test_reading_needs_little(path):
    """In a fresh process: no framework, no engine, no writer and no YAML parser is imported on
    the way to the numbers.
    """
    code = (
        "import sys; from logitcask.cache_format import CacheReader; "
        f"s = CacheReader({str(path)!r})[0]; print(s.logprobs.shape); "
        "heavy = {'torch', 'vllm', 'transformers', 'datasets', 'pipeline', 'train'}; "
        "heavy |= {'yaml', 'omegaconf', 'typer', 'rich', 'logitcask.cache_format.writer', 'logitcask.cache_format.cli.cache_commands'}; heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_others_can_open_the_shards(path, tmp_path):
    """The plain columns are plain Arrow: to pyarrow alone, and to datasets, by the files or by
    the folder's card.
    """
    datasets = pytest.importorskip("datasets")
    cache = CacheReader(path)
    expected = [s.input_ids.tolist() for s in cache]
    with pa.ipc.open_file(str(path / "data" / "shard-00000.arrow")) as file:
        table = file.read_all()
    assert table["input_ids"].to_pylist() == expected[:5]
    assert table["target_rank"].to_pylist() == [cache[i].target_rank.tolist() for i in range(5)]
    for source in (
        {"path": "arrow", "data_files": str(path / "data" / "*.arrow")},
        {"path": str(path)},
    ):
        loaded = datasets.load_dataset(
            **source, split="train", cache_dir=str(tmp_path / "datasets")
        )
        assert loaded["input_ids"][:] == expected


def test_more_shards_than_files_may_be_open(tmp_path, rng, header, sequence):
    with CacheWriter(tmp_path / "many") as writer:
        started = writer.begin(header())
        for index in range(90):
            with writer.shard(index) as shard:
                shard.append(sequence(rng, f"{index}", tokens=4))
        writer.finish(started, 90)
    code = (
        "import resource; from logitcask.cache_format import CacheReader; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)); "
        f"cache = CacheReader({str(tmp_path / 'many')!r}); print(sum(len(s) for s in cache) + len(cache[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{91 * 4}\n", done.stderr


def test_a_forked_reader_opens_its_own_files(path):
    cache = CacheReader(path)
    expected = cache[7].sequence_id
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(cache.__getitem__, [7, 7])[0].sequence_id == expected


@pytest.mark.parametrize("url", ["foo://x", "s3://bucket/cache", "http://127.0.0.1:9/cache"])
def test_a_url_that_does_not_work_is_one_clear_error(url):
    with pytest.raises(CacheError):
        CacheReader(url)
