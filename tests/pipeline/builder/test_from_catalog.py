"""Builds that find their content in the catalogue: the same, a part, some of it.

Every cache made of others is compared with a full build, or with ``derive``, made without a
catalogue.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.catalog.listing import listing
from logitcask.cache_format.catalog.remotes import config_file
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.derive.merge import merge
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.share.copy import push
from logitcask.cache_format.share.signature import keygen, sign
from logitcask.cache_format.verify import verify
from logitcask.pipeline.builder import from_catalog, overlap, score
from logitcask.pipeline.builder.from_catalog import Taken
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher

ROWS = 60


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(autouse=True)
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior comes from the first 200 positions, so that small caches have others, too."""
    monkeypatch.setattr(score, "PRIOR_POSITIONS", 200)
    monkeypatch.setattr(overlap, "PRIOR_POSITIONS", 200)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """``rows("a", range(60))``: a file of the documents with these numbers."""

    def write(name: str, numbers: Any) -> Path:
        file = tmp_path / f"{name}.jsonl"
        texts = (f"document {n}: {'words ' * (n % 7)}and {n * n}" for n in numbers)
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if not file.exists() or file.read_text() != content:  # its time is part of its stamp
            file.write_text(content)
        return file

    return write


@pytest.fixture
def config(tmp_path: Path, rows) -> Callable[..., BuildConfig]:
    """``config(output, data=..., **fields)``: a config; by default of 60 documents."""

    def make(output: str | None = None, **fields: Any) -> BuildConfig:
        data = fields.pop("data", {})
        if "path" not in data:
            data = {"path": str(rows("rows", range(ROWS))), **data}
        where = tmp_path / (output or uuid.uuid4().hex)
        return BuildConfig.model_validate(
            {
                "teacher": {"model": "synthetic", "vocab_size": 300},
                "data": data,
                "store": {"shard_tokens": 700, **fields.pop("store", {})},
                "audit": {"sequences": 0},
                "log": False,
                "output": where,
                **fields,
            }
        )

    return make


def texts(folder: Any) -> list[tuple[str, list[int]]]:
    return [(each.sequence_id, each.input_ids.tolist()) for each in CacheReader(str(folder))]


def assert_same_content(found, expected) -> None:
    assert found.fingerprint == expected.fingerprint
    assert found.content_sha256 == expected.content_sha256
    assert [s.content_sha256 for s in found.shards] == [s.content_sha256 for s in expected.shards]


@pytest.fixture
def no_teacher(monkeypatch) -> Callable[[], None]:
    """``no_teacher()``: from here on, no teacher may start."""

    def forbid() -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the teacher was started")

        monkeypatch.setattr(SyntheticTeacher, "__init__", refuse)

    return forbid


# The same


def test_the_same_request_is_linked(config, home, no_teacher):
    first = build(config("one"), home=home)
    no_teacher()
    second = build(config("two"), home=home)
    assert second.reused
    assert second.tokens_scored == 0
    assert second.taken == Taken("same", (str(config("one").output),), ROWS)
    assert second.manifest == first.manifest
    for shard in first.manifest.shards:
        assert os.path.samefile(
            config("one").output / shard.path, config("two").output / shard.path
        )
    again = build(config("two"), home=home)
    assert (again.reused, again.taken) == (True, None)
    assert len(listing(home)) == 2


def test_without_a_catalogue_nothing_is_found_or_registered(config, home):
    build(config("one"), home=home)
    assert build(config("two")).tokens_scored > 0
    assert len(listing(home)) == 1


def test_no_reuse_builds_and_registers(config, home):
    build(config("one"), home=home)
    result = build(config("two"), home=home, reuse_known=False)
    assert result.tokens_scored > 0
    assert result.taken is None
    assert len(listing(home)) == 2


def test_the_same_text_in_another_file_is_the_same(config, rows, home, no_teacher):
    first = build(config("one"), home=home)
    no_teacher()
    other = config("two", data={"path": str(rows("copy", range(ROWS)))})
    result = build(other, home=home)
    assert result.taken.how == "same"
    assert_same_content(result.manifest, first.manifest)
    assert result.manifest.data.source == other.data.where
    assert build(other, home=home).reused
    assert verify(str(other.output), deep=True) == []


