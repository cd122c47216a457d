"""Folders of runs: which are found, how they are called, and which were judged on one text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.train.comparison.runs import chosen_base, labels_of, read_runs


def test_labels_are_the_shortest_ends_that_differ():
    paths = [*map(Path, ("/x/a/run", "/x/b/run", "/x/c", "/y/c/student", "/y/d/student"))]
    assert labels_of(paths) == ["a/run", "b/run", "c", "c/student", "d/student"]
    assert labels_of([Path("/run"), Path("/a/run")]) == ["//run", "a/run"]


def test_a_folder_of_runs_stands_for_them(make_run, tmp_path):
    """Those of a sweep, and those of rounds."""
    for name in ("sweep/seed=1", "sweep/seed=0", "rounds/round-000/student", "rounds/round-001/student", "one"):  # fmt: skip
        make_run(name)
    (tmp_path / "sweep" / "failed").mkdir()
    found = read_runs([str(tmp_path / name) for name in ("one", "sweep", "rounds")])
    assert [run.label for run in found] == ["one", "seed=0", "seed=1", "round-000/student", "round-001/student"]  # fmt: skip
    assert chosen_base("seed=1", found) == 2
    assert chosen_base(str(tmp_path / "rounds" / "round-000" / "student"), found) == 3
    assert chosen_base(None, found) == 0
    with pytest.raises(UserError, match=r"--base is seed=2, .* name one of one, seed=0"):
        chosen_base("seed=2", found)


def test_other_folders_are_refused(make_run, tmp_path):
    one = str(make_run("one"))
    with pytest.raises(UserError, match="expected two or more"):
        read_runs([one])
    with pytest.raises(UserError, match="named twice"):
        read_runs([one, f"{one}/../one"])
    with pytest.raises(UserError, match="holds no finished run"):
        read_runs([one, str(tmp_path / "nothing")])
    two = make_run("two")
    (two / "held_out.json").write_text('{"positions": [1], "sums": {"kl": [1, 2]}, "ece": 0}')
    with pytest.raises(UserError, match=r"held_out.json is damaged \(ValueError\)"):
        read_runs([one, str(two)])
    (two / "metrics.json").write_text("[1]")
    with pytest.raises(UserError, match="no run that can be read"):
        read_runs([one, str(two)])
    (two / "metrics.json").unlink()
    with pytest.raises(UserError, match="a run that is not finished"):
        read_runs([one, str(two)])


def changed(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("options", "name", "change"),
    [
        ({"reference": "q" * 64}, None, None),
        ({"reference": None}, None, None),
        ({"sequences": 19}, None, None),
        ({"config": {"evaluation.max_sequences": 64}}, None, None),
        ({}, "metrics.json", lambda m: m["teacher"].update(left_out=0.25)),
        ({}, "held_out.json", lambda h: h["parts"][0]["sequences"].reverse()),
        ({}, "held_out.json", lambda h: h["parts"][0].update(ids=59)),
    ],
)
def test_other_text_is_not_the_same(make_run, options, name, change):
    one, other = make_run("one"), make_run("other", **options)
    if name is not None:
        changed(other, name, change)
    first, second = read_runs([str(one), str(other)])
    assert not first.judged_as(second)
    assert not first.paired_with(second)


def test_the_same_text(make_run):
    runs = read_runs(
        [
            str(make_run("a")),
            # Neither the cache, the seed nor the path of the reference matters.
            str(make_run("b", fingerprint="d" * 64, seed=4)),
            str(make_run("old", old=True)),
        ]
    )
    assert all(one.judged_as(other) for one in runs for other in runs)
    assert runs[0].paired_with(runs[1])
    assert not runs[0].paired_with(runs[2])


def test_held_out_rows_of_mixtures(make_run):
    """The caches and their shares matter, and their weights do not."""
    folders = [make_run(name, reference=None, old=True) for name in "abc"]
    for folder, weight, share in zip(folders, (1, 2, 1), (0.1, 0.1, 0.2), strict=True):
        entry = {"fingerprint": "c" * 64, "weight": weight, "name": "c", "held_out": share}
        changed(folder, "run.json", lambda run, entry=entry: run.update(cache=[entry]))
    first, second, third = read_runs([*map(str, folders)])
    assert first.judged_as(second)
    assert not first.judged_as(third)
    assert first.judge.words == "held-out rows of its own cache caches/c (cccccccccccccccc), 20 sequences, 117 positions"  # fmt: skip
