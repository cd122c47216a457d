"""The identity of weights: read once, before an engine starts, and never taken for what it was
when it may have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers import weights
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.weights import weights_sha256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(b"%d" % number * 1000)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "a"}))
    return folder


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read whole, as they are read; nothing is known from earlier."""
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(handle: Any, name: str) -> Any:
        read.append(Path(handle.name).name)
        return digest(handle, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr(weights, "_known", {})
    monkeypatch.setattr(weights, "_SETTLED", -(10**18))
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "cache"))
    return read


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(weights, "_known", {})


def notes(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "weights").glob("*.json"))


def test_what_it_is(model: Path, reads: list[str]) -> None:
    """As it has been in every version: names and digests of the files, in order of name, and the
    config.
    """
    files = sorted(model.glob("*.safetensors"))
    content = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    expected = hashlib.sha256(
        json.dumps([content, {"model_type": "llama"}], sort_keys=True).encode()
    ).hexdigest()
    assert weights_sha256(model) == expected
    for file in files:
        file.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        weights_sha256(model)


def test_files_are_read_once(
    model: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process, in the next one, by another path; and one file alone where one has changed."""
    first = weights_sha256(model)
    assert len(reads) == 2
    assert weights_sha256(model) == first
    forget(monkeypatch)
    (tmp_path / "link").symlink_to(model)
    assert weights_sha256(tmp_path / "link") == first
    monkeypatch.chdir(model.parent)
    assert weights_sha256(Path("model")) == first
    assert len(reads) == 2

    changed = model / "model-00002-of-00002.safetensors"
    changed.write_bytes(b"3" * 1000)
    assert weights_sha256(model) != first
    assert reads[2:] == [changed.name]
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1}))
    assert weights_sha256(model) != first
    assert len(reads) == 3


@pytest.mark.parametrize(
    "how", ["replaced by a file of the same times", "in place, with its times put back"]
)
def test_a_change_that_hides_is_seen(
    model: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    file = model / "model-00001-of-00002.safetensors"
    os.utime(file, (1e9, 1e9))
    first = weights_sha256(model)
    forget(monkeypatch)
    if "replaced" in how:
        other = model / "other"
        other.write_bytes(b"7" * 1000)
        os.utime(other, (1e9, 1e9))
        other.replace(file)
    else:
        file.write_bytes(b"7" * 1000)
        os.utime(file, (1e9, 1e9))
    assert weights_sha256(model) != first
    assert reads[2:] == [file.name]


def test_a_file_that_was_just_written_is_not_remembered(
    model: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of whole seconds it may change again and look the same; nor one that changes
    while it is read.
    """
    monkeypatch.setattr(weights, "_SETTLED", 10**18)
    first = weights_sha256(model)
    assert weights_sha256(model) == first
    assert len(reads) == 4
    assert [json.loads(note.read_text()) for note in notes(tmp_path)] == [{}]

    monkeypatch.setattr(weights, "_SETTLED", -(10**18))
    digest = hashlib.file_digest

    def written_meanwhile(handle: Any, name: str) -> Any:
        found = digest(handle, name)
        os.utime(handle.name, (1, 1))
        return found

    monkeypatch.setattr(hashlib, "file_digest", written_meanwhile)
    weights_sha256(model)
    weights_sha256(model)
    assert len(reads) == 8


@pytest.mark.parametrize(
    "spoil",
    [
        lambda note: note.write_text("{not"),
        lambda note: note.write_bytes(b"\xff\xfe"),
        lambda note: note.write_text("[1]"),
        lambda note: note.write_text(json.dumps({key: [1, 2] for key in json.loads(note.read_text())})),
        lambda note: note.write_text(note.read_text().replace('", "', '"')),
        lambda note: note.write_text(json.dumps({k: [*v[:4], "0"] for k, v in json.loads(note.read_text()).items()})),
        lambda note: note.write_text(json.dumps({k: [*v[:4], 7] for k, v in json.loads(note.read_text()).items()})),
        lambda note: (note.unlink(), note.mkdir()),
    ],
)  # fmt: skip
def test_a_note_that_is_none_is_ignored(
    model: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    first = weights_sha256(model)
    (note,) = notes(tmp_path)
    spoil(note)
    forget(monkeypatch)
    assert weights_sha256(model) == first
    assert len(reads) in (2, 4)
    assert len(reads) == 4 or json.loads(note.read_text())


def test_a_folder_that_cannot_be_written_costs_time_alone(
    model: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = weights_sha256(model)
    assert weights_sha256(model) == first
    assert len(reads) == 2, "within a process it is known all the same"
    forget(monkeypatch)
    assert weights_sha256(model) == first
    assert len(reads) == 4

    forget(monkeypatch)
    monkeypatch.delenv("LOGITCASK_CACHE")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(weights, "shard_cache_folder", homeless)
    assert weights_sha256(model) == first


def test_another_folder_of_the_same_name_is_another(
    model: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two nodes that share the user's folder: none takes what the other has read, nor
    writes over it.
    """
    first = weights_sha256(model)
    away = tmp_path / "away"
    shutil.copytree(model, tmp_path / "copy")
    model.rename(away)
    (tmp_path / "copy").rename(model)
    forget(monkeypatch)
    assert weights_sha256(model) == first
    assert len(reads) == 4
    assert len(notes(tmp_path)) == 2


def test_engines_that_start_together_read_once(
    model: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, and are told by the note: what a process knows is taken from them here."""
    monkeypatch.setattr(
        weights,
        "_recall",
        lambda note, recall=weights._recall: weights._known.clear() or recall(note),
    )
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: weights_sha256(model), range(4)))
    assert len(found) == 1
    assert sorted(reads) == sorted(file.name for file in model.glob("*.safetensors"))


def test_weights_are_read_before_the_engine_loads_them_and_once(
    tiny_llama: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks the teacher who it is, a build that generates twice, hears what was read
    then.
    """
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    before: list[list[str]] = []

    def loading(*args: Any, **kwargs: Any) -> Any:
        before.append(list(reads))
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    config = TeacherConfig(model=str(tiny_llama), backend="transformers")
    teacher = open_teacher(config, max_length=32, capture=Capture(4))
    assert teacher.identity() == teacher.identity()
    assert teacher.identity().weights_sha256 == weights_sha256(tiny_llama)
    assert before == [["model.safetensors"]]
    assert reads == ["model.safetensors"]