def test_shards_of_another_size_are_the_same(config, home, no_teacher):
    first = build(config("one"), home=home)
    no_teacher()
    result = build(config("two", store={"shard_tokens": 10_000}), home=home)
    assert result.taken.how == "same"
    assert result.manifest == first.manifest


def test_a_touched_file_is_compared_by_its_text(config, home, no_teacher):
    first = build(config("one"), home=home)
    Path(config().data.path).touch()
    no_teacher()
    result = build(config("two"), home=home)
    assert result.taken.how == "same"
    assert_same_content(result.manifest, first.manifest)
    assert result.manifest.data.stamp != first.manifest.data.stamp


@pytest.mark.parametrize(
    "other",
    [
        {"store": {"seed": 1}},
        {"store": {"top_k": 33}},
        {"store": {"min_probability": None}},
        {"teacher": {"model": "synthetic", "vocab_size": 301}},
        {"teacher": {"model": "synthetic", "vocab_size": 300, "seed": 1}},
        {"teacher": {"model": "synthetic", "vocab_size": 300, "dtype": "float16"}},
    ],
)
def test_another_teacher_or_a_larger_store_is_built(config, home, other):
    build(config("one"), home=home)
    found = build(config("two", **other), home=home)
    assert found.taken is None
    assert_same_content(found.manifest, build(config("three", **other)).manifest)


def test_changed_rows_are_noticed(config, rows, home):
    data = {"path": str(rows("mine", range(ROWS)))}
    build(config("one", data=data), home=home)
    rows("mine", [*range(ROWS - 1), 999])
    found = build(config("two", data=data), home=home)
    assert found.taken == Taken("part", (str(config("one").output),), ROWS - 1)
    assert texts(config("two").output)[-1] != texts(config("one").output)[-1]
    assert_same_content(found.manifest, build(config("three", data=data)).manifest)


def test_a_cache_removed_or_moved_by_hand_is_passed_over(config, home, tmp_path):
    first = build(config("one"), home=home)
    shutil.move(config("one").output, tmp_path / "moved")
    second = build(config("two"), home=home)
    assert second.taken is None
    assert_same_content(second.manifest, first.manifest)


def test_a_damaged_cache_is_not_passed_on(config, home, caplog):
    first = build(config("one"), home=home)
    shard = config("one").output / first.manifest.shards[1].path
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = build(config("two"), home=home)
    assert second.tokens_scored > 0
    assert_same_content(second.manifest, first.manifest)
    assert verify(str(config("two").output), deep=True) == []
    assert f"{config('one').output} is not used: " in caplog.text


def test_a_cache_under_removal_is_not_used(config, home):
    build(config("one"), home=home)
    ((entry, _),) = home.entries()
    assert home.begin_removal(entry)
    assert build(config("two"), home=home).taken is None


def test_an_unfinished_build_goes_on_although_the_cache_is_known(config, home, monkeypatch):
    real, count = SyntheticTeacher.score, 0

    def failing(self, sequences):
        nonlocal count
        for each in real(self, sequences):
            count += 1
            if count > 40:
                raise UserError("the engine died")
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticTeacher, "score", failing)
        with pytest.raises(UserError, match="died"):
            build(config("one"), home=home)
    done = len(list((config("one").output / BUILD_DIR / "commits").glob("*.json")))
    assert done > 0
    other = build(config("two"), home=home)
    result = build(config("one"), home=home)
    assert 0 < result.tokens_scored < other.tokens_scored
    assert_same_content(result.manifest, other.manifest)


