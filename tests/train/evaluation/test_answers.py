"""Prompts and references out of a cache, and what a student makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.cache_format import CachedSequence
from logitcask.train.config import AnswersConfig
from logitcask.train.evaluation.answers import Answer, answers, mean_rouge_l, split_at_prompt


def sequence(ids: list[int], mask: list[bool]) -> CachedSequence:
    loss_mask = np.array(mask, np.bool_)
    positions = np.flatnonzero(loss_mask[1:]).astype(np.int32)
    rows = len(positions)
    return CachedSequence(
        sequence_id="one",
        input_ids=np.array(ids, np.int32),
        loss_mask=loss_mask,
        positions=positions,
        ids=np.zeros((rows, 1), np.int32),
        logprobs=np.zeros((rows, 1), np.float32),
        tail_logprob=np.full(rows, -np.inf, np.float32),
        target_logprob=np.zeros(rows, np.float32),
        target_rank=np.zeros(rows, np.int32),
    )


@pytest.mark.parametrize(
    ("mask", "prompt", "reference"),
    [
        ("......xxxx", 6, 4),
        ("......xx....xxx", 6, 2),  # the first of two answers
        ("......xxxxxxxxxxxx", 6, 8),  # no longer than max_new_tokens
        (".xxxxxxxxxxx", 5, 7),  # a document: prompt_tokens
        (".xxx", None, None),  # shorter than that
        (".....x", 5, 1),
    ],
)
def test_where_the_prompt_ends(mask: str, prompt: int | None, reference: int | None) -> None:
    settings = AnswersConfig(max_new_tokens=8, prompt_tokens=5)
    found = split_at_prompt(
        sequence(list(range(len(mask))), [each == "x" for each in mask]), settings
    )
    if prompt is None:
        assert found is None
    else:
        assert [part.tolist() for part in found] == [
            list(range(prompt)),
            list(range(prompt, prompt + reference)),
        ]


@pytest.fixture
def tiny(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(
        tiny_llama
    )


def test_answers_are_the_students_greedy_ones(tiny, rng) -> None:
    """Batched with prompts of other lengths, each is what the model gives alone; and the order
    is that of the data.
    """
    model, tokenizer = tiny
    data = []
    for length in (9, 30, 14, 22, 5, 40, 11, 12, 13, 17):
        ids = rng.integers(3, 384, length + 12).tolist()
        data.append(sequence(ids, [False] * length + [True] * 12))
    found = answers(model, tokenizer, data, AnswersConfig(max_new_tokens=12))
    assert len(found) == len(data)
    for answer, one in zip(found, data, strict=True):
        start = int(one.loss_mask.argmax())
        prompt = torch.from_numpy(one.input_ids[:start]).long()[None]
        for _ in range(12):
            following = model(input_ids=prompt).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            prompt = torch.cat([prompt, following.view(1, 1)], 1)
        assert (
            answer.student == tokenizer.decode(prompt[0, start:], skip_special_tokens=True).strip()
        )
        assert (
            answer.reference
            == tokenizer.decode(one.input_ids[start:], skip_special_tokens=True).strip()
        )
        assert 0 <= answer.rouge_l <= 1


def test_the_teachers_own_words_score_one(tiny) -> None:
    model, tokenizer = tiny
    ids = tokenizer("the teacher reads what")["input_ids"]
    prompt = torch.tensor(ids)[None]
    said = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=16)[0].tolist()
    (answer,) = answers(
        model,
        tokenizer,
        [sequence(said, [False] * len(ids) + [True] * (len(said) - len(ids)))],
        AnswersConfig(max_new_tokens=16),
    )
    assert answer.student == answer.reference
    if any(each.isalnum() for each in answer.reference):
        assert answer.rouge_l == pytest.approx(1.0)


def test_references_without_words_are_left_out(tiny, caplog) -> None:
    model, tokenizer = tiny
    ids = [
        tokenizer(text)["input_ids"]
        for text in ("the teacher reads", " ?! ...", " what the student")
    ]
    data = [sequence([*ids[0], *end], [False] * len(ids[0]) + [True] * len(end)) for end in ids[1:]]
    none, some = answers(model, tokenizer, data, AnswersConfig(max_new_tokens=4))
    assert none.rouge_l is None
    assert some.rouge_l is not None
    assert mean_rouge_l([none, some]) == some.rouge_l
    assert "1 of 2 references have no words" in caplog.text
    assert mean_rouge_l([none]) is None


def test_a_report_without_rouge_l(tmp_path) -> None:
    from logitcask.train.cli import summary
    from logitcask.train.output.report import write_report

    metrics = {
        "before": {"kl": 1.0, "ce": 1.0},
        "after": {"kl": 0.5, "ce": 1.0},
        "teacher": {"ce": 1.0, "model": "t", "engine": "e"},
        "rouge_l": {"before": None, "after": None, "answers": 1},
        "k": 5,
        "steps": 1,
        "kl_kind": "",
        "run": "r",
        "losses": [],
        "exactness": {},
        "seed": 1,
        "seconds": 1.0,
        "train_sequences": 1,
        "positions_trained": 1,
        "created_by": "l",
        "held_out_sequences": 1,
        "held_out_positions": 1,
        "student": {"parameters": 1, "trained": 1, "architecture": "A"},
        "cache": {
            "path": "c",
            "fingerprint": "f",
            "source": "s",
            "tokens": 1,
            "bytes_per_token": 1.0,
        },
    }
    assert "rouge-l          none" in summary(metrics)
    write_report(
        tmp_path / "report.html", metrics, [], [], [Answer("p", "?!", "x", None)._asdict()]
    )
    page = (tmp_path / "report.html").read_text()
    assert "No Rouge-L" in page
    assert page.count('<figure class="chart">') == 1  # nothing was logged
