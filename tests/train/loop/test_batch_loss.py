"""The loss of a batch against the same losses of the model's own whole logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.train.config import SelectPositions
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.mixture import Collator, Drawn, Mixture
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.loop.batch_loss import BatchLoss, chosen_positions
from logitcask.train.loop.objective import Objective
from logitcask.train.losses import LOSSES, SparseTeacher, TailDraws

pytestmark = pytest.mark.random

VOCAB = 60


@pytest.fixture
def student():
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        attention_dropout=0.5,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def made(write_cache, scratch_config, student):
    """(loss of batches, a batch of all sequences of caches of these kinds)."""

    def make(*kinds, positions=None, chunk=7):
        caches = [
            write_cache(kind, kind=kind, shards=1, sequences=3, tokens=(8, 20)) for kind in kinds
        ]
        data = [CachedDataset(cache, range(len(cache))) for cache in caches]
        mixture = Mixture(data, list(kinds), [], None)
        objective = Objective(
            scratch_config(cache="c", losses=[{"name": "forward_kl"}], ce_weight=0.5)
        )
        drawn = [Drawn(number, [s]) for number, part in enumerate(data) for s in part]
        loss = BatchLoss(LogitsHead(student), mixture, objective, chunk)
        return loss, Collator(positions=positions)(drawn)

    return make


def logits_at_kept(student, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return student(**inputs).logits.flatten(0, 1)[batch["kept"]]


def terms(logits, batch, store=lambda name: True):
    """(KL, CE) at each position, of whole logits."""
    fields = {
        name: batch[f"teacher_{name}"]
        for name in ("ids", "logprobs", "tail_logprob", "target_logprob", "samples", "entropy")
        if f"teacher_{name}" in batch and store(name)
    }
    if "samples" in fields:
        fields["draws"] = TailDraws(fields.pop("samples"))
    teacher = SparseTeacher(**fields, target_ids=batch["labels"], vocab_size=VOCAB)
    ce = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return LOSSES["forward_kl"](logits, teacher), ce


@pytest.mark.parametrize("kind", ["head", "samples"])
def test_the_objective_is_summed_over_all_positions(student, made, kind):
    loss, batch = made(kind)
    objective, values = loss.distil(batch)
    kl, ce = terms(logits_at_kept(student, batch), batch)
    torch.testing.assert_close(values["forward_kl"], kl.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["ce"], ce.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective, (kl + 0.5 * ce).sum(), rtol=1e-4, atol=1e-4)

    names = [name for name, _ in student.named_parameters()]
    expected = torch.autograd.grad((kl + 0.5 * ce).sum(), list(student.parameters()))
    objective.backward()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            student.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4, msg=name
        )


def test_each_cache_of_a_batch_keeps_its_own_tail(student, made):
    """Draws, which only the second one has, are no business of the first."""
    loss, batch = made("head", "samples")
    _, values = loss.distil(batch)
    logits = logits_at_kept(student, batch)
    of_first = sum(place.kept for place in batch["layout"] if place.source == 0)
    without, _ = terms(logits, batch, store=lambda name: name not in ("samples", "entropy"))
    with_draws, _ = terms(logits, batch)
    expected = torch.cat([without[:of_first], with_draws[of_first:]]).detach()
    torch.testing.assert_close(values["forward_kl"], expected, rtol=1e-4, atol=1e-5)
    assert (without - with_draws)[of_first:].abs().max() > 1e-2


def test_only_chosen_positions_are_in_the_loss(student, made):
    loss, batch = made("samples", positions=SelectPositions(by="gap", share=0.4))
    _, values = loss.distil(batch)
    logits = logits_at_kept(student, batch)
    kl, ce = terms(logits, batch)
    gap = ce + batch["teacher_target_logprob"]
    expected, start = [], 0
    for place in batch["layout"]:
        largest = gap[start : start + place.kept].argsort(descending=True)[: place.chosen]
        expected += sorted((largest + start).tolist())
        start += place.kept
    assert chosen_positions(batch) == len(expected) < start
    torch.testing.assert_close(values["forward_kl"], kl[expected].detach(), rtol=1e-4, atol=1e-5)


def test_gaps_are_measured_without_dropout_and_without_a_trace(student, made):
    loss, batch = made("head")
    _, ce = terms(logits_at_kept(student, batch), batch)
    student.train()
    state = torch.get_rng_state()
    gaps = loss.gaps(batch)
    torch.testing.assert_close(
        gaps, (ce + batch["teacher_target_logprob"]).detach(), rtol=1e-4, atol=1e-5
    )
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in student.parameters())


def test_the_students_forward_takes_cached_batches_too(student, made):
    loss, batch = made("head")
    plain = student(input_ids=batch["input_ids"]).logits
    expected, _ = loss.distil(batch)
    loss.route(student)
    torch.testing.assert_close(student(**batch)[0], expected)
    torch.testing.assert_close(student(**batch, gaps=True), loss.gaps(batch))
    torch.testing.assert_close(student(input_ids=batch["input_ids"]).logits, plain)
