"""Whether data, tokenizer and teacher are those that a build began with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from logitcask.cache_format import UserError
from logitcask.cache_format.manifest import TeacherIdentity, TokenizerIdentity
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.identity import (
    check_teacher,
    check_unchanged,
    tokenizer_changes,
    tokenizer_of,
)
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer

CONFIG = BuildConfig(teacher={"model": "synthetic"}, data={"path": "d"}, output="cache")
TOKENIZER = TokenizerIdentity(
    name="t", sha256="1" * 64, vocab_sha256="2" * 64, chat_template_sha256="3" * 64, vocab_size=9
)
TEACHER = TeacherIdentity(
    model="m", backend="vllm", engine="vllm 1", dtype="float32", route="raw", vocab_size=9
)


def stamped(stamp):
    def look():
        if isinstance(stamp, Exception):
            raise stamp
        return stamp

    return SimpleNamespace(stamp=look)


def test_data_is_what_it_was_before_its_first_row_was_read():
    check_unchanged(stamped("now"), "now", CONFIG)
    for found in ("later", FileNotFoundError("gone")):
        with pytest.raises(UserError, match=r"^d has changed while it was read"):
            check_unchanged(stamped(found), "now", CONFIG)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"name": "another folder"}, ""),
        ({"vocab_sha256": "0"}, "its vocabulary"),
        ({"chat_template_sha256": None}, "its chat template"),
        (
            {"sha256": "0", "chat_template_sha256": "0"},
            "how it turns text into ids, its chat template",
        ),
    ],
)
def test_what_of_a_tokenizer_differs_is_named(changes, says):
    assert tokenizer_changes(TOKENIZER, TOKENIZER.model_copy(update=changes)) == says


def test_a_template_counts_where_there_is_one():
    tokenizer = SyntheticTokenizer()
    without, one, other = (
        tokenizer_of(SimpleNamespace(tokenizer=tokenizer, template=template), CONFIG)
        for template in (None, SimpleNamespace(text="a"), SimpleNamespace(text="b"))
    )
    assert one.name == "synthetic"
    assert tokenizer_changes(one, other) == tokenizer_changes(without, one) == "its chat template"


def test_the_teacher_that_scores_answers_is_the_one_that_wrote_them(tmp_path):
    build_dir = tmp_path / "cache" / ".build"
    (build_dir / "generations").mkdir(parents=True)
    check_teacher(build_dir, TEACHER)
    check_teacher(build_dir, TEACHER.model_copy(update={"route": "flat"}))
    with pytest.raises(UserError, match='answers of another teacher: dtype: "float32" -> "bf'):
        check_teacher(build_dir, TEACHER.model_copy(update={"dtype": "bfloat16"}))
    check_teacher(build_dir, TEACHER)
