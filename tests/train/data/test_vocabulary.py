"""Teachers with more rows than the student: what is learnt is the dense distribution over the
ids that both have.
"""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from logitcask.cache_format import CachedSequence, CacheReader, ChosenIds, TailSamples, UserError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.data.batch import collate, teacher_of
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.mixture import open_data
from logitcask.train.data.vocabulary import left_out, restricted
from logitcask.train.evaluation.metrics import rank_agreement, rank_correlation
from logitcask.train.losses import LOSSES
from logitcask.train.run import train

TEACHER, STUDENT, TOKENS = 1216, 1152, 1100
"""Rows of both and tokens of their tokenizer: Qwen2.5's numbers, scaled down."""


def cached(log_p, sizes, target_ids, draws=None, *, with_logprobs=True):
    """What a cache holds of dense distributions float64[P, V], unrounded: heads of these sizes,
    and these draws [P, T, S].
    """
    order = np.argsort(-log_p, axis=1, kind="stable")
    inside = np.arange(log_p.shape[1]) < np.asarray(sizes)[:, None]
    width, values = int(max(sizes)), np.take_along_axis(log_p, order, axis=1)
    tail = np.where(inside, 0, np.exp(values)).sum(axis=1)
    target_logprob = np.take_along_axis(log_p, target_ids[:, None], axis=1)
    samples = None
    if draws is not None:
        logprobs = np.take_along_axis(log_p, draws.reshape(len(draws), -1), axis=1).reshape(
            draws.shape
        )
        samples = TailSamples(
            draws.astype(np.int32), logprobs.astype(np.float32) if with_logprobs else None
        )
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail)
    return CachedSequence(
        sequence_id="x",
        input_ids=np.concatenate([[0], target_ids]).astype(np.int32),
        loss_mask=np.arange(len(target_ids) + 1) > 0,
        positions=np.arange(len(target_ids), dtype=np.int32),
        ids=np.where(inside, order, -1)[:, :width].astype(np.int32),
        logprobs=np.where(inside, values, -np.inf)[:, :width].astype(np.float32),
        tail_logprob=log_tail.astype(np.float32),
        target_logprob=target_logprob[:, 0].astype(np.float32),
        target_rank=(log_p > target_logprob).sum(axis=1).astype(np.int32),
        entropy=-(np.exp(log_p) * log_p).sum(axis=1).astype(np.float32),
        samples=samples,
    )


