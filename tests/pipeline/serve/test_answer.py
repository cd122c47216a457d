"""Answers against dictionaries made one by one, and as clients read them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.shards.codec import Codec
from logitcask.pipeline.serve.answer import prompt_logprobs
from logitcask.pipeline.serve.keeper import LOGPROB_STEP
from logitcask.pipeline.teachers.server.rows import parse_rows
from tests.pipeline.serve.conftest import header


def one_by_one(sequence: CachedSequence, k: int) -> list[dict[str, Any] | None]:
    rows: list[dict[str, Any] | None] = [None]
    for p in range(len(sequence.positions)):
        size = int((sequence.ids[p] >= 0).sum())
        target = int(sequence.target_ids[p])
        head = {
            int(i): (float(x), n)
            for n, (i, x) in enumerate(
                zip(sequence.ids[p, :size], sequence.logprobs[p, :size], strict=True), 1
            )
        }
        values = sequence.logprobs[p, :size].tolist()
        if target in head:
            at = head[target][1] - 1
            above = values[at - 1] if at else 0.0
            below = values[at + 1] if at + 1 < size else float("-inf")
            entry = (min(max(float(sequence.target_logprob[p]), below), above), at + 1)
        else:
            most = values[-1] if values else 0.0
            entry = (
                min(float(sequence.target_logprob[p]), most),
                max(int(sequence.target_rank[p]), size) + 1,
            )
        row = {target: entry} | {
            i: each for i, each in head.items() if each[1] <= k and i != target
        }
        rows.append(
            {str(i): {"logprob": x, "rank": r, "decoded_token": None} for i, (x, r) in row.items()}
        )
    return rows


@pytest.mark.parametrize("width", [1, 8, 40])
def test_every_entry(table: Any, rng: np.random.Generator, width: int) -> None:
    """Targets inside and outside of heads, heads cut and whole, the logprobs rounded coarsely."""
    text = rng.integers(0, 384, 60).tolist()
    for at in range(3, 60, 3):  # every third target is one of the eight most probable ids
        text[at] = int(np.argsort(-table.logprobs[text[at - 1]])[at % 8])
    sequence = table.cached("s", text, [False] + [True] * 59, width)
    rough = CachedSequence(
        **{
            name: getattr(sequence, name)
            for name in (
                "sequence_id",
                "input_ids",
                "loss_mask",
                "positions",
                "ids",
                "tail_logprob",
                "target_rank",
            )
        },
        logprobs=np.round(sequence.logprobs * 2) / 2,
        target_logprob=np.round(sequence.target_logprob * 256) / 256,
    )
    inside = (sequence.ids == sequence.target_ids[:, None]).any(axis=1)
    assert width == 1 or (inside.any() and not inside.all())
    for each in (sequence, rough):
        for k in {0, 1, width // 2, width}:
            answer = prompt_logprobs(each, k)
            assert json.loads(answer) == one_by_one(each, k)
            rows = parse_rows(
                b'{"choices": [{"prompt_logprobs": ' + answer + b"}]}", each.input_ids, k, "s"
            )
            assert rows is not None, "our own client takes it"
    # Values without rounding are those that vLLM gives.
    assert json.loads(prompt_logprobs(sequence, width)) == table.prompt_logprobs(text, width)


def test_heads_of_several_sizes(table: Any, rng: np.random.Generator) -> None:
    text = rng.integers(0, 384, 40).tolist()
    sequence = table.cached("s", text, [False] + [True] * 39, 12)
    sizes = rng.integers(3, 13, 39)
    inside = np.arange(12) < sizes[:, None]
    ragged = CachedSequence(
        **{
            name: getattr(sequence, name)
            for name in (
                "sequence_id",
                "input_ids",
                "loss_mask",
                "positions",
                "tail_logprob",
                "target_rank",
                "target_logprob",
            )
        },
        ids=np.where(inside, sequence.ids, -1),
        logprobs=np.where(inside, sequence.logprobs, -np.inf),
    )
    for k in (0, 2, 3):
        assert json.loads(prompt_logprobs(ragged, k)) == table.prompt_logprobs(text, k)


@pytest.mark.parametrize("step", [1 / 16, LOGPROB_STEP])
def test_rounding(table: Any, rng: np.random.Generator, step: float) -> None:
    """A quarter of a step on average, half a step at most (docs/serve.md)."""
    codec, head, target = Codec(header(40, step=step).store, None), [], []
    for _ in range(25):
        text = rng.integers(0, 384, 101).tolist()
        exact = table.cached("s", text, [False] + [True] * 100, 40)
        read = codec.open(codec.encode([exact]), "s").decode(0)
        head.append(np.abs(read.logprobs - exact.logprobs))
        target.append(np.abs(read.target_logprob - exact.target_logprob))
    assert np.size(head) == 100_000
    assert np.mean(head) == pytest.approx(step / 4, rel=0.03)
    assert np.max(head) <= step / 2
    assert np.max(target) <= 1 / 512


def test_a_target_of_probability_zero(table: Any) -> None:
    """-9999, as vLLM says it: JSON has no -inf."""
    sequence = table.cached("s", [1, 2], [False, True], 4)
    sequence.target_logprob[:] = -np.inf
    assert json.loads(prompt_logprobs(sequence, 1))[1]["2"]["logprob"] == -9999.0


@pytest.mark.parametrize("k", [1, 5])
def test_trl_reads_it(table: Any, rng: np.random.Generator, k: int) -> None:
    """The part of its client that needs no server."""
    client = pytest.importorskip("trl.generation.vllm_client").VLLMClient
    text = rng.integers(0, 384, 30).tolist()
    sequence = table.cached("s", text, [False] + [True] * 29, 8)
    choice = {"prompt_logprobs": json.loads(prompt_logprobs(sequence, k))}
    found = client._format_sequence_logprobs(choice, text, 10, k)
    dense = table.logprobs[text[9:-1]]
    order = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    assert np.array_equal(found["logprob_token_ids"], order)
    assert np.array_equal(np.float32(found["logprobs"]), np.take_along_axis(dense, order, axis=1))
    assert np.array_equal(
        np.float32(found["actual_logprobs"])[:, 0], dense[np.arange(20), text[10:]]
    )
