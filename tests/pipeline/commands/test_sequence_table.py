"""The table of ``teacher-cache inspect``: one line per token in any width, and what it leaves out."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.export.token_text import TokenText
from logitcask.cache_format.sequence import TailSamples
from logitcask.pipeline.commands.sequence_table import table

WORDS = ["the", " a", "\n", "漢字", "=" * 40, " ", "end", "\N{RIGHT-TO-LEFT OVERRIDE}x"]


class Words:
    def decode(self, ids, **options):
        return "".join(WORDS[each] for each in ids)

    def convert_ids_to_tokens(self, ids):
        return [WORDS[each] for each in ids]


@pytest.fixture
def sequence():
    """Eight tokens; positions 0 and 3 to 6 are kept, with heads of five ids and one or two draws."""
    ids = np.array([[1, 2, 3, 4, 0]] * 5, np.int32)
    probabilities = np.array([[0.4, 0.2, 0.1, 0.05, 0.03]] * 5)
    draws = np.array([[[5, 6]], [[5, -1]]] + [[[6, 7]]] * 3, np.int32)
    return CachedSequence(
        sequence_id="some/7",
        input_ids=np.arange(8, dtype=np.int32),
        loss_mask=np.array([0, 1, 0, 0, 1, 1, 1, 1], np.bool_),
        positions=np.array([0, 3, 4, 5, 6], np.int32),
        ids=ids,
        logprobs=np.log(probabilities).astype(np.float32),
        tail_logprob=np.log(np.full(5, 0.22)).astype(np.float32),
        target_logprob=np.log(np.array([0.4, 0.05, 0.11, 0.01, 1e-9])).astype(np.float32),
        target_rank=np.array([0, 3, 2, 40, 12_345], np.int32),
        samples=TailSamples(ids=draws, logprobs=np.log(np.full(draws.shape, 0.1)).astype("f4")),
    )


def printed(sequence, width, top=5):
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(table(sequence, TokenText(Words()), top, width))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_one_line_per_token_in_any_width(sequence, width):
    title, _, _, _, *rows = printed(sequence, width)
    assert "some/7: 8 tokens, 5 kept positions" in title
    assert len([row for row in rows if row.strip()]) == len(sequence)
    from rich.cells import cell_len

    assert all(cell_len(row) <= width for row in rows)


def test_what_a_line_says(sequence):
    rows = printed(sequence, 200)[4:]
    assert rows[0].split() == ["0", "the"]  # masked: no teacher
    line = rows[1].split("  ")
    found = [cell.strip() for cell in line if cell.strip()]
    equals = "=" * 11 + "…" + "=" * 11 + " (40)"
    assert found == [
        *("1", "␣a", "40.0%", "0"),
        *("␣a 40%", "\\n 20%", "漢字 10%", f"{equals.replace(' ', '␣')} 5%", "the 3%"),
        *("22.0%", "␣", "end"),
    ]
    assert "12,345" in rows[7]


def test_what_does_not_fit_is_counted(sequence):
    rows = printed(sequence, 80)[4:]
    shown = rows[1]
    assert "␣a 40%  \\n 20%  漢字 10%  +2" in shown
    assert "␣ " not in shown.partition("22.0%")[2], "no draws in a narrow table"
    assert "␣a 40%  \\n 20%  +1" not in printed(sequence, 80, top=2)[5]


def test_without_draws(sequence):
    rows = printed(dataclasses.replace(sequence, samples=None), 200)[4:]
    assert rows[1].rstrip().endswith("22.0%")
