"""On-policy reverse KL with the student's own most probable ids: ``writer_top_k`` of the teacher
config.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache_format import CacheReader, ConfigError, verify
from logitcask.rounds.run import run_rounds


def test_every_round_has_the_ids_of_the_student_that_wrote(rounds, tiny_llama):
    """Beside given text, which has none, and text of an earlier round."""
    config = rounds(
        student={"losses": [{"name": "reverse_kl"}]},
        generate={"writer_top_k": 4},
        count=2,
        warmup_steps=1,
        on_policy_fraction=0.5,
        replay=0.25,
    )
    document, _ = run_rounds(config, [])
    assert [each["steps"] for each in document["rounds"]] == [1, 3, 5]
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for number in (1, 2):
        path = config.output / f"round-{number:03d}" / "cache"
        before = config.output / f"round-{number - 1:03d}" / "student"
        models = [AutoModelForCausalLM.from_pretrained(before), teacher]
        cache = CacheReader(path)
        assert verify(str(path), deep=True) == []
        for sequence in cache:
            ids = torch.from_numpy(sequence.input_ids)[None].long()
            with torch.no_grad():
                log_q, log_p = (
                    model(ids).logits[0].double().log_softmax(1)[sequence.positions]
                    for model in models
                )
            chosen = torch.from_numpy(sequence.chosen.ids).long()
            assert chosen.shape[1] == 4
            assert (log_q.gather(1, chosen) >= log_q.topk(4).values[:, -1:] - 1e-4).all()
            found = log_p.gather(1, chosen).numpy()
            rounding = cache.manifest.store.rounding
            assert np.abs(found - sequence.chosen.logprobs).max() <= rounding + 1e-4


def test_the_teachers_own_answers_have_none(rounds):
    config = rounds(
        student={"losses": [{"name": "reverse_kl"}]},
        generate={"writer_top_k": 4},
        count=1,
        teacher_text=True,
        on_policy_fraction=0.5,
    )
    run_rounds(config, [])
    of_round = config.output / "round-001"
    assert CacheReader(of_round / "teacher").manifest.store.chosen_ids == 0
    assert CacheReader(of_round / "cache").manifest.store.chosen_ids == 4


def test_passes_of_skd_have_none(rounds):
    config = rounds(generate={"writer_top_k": 4}, skd={"top_k": 3}, on_policy_fraction=0.5)
    with pytest.raises(ConfigError, match=r"writer_top_k is 4, but with rounds.skd"):
        run_rounds(config, [])
