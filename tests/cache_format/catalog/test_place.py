"""A cache in another folder: links, copies, and nothing damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from logitcask.cache_format import CacheReader, DamagedCacheError, UserError
from logitcask.cache_format.catalog import place as placing
from logitcask.cache_format.catalog.place import discard, place
from logitcask.cache_format.layout import SIGNATURE
from logitcask.cache_format.share.copy import push
from logitcask.cache_format.share.signature import check_signed, keygen, sign
from logitcask.cache_format.verify import verify


@pytest.fixture
def source(make_cache, tmp_path) -> Path:
    make_cache(tmp_path / "source")
    return tmp_path / "source"


def manifest_of(folder):
    return CacheReader(str(folder)).manifest


def test_files_are_shared(source, tmp_path):
    place(str(source), manifest_of(source), tmp_path / "out")
    for file in (source / "data").iterdir():
        assert os.path.samefile(file, tmp_path / "out" / "data" / file.name)
    assert manifest_of(tmp_path / "out") == manifest_of(source)
    assert verify(str(tmp_path / "out")) == []
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        *("README.md", "data", "manifest.json")
    ]


def test_the_manifest_is_its_own(source, tmp_path):
    other = manifest_of(source).model_copy(update={"config": {"other": 1}})
    place(str(source), other, tmp_path / "out")
    assert manifest_of(tmp_path / "out").config == {"other": 1}
    assert manifest_of(source).config != {"other": 1}


def test_without_links_files_are_copied(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(placing.os, "link", refuse)
    place(str(source), manifest_of(source), tmp_path / "out")
    for file in (source / "data").iterdir():
        copy = tmp_path / "out" / "data" / file.name
        assert copy.read_bytes() == file.read_bytes()
        assert not os.path.samefile(file, copy)


def test_links_are_followed(source, tmp_path):
    """A folder of links, as the hub's client makes, may be removed afterwards."""
    files = tmp_path / "files"
    files.mkdir()
    for file in (source / "data").iterdir():
        file.rename(files / file.name)
        file.symlink_to(Path("../../files") / file.name)
    place(str(source), manifest_of(source), tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out" / "data").iterdir())
    shutil.rmtree(files)
    assert verify(str(tmp_path / "out")) == []


def test_signatures_come_with_the_same_manifest_alone(source, tmp_path):
    key = keygen(tmp_path / "me", "Ada")
    sign(source, tmp_path / "me")
    reader = CacheReader(str(source))
    place(str(source), reader.manifest, tmp_path / "out")
    assert check_signed(str(tmp_path / "out"), reader.manifest_sha256, [key])
    other = reader.manifest.model_copy(update={"config": {"other": 1}})
    place(str(source), other, tmp_path / "other")
    assert not (tmp_path / "other" / SIGNATURE).exists()


def test_from_a_store(source, tmp_path):
    push(source, "memory://placed/cache")
    place("memory://placed/cache", manifest_of(source), tmp_path / "out")
    assert manifest_of(tmp_path / "out") == manifest_of(source)


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_a_damaged_source_is_refused(source, tmp_path, damage):
    file = source / "data" / "shard-00001.arrow"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "changed" else content[:-1])
    manifest = manifest_of(source)
    with pytest.raises(DamagedCacheError, match=r"shard-00001.arrow is (damaged|missing)"):
        place(str(source), manifest, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    discard(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_of_others_are_not_replaced(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"is no cache, but has README.md of its own"):
        place(str(source), manifest_of(source), tmp_path / "out")
    discard(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("step", range(1, 6))
def test_killed_at_any_rename_it_goes_on(source, tmp_path, monkeypatch, step):
    real, count = os.replace, 0

    class Killed(BaseException):
        pass

    def replace(*arguments):
        nonlocal count
        count += 1
        if count == step:
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if step <= 4:  # two shards, the card, the manifest
            with pytest.raises(Killed):
                place(str(source), manifest_of(source), tmp_path / "out")
            assert not (tmp_path / "out" / "manifest.json").exists()
    place(str(source), manifest_of(source), tmp_path / "out")
    assert verify(str(tmp_path / "out")) == []
    assert verify(str(source)) == []
    assert not (tmp_path / "out" / ".pull").exists()
