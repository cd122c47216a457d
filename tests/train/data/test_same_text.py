"""Texts of a reference cache in other caches: found under other ids, in other pieces, with other
answers; and nothing else is found.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from logitcask.cache_format import CacheReader, CacheWriter
from logitcask.cache_format.errors import UserError
from logitcask.train.data.held_out import Reference, read_index
from logitcask.train.data.mixture import open_data
from logitcask.train.data.same_text import WINDOW, ReferenceTexts, token_hashes
from tests.train.conftest import made


def text(rng, tokens, name="t", prompt=0):
    """A sequence whose first ``prompt`` tokens are not learnt."""
    whole = made.make_sequence(rng, name, tokens=tokens, vocab_size=60, top_k=6, kept=1.0)
    mask = np.arange(tokens) >= max(1, prompt)
    return replace(whole.at(np.flatnonzero(mask[1:])), loss_mask=mask)


def piece(sequence, start, stop, name):
    """Tokens ``start`` to ``stop`` of a document as a sequence of its own."""
    rows = np.flatnonzero((sequence.positions >= start) & (sequence.positions < stop - 1))
    part = sequence.at(rows)
    return replace(
        part,
        sequence_id=name,
        input_ids=sequence.input_ids[start:stop],
        loss_mask=np.arange(stop - start) > 0,
        positions=part.positions - np.int32(start),
    )


def cut(sequence, length, name):
    """A document in pieces of ``length`` tokens, as builds make them."""
    n = len(sequence)
    return [
        piece(sequence, start, min(start + length, n), f"{name}/{number}")
        for number, start in enumerate(range(0, n - 1, length))
    ]


@pytest.fixture
def write(tmp_path):
    """``write(name, sequences, **fields)``: a cache of these sequences, of data with ``fields``."""

    def make(name, sequences, **fields):
        header = made.make_header(vocab_size=60, top_k=6)
        data = header.data.model_copy(update={"source": name, **fields})
        with CacheWriter(tmp_path / name) as writer:
            header = writer.begin(header.model_copy(update={"data": data}))
            with writer.shard(0, sequences_per_batch=lambda _: 3) as shard:
                for sequence in sequences:
                    shard.append(sequence)
            writer.finish(header, 1)
        return CacheReader(tmp_path / name)

    return make


def found(cache, reference):
    """Ids of the sequences of ``cache`` whose text is in ``reference``."""
    index = read_index(cache, 0.0, Reference.read(reference))
    return [s.sequence_id for s, known in zip(cache, index.in_reference, strict=True) if known]


def test_the_same_text_under_another_id(write, rng):
    texts = [text(rng, n, f"train/{i}") for i, n in enumerate((2, 3, 20, 33, 60, 64))]
    near = replace(texts[2], sequence_id="near", input_ids=texts[2].input_ids[::-1].copy())
    cache = write("a", [*texts, near])
    judge = write("b", [replace(t, sequence_id=f"x-{i}") for i, t in enumerate(texts[1:5])])
    assert found(cache, judge) == [t.sequence_id for t in texts[1:5]]
    assert found(write("c", [near]), judge) == []


@pytest.mark.parametrize("ours", [40, 64, 150, 700])
@pytest.mark.parametrize("theirs", [40, 64, 150, 700])
def test_a_document_in_other_pieces(write, rng, ours, theirs):
    """All pieces of the document, and none of another one with the same ids and lengths."""
    document, other = text(rng, 700), text(rng, 700)
    cache = write("a", [*cut(document, ours, "train/1"), *cut(other, ours, "train/2")])
    judge = write("b", cut(document, theirs, "book#2"))
    assert found(cache, judge) == [s.sequence_id for s in cut(document, ours, "train/1")]
    assert found(judge, cache) == [s.sequence_id for s in cut(document, theirs, "book#2")]


@pytest.mark.parametrize("number", range(4))
def test_one_piece_from_the_middle_is_enough(write, rng, number):
    """A reference that is a sample of the pieces of a document, and a cache with other pieces."""
    document = text(rng, 600)
    cache = write("a", cut(document, 110, "train/1"))
    judge = write("b", [cut(document, 150, "x")[number]])
    assert len(found(cache, judge)) == 6


def test_a_common_beginning_is_not_the_same_text(write, rng):
    """A licence, or any other run that is much less than half of both."""
    licence = text(rng, 70).input_ids
    a, b = (np.concatenate([licence, rng.integers(0, 60, 230)]) for _ in range(2))
    reference = ReferenceTexts.of([hashed(b)])
    assert not reference.holds(hashed(a), by_name=False).any()
    assert reference.holds(hashed(b), by_name=False).all()


def hashed(*sequences, first_kept=0):
    lengths = np.array([len(s) for s in sequences])
    return token_hashes(
        np.concatenate(sequences),
        lengths,
        np.full(len(sequences), first_kept),
        [f"r{i}" for i in range(len(sequences))],
    )


def test_another_answer_to_the_same_prompt(write, rng):
    """Chats with several answers: the prompt is the text. All answers of a row go together."""
    chat = text(rng, 40, "train/0/0", prompt=12)
    again = text(rng, 30, "train/0/1", prompt=12)
    prompt = chat.input_ids[:12]
    reference = ReferenceTexts.of([hashed(chat.input_ids, first_kept=11)])
    same = np.concatenate([prompt, again.input_ids[12:]])
    assert reference.holds(hashed(same, first_kept=11), by_name=False).all()
    # Longer by one token, or a document that begins so: another text.
    assert not reference.holds(hashed(same, first_kept=12), by_name=False).any()
    assert not reference.holds(hashed(same, first_kept=0), by_name=False).any()

    cache = write(
        "a", [chat, again, text(rng, 30, "train/1/0", prompt=12)], mask_policy="generated"
    )
    judge = write("b", [replace(again, sequence_id="q/0")], mask_policy="generated")
    assert found(cache, judge) == ["train/0/0", "train/0/1"]


def test_a_shared_system_prompt_is_not_the_same_chat(rng):
    system = rng.integers(0, 60, 200)
    chats = [np.concatenate([system, rng.integers(0, 60, 40)]) for _ in range(2)]
    reference = ReferenceTexts.of([hashed(chats[0], first_kept=220)])
    assert not reference.holds(hashed(chats[1], first_kept=220), by_name=False).any()
    assert reference.holds(hashed(chats[0], first_kept=220), by_name=False).all()


def test_names_of_rows_count_in_the_same_data_only(write, rng):
    """Rows of one source are known by their names, even if templates differ."""
    a, b = text(rng, 50, "train/3/1"), text(rng, 50, "train/3")
    assert found(write("a", [a], source="s"), write("b", [b], source="s")) == ["train/3/1"]
    assert found(write("c", [a], source="s"), write("d", [b], source="t")) == []
    changed = write("e", [b], source="s", stamp="2 files")
    assert found(write("f", [a], source="s"), changed) == []


def test_hashes_are_those_of_the_runs(rng):
    """Equal where the tokens are equal and different elsewhere, wherever the run is in a batch."""
    tokens = rng.integers(0, 2, 4000)  # 32 tokens of 2 kinds: 4000 runs are all different
    tokens[2000:2100] = tokens[500:600]
    batch = hashed(tokens[:1500], tokens[1500:])
    runs = np.lib.stride_tricks.sliding_window_view(tokens, WINDOW)
    _, expected = np.unique(runs, axis=0, return_inverse=True)
    _, number = np.unique(batch.windows[: len(runs)], return_inverse=True)
    same = expected.ravel()[:, None] == expected.ravel()
    assert np.array_equal(same, number[:, None] == number)
    assert same.sum() > len(runs)
    assert batch.whole[1] == hashed(tokens[1500:]).whole[0] != batch.whole[0]
    assert hashed(np.zeros(5, int)).whole != hashed(np.zeros(6, int)).whole


def test_training_never_sees_a_text_of_the_reference(write, rng, scratch_config, caplog):
    """Pieces of one document under other names: none of them is learnt from, and one line says so.
    The reference alone is evaluated on.
    """
    caplog.set_level("INFO")
    document = text(rng, 200)
    others = [text(rng, 30, f"train/{i}") for i in range(2, 12)]
    cache = write("a", [*cut(document, 50, "train/1"), *others])
    judge = write("b", [*cut(document, 64, "x#1"), text(rng, 30, "y")])
    config = scratch_config(cache=cache.path, evaluation={"cache": judge.path})
    assert config.evaluation.held_out == 0
    data, held_out = open_data(config, [cache], 0, None, judge)
    learnt = [cache[int(i)].sequence_id for i in data.sources[0].indices]
    assert learnt == [s.sequence_id for s in others]
    assert data.in_reference == 4
    assert len(held_out) == 5
    assert [part.cache for part in held_out.parts] == [judge]
    lines = [r.message for r in caplog.records if "reference" in r.message]
    assert lines == [
        f"4 of 14 sequences of {cache.path} are not learnt from: their texts are in the reference cache {judge.path}"
    ]
    fewer = scratch_config(cache=cache.path, evaluation={"cache": judge.path, "max_sequences": 2})
    assert len(open_data(fewer, [cache], 0, None, judge)[1]) == 2
    # held_out beside a reference: rows that are not learnt from either
    both = scratch_config(cache=cache.path, evaluation={"cache": judge.path, "held_out": 0.4})
    fewer_learnt = open_data(both, [cache], 0, None, judge)[0].sources[0]
    assert 0 < len(fewer_learnt) < len(others)


def test_a_reference_with_all_texts_is_refused(write, rng, scratch_config):
    cache = write("a", [text(rng, 30, f"train/{i}") for i in range(5)])
    config = scratch_config(cache=cache.path, evaluation={"cache": cache.path})
    with pytest.raises(UserError, match="has 5 sequences and none is left to train on") as caught:
        open_data(config, [cache], 0, None, cache)
    assert "\n" not in str(caught.value)
