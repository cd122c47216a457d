"""The bins of an evaluation against counting by hand, and parts of it added up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from logitcask.cache_format import CacheReader
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.train.data.dataset import CachedDataset, HeldOut
from logitcask.train.evaluation.evaluate import _batches, evaluate
from logitcask.train.evaluation.measured import ENTROPY_EDGES, Measured
from logitcask.train.evaluation.metrics import BINS
from logitcask.train.head.lm_head import LogitsHead
from tests.train.conftest import scratch

OPTIONS = {"k": 5, "batch_size": 4, "logits_chunk": None}


@pytest.fixture
def head():
    torch.manual_seed(3)
    config = AutoConfig.for_model(**scratch(vocab_size=384)["config"])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return LogitsHead(model)


def by_hand(head, reader, entropies):
    """(calibration of the student, of the teacher, sums by entropy), position by position."""
    student, teacher = np.zeros((3, BINS)), np.zeros((3, BINS))
    by_entropy = {
        name: np.zeros(len(ENTROPY_EDGES) + 1)
        for name in ("positions", "entropy", "top1_agreement", "ce")
    }
    for sequence, found in zip(reader, entropies, strict=True):
        ids = torch.from_numpy(sequence.input_ids).long()[None]
        with torch.no_grad():
            hidden = head.hidden(input_ids=ids, attention_mask=torch.ones_like(ids))
            logprobs = head.logits(hidden[0]).double().log_softmax(-1)
        for row, position in enumerate(sequence.positions):
            target, at = int(sequence.input_ids[position + 1]), logprobs[position]
            sure = float(at.max().exp())
            column = min(int(sure * BINS), BINS - 1)
            student[:, column] += [1, sure, int(at.argmax()) == target]
            sure = float(np.exp(sequence.logprobs[row, 0]))
            column = min(int(sure * BINS), BINS - 1)
            teacher[:, column] += [1, sure, sequence.ids[row, 0] == target]
            place = sum(found[row] >= edge for edge in ENTROPY_EDGES)
            by_entropy["positions"][place] += 1
            by_entropy["entropy"][place] += found[row]
            by_entropy["top1_agreement"][place] += int(at.argmax()) == sequence.ids[row, 0]
            by_entropy["ce"][place] -= float(at[target])
    return student, teacher, by_entropy


@pytest.mark.parametrize("kind", ["exact", "lower"])
def test_bins_by_hand(head, cache, tmp_path, kind):
    place = cache
    if kind == "lower":
        place = tmp_path / "heads"
        derive(str(cache), place, DeriveOptions(tail_samples=0, top_k=8))
    derive(str(place), tmp_path / "some", DeriveOptions(sequences=":12"))
    reader = CacheReader(tmp_path / "some")
    assert reader.manifest.store.entropy == (kind == "exact")
    if kind == "exact":
        entropies = [sequence.entropy for sequence in reader]
    else:
        cells = [np.column_stack([s.logprobs, s.tail_logprob]).astype(np.float64) for s in reader]
        entropies = [
            -np.where(np.isfinite(c), np.exp(c) * c, 0).sum(1).astype(np.float32) for c in cells
        ]
    found = evaluate(head, HeldOut([CachedDataset(reader, range(12))]), **OPTIONS)
    bins, (student, teacher, by_entropy) = found.bins(), by_hand(head, reader, entropies)
    assert bins["entropy_kind"] == kind
    assert np.array(bins["calibration"]) == pytest.approx(student, rel=1e-4)
    assert np.array(found.teacher_calibration()) == pytest.approx(teacher, rel=1e-5)
    assert sum(by_entropy["positions"] > 0) > 1
    for name, sums in by_entropy.items():
        assert bins["entropy"][name] == pytest.approx(sums.tolist(), rel=1e-4, abs=1e-5), name
    # The bins add up to the means.
    total = sum(bins["entropy"]["positions"])
    for name, mean in found.means().items():
        if name in bins["entropy"]:
            assert sum(bins["entropy"][name]) / total == pytest.approx(mean)


def test_a_lower_bound_is_below_the_entropy(head, cache, tmp_path):
    derive(str(cache), tmp_path / "heads", DeriveOptions(tail_samples=0, top_k=8))
    totals = [
        sum(evaluate(head, HeldOut([CachedDataset(CacheReader(place), range(8))]), **OPTIONS).bins()["entropy"]["entropy"])
        for place in (tmp_path / "heads", cache)
    ]  # fmt: skip
    assert totals[0] < totals[1]


def test_parts_add_up_to_the_whole(head, write_cache):
    data = HeldOut([CachedDataset(write_cache(k, sequences=9, shards=1), range(9)) for k in "ab"])
    torch.manual_seed(0)
    head = LogitsHead(AutoModelForCausalLM.from_config(AutoConfig.for_model(**scratch()["config"])))
    parts = [Measured(18) for _ in range(3)]
    for number, batch in enumerate(_batches(head, data, **OPTIONS)):
        parts[number % 2].add(batch)  # the third has none
    whole, merged = evaluate(head, data, **OPTIONS), Measured.merged(parts)
    assert merged.means() == pytest.approx(whole.means(), rel=1e-12)
    assert merged.by_sequence().positions.tolist() == whole.by_sequence().positions.tolist()
    assert merged.bins()["entropy"] == {
        name: pytest.approx(sums) for name, sums in whole.bins()["entropy"].items()
    }
    assert merged.bins()["calibration"] == whole.bins()["calibration"]


def test_a_cache_without_heads_has_no_agreement(write_cache):
    torch.manual_seed(0)
    head = LogitsHead(AutoModelForCausalLM.from_config(AutoConfig.for_model(**scratch()["config"])))
    data = HeldOut([CachedDataset(write_cache("c", kind="random sampling", shards=1), range(9))])
    found = evaluate(head, data, **OPTIONS)
    assert found.teacher_calibration() is None
    assert "top1_agreement" not in found.bins()["entropy"]
    assert sum(found.bins()["calibration"][0]) == found.by_sequence().positions.sum()
