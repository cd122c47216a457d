"""How the students of the study of rounds are judged: on what they write themselves, and on
held-out text. Both models are in memory here, which the product never does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES = 2
"""Sampled answers to each held-out prompt."""


@dataclass(frozen=True)
class Held:
    """What students are judged by.

    prompts: ids of each. documents: ids of each. answers: the teacher's greedy answers as text.
    """

    prompts: list[list[int]]
    documents: list[list[int]]
    answers: list[str]


class Judge:
    """The teacher, and the held-out text. ``length``: tokens of prompt and answer together."""

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        self.teacher = load(folder / "teacher")
        prompts, documents = (
            [self.tokenizer(json.loads(line)["text"])["input_ids"] for line in file.open()]
            for file in (folder / "held-out-prompts.jsonl", folder / "held-out.jsonl")
        )
        answers = self._answers(self.teacher, prompts, greedy=True)
        self.held = Held(prompts, documents, self._texts(prompts, answers))

    def figures(self, student: Path) -> dict[str, float]:
        """ce, kl: on held-out documents, nats; kl is KL(teacher || student).

        own_nll: the teacher's -logprob of the tokens of sampled answers. own_kl: KL(student ||
        teacher) behind each of their prefixes, summed over the vocabulary. Nats per token.
        rouge_l: F1 of the greedy answers with the teacher's, in percent. length: tokens of a
        sampled answer.
        """
        model, held = load(student), self.held
        sums = dict.fromkeys(("ce", "kl", "own_nll", "own_kl"), 0.0)
        read = 0
        for ids in held.documents:
            log_p, log_q, labels = self._scored(model, ids, 1)
            sums["ce"] -= log_q.gather(1, labels[:, None]).sum().item()
            sums["kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
            read += len(labels)
        torch.manual_seed(0)
        prompts = held.prompts * SAMPLES
        written = 0
        for prompt, answer in zip(
            prompts, self._answers(model, prompts, greedy=False), strict=True
        ):
            if not answer:
                continue
            log_p, log_q, labels = self._scored(model, prompt + answer, len(prompt))
            sums["own_nll"] -= log_p.gather(1, labels[:, None]).sum().item()
            sums["own_kl"] += (log_q.exp() * (log_q - log_p)).sum().item()
            written += len(labels)
        greedy = self._texts(held.prompts, self._answers(model, held.prompts, greedy=True))
        scorer = RougeScorer(["rougeL"])
        rouge = [
            scorer.score(one, other)["rougeL"].fmeasure
            for one, other in zip(held.answers, greedy, strict=True)
        ]
        found = {
            "ce": sums["ce"] / read,
            "kl": sums["kl"] / read,
            "own_nll": sums["own_nll"] / max(1, written),
            "own_kl": sums["own_kl"] / max(1, written),
            "rouge_l": 100 * sum(rouge) / len(rouge),
            "length": written / len(prompts),
        }
        return {name: round(value, 4) for name, value in found.items()}

    @torch.inference_mode()
    def _scored(self, model: Any, ids: list[int], start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-softmaxes of teacher and student, float64[n, V], and labels int64[n], of the tokens
        from ``start`` on.
        """
        inputs = torch.tensor([ids])
        log_p, log_q = (
            torch.log_softmax(each(input_ids=inputs).logits[0, start - 1 : -1].double(), -1)
            for each in (self.teacher, model)
        )
        return log_p, log_q, inputs[0, start:]

    @torch.inference_mode()
    def _answers(
        self, model: Any, prompts: Sequence[list[int]], *, greedy: bool
    ) -> list[list[int]]:
        """Ids of an answer to each prompt, without the token that ends a text."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), 32):
            batch = prompts[start : start + 32]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(each)) + each for each in batch])
            mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
            sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.length - min(map(len, batch)),
                do_sample=not greedy,
                **sampling,
            )
            for prompt, row in zip(batch, out[:, width:].tolist(), strict=True):
                answer = row[: self.length - len(prompt)]
                found.append(answer[: answer.index(0)] if 0 in answer else answer)
        return found

    def _texts(self, prompts: list[list[int]], answers: list[list[int]]) -> list[str]:
        """The answers as text: their bytes may begin within a character of the prompt."""
        return [
            self.tokenizer.decode(prompt + answer)[len(self.tokenizer.decode(prompt)) :]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
