"""The data of the token view, read again and compared with the cache."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from logitcask.pipeline.report import token_view
from logitcask.pipeline.report.figures import LONGEST_TEXT, shortened
from logitcask.pipeline.report.token_view import TokenView


def data_of(page):
    """Element id -> its bytes."""
    found = re.findall(r'<script type="text/plain" id="([\w-]+)">([^<]*)</script>', page)
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in found}


def arrays(data):
    size = int.from_bytes(data[:4], "little")
    at, found = 4 + size, {}
    for name, kind, length in json.loads(data[4:at]):
        planes = np.frombuffer(data, np.uint8, 4 * length, at).reshape(4, length)
        found[name] = np.ascontiguousarray(planes.T).view(f"<{kind[0]}4").ravel()
        at += 4 * length
    return found


@pytest.fixture
def page(reader, monkeypatch):
    """The elements of all sequences, in chunks of at least 200 tokens."""
    monkeypatch.setattr(token_view, "CHUNK_TOKENS", 200)
    view = TokenView(io.StringIO(), reader.manifest.store.vocab_size)
    for index, sequence in enumerate(reader):
        view.add(index, sequence)
    assert (len(view), view.tokens) == (40, reader.manifest.statistics.tokens)
    return "".join(view.elements(lambda token: f"t{token}", vocab_size=40))


def test_every_number_of_every_token(page, reader):
    data = data_of(page)
    view = json.loads(data["view"])
    assert view["chunks"] > 3
    assert view["vocab_size"] == 40
    for index, name, tokens, positions, loss, most, chunk, start in view["sequences"]:
        sequence = reader[index]
        text, teacher = arrays(data[f"text-{chunk}"]), arrays(data[f"teacher-{chunk}"])
        assert (name, tokens, positions) == (
            sequence.sequence_id,
            len(sequence),
            len(sequence.positions),
        )
        assert loss == pytest.approx(-sequence.target_logprob.mean(), abs=1e-4)
        assert most == pytest.approx(-sequence.target_logprob.min(), abs=1e-4)
        np.testing.assert_array_equal(text["token"][start : start + tokens], sequence.input_ids)
        row_of = {int(position) + 1: row for row, position in enumerate(sequence.positions)}
        begins = {
            name: np.concatenate([[0], np.cumsum(teacher[f"{name}_size"])])
            for name in ("head", "draw")
        }
        for token in range(tokens):
            at, row = start + token, row_of.get(token)
            head, draw = (slice(*begins[name][at : at + 2]) for name in ("head", "draw"))
            if row is None:
                assert np.isnan(text["loss"][at])
                assert teacher["rank"][at] == -1
                assert head.start == head.stop
                continue
            assert text["loss"][at] == -sequence.target_logprob[row]
            assert teacher["rank"][at] == sequence.target_rank[row]
            assert teacher["entropy"][at] == sequence.entropy[row]
            assert teacher["tail"][at] == sequence.tail_logprob[row]
            stored = sequence.ids[row] >= 0
            assert teacher["head_ids"][head].tolist() == sequence.ids[row][stored].tolist()
            np.testing.assert_array_equal(
                teacher["head_logprobs"][head], sequence.logprobs[row][stored]
            )
            drawn = sequence.samples.ids[row].ravel()
            assert teacher["draw_ids"][draw].tolist() == drawn[drawn >= 0].tolist()


def test_sequences_without_positions(reader):
    view = TokenView(io.StringIO(), 40)
    view.add(0, reader[0].at(slice(0)))
    data = data_of("".join(view.elements(None)))
    assert json.loads(data["view"])["sequences"][0][3:6] == [0, None, None]
    assert np.isnan(arrays(data["text-0"])["loss"]).all()
    assert arrays(data["teacher-0"])["draw_ids"].tolist() == []


def test_only_ids_that_occur_have_texts(page, reader):
    view = json.loads(data_of(page)["view"])
    occur = {
        int(token)
        for sequence in reader
        for ids in (sequence.input_ids, sequence.ids, sequence.samples.ids)
        for token in ids.ravel()
        if token >= 0
    }
    assert view["ids"] == sorted(occur)
    assert view["texts"] == [f"t{token}" for token in view["ids"]]


def test_without_entropies_draws_and_texts(reader):
    view = TokenView(io.StringIO(), 40)
    view.add(5, replace(reader[5], entropy=None, samples=None))
    data = data_of("".join(view.elements(None)))
    assert not {"entropy", "draw_size"} & set(arrays(data["teacher-0"]))
    assert json.loads(data["view"])["texts"] == [str(i) for i in json.loads(data["view"])["ids"]]


def test_memory_holds_one_chunk(reader, monkeypatch):
    monkeypatch.setattr(token_view, "CHUNK_TOKENS", 100)
    view = TokenView(io.StringIO(), 40)
    for index, sequence in enumerate(reader):
        view.add(index, sequence)
        assert sum(map(len, view._held)) < 100


def test_long_texts_are_shortened():
    assert shortened("x" * LONGEST_TEXT) == "x" * LONGEST_TEXT
    text = shortened("a" + "x" * 1_000_000 + "b")
    assert len(text) < LONGEST_TEXT + 50
    assert text.startswith("ax")
    assert text.endswith("xb")
    assert "(1,000,002 characters)" in text
