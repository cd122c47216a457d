"""DistillKit's raw rows: logprobs, logits, packed examples, padding, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.cache_format import UserError
from logitcask.cache_format.schema import UNKNOWN_VALUES
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, V, imported, make_texts, mean_kl


def write(path, texts, values, **columns):
    rows = {"input_ids": [t.tokens.tolist() for t in texts], "token_ids": [], "top_values": []}
    for text in texts:
        ids, top = text.top(values(text))
        rows["token_ids"].append(ids.tolist())
        rows["top_values"].append(top.tolist())
    pq.write_table(pa.table(rows | columns), path, row_group_size=100)
    return path


def test_logprobs(texts, tmp_path):
    source = write(tmp_path / "rows.parquet", texts, lambda text: text.logprobs)
    reader = imported("distillkit-raw", source, tmp_path / "cache")
    held = [text.top(text.logprobs) for text in texts]
    assert mean_kl(held, reader) < KL_BY_ROUNDING
    assert [s.input_ids.tolist() for s in reader] == [t.tokens.tolist() for t in texts]
    manifest = reader.manifest
    assert manifest.store.unknown == ("targets",)
    assert manifest.required_features == (UNKNOWN_VALUES,)
    assert manifest.statistics.teacher_ce is None
    truth = np.mean([np.exp(logprobs).sum(axis=1).mean() for _, logprobs in held])
    by_position = np.concatenate([np.exp(logprobs).sum(axis=1) for _, logprobs in held]).mean()
    assert manifest.statistics.head_mass == pytest.approx(by_position, abs=0.01)
    assert truth > 0.5
    for text, sequence in zip(texts, reader, strict=True):
        inside = (sequence.ids == sequence.target_ids[:, None]).any(axis=1)
        own = text.logprobs[np.arange(len(text.logprobs)), text.tokens[1:]]
        assert np.isnan(sequence.target_logprob[~inside]).all()
        assert (sequence.target_rank[~inside] == -1).all()
        assert np.abs(sequence.target_logprob - own)[inside].max(initial=0) < 0.02
        ranks = (text.logprobs > own[:, None]).sum(axis=1)
        assert (sequence.target_rank[inside] == ranks[inside]).all()


def test_logits_leave_the_tail_unknown(texts, tmp_path):
    source = write(tmp_path / "rows.parquet", texts, lambda text: text.logits)
    reader = imported("distillkit-raw", source, tmp_path / "cache")
    assert reader.manifest.store.unknown == ("tail", "targets")
    assert reader.manifest.statistics.head_mass is None
    assert all(np.isnan(s.tail_logprob).all() for s in reader)
    held = [text.top(text.logits) for text in texts]
    assert mean_kl(held, reader, tail=False) < KL_BY_ROUNDING


def test_whole_distributions_of_logits_are_known(rng, tmp_path):
    texts = make_texts(rng, 5)
    rows = {
        "input_ids": [t.tokens.tolist() for t in texts],
        "token_ids": [np.tile(np.arange(V), (len(t.logits), 1)).tolist() for t in texts],
        "top_values": [t.logits.tolist() for t in texts],
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    reader = imported("distillkit-raw", tmp_path / "rows.parquet", tmp_path / "cache")
    assert reader.manifest.store.unknown == ()
    assert reader.manifest.required_features == ()
    own = np.concatenate([t.logprobs[np.arange(len(t.logprobs)), t.tokens[1:]] for t in texts])
    assert reader.manifest.statistics.teacher_ce == pytest.approx(-own.mean(), abs=0.01)
    assert all(np.isneginf(s.tail_logprob).all() for s in reader)


def test_packed_examples_and_padding(rng, tmp_path):
    one, two, three = make_texts(rng, 3, 6)
    # Prepacked: each example has lost its last token, and has as many rows as tokens.
    tokens = [*one.tokens[:-1], *two.tokens[:-1], 0, 0]
    ids = [*one.top(one.logprobs)[0].tolist(), *two.top(two.logprobs)[0].tolist(), [0], [0]]
    values = [*one.top(one.logprobs)[1].tolist(), *two.top(two.logprobs)[1].tolist(), [-9], [-9]]
    whole = three.top(three.logprobs)
    rows = [
        {
            "input_ids": [int(t) for t in tokens],
            "attention_mask": [1] * 5 + [2] * 5 + [0] * 2,
            "token_ids": ids,
            "top_values": values,
        },
        {
            "input_ids": three.tokens.tolist(),
            "attention_mask": [1] * 6,
            "token_ids": whole[0].tolist(),
            "top_values": whole[1].tolist(),
        },
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = imported("distillkit-raw", tmp_path / "rows.jsonl", tmp_path / "cache")
    assert [len(s) for s in reader] == [5, 5, 6]
    assert reader[1].input_ids.tolist() == two.tokens[:-1].tolist()
    held = [tuple(part[:4] for part in text.top(text.logprobs)) for text in (one, two)]
    assert mean_kl([*held, whole], reader) < KL_BY_ROUNDING


def test_labels_are_the_loss_mask(rng, tmp_path):
    texts = make_texts(rng, 4, 8)
    labels = [[-100] * 5 + t.tokens[5:].tolist() for t in texts]
    source = write(tmp_path / "r.parquet", texts, lambda t: t.logprobs, labels=labels)
    reader = imported("distillkit-raw", source, tmp_path / "cache")
    assert all(s.positions.tolist() == [4, 5, 6] for s in reader)
    assert reader.manifest.data.mask_policy == "completion"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": lambda t, i, v: (i + V, v)}, "beyond the vocabulary of 300"),
        ({"shift": lambda t, i, v: (i[:-2], v[:-2])}, "rows of values for 12 tokens, expected 11"),
        ({"late": lambda t, i, v: (np.roll(i, 1, 0), np.roll(v, 1, 0))}, "shifted by one"),
        ({"early": lambda t, i, v: (np.roll(i, -1, 0), np.roll(v, -1, 0))}, "shifted by one"),
        ({"twice": lambda t, i, v: (np.repeat(i[:, :1], 8, 1), v)}, "an id stands twice in row 0"),
        ({"shape": lambda t, i, v: (i[:, :-1], v)}, "of unequal shape"),
        ({"low": lambda t, i, v: (i, v - 20)}, "say which they are: --values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_right_is_refused(change, said, rng, tmp_path):
    texts = make_texts(rng, 30, 12)
    rows = []
    for text in texts:
        ids, values = next(iter(change.values()))(text, *text.top(text.logprobs))
        rows.append([text.tokens.tolist(), ids.tolist(), values.tolist()])
    table = pa.table(
        dict(
            zip(
                ["input_ids", "token_ids", "top_values"],
                map(list, zip(*rows, strict=True)),
                strict=True,
            )
        )
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=said) as error:
        imported("distillkit-raw", tmp_path / "rows.parquet", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_logits_that_are_called_logprobs_are_refused(rng, tmp_path):
    source = write(tmp_path / "r.parquet", make_texts(rng, 5), lambda t: t.logits)
    with pytest.raises(UserError, match=r"have a mass above 1\.05"):
        imported("distillkit-raw", source, tmp_path / "cache", values="logprobs")