def normalised(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_same(found, expected):
    for name in ("ids", "target_rank", "positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("logprobs", "tail_logprob", "target_logprob", "entropy"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("sizes", "positions"),
    [((TEACHER, STUDENT, TOKENS), 20), ((152_064, 151_936, 151_665), 2)],
    ids=["small", "qwen2.5"],
)
def test_whole_heads_are_the_dense_distribution_over_the_common_ids(sizes, positions):
    rng = np.random.default_rng(1)
    rows, common, tokens = sizes
    log_p = normalised(rng.normal(0, 3, (positions, rows)))
    log_p[0, common + 1] += 20  # a padding row first of all
    log_p = normalised(log_p)
    dense = normalised(log_p[:, :common])
    targets = rng.integers(0, tokens, positions)
    found = restricted(cached(log_p, [rows] * positions, targets), common, rows)
    expected = cached(dense, [common] * positions, targets)
    np.testing.assert_allclose(
        left_out(cached(log_p, [rows] * positions, targets), common),
        np.exp(log_p[:, common:]).sum(1),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(np.isneginf(found.tail_logprob), True)
    assert_same(
        found,
        dataclasses.replace(
            expected, ids=expected.ids[:, :common], logprobs=expected.logprobs[:, :common]
        ),
    )

    ours, truth = (teacher_of(collate([each]), common) for each in (found, expected))
    z = torch.from_numpy(dense + rng.normal(0, 1, dense.shape)).float()
    p, log_q = torch.from_numpy(dense).exp(), z.double().log_softmax(1)
    assert LOSSES["forward_kl"](z, ours).numpy() == pytest.approx(
        (p * (p.log() - log_q)).sum(1).numpy(), abs=2e-4
    )
    for name in (
        LOSSES.keys() - {"policy_gradient", "dpkd_sequence"}
        if rows == TEACHER
        else ("forward_kl", "reverse_kl", "ranking")
    ):
        both = [LOSSES[name](z.requires_grad_(), teacher) for teacher in (ours, truth)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=2e-4, msg=name)
        torch.testing.assert_close(
            *(torch.autograd.grad(v.sum(), z)[0] for v in both), rtol=1e-3, atol=1e-5, msg=name
        )
    assert all(map(torch.equal, rank_agreement(z, ours, 5), rank_agreement(z, truth, 5)))
    torch.testing.assert_close(rank_correlation(z, ours, 5), rank_correlation(z, truth, 5))


def test_heads_lose_their_padding_ids_and_tails_without_any_are_scaled():
    rng = np.random.default_rng(2)
    log_p = rng.normal(0, 2, (30, TEACHER))
    log_p[:, STUDENT:] = -200
    highest = -np.sort(-log_p, axis=1)[:, :3]
    # In every head, somewhere.
    log_p[:, STUDENT + 3] = rng.uniform(highest[:, 2], highest[:, 0] + 1)
    log_p[::3, STUDENT + 9] = highest[::3, 0] + 2
    log_p = normalised(log_p)
    targets = rng.integers(0, TOKENS, 30)
    sequence = cached(log_p, rng.integers(5, 12, 30), targets)
    kept = (sequence.ids >= 0).sum(axis=1) - (sequence.ids >= STUDENT).sum(axis=1)
    assert (kept < (sequence.ids >= 0).sum(axis=1)).any()
    assert_same(
        restricted(sequence, STUDENT, TEACHER),
        cached(normalised(log_p[:, :STUDENT]), kept, targets),
    )


@pytest.mark.parametrize("name", ["forward_kl", "random_sampling", "jsd", "tvd", "skew_reverse_kl"])
def test_draws_of_padding_ids_estimate_the_dense_loss_over_the_common_ids(name):
    """5 standard errors; the same draws with the tail's mass as it was, or nothing scaled up,
    are further away.
    """
    rng = np.random.default_rng(20)
    positions, draws, size = 20_000, 8, 60
    log_p = rng.normal(0, 2, size)
    log_p[-10:] = log_p[:50].max() - 6  # padding rows, with about as much as is let through
    log_p = normalised(log_p[None])[0]
    head = np.argsort(-log_p, kind="stable")[:5]
    tail = np.exp(log_p)
    tail[head] = 0
    lost = tail[50:].sum()
    assert 0.005 < lost < 0.02
    drawn = rng.choice(size, (positions, 1, draws), p=tail / tail.sum())
    whole = cached(
        np.tile(log_p, (positions, 1)), [5] * positions, np.zeros(positions, np.int64), drawn
    )
    dense = normalised(log_p[None, :50])
    z = torch.from_numpy(np.tile(dense + np.linspace(-1.5, 1.5, 50), (positions, 1)))
    truth = LOSSES[name](
        z[:1], teacher_of(collate([cached(dense, [50], np.zeros(1, np.int64))]), 50)
    ).item()

    def standard_errors(sequence):
        value = LOSSES[name](z, teacher_of(collate([sequence]), 50))
        return ((value.mean() - truth).abs() / (value.std() / positions**0.5)).item()

    found = restricted(whole, 50, size)
    assert left_out(whole, 50).mean() == pytest.approx(lost, rel=0.1)
    assert not (found.ids >= 50).any()
    assert not (found.samples.ids >= 50).any()
    real = found.samples.ids >= 0
    assert (real[..., :-1] >= real[..., 1:]).all()  # padding comes last
    assert standard_errors(found) < 5
    assert standard_errors(dataclasses.replace(found, tail_logprob=whole.tail_logprob)) > 5
    if name == "forward_kl":
        guessed = restricted(
            dataclasses.replace(whole, samples=TailSamples(whole.samples.ids)), 50, size
        )
        assert np.abs(guessed.entropy.mean() - found.entropy.mean()) < 0.05


def test_a_tail_of_which_every_draw_was_lost_keeps_some_mass():
    log_p = normalised(np.concatenate([np.linspace(3, 0, 50), np.full(10, 1.0)])[None])
    draws = np.full((1, 1, 4), 55)
    found = restricted(cached(log_p, [6], np.zeros(1, np.int64), draws), 50, 60)
    assert (found.samples.ids == -1).all()
    assert np.isfinite(found.tail_logprob).all()
    z = torch.zeros(1, 50)
    for name, loss in LOSSES.items():
        if name in ("policy_gradient", "dpkd_sequence"):  # need other texts, and no tail
            continue
        assert loss(z, teacher_of(collate([found]), 50)).abs().item() < 50, name
    nothing = restricted(cached(log_p, [0], np.zeros(1, np.int64), draws), 50, 60)
    assert np.isfinite(nothing.tail_logprob).all()
    assert np.isfinite(LOSSES["random_sampling"](z, teacher_of(collate([nothing]), 50)).item())


def test_a_position_without_draws_keeps_its_tail():
    log_p = np.random.default_rng(4).normal(0, 2, (4, 60))
    log_p[:, 50:] = -60
    log_p[:, 55] = 9  # in every head
    log_p, targets = normalised(log_p), np.zeros(4, np.int64)
    drawn = TailSamples(np.full((4, 2, 3), -1, np.int32), np.full((4, 2, 3), -np.inf, np.float32))
    found = restricted(dataclasses.replace(cached(log_p, [5] * 4, targets), samples=drawn), 50, 60)
    assert_same(found, cached(normalised(log_p[:, :50]), [4] * 4, targets))
    assert (found.samples.ids == -1).all()


def test_a_sequence_without_padding_ids_is_left_as_it_is():
    rng = np.random.default_rng(3)
    log_p = rng.normal(0, 2, (3, 60))
    log_p[:, 50:] = -60
    sequence = cached(normalised(log_p), [4, 5, 6], np.zeros(3, np.int64), np.full((3, 1, 2), 7))
    assert restricted(sequence, 50, 60) is sequence


@pytest.fixture(scope="module")
def pair(tiny_llama, tmp_path_factory):
    """``pair(padding=...)``: the config of a cache by a teacher whose padding rows have logits
    of 0, times ``padding``.
    """
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(TOKENS - len(tokenizer))])
    caches = {}

    def make(*, padding=0.0):
        if padding in caches:
            return caches[padding]
        config = AutoConfig.from_pretrained(tiny_llama)
        config.vocab_size = TEACHER
        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            teacher.lm_head.weight[:TOKENS] *= 2
            teacher.lm_head.weight[TOKENS:] *= padding
        name = folder / f"teacher-{padding}"
        teacher.save_pretrained(name)
        tokenizer.save_pretrained(name)
        settings = {
            "teacher": {"model": str(name), "backend": "transformers"},
            "data": {"path": "python-docs", "max_length": 32, "max_tokens": 1500},
            "store": {
                "top_k": TEACHER,
                "min_probability": None,
                "tail_samples": 0,
                "logprob_step": 2**-10,
            },
            "audit": {"sequences": 0},
            "output": str(folder / f"cache-{padding}"),
        }
        config = BuildConfig.model_validate(settings)
        build(config)
        caches[padding] = config.output, teacher, name
        return caches[padding]

    return make


