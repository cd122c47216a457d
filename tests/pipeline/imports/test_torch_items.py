"""Files of torch: answers and whole texts, lists of items, and files that would run code."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from logitcask.cache_format import UserError
from tests.pipeline.imports.conftest import KL_BY_ROUNDING, imported, make_texts, mean_kl


def item(text, prompt, dtype=torch.float32):
    ids, logprobs = (torch.tensor(part[prompt - 1 :]) for part in text.top(text.logprobs))
    return {
        "full_ids": torch.tensor(text.tokens),
        "prompt_len": prompt,
        "indices": ids.to(torch.int32),
        "values": logprobs.to(dtype),
    }


def test_items(texts, tmp_path):
    items = [item(text, 2) for text in texts]
    for number in range(10):
        torch.save(items[number], tmp_path / f"{number:03d}.pt")
    torch.save(items[10:], tmp_path / "rest.pt")
    reader = imported("torch", tmp_path, tmp_path / "cache")
    held = [tuple(part[1:] for part in text.top(text.logprobs)) for text in texts]
    assert mean_kl(held, reader) < KL_BY_ROUNDING
    assert all(s.positions[0] == 1 for s in reader)
    assert reader.manifest.data.mask_policy == "completion"


def test_rows_for_every_token_and_half_precision(rng, tmp_path):
    texts = make_texts(rng, 20)
    items = [{**item(text, 1, torch.bfloat16), "prompt_len": 2} for text in texts]
    torch.save(items, tmp_path / "all.pt")
    reader = imported("torch", tmp_path / "all.pt", tmp_path / "cache")
    held = []
    for text in texts:
        ids, logprobs = text.top(text.logprobs)
        rounded = torch.tensor(logprobs).to(torch.bfloat16).double().numpy()
        mass = np.exp(rounded).sum(axis=1, keepdims=True)
        held.append((ids[1:], (rounded - np.log(np.maximum(mass, 1)))[1:]))
    assert mean_kl(held, reader) < KL_BY_ROUNDING


_ONE = {"full_ids": [1, 2], "indices": [[1]], "values": [[-0.5]]}


def test_tensors_with_gradients(rng, tmp_path):
    text = make_texts(rng, 1)[0]
    made = item(text, 1)
    torch.save({**made, "values": made["values"].requires_grad_()}, tmp_path / "a.pt")
    assert len(imported("torch", tmp_path / "a.pt", tmp_path / "cache")) == 1


class Evil:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"full_ids": [1]}, "expected items of full_ids, indices, values and prompt_len"),
        (
            {"full_ids": [1, 2], "indices": [[1]] * 5, "values": [[0.0]] * 5},
            "has 5 rows, expected 1",
        ),
        ({"full_ids": [1, 2], "indices": [1], "values": [0.0]}, "equal shapes of two dimensions"),
        ({**_ONE, "prompt_len": torch.tensor([1, 2])}, "has 2 numbers in prompt_len"),
        ({**_ONE, "prompt_len": "two"}, "prompt_len is no tensor"),
        ({**_ONE, "full_ids": [1, 2.5]}, "full_ids has 2.5, expected integers"),
        ({**_ONE, "indices": [[float("nan")]]}, "indices has nan, expected integers"),
    ],
    ids=["fields", "rows", "shape", "prompts", "prompt", "half", "nan"],
)
def test_other_content_is_refused(content, said, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=said):
        imported("torch", tmp_path / "a.pt", tmp_path / "cache")


def test_code_in_a_file_is_never_run(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"full_ids": Evil()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="holds more than tensors and plain values") as error:
            imported("torch", tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
