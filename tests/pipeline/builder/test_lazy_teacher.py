"""A teacher starts when something needs it, once, and is freed."""

from __future__ import annotations

import pytest

from logitcask.pipeline.builder import lazy_teacher
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.teachers.base import Sampling

CONFIG = BuildConfig(
    teacher={"model": "synthetic", "vocab_size": 300},
    data={"path": "python-docs", "max_length": 77},
    store={"top_k": 5, "tail_samples": 3},
    output="cache",
)


class Engine:
    """A teacher that knows whether it was freed."""

    def __init__(self, **asked):
        self.asked = asked
        self.closed = 0

    def close(self):
        self.closed += 1


@pytest.fixture
def started(monkeypatch):
    engines = []

    def open_teacher(config, model, **asked):
        engines.append(Engine(config=config, model=model, **asked))
        return engines[-1]

    monkeypatch.setattr(lazy_teacher, "open_teacher", open_teacher)
    return engines


def test_nothing_starts_unless_it_is_needed(started, tmp_path):
    with LazyTeacher(CONFIG, Inputs(CONFIG), tmp_path):
        pass
    assert started == []


def test_what_wrote_also_scores(started, tmp_path):
    sampling = Sampling(temperature=1.0, top_p=1.0, end_tokens=(2,))
    with LazyTeacher(CONFIG, Inputs(CONFIG), tmp_path) as teacher:
        assert teacher.start(sampling) is teacher.start() is started[0]
    (engine,) = started
    assert engine.asked == {
        "config": CONFIG.teacher,
        "model": None,
        "max_length": 77,
        "capture": CONFIG.store.capture(),
        "sampling": sampling,
        "state": tmp_path,
    }
    assert engine.closed == 1


def test_it_is_freed_early_for_others_and_when_the_build_fails(started, tmp_path):
    with pytest.raises(ZeroDivisionError), LazyTeacher(CONFIG, Inputs(CONFIG), tmp_path) as teacher:
        teacher.start()
        teacher.close()
        assert started[0].closed == 1
        teacher.start()
        raise ZeroDivisionError
    assert [engine.closed for engine in started] == [1, 1]