def student_config(scratch_config, cache, rows, tokenizer=None):
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    config |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": rows,
    }
    return scratch_config(
        cache=str(cache),
        student={"config": config, "tokenizer": None if tokenizer is None else str(tokenizer)},
        losses=[{"name": "forward_kl"}, {"name": "ranking", "k": 5}],
        evaluation={"held_out": 0.2},
    )


def test_a_pair_padded_differently_trains(pair, scratch_config, caplog):
    cache, teacher, folder = pair()
    config = student_config(scratch_config, cache, STUDENT, folder)
    with caplog.at_level(logging.INFO):
        metrics, _ = train(config)
    line = next(
        record.getMessage()
        for record in caplog.records
        if "their tokenizer has" in record.getMessage()
    )
    assert line.startswith(
        f"the student predicts {STUDENT:,} ids, the teacher {TEACHER:,}, their tokenizer has {TOKENS:,}"
    )
    assert metrics["after"]["kl"] < metrics["before"]["kl"]

    # Both models' own logits, over the ids that both have.
    _, held_out = open_data(config, [CacheReader(str(cache))], 7, STUDENT)
    prior = held_out.parts[0].teacher(collate([held_out[0]])).prior
    assert prior.shape == (STUDENT,)
    assert prior.sum().item() == pytest.approx(1)
    student = AutoModelForCausalLM.from_pretrained(config.output_dir)
    kl, ce, mass, positions = 0.0, 0.0, 0.0, 0
    for sequence in held_out:
        ids = torch.from_numpy(sequence.input_ids).long()[None]
        with torch.no_grad():
            p, z = (model(ids).logits[0, :-1].double() for model in (teacher, student))
        common, log_q = p[:, :STUDENT].log_softmax(1), z.log_softmax(1)
        kl += (common.exp() * (common - log_q)).sum().item()
        ce -= common.gather(1, ids[0, 1:, None]).sum().item()
        mass += p.softmax(1)[:, STUDENT:].sum().item()
        positions += len(p)
    assert metrics["held_out_positions"] == positions
    assert metrics["after"]["kl"] == pytest.approx(kl / positions, abs=1e-3)
    assert metrics["teacher"]["ce"] == pytest.approx(ce / positions, abs=1e-3)
    assert metrics["teacher"]["left_out"] == pytest.approx(mass / positions, rel=0.01)
    assert 0 < metrics["teacher"]["left_out"] < 1e-3
    assert "are left out" in (config.output_dir / "report.html").read_text()


