"""The examples of docs/extending.md, as a user would run them: files in an empty folder, and
commands.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.runtime.extensions import LOSS, load
from logitcask.pipeline.cli import app as teacher_cache
from logitcask.train.cli import app as train_student

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))
TEXT = "the quick brown fox jumps over the lazy dog and does it again\n" * 60


@pytest.fixture
def folder(user_folder):
    for name, text in FILES.items():
        (user_folder / name).write_text(text)
    (user_folder / "text.txt").write_text(TEXT)
    return user_folder


def run(command, *arguments):
    command(list(arguments), standalone_mode=False)


def test_the_page_has_whole_examples():
    assert set(FILES) == {
        *("my_losses.py", "student.yaml", "check_hellinger.py"),
        *("bigram.py", "bigram.yaml", "notes.py", "notes.yaml"),
    }
    assert max(len(line) for text in FILES.values() for line in text.splitlines()) <= 100


def test_the_loss_against_its_definition(folder):
    """The example's own check, which fails for a loss that is 0.1 % off."""
    exec(FILES["check_hellinger.py"], {})
    scaled = FILES["my_losses.py"].replace("return scale *", "return 1.001 * scale *")
    (folder / "my_losses_off.py").write_text(scaled)
    with pytest.raises(
        AssertionError, match="my_losses_off:hellinger with whole heads: values are"
    ):
        exec(FILES["check_hellinger.py"].replace("my_losses:", "my_losses_off:"), {})


def test_the_teacher(folder, capsys):
    run(teacher_cache, "build", "bigram.yaml", "data.max_tokens=4000")
    assert "bigram 1, code " in capsys.readouterr().out
    cache = CacheReader("caches/bigram")
    assert cache.manifest.teacher.backend == "bigram:Bigram"
    # The definition again: counts of pairs in a dictionary, 258 ids, smoothing of 0.5.
    pairs = Counter(zip(TEXT.encode(), TEXT.encode()[1:], strict=False))
    totals = Counter()
    for (first, _), count in pairs.items():
        totals[first] += count

    def logprob(first, second):
        return np.log((pairs[first, second] + 0.5) / (totals[first] + 0.5 * 258))

    checked = 0
    for sequence in cache:
        tokens = sequence.input_ids.tolist()
        for row, at in enumerate(sequence.positions.tolist()):
            found = float(sequence.target_logprob[row])
            assert found == pytest.approx(logprob(tokens[at], tokens[at + 1]), abs=2e-3, rel=1e-3)
            for token, value in zip(sequence.ids[row], sequence.logprobs[row], strict=True):
                if token >= 0:
                    assert float(value) == pytest.approx(logprob(tokens[at], int(token)), abs=0.04)
            checked += 1
    assert checked > 1000


def test_a_student_of_the_teacher_with_the_loss(folder, capsys):
    run(teacher_cache, "build", "bigram.yaml", "data.max_tokens=8000")
    steps = ["training.max_steps=2", "training.use_cpu=true", "training.disable_tqdm=true"]
    steps += ["training.logging_steps=1", "evaluation.held_out=0.3"]
    run(train_student, "student.yaml", *steps)
    metrics = json.loads((folder / "runs/hellinger/metrics.json").read_text())
    assert metrics["losses"] == [["forward_kl", "1"], ["my_losses:hellinger", "0.5"]]
    assert metrics["exactness"]["my_losses:hellinger"] == "a lower bound"
    code = hashlib.sha256(FILES["my_losses.py"].encode()).hexdigest()
    assert metrics["config"]["code_sha256"] == {"my_losses:hellinger": code}
    history = json.loads((folder / "runs/hellinger/log.json").read_text())
    recorded = [step for step in history if "loss_my_losses:hellinger" in step]
    assert len(recorded) == 2
    assert all(0 < step["loss_my_losses:hellinger"] < 2 for step in recorded)  # scale is 2
    for step in recorded:
        total = step["loss_forward_kl"] + 0.5 * step["loss_my_losses:hellinger"]
        assert step["loss"] == pytest.approx(total, rel=1e-4)

    run(train_student, "student.yaml", *steps)
    assert "is trained already" in capsys.readouterr().out
    edited = FILES["my_losses.py"].replace("bounded distance", "bound")
    (folder / "my_losses.py").write_text(edited)
    with pytest.raises(
        UserError, match=rf'code_sha256.my_losses:hellinger: "{code}" -> "\w+"; begin afresh'
    ):
        run(train_student, "student.yaml", *steps)


def test_the_loss_alone(folder, draw):
    """In a training loop of one's own, on plain logits."""
    from logitcask.train.losses.check import sparse_teacher

    loss = load(LOSS, "my_losses:hellinger")
    log_p = torch.randn(5, 12, generator=draw).double().log_softmax(1)
    z = torch.randn(5, 12, generator=draw).double()
    value = loss(z, sparse_teacher(log_p, torch.zeros(5, dtype=torch.int64), 12))
    p, q = log_p.exp().numpy(), z.softmax(1).numpy()
    np.testing.assert_allclose(value, ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(axis=1) / 2, rtol=1e-9)


def test_the_source(folder, capsys):
    with closing(sqlite3.connect("notes.db")) as database:
        database.execute("CREATE TABLE notes (id INTEGER, title TEXT, body TEXT)")
        notes = [(key, f"Title {key}", "body " * key) for key in (3, 1, 2)]
        database.executemany("INSERT INTO notes VALUES (?, ?, ?)", notes)
        database.commit()
    smaller = ["teacher.vocab_size=300", "audit.sequences=0"]
    run(teacher_cache, "build", "notes.yaml", *smaller)
    cache = CacheReader("caches/notes")
    assert [sequence.sequence_id for sequence in cache] == ["note-1", "note-2", "note-3"]
    texts = [bytes(s.input_ids[1:].tolist()).decode() for s in cache]
    assert texts == [f"Title {key}\n\n{'body ' * key}" for key in (1, 2, 3)]
    size = Path("notes.db").stat()
    assert cache.manifest.data.stamp == f"notes:Notes:{size.st_size}/{size.st_mtime_ns}"
    run(teacher_cache, "build", "notes.yaml", *smaller)
    assert "reusing it" in capsys.readouterr().out
    with closing(sqlite3.connect("notes.db")) as database:
        database.execute("UPDATE notes SET body = 'other' WHERE id = 2")
        database.commit()
    with pytest.raises(UserError, match="notes:Notes has changed since caches/notes was built"):
        run(teacher_cache, "build", "notes.yaml", *smaller)


def test_the_shortest_source(folder):
    (body,) = re.findall(r"```python\n(def lines.*?)```", PAGE, re.DOTALL)
    (folder / "short.py").write_text(body)
    fields = ["data.path=short:lines", "data.name=text.txt", "data.id_field=null"]
    fields += ["teacher.vocab_size=300", "audit.sequences=0", "output=caches/short"]
    run(teacher_cache, "build", "notes.yaml", *fields)
    assert len(CacheReader("caches/short")) == 60


def test_the_list_of_losses(folder, install, capsys):
    (table,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    group, name, value = re.fullmatch(
        r'\[project\.entry-points\."(.*)"\]\n(\w+) = "(.*)"\n', table
    ).groups()
    install("distances", "2.0", {group: {name: value}})
    run(train_student, "losses")
    shown = capsys.readouterr().out
    assert re.search(
        r"^hellinger +distances 2\.0, my_losses:hellinger +scale: 1\.0$", shown, re.MULTILINE
    )
    assert re.search(r"^forward_kl +logitcask +temperature: 1\.0, tail: auto$", shown, re.MULTILINE)