def test_an_output_with_files_of_others_is_refused(config, home):
    build(config("one"), home=home)
    output = config("two").output
    output.mkdir()
    (output / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md of its own"):
        build(config("two"), home=home)
    assert [file.name for file in output.iterdir()] == ["README.md"]


def test_a_store_as_output_gets_a_copy(config, home, no_teacher):
    first = build(config("one"), home=home)
    no_teacher()
    for count, changes in enumerate(({}, {"store": {"top_k": 4}})):
        url = f"memory://{uuid.uuid4()}/cache"
        result = build(config(**changes).model_copy(update={"output": url}), home=home)
        assert result.taken.how == ("same", "derived")[count]
        assert verify(url, deep=True) == []
        assert build(config(**changes).model_copy(update={"output": url}), home=home).reused
    assert list((home.folder / "temporary").iterdir()) == []
    assert result.manifest.content_sha256 != first.manifest.content_sha256


# Derived


@pytest.mark.parametrize(
    "less",
    [
        {"top_k": 4},
        {"tail_samples": 0},
        {"tail_samples": 8, "top_k": 9},
        {"logprob_step": 0.25},
        {"mass_per_sample": 0.1},
    ],
)
def test_a_smaller_store_is_derived(config, home, tmp_path, no_teacher, less):
    build(config("one"), home=home)
    expected = derive(
        str(config("one").output), tmp_path / "expected", DeriveOptions(**less), shard_tokens=700
    )
    no_teacher()
    result = build(config("two", store=less), home=home)
    assert result.taken == Taken("derived", (str(config("one").output),), ROWS)
    assert_same_content(result.manifest, expected)
    again = build(config("two", store=less), home=home)
    assert (again.reused, again.taken) == (True, None)
    with pytest.raises(UserError, match="holds a finished cache with other settings"):
        build(config("two"), home=home)


@pytest.mark.parametrize(
    ("data", "slice_"),
    [
        ({"max_tokens": 900}, "0:25"),
        ({"split": "train[:50%]"}, "0:30"),
        ({"split": "train[20:40]"}, "20:40"),
        ({"split": "train[59:]"}, "59:60"),
    ],
)
def test_a_part_of_the_text_is_derived(config, home, tmp_path, no_teacher, data, slice_):
    build(config("one"), home=home)
    alone = build(config("three", data=data))
    no_teacher()
    result = build(config("two", data=data), home=home)
    assert result.taken.how == "derived"
    (start, stop) = map(int, slice_.split(":"))
    if "max_tokens" in data:
        stop = result.manifest.statistics.sequences
    options = DeriveOptions(sequences=f"{start}:{stop}")
    source = str(config("one").output)
    expected = derive(source, tmp_path / "expected", options, shard_tokens=700)
    assert_same_content(result.manifest, expected)
    # The text is that of a build.
    assert result.manifest.data.sha256 == alone.manifest.data.sha256
    assert texts(config("two").output) == texts(config("three").output)


def test_a_part_of_the_text_in_a_smaller_store(config, home, tmp_path, no_teacher):
    build(config("one"), home=home)
    no_teacher()
    result = build(config("two", data={"split": "train[10:30]"}, store={"top_k": 5}), home=home)
    options = DeriveOptions(sequences="10:30", top_k=5)
    source = str(config("one").output)
    expected = derive(source, tmp_path / "expected", options, shard_tokens=700)
    assert_same_content(result.manifest, expected)


def test_a_derived_cache_is_no_origin(config, home):
    build(config("one"), home=home)
    derived = build(config("two", store={"top_k": 8}), home=home)
    shutil.rmtree(config("one").output)
    again = build(config("three", store={"top_k": 4}), home=home)
    assert again.taken is None
    assert again.manifest.derived_from is None
    # For the request that it answers, it is what is there.
    same = build(config("four", store={"top_k": 8}), home=home)
    assert same.taken == Taken("same", (str(config("two").output),), ROWS)
    assert same.manifest == derived.manifest
    assert build(config("four", store={"top_k": 8}), home=home).reused


def test_a_cache_derived_by_hand_answers_no_request(config, home, tmp_path):
    build(config("one"), home=home)
    options = DeriveOptions(sequences="0:9")
    home.register(tmp_path / "d", derive(str(config("one").output), tmp_path / "d", options))
    shutil.rmtree(config("one").output)
    assert build(config("two"), home=home).taken is None


def test_a_cache_derived_by_hand_is_still_refused(config, home, tmp_path):
    build(config("one"), home=home)
    derive(str(config("one").output), config("two").output, DeriveOptions(sequences="0:9"))
    with pytest.raises(UserError, match="holds a cache that `teacher-cache derive` made"):
        build(config("two"), home=home)


def test_a_killed_derivation_is_made_again(config, home, monkeypatch):
    build(config("one"), home=home)

    class Killed(BaseException):
        pass

    from logitcask.cache_format.writer import CacheWriter

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", die)
        with pytest.raises(Killed):
            build(config("two", store={"top_k": 4}), home=home)
    assert (config("two").output / BUILD_DIR / "header.json").exists()
    assert build(config("two", store={"top_k": 4}), home=home).taken.how == "derived"
    # Killed again, and the origin is gone: it is built.
    shutil.rmtree(config("two").output)
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", die)
        with pytest.raises(Killed):
            build(config("three", store={"top_k": 4}), home=home)
    shutil.rmtree(config("one").output)
    found = build(config("three", store={"top_k": 4}), home=home)
    assert found.taken is None
    assert_same_content(found.manifest, build(config("four", store={"top_k": 4})).manifest)


# Some of it


def overlap_with(config, rows, home, numbers, **fields):
    """(result with the catalogue, manifest of a full build without one)."""
    data = {"path": str(rows("more", numbers))}
    result = build(config("more", data=data, **fields), home=home)
    return result, build(config("full", data=data, **fields)).manifest


@pytest.mark.parametrize(
    "store",
    [
        {},
        {"sample_logprobs": True, "sample_sets": 2},
        {"tail_samples": 0, "top_p": 0.9},
        {"top_k": 0, "min_k": 0, "draws": "independent"},
    ],
)
def test_a_fifth_more_documents_are_scored_alone(config, rows, home, store):
    before = build(config("one", store=store), home=home)
    result, full = overlap_with(config, rows, home, range(ROWS * 6 // 5), store=store)
    assert_same_content(result.manifest, full)
    assert result.taken == Taken("part", (str(config("one").output),), ROWS)
    new = full.statistics.tokens - before.manifest.statistics.tokens
    assert result.tokens_scored == new
    assert verify(str(config("more").output), deep=True) == []
    for name in ("sequences", "tokens", "positions", "mean_head_size", "mean_draws"):
        assert getattr(result.manifest.statistics, name) == getattr(full.statistics, name)
    # Sums over rounded numbers, each within half a step of the scalars, 1/256 nat.
    assert abs(result.manifest.statistics.teacher_ce - full.statistics.teacher_ce) < 1 / 512


def test_rows_between_and_with_other_names(config, rows, home):
    """Other row numbers, so other ids: the tokens count."""
    build(config("one"), home=home)
    numbers = [*range(20), 500, *range(20, 45), 501, 502, *range(45, ROWS)]
    result, full = overlap_with(config, rows, home, numbers)
    assert_same_content(result.manifest, full)
    assert result.taken.sequences == ROWS
    assert texts(config("more").output) == texts(config("full").output)


def test_new_rows_in_front_score_the_first_ones_again(config, rows, home, caplog):
    """The ranks of ids come from the first rows, in unrounded numbers."""
    build(config("one"), home=home)
    with caplog.at_level(logging.INFO):
        result, full = overlap_with(config, rows, home, [700, *range(ROWS)])
    assert_same_content(result.manifest, full)
    assert 0 < result.taken.sequences < ROWS
    again = ROWS - result.taken.sequences
    assert f"the first {again} are scored again, for the ranks of ids" in caplog.text


def test_the_same_rows_in_another_order_need_no_teacher_but_for_the_ranks(
    config, rows, home, no_teacher
):
    build(config("one"), home=home)
    numbers = [*range(30), *range(59, 29, -1)]
    full = build(config("full", data={"path": str(rows("more", numbers))}))
    no_teacher()
    result = build(config("more", data={"path": str(rows("more", numbers))}), home=home)
    assert_same_content(result.manifest, full.manifest)
    assert (result.tokens_scored, result.taken.sequences) == (0, ROWS)


def test_two_caches_give_rows(config, rows, home):
    build(config("one", data={"path": str(rows("a", range(40)))}), home=home)
    build(config("two", data={"path": str(rows("b", range(30, 70)))}), home=home)
    result, full = overlap_with(config, rows, home, range(75))
    assert_same_content(result.manifest, full)
    assert result.taken.sequences == 70
    assert set(result.taken.where) == {str(config("one").output), str(config("two").output)}


def test_a_small_overlap_of_the_first_rows_alone_is_built(config, rows, home, caplog):
    build(config("one", data={"path": str(rows("a", range(3)))}), home=home)
    with caplog.at_level(logging.INFO):
        result, full = overlap_with(config, rows, home, range(1, 60))
    assert_same_content(result.manifest, full)
    assert result.taken is None
    assert "so all are scored" in caplog.text


def test_another_store_gives_no_rows(config, rows, home):
    build(config("one", store={"top_k": 32}), home=home)
    result, full = overlap_with(config, rows, home, range(70), store={"top_k": 8})
    assert_same_content(result.manifest, full)
    assert result.taken is None


def test_a_merged_cache_gives_no_rows(config, rows, home, tmp_path):
    for name, numbers in (("a", range(30)), ("b", range(30, 60))):
        build(config(name, data={"path": str(rows(name, numbers))}))
    sources = [str(config("a").output), str(config("b").output)]
    home.register(tmp_path / "m", merge(sources, tmp_path / "m", number_ids=True))
    assert build(config("one"), home=home).taken is None


@pytest.mark.parametrize("when", ["before", "during"])
def test_rows_that_are_lost_are_scored(config, rows, home, monkeypatch, caplog, when):
    first = build(config("one"), home=home)
    data = {"path": str(rows("more", range(70)))}
    full = build(config("full", data=data)).manifest

    def lose() -> None:
        shard = first.manifest.shards[-1].path if when == "during" else "manifest.json"
        (config("one").output / shard).write_bytes(b"damaged")

    real = from_catalog.Catalog.match

    def match(*arguments: Any) -> Any:
        found = real(*arguments)
        lose()
        return found

    monkeypatch.setattr(from_catalog.Catalog, "match", match)
    result = build(config("more", data=data), home=home)
    assert_same_content(result.manifest, full)
    assert verify(str(config("more").output), deep=True) == []
    assert "the rest is scored, because rows cannot be copied" in caplog.text


def test_another_engine_scores_all(config, rows, home, monkeypatch, caplog):
    """The engine's version is known only once it runs, and is part of the fingerprint."""
    build(config("one"), home=home)
    real = SyntheticTeacher.identity
    monkeypatch.setattr(
        SyntheticTeacher,
        "identity",
        lambda self: real(self).model_copy(update={"engine": "synthetic 2"}),
    )
    result, full = overlap_with(config, rows, home, range(70))
    assert_same_content(result.manifest, full)
    assert result.taken is None
    assert "scored by synthetic (synthetic 1, float32), and this teacher is" in caplog.text


def test_an_interrupted_build_of_both_goes_on(config, rows, home, monkeypatch):
    build(config("one"), home=home)
    data = {"path": str(rows("more", range(90)))}
    full = build(config("full", data=data)).manifest
    real = SyntheticTeacher.score

    def failing(self: Any, sequences: Any) -> Any:
        for count, each in enumerate(real(self, sequences)):
            if count > 15:
                raise UserError("the engine died")
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticTeacher, "score", failing)
        with pytest.raises(UserError, match="died"):
            build(config("more", data=data), home=home)
    result = build(config("more", data=data), home=home)
    assert_same_content(result.manifest, full)
    assert result.taken.how == "part"
    assert 0 < result.tokens_scored < full.statistics.tokens


# Remotes


@pytest.fixture
def remote(config, home, tmp_path) -> str:
    """The remote of ``home``, with a cache from another machine, whose home is another."""
    url = f"memory://{uuid.uuid4()}"
    other = Home(tmp_path / "other-home")
    build(config("made-there"), home=other)
    push(config("made-there").output, f"{url}/cache")
    home.folder.mkdir()
    config_file(home).write_text(f"remotes: [{url!r}]\n")
    return url


def test_a_cache_at_a_remote_is_pulled(config, home, remote, no_teacher):
    no_teacher()
    result = build(config("here"), home=home)
    assert result.taken == Taken("same", (f"{remote}/cache",), ROWS)
    assert verify(str(config("here").output), deep=True) == []


def test_a_smaller_store_is_derived_from_a_remote(config, home, remote, no_teacher):
    no_teacher()
    result = build(config("here", store={"top_k": 4}), home=home)
    assert result.taken.how == "derived"
    assert verify(str(config("here").output), deep=True) == []


def test_rows_come_from_a_remote(config, rows, home, remote):
    result, full = overlap_with(config, rows, home, range(72))
    assert_same_content(result.manifest, full)
    assert result.taken == Taken("part", (f"{remote}/cache",), ROWS)


@pytest.mark.parametrize("what", ["shard", "manifest"])
def test_a_hostile_remote_gives_nothing(config, home, remote, what, caplog):
    """A shard of other numbers with the right size; a manifest that claims another content."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    good = build(config("good")).manifest
    evil = build(config("evil", store={"seed": 7})).manifest
    if what == "shard":
        name = f"{remote}/cache/{good.shards[0].path}"
        content = bytearray(filesystem.cat_file(name))
        content[len(content) // 2] ^= 1
        filesystem.pipe_file(name, bytes(content))
    else:
        text = json.loads(evil.to_json())
        text["fingerprint"] = good.fingerprint
        filesystem.pipe_file(f"{remote}/cache/manifest.json", json.dumps(text).encode())
    with caplog.at_level(logging.WARNING):
        result = build(config("here"), home=home)
    assert result.tokens_scored > 0
    assert_same_content(result.manifest, good)
    assert "is not used" in caplog.text or "is left out" in caplog.text


def test_an_unreachable_remote_is_a_warning(config, home, caplog):
    home.folder.mkdir()
    config_file(home).write_text("remotes: [nosuchprotocol://x]\n")
    assert build(config("here"), home=home).tokens_scored > 0
    assert caplog.text.count("the remote nosuchprotocol://x is left out") == 1


@pytest.mark.parametrize("store", [{}, {"top_k": 4}], ids=["same", "derived"])
@pytest.mark.parametrize("place", ["home", "remote"])
def test_trusted_keys_are_asked_of_what_is_taken(
    config, home, remote, tmp_path, caplog, place, store
):
    """Of the home and of remotes; by the same request, by a derivation and by rows."""
    for name in ("mine", "theirs"):
        keygen(tmp_path / name, name)
    if place == "home":
        config_file(home).unlink()
        made = build(config("first"), home=home)
        where = str(config("first").output)
    else:
        made = build(config("first"))
        where = f"{remote}/cache"
    keys = [str(tmp_path / "mine.pub")]

    def asked(output: str) -> Any:
        caplog.clear()
        return build(config(output, trusted_keys=keys, store=store), home=home)

    def signed_by(name: str) -> None:
        sign(config("first").output, tmp_path / name)
        if place == "remote":
            push(config("first").output, where, force=True)

    with pytest.raises(UserError, match="no public key"):
        build(config("none", trusted_keys=["ed25519:x"]), home=home)
    assert asked("unsigned").tokens_scored > 0
    assert f"{where} is not used: {where} is not signed" in caplog.text
    shutil.rmtree(config("unsigned").output)
    signed_by("theirs")
    assert asked("by-others").tokens_scored > 0
    assert f"{where} is not used: {where} is signed by theirs" in caplog.text
    shutil.rmtree(config("by-others").output)
    signed_by("mine")
    found = asked("by-me")
    assert found.tokens_scored == 0
    assert found.taken.where == (where,)
    if not store:
        assert found.manifest.content_sha256 == made.manifest.content_sha256


def test_rows_of_another_manifest_are_not_copied(config, rows, home, tmp_path, monkeypatch):
    """A manifest that is replaced between the plan and the copying has not been checked."""
    first = build(config("first"), home=home)
    real = overlap.Known.save

    def save(*arguments: Any) -> Any:
        found = real(*arguments)
        file = config("first").output / "manifest.json"
        file.write_text(json.dumps(json.loads(first.manifest.to_json())))
        return found

    monkeypatch.setattr(overlap.Known, "save", save)
    result, full = overlap_with(config, rows, home, range(72))
    assert_same_content(result.manifest, full)
    assert result.tokens_scored == full.statistics.tokens


@pytest.mark.parametrize("path", ["rows.jsonl", "*.jsonl"])
def test_the_same_name_in_another_folder_is_other_text(config, home, tmp_path, monkeypatch, path):
    """Of equal size and time, as files of an archive may be; and of the same text, it is found."""
    results = {}
    for folder, word in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Path("rows.jsonl").write_text(json.dumps({"text": f"text {word}"}) + "\n")
        os.utime("rows.jsonl", (1000, 1000))
        results[folder] = build(config(f"from-{folder}", data={"path": path}), home=home)
    assert texts(config("from-b").output) != texts(config("from-a").output)
    assert results["b"].tokens_scored > 0
    assert results["c"].taken.how == "same"
    assert texts(config("from-c").output) == texts(config("from-a").output)