def test_a_student_without_rows_for_tokens_is_refused(pair, scratch_config):
    cache, _, folder = pair()
    for tokenizer in (folder, None):
        with pytest.raises(
            UserError,
            match=rf"predicts {TOKENS - 1:,} ids, but the tokenizer of .* uses {TOKENS:,}; use",
        ):
            train(student_config(scratch_config, cache, TOKENS - 1, tokenizer))


def test_padding_rows_with_mass_on_them_are_refused(pair, scratch_config):
    cache, _, _ = pair(padding=2.0)
    expected = rf"predicts {STUDENT:,} ids and the teacher {TEACHER:,}, but 0\.0\d+ of the teacher's mass .*expected padding"
    with pytest.raises(UserError, match=expected) as caught:
        train(student_config(scratch_config, cache, STUDENT))
    assert "\n" not in str(caught.value)


def test_texts_with_tokens_that_the_student_lacks_are_left_out(write_cache, scratch_config, caplog):
    cache = write_cache("c", shards=1, sequences=40, tokens=(4, 8))
    largest, rows = np.array([sequence.input_ids.max() for sequence in cache]), 55
    config = scratch_config(cache=cache.path, evaluation={"held_out": 0.3})
    data, held_out = open_data(config, [cache], 0, rows)
    used = np.concatenate([data.sources[0].indices, held_out.parts[0].indices])
    assert sorted(used) == [i for i in range(40) if largest[i] < rows and len(cache[i].positions)]
    left = int((largest >= rows).sum())
    assert left
    assert re.search(rf"{left} of 40 sequences of .* ids from {rows} up", caplog.text)
    batch = collate([held_out[0]])
    assert (
        max(batch["teacher_ids"].max(), batch["teacher_samples"].max(), batch["input_ids"].max())
        < rows
    )
    assert held_out.parts[0].teacher(batch).vocab_size == rows
    assert CachedDataset(cache, [0]).vocab_size == 60


def test_chosen_ids_that_the_student_lacks_are_left_out():
    """The others have their share of what is left, as the head has."""
    rng = np.random.default_rng(5)
    log_p = normalised(rng.normal(0, 3, (30, 60)))
    targets = rng.integers(0, 50, 30)
    sequence = cached(log_p, np.full(30, 12), targets)
    ids = np.argsort(rng.random((30, 60)), axis=1)[:, :6].astype(np.int32)
    logprobs = np.take_along_axis(log_p, ids, axis=1).astype(np.float32)
    sequence = dataclasses.replace(sequence, chosen=ChosenIds(ids, logprobs))
    found = restricted(sequence, 50, 60)
    inside = 1 - np.exp(sequence.logprobs).sum(axis=1, where=sequence.ids >= 50)
    for row in range(30):
        kept = ids[row] < 50
        count = int(kept.sum())
        assert found.chosen.ids[row].tolist() == [*ids[row][kept], *[-1] * (6 - count)]
        np.testing.assert_allclose(
            found.chosen.logprobs[row, :count],
            np.minimum(logprobs[row][kept] - np.log(inside[row]), 0),
            atol=1e-5,
        )
    untouched = dataclasses.replace(sequence, chosen=ChosenIds(ids % 50, logprobs))
    assert restricted(untouched, 60, 60) is untouched
