"""Figures, compared with the same from the table of ``teacher-cache export``, in polars and numpy."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from logitcask.pipeline.report.figures import (
    FEWEST,
    Figures,
    choose,
    shortened,
    sizes_up_to,
    source_of,
)
from logitcask.pipeline.report.token_class import token_class


@pytest.fixture
def figures(reader):
    """Of the whole cache; the class of an id is whether it is odd."""
    store = reader.manifest.store
    found = Figures(
        store.vocab_size, store.top_k, lambda token: token_class(" a" if token % 2 else ".")
    )
    for index, sequence in enumerate(reader):
        found.add(index, sequence)
    return found


@pytest.fixture
def table(reader):
    """The kept positions, a row each."""
    return pl.from_arrow(reader.to_table()).filter(pl.col("target_id").is_not_null())


def close(mean, values):
    assert mean.count == len(values)
    assert mean.mean == pytest.approx(float(values.cast(pl.Float64).mean()), rel=1e-6)


def test_totals(figures, table, reader):
    totals = reader.manifest.statistics
    assert (figures.sequences, figures.tokens, figures.positions) == (
        totals.sequences,
        totals.tokens,
        totals.positions,
    )
    assert figures.loss.mean == pytest.approx(
        totals.teacher_ce, abs=2**-9
    )  # it is of unrounded numbers
    assert figures.entries / figures.positions == totals.mean_head_size
    assert figures.draws / figures.positions == totals.mean_draws
    close(figures.loss, -table["target_logprob"])
    close(figures.head_mass, 1 - table["tail_mass"])
    close(figures.entropy, table["entropy"])


def test_histograms(figures, table):
    for counts, edges, values in (
        (figures.mass_counts, figures.mass_edges, 1 - table["tail_mass"].to_numpy()),
        (figures.entropy_counts, figures.entropy_edges, table["entropy"].to_numpy()),
        (figures.loss_counts, figures.loss_edges, -table["target_logprob"].to_numpy()),
    ):
        expected = [
            int(((values >= low) & (values < high)).sum())
            for low, high in itertools.pairwise(edges)
        ]
        expected[-1] += int((values >= edges[-1]).sum())
        assert counts.tolist() == expected
        assert counts.sum() == len(table)
        assert (counts > 0).sum() > 3


def test_values_outside_count_in_the_last_bin(reader):
    sequence = max(reader, key=len)
    figures = Figures(reader.manifest.store.vocab_size, 8)
    far = np.full_like(sequence.target_logprob, -99.0)
    figures.add(0, replace(sequence, target_logprob=far))
    assert figures.loss_counts.tolist() == [0] * 19 + [len(far)]


def test_coverage(figures, table):
    assert [each.k for each in figures.coverage()] == [1, 2, 4, 8]
    heads = np.exp(np.array(table["head_logprobs"].to_list(), np.float64))
    for each in figures.coverage():
        assert each.mass == pytest.approx(heads[:, : each.k].sum(axis=1).mean(), rel=1e-6)
        assert each.target == pytest.approx((table["target_rank"] < each.k).mean())
        assert each.entries == each.k


def test_coverage_of_heads_that_differ_in_size(reader):
    """Entries that are not stored have no mass."""
    figures = Figures(reader.manifest.store.vocab_size, 8)
    sequence = max(reader, key=len)
    sequence.ids[::2, 3:] = -1
    sequence.logprobs[::2, 3:] = -np.inf
    figures.add(0, sequence)
    p = np.exp(sequence.logprobs.astype(np.float64))
    last = figures.coverage()[-1]
    assert last.mass == pytest.approx(p.sum() / len(p), rel=1e-6)
    assert last.entries == pytest.approx((sequence.ids >= 0).sum() / len(p))


def test_by_source(figures, table):
    sources = table["sequence_id"].str.split("/").list.first()
    expected = {"web": "web/train", "book": "book", "code": "code/x"}
    found = dict(figures.sources(5))
    assert set(found) == set(expected.values())
    for first, name in expected.items():
        close(found[name], -table["target_logprob"].filter(sources == first))
    most, rest = figures.sources(1)
    assert rest[0] == "all others"
    assert most[1].count >= max(each.count for name, each in found.items() if name != most[0])
    assert most[1].count + rest[1].count == len(table)


def test_by_place(figures, table):
    place = table["position"] + 1
    found = figures.places()
    assert [each[:2] for each in found] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    for low, high, mean in found:
        close(mean, -table["target_logprob"].filter((place >= low) & (place <= high)))


def test_by_class(figures, table):
    odd = table["target_id"] % 2 == 1
    close(figures.by_class["word or its beginning"], -table["target_logprob"].filter(odd))
    close(figures.by_class["punctuation, symbols"], -table["target_logprob"].filter(~odd))


def test_longest_and_strangest(figures, table, reader):
    lengths = [len(sequence) for sequence in reader]
    assert [each.tokens for each in figures.longest] == sorted(lengths, reverse=True)[:10]
    of_each = table.group_by("sequence_id").agg(
        loss=-pl.col("target_logprob").cast(pl.Float64).mean(), count=pl.len()
    )
    losses = of_each.filter(pl.col("count") >= FEWEST)["loss"].sort(descending=True).to_list()
    assert len(losses) > 20
    assert [each.loss for each in figures.hardest] == pytest.approx(losses[:10])
    assert [each.loss for each in figures.easiest] == pytest.approx(losses[::-1][:10])
    for each in (*figures.longest, *figures.hardest):
        assert reader[each.index].sequence_id == each.sequence_id
        assert len(reader[each.index].positions) == each.positions


def test_of_equal_ones_the_first(reader):
    figures = Figures(reader.manifest.store.vocab_size, 8)
    sequence = max(reader, key=len)
    for index in range(30):
        figures.add(index, sequence)
    assert [each.index for each in figures.longest] == list(range(10))


def test_without_positions(reader):
    figures = Figures(reader.manifest.store.vocab_size, 0)
    figures.add(0, reader[0].at(slice(0)))
    assert math.isnan(figures.loss.mean)
    assert figures.coverage() == []
    assert figures.longest[0].positions == 0


def test_sources_are_bounded(reader, monkeypatch):
    monkeypatch.setattr("logitcask.pipeline.report.figures.GROUPS", 2)
    figures = Figures(reader.manifest.store.vocab_size, 8)
    for index, sequence in enumerate(reader):
        figures.add(index, sequence)
    assert len(figures.by_source) == 3
    assert figures.sources(9)[-1][0] == "all others"
    assert sum(mean.count for _, mean in figures.sources(9)) == figures.positions


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("train/17", "train"),
        ("train/17/2", "train"),
        ("0/train/17", "0/train"),
        ("topics/if#3/1", "topics/if"),
        ("my-id", "my-id"),
        ("17", "17"),
    ],
)
def test_sources_of_ids(name, source):
    assert source_of(name) == source


def test_a_name_of_a_megabyte_takes_no_time():
    """With a number of steps that grows with the square of the length, this would take hours."""
    assert source_of("/1" * 500_000 + "x") == shortened("/1" * 500_000 + "x")
    assert source_of("x" + "/1" * 500_000) == "x"
    assert source_of("1" * 1_000_000) == shortened("1" * 1_000_000)


def test_sizes():
    assert sizes_up_to(32) == [1, 2, 4, 8, 16, 32]
    assert sizes_up_to(20) == [1, 2, 4, 8, 16, 20]
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(0) == []


def test_a_choice_is_random_sorted_and_the_same_for_a_seed():
    chosen = choose(1000, 0.1, np.random.default_rng(3))
    assert len(set(chosen.tolist())) == 100
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == choose(1000, 0.1, np.random.default_rng(3)).tolist()
    assert chosen.tolist() != choose(1000, 0.1, np.random.default_rng(4)).tolist()
    assert choose(5, 2.0, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]
    assert len(choose(5, 0.01, np.random.default_rng(0))) == 1
    assert len(choose(0, 1.0, np.random.default_rng(0))) == 0
