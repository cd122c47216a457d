"""The whole way from text to a cache on disk, by real vLLM, against transformers' dense
log-softmax: nothing is shifted.

The texts are in no other test.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from logitcask.cache_format import CacheReader
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.teachers.open import open_teacher

MAX_LENGTH = 48
DOCUMENTS = [
    "Z",
    "Rain fell",
    "The lighthouse keeper counted eleven ships before noon, and wrote each name into a ledger bound in sealskin. "
    * 3,
    "Ἐν ἀρχῇ ἦν ὁ λόγος; zażółć gęślą jaźń; 한국어도 됩니다 🦜🧊",
    "for widget in shelf:\n\tif widget.broken:\n\t\trepair(widget, glue='hot')\n",
]
CHATS = [
    [
        {"role": "user", "content": "Name a metal that floats on water."},
        {"role": "assistant", "content": "Lithium does, for a moment."},
        {"role": "user", "content": "¿Y después?"},
        {"role": "assistant", "content": "It reacts and burns — «chemie»."},
    ]
]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture(scope="module")
def dense(smollm2):
    teacher = open_teacher(
        TeacherConfig(model=str(smollm2), backend="transformers"),
        max_length=MAX_LENGTH,
        capture=Capture(8),
    )
    yield teacher.dense_logprobs
    teacher.close()


@pytest.fixture(scope="module")
def caches(smollm2, tmp_path_factory):
    """One of documents and one of chats, scored by vLLM."""
    folder = tmp_path_factory.mktemp("alignment")
    built = {}
    for kind, field, rows in (("documents", "text", DOCUMENTS), ("chats", "messages", CHATS)):
        file = folder / f"{kind}.jsonl"
        file.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
        data = {"path": str(file), "max_length": MAX_LENGTH if kind == "documents" else 128}
        data |= {"messages_field": "messages"} if kind == "chats" else {}
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": str(smollm2), "batch_tokens": 64},
                "data": data,
                "store": {"top_k": 8, "shard_tokens": 100},
                "output": str(folder / kind),
            }
        )
        manifest = build(config).manifest
        assert manifest.teacher.backend == "vllm"
        built[kind] = CacheReader(folder / kind)
    return built


def assert_aligned(sequence, dense, bound):
    """Each kept position of ``sequence`` says what ``dense`` (float[n-1, V]) says in that very
    row.
    """
    assert len(sequence.positions), "nothing to compare"
    rows = dense[sequence.positions].astype(np.float64)
    targets = sequence.input_ids[sequence.positions + 1]
    target = rows[np.arange(len(rows)), targets]
    np.testing.assert_allclose(sequence.target_logprob, target, atol=2e-3 + 2.0**-11, rtol=0)
    low = (rows > target[:, None] + 4e-3).sum(axis=1)
    high = (rows > target[:, None] - 4e-3).sum(axis=1)
    assert ((low <= sequence.target_rank) & (sequence.target_rank <= high)).all()
    k = sequence.ids.shape[1]
    named = np.take_along_axis(rows, sequence.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(sequence.logprobs, named, atol=2e-3 + bound, rtol=0)
    cut = np.partition(rows, -k, axis=1)[:, -k]
    assert (named >= cut[:, None] - 4e-3).all(), "an id is in the head that does not belong there"
    mass = 1 - np.exp(named).sum(axis=1)
    np.testing.assert_allclose(np.exp(sequence.tail_logprob), mass, atol=2e-3)


@needs_vllm
@pytest.mark.parametrize("kind", ["documents", "chats"])
def test_vllm_cache_is_what_transformers_says(caches, dense, kind):
    cache = caches[kind]
    lengths = [len(s) for s in cache]
    if kind == "documents":
        assert 1 in lengths
        assert 2 in lengths
        assert MAX_LENGTH in lengths
    for sequence in cache:
        if len(sequence) > 1:
            assert_aligned(
                sequence, dense(sequence.input_ids), cache.manifest.store.logprob_step / 2
            )


@needs_vllm
def test_the_chat_mask_covers_the_answers_only(caches, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (sequence,) = caches["chats"]
    answers = [turn["content"] + "<|im_end|>" for turn in CHATS[0] if turn["role"] == "assistant"]
    assert tokenizer.decode(sequence.input_ids[sequence.loss_mask]) == "".join(answers)
    assert tokenizer.decode(sequence.target_ids) == "".join(answers)


@needs_vllm
@pytest.mark.parametrize("shifted", ["rows", "positions", "input_ids"])
def test_anything_shifted_by_one_is_noticed(caches, dense, shifted):
    sequence = max(caches["documents"], key=len)
    logprobs = dense(sequence.input_ids)
    bound = caches["documents"].manifest.store.logprob_step / 2
    assert_aligned(sequence, logprobs, bound)
    if shifted == "rows":
        wrong, other = sequence, np.roll(logprobs, 1, axis=0)
    elif shifted == "positions":
        wrong, other = (
            dataclasses.replace(sequence, positions=np.roll(sequence.positions, 1)),
            logprobs,
        )
    else:
        wrong, other = (
            dataclasses.replace(sequence, input_ids=np.roll(sequence.input_ids, 1)),
            logprobs,
        )
    with pytest.raises(AssertionError):
        assert_aligned(wrong, other, bound)
