"""Axolotl's columns: chats with vLLM's logprobs, and prepared targets of both alignments."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from tests.pipeline.imports.conftest import (
    KL_BY_ROUNDING,
    K,
    Text,
    V,
    imported,
    make_texts,
    mean_kl,
)

_FIELD = "llm_text_generation_vllm_logprobs"


def lists(text, first):
    """What vLLM says of the tokens from ``first``: the most probable ids, and the token itself."""
    found, held = [], []
    ids, logprobs = text.top(text.logprobs)
    for token in range(first, len(text.tokens)):
        row = dict(zip(ids[token - 1].tolist(), logprobs[token - 1].tolist(), strict=True))
        own = int(text.tokens[token])
        row.setdefault(own, float(text.logprobs[token - 1, own]))
        found.append([{"token": f"token_id:{i}", "logprob": p, "rank": 1} for i, p in row.items()])
        both = np.full((2, K + 1), -1.0)
        both[0, : len(row)], both[1, : len(row)] = list(row), list(row.values())
        held.append(both)
    stacked = np.array(held).reshape(-1, 2, K + 1)
    return found, (stacked[:, 0].astype(int), stacked[:, 1])


@pytest.mark.parametrize("form", ["ids", "jsonl"])
def test_lists_of_token_ids(form, texts, tmp_path):
    rows, held = [], []
    for text in texts if form == "ids" else texts[:50]:
        found, kept = lists(text, 1)
        rows.append({"input_ids": text.tokens.tolist(), _FIELD: [None, *found]})
        held.append(kept)
    source = tmp_path / ("rows.parquet" if form == "ids" else "rows.jsonl")
    if form == "ids":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = imported("axolotl", source, tmp_path / "cache")
    # The token itself is in every list, so all targets are known; where it is not among the most
    # probable, its rank is not.
    assert reader.manifest.store.unknown == ("ranks",)
    own = np.concatenate(
        [t.logprobs[np.arange(len(t.logprobs)), t.tokens[1:]] for t in texts[: len(rows)]]
    )
    assert reader.manifest.statistics.teacher_ce == pytest.approx(-own.mean(), abs=0.01)
    assert mean_kl(held, reader) < KL_BY_ROUNDING
    assert max(s.ids.shape[1] for s in reader) == K


def test_chats_are_rendered(rng, tmp_path):
    tokenizer = SyntheticTokenizer()
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"answer {n}"}]
        for n in range(30)
    ]
    rows, held, answers = [], [], []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = np.array(tokenizer([text], add_special_tokens=False)["input_ids"][0])
        logits = rng.normal(0, 2, (len(ids) - 1, V))
        logits[np.arange(len(ids) - 1), ids[1:]] += 5
        made = Text(ids, logits)
        # Only the answer was generated: the lists are about the last tokens.
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        first = len(tokenizer([prompt], add_special_tokens=False)["input_ids"][0])
        found, kept = lists(made, first)
        rows.append({"messages_combined": chat, _FIELD: found})
        held.append(tuple(part for part in kept))
        answers.append(ids)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = imported("axolotl", tmp_path / "rows.jsonl", tmp_path / "cache")
    assert [s.input_ids.tolist() for s in reader] == [ids.tolist() for ids in answers]
    # The newline behind the end of the turn has a list, and is not the assistant's.
    kept = [
        (ids[: len(s.positions)], p[: len(s.positions)])
        for (ids, p), s in zip(held, reader, strict=True)
    ]
    assert all(len(ids) - len(s.positions) <= 1 for (ids, _), s in zip(held, reader, strict=True))
    assert mean_kl(kept, reader) < KL_BY_ROUNDING
    assert (reader.manifest.data.kind, reader.manifest.data.mask_policy) == ("chats", "assistant")

    # Another template makes other tokens, which the lists do not hold.
    for row in rows:
        row["messages_combined"] = [
            {"role": "system", "content": "x"},
            *row["messages_combined"][:1],
            {"role": "assistant", "content": "something else entirely"},
        ]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        UserError, match="of the lists hold the token that they are about, expected"
    ):
        imported("axolotl", tmp_path / "other.jsonl", tmp_path / "other")


@pytest.mark.parametrize("token", [" the", "token_id:x", "token_id:" + "9" * 30])
def test_tokens_as_text_are_refused(token, rng, tmp_path):
    (text,) = make_texts(rng, 1)
    found, _ = lists(text, 1)
    found[0][0]["token"] = token
    row = {"input_ids": text.tokens.tolist(), _FIELD: [None, *found]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"has the token '{token}', expected token_id:NUMBER"):
        imported("axolotl", tmp_path / "rows.jsonl", tmp_path / "cache")


def prepared(path, texts, alignment):
    """A file of prepared targets, scaled to 1; row j is about token j + 1, or j."""
    rows = []
    held = []
    for text in texts:
        ids, logprobs = text.top(text.logprobs)
        scaled = logprobs - np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        held.append((ids, scaled))
        nothing = ([list(range(K))], [[-1e9] * K], [[0] * K])
        parts = (ids.tolist(), scaled.tolist(), np.ones(ids.shape, int).tolist())
        both = [
            a + b if alignment == "current" else b + a for a, b in zip(parts, nothing, strict=True)
        ]
        rows.append(
            {
                "input_ids": text.tokens.tolist(),
                "labels": text.tokens.tolist(),
                **dict(
                    zip(("target_token_ids", "target_logprobs", "target_mask"), both, strict=True)
                ),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return held


@pytest.mark.parametrize("alignment", ["current", "legacy"])
def test_prepared_targets(alignment, texts, tmp_path):
    texts = texts if alignment == "current" else texts[:50]
    held = prepared(tmp_path / "rows.parquet", texts, alignment)
    options = {"alignment": alignment}
    reader = imported("axolotl-prepared", tmp_path / "rows.parquet", tmp_path / "cache", **options)
    # Scaled to 1, so the mass outside is gone.
    assert "tail" in reader.manifest.store.unknown
    assert mean_kl(held, reader, tail=False) < KL_BY_ROUNDING
    other = {"current": "legacy", "legacy": "current"}[alignment]
    with pytest.raises(UserError, match="the rows are shifted by one"):
        imported("axolotl-prepared", tmp_path / "rows.parquet", tmp_path / "o", alignment=other)
