"""``data.generate.splice``: a token of the teacher in the place of the first one that it ranks low."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.pipeline.builder import overlap
from logitcask.pipeline.builder import score as scoring
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.builder.splices import warn_of_ties
from logitcask.pipeline.config import BuildConfig
from logitcask.pipeline.generate import answers as generation
from logitcask.pipeline.generate import splice as splicing
from logitcask.pipeline.generate.splice import first_rejected, teacher_sample, uniform
from logitcask.pipeline.report.content import _written_by
from logitcask.pipeline.text.config import SpliceConfig

from .test_writer import other_weights

K = 100
LONGEST = 24


def config_of(
    folder: Path,
    teacher: dict[str, Any],
    writer: str,
    *,
    number: int = 1,
    output: str | None = None,
    store: dict[str, Any] | None = None,
    splice: dict[str, Any] | None = None,
    **generate: Any,
) -> BuildConfig:
    """A pass of ``number``: the cache ``pass-NUMBER``, from that of the pass before."""
    rows = folder / "questions.jsonl"
    if not rows.exists():
        rows.write_text("".join(f'{{"q": "what is {n}?"}}\n' for n in range(7)))
    generate = {"writer": writer, "max_new_tokens": LONGEST, **generate}
    if number > 1:
        earlier = {"cache": str(folder / f"pass-{number - 1}"), "top_k": K}
        generate["splice"] = {**earlier, **(splice or {})}
    return BuildConfig.model_validate(
        {
            "teacher": teacher,
            "data": {
                "path": str(rows),
                "prompt_field": "q",
                "max_length": 64,
                "generate": generate,
            },
            "store": store or {},
            "audit": {"sequences": 0},
            "log": False,
            "output": str(folder / (output or f"pass-{number}")),
        }
    )


def synthetic(
    folder: Path, number: int = 1, *, teacher: int = 1, writer: int = 1, **options: Any
) -> BuildConfig:
    """The writer is like the teacher, which therefore rejects some of its tokens only."""
    model = {"model": "synthetic", "backend": "synthetic", "vocab_size": 300, "seed": teacher}
    return config_of(folder, model, f"synthetic:{writer}", number=number, **options)


def answer(cache: CacheReader, index: int) -> list[int]:
    """The tokens of an answer."""
    return cache[index].target_ids.tolist()


def rejections(cache: CacheReader, top_k: int = K) -> list[int | None]:
    """Of each answer the index of its first rejected token."""
    return [first_rejected(each.target_rank, top_k) for each in cache]


def greedy(model: Any, ids: list[int]) -> torch.Tensor:
    """float32[V]: the logprobs of the token behind ``ids``."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return logits.float().log_softmax(0)


def reference(
    student: Any, teacher: Any, prompt: list[int], ends: set[int], top_k: int, draft: int
) -> tuple[list[int], int]:
    """SKD as the paper has it, one sequence at a time: ``draft`` tokens of the student, all of
    them ranked by the teacher, the first rejected one replaced, the rest dropped. Both are greedy.
    """
    written: list[int] = []
    rejected = 0
    while len(written) < LONGEST and not (written and written[-1] in ends):
        drafted: list[int] = []
        most = min(draft, LONGEST - len(written))
        while len(drafted) < most and not (drafted and drafted[-1] in ends):
            drafted.append(int(greedy(student, prompt + written + drafted).argmax()))
        for at, token in enumerate(drafted):
            teachers = greedy(teacher, prompt + written + drafted[:at])
            if int((teachers > teachers[token]).sum()) >= top_k:
                drafted = [*drafted[:at], int(teachers.argmax())]
                rejected += 1
                break
        written += drafted
    return written, rejected


def test_passes_are_the_sequential_algorithm(tmp_path, tiny_llama):
    """Token for token, whatever the length of a draft, with several rejections in each answer."""
    from transformers import AutoModelForCausalLM

    writer = other_weights(tiny_llama, tmp_path / "student")
    teacher = {"model": str(tiny_llama), "backend": "transformers"}

    top_k = 25

    def one(number: int) -> CacheReader:
        greedy_draws = {"temperature": 0.0, "splice": {"temperature": 0.0, "top_k": top_k}}
        build(config_of(tmp_path, teacher, str(writer), number=number, **greedy_draws))
        return CacheReader(tmp_path / f"pass-{number}")

    caches = [one(1)]
    while any(at is not None for at in rejections(caches[-1], top_k)):
        caches.append(one(len(caches) + 1))
    student, scorer = (AutoModelForCausalLM.from_pretrained(each) for each in (writer, tiny_llama))
    ends = set(caches[-1].manifest.data.generation.end_tokens)
    # Each splice makes another answer.
    texts = [{tuple(answer(cache, index)) for cache in caches} for index in range(7)]
    spliced = [len(each) - 1 for each in texts]
    assert min(spliced) >= 2
    for index, sequence in enumerate(caches[-1]):
        prompt = sequence.input_ids[: int(sequence.positions[0]) + 1].tolist()
        for draft in (1, 5):
            expected, rejected = reference(student, scorer, prompt, ends, top_k, draft)
            assert answer(caches[-1], index) == expected
            assert rejected == spliced[index]


def test_ranks_are_those_of_the_whole_distribution(tmp_path, tiny_llama):
    """Also where ids tie: each id of this teacher has a twin, so both have the rank of the first."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "twins"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    writer = other_weights(tiny_llama, tmp_path / "student")
    build(config_of(tmp_path, {"model": str(folder), "backend": "transformers"}, str(writer)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen = set()
    for sequence in CacheReader(tmp_path / "pass-1"):
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.input_ids)[None].long()).logits[0].double()
        for row, position in enumerate(sequence.positions):
            dense = logits[position]
            rank = int((dense > dense[sequence.target_ids[row]]).sum())
            assert rank == sequence.target_rank[row]
            assert rank % 2 == 0
            seen.add(rank)
    assert len(seen) > 5


def test_a_token_that_ties_with_the_last_accepted_one_is_accepted():
    logits = np.array([3.0, 2.0, 2.0, 2.0, 1.0])
    ranks = np.array([(logits > each).sum() for each in logits], np.int32)
    assert ranks.tolist() == [0, 1, 1, 1, 4]
    assert [first_rejected(ranks, top_k) for top_k in (1, 2, 4, 5)] == [1, 4, 4, None]


def nucleus(
    logprobs: np.ndarray, temperature: float, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the nucleus of a whole distribution, float64[V], and their probabilities in it."""
    warped = np.exp(logprobs / temperature - (logprobs / temperature).max())
    warped /= warped.sum()
    order = np.argsort(-warped, kind="stable")
    size = 1 + int((warped[order].cumsum() < top_p).sum())
    return order[:size], warped[order[:size]] / warped[order[:size]].sum()


GRID = (np.arange(200) + 0.5) / 200


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_the_draw_is_of_the_teachers_nucleus(rng, temperature, top_p):
    """If the head shows it whole, the draws are those of the whole distribution. If not, it is
    said, and they are of top-k sampling.
    """
    vocab, found = 60, {True: 0, False: 0}
    for _ in range(60):
        dense = rng.normal(size=vocab) * rng.choice([0.2, 2.0, 6.0])
        dense -= np.log(np.exp(dense).sum())
        order = np.argsort(-dense)
        size, top_k = int(rng.integers(1, vocab + 1)), int(rng.integers(1, vocab + 1))
        ids, logprobs = order[:size].astype(np.int32), dense[order[:size]]
        mass = float(np.exp(dense[order[size:]]).sum())
        tail = math.log(mass) if mass else -math.inf
        splice = SpliceConfig(cache="x", top_k=top_k, temperature=temperature, top_p=top_p)
        draws = [teacher_sample(ids, logprobs, tail, vocab, splice, u) for u in GRID]
        whole = draws[0][1]
        assert {each[1] for each in draws} == {whole}
        found[whole] += 1
        if whole:
            expected, chances = nucleus(dense, temperature, top_p)
            assert len(expected) <= min(size, top_k)
        else:
            first, chances = nucleus(logprobs[: min(size, top_k)], temperature, top_p)
            expected = ids[first]
        counts = np.array([sum(each[0] == index for each in draws) for index in expected])
        assert counts.sum() == len(GRID)
        assert np.abs(counts / len(GRID) - chances).max() <= 1 / len(GRID) + 1e-9
    assert min(found.values()) > 0


def test_the_tail_weighs_at_most_its_bound(rng):
    for _ in range(200):
        dense = rng.normal(size=50) * rng.choice([0.0, 0.5, 5.0])
        dense = np.sort(dense - np.log(np.exp(dense).sum()))[::-1]
        size, power = int(rng.integers(1, 50)), float(rng.choice([0.3, 1.0, 5.0]))
        tail = float(np.log(np.exp(dense[size:]).sum()))
        truth = float(np.log(np.exp(power * dense[size:]).sum()))
        assert splicing._tail_weight(dense[:size], tail, 50, power) >= truth - 1e-9
    assert splicing._tail_weight(dense, -math.inf, 50, 2.0) == -math.inf


def test_a_draw_without_temperature_is_the_most_probable_id():
    splice = SpliceConfig(cache="x", temperature=0.0)
    ids, logprobs = np.array([7, 3], np.int32), np.log([0.4, 0.4])
    for u in (0.0, 0.999):
        assert teacher_sample(ids, logprobs, math.log(0.2), 9, splice, u) == (7, True)


def test_random_numbers_are_of_the_answer_and_the_pass():
    found = {
        uniform(seed, name, number)
        for seed in (0, 1)
        for name in ("a/0", "a/1")
        for number in (2, 3)
    }
    assert len(found) == 8
    assert all(0 <= each < 1 for each in found)
    assert uniform(0, "a/0", 2) == uniform(0, "a/0", 2)


@pytest.mark.parametrize("samples", [1, 2])
def test_what_stays_of_an_answer(tmp_path, samples):
    """Everything in front of the first rejected token; the whole answer if there is none."""
    build(synthetic(tmp_path, samples=samples))
    build(synthetic(tmp_path, 2, samples=samples))
    before, after = (CacheReader(tmp_path / f"pass-{n}") for n in (1, 2))
    found = rejections(before)
    assert any(at is None for at in found)
    assert sum(at is not None for at in found) >= 2
    counters = dict(after.manifest.data.counters)
    accepted = dropped = 0
    for index, at in enumerate(found):
        old, new = answer(before, index), answer(after, index)
        assert before[index].sequence_id == after[index].sequence_id
        if at is None:
            assert new == old
            continue
        accepted += at
        dropped += len(old) - at
        assert new[:at] == old[:at]
        assert new[at] != old[at]
        held = before[index].ids[at][:K]
        assert new[at] in held
        later = rejections(after)[index]
        assert later is None or later > at
    assert counters["answers_spliced"] == sum(at is not None for at in found)
    assert (counters["tokens_accepted"], counters["tokens_dropped"]) == (accepted, dropped)
    assert counters["generated_tokens"] == sum(len(answer(after, i)) for i in range(len(after)))
    assert (counters["generations"], counters["prompts"]) == (7 * samples, 7)
    finished = sum(counters.get(f"finished_{how}", 0) for how in ("stop", "length", "empty"))
    assert finished == 7 * samples


def test_answers_without_a_token_stay_without_one(tmp_path):
    """They are no sequences, so the cache of the pass before has none of them."""
    build(synthetic(tmp_path, output="probe"))
    from logitcask.pipeline.builder.inputs import Inputs

    probe = CacheReader(tmp_path / "probe")
    letter = Inputs(synthetic(tmp_path)).tokenizer.decode(answer(probe, 2)[:1])
    for number in (1, 2):
        build(synthetic(tmp_path, number, stop=[letter]))
    before, after = (CacheReader(tmp_path / f"pass-{n}") for n in (1, 2))
    names = [each.sequence_id for each in before]
    assert "train/2/0" not in names
    assert [each.sequence_id for each in after] == names
    counters = after.manifest.data.counters
    assert counters["generations"] - counters["sequences"] == 7 - len(names) > 0


def test_the_manifest_says_what_was_spliced(tmp_path):
    for number in (1, 2, 3):
        build(synthetic(tmp_path, number))
    caches = [CacheReader(tmp_path / f"pass-{number}") for number in (1, 2, 3)]
    first, *spliced = (each.manifest for each in caches)
    assert first.data.generation.splice is None
    assert first.required_features == ("writer_logprobs",)
    for number, before, manifest in zip((2, 3), (first, spliced[0]), spliced, strict=True):
        assert manifest.data.generation.splice.model_dump() == {
            "number": number,
            "top_k": K,
            "temperature": 0.2,
            "top_p": 0.5,
            "fingerprint": before.fingerprint,
            "content_sha256": before.content_sha256,
        }
        assert manifest.required_features == ()
        assert manifest.data.generation.writer == first.data.generation.writer
        assert manifest.data.generation.prompts_sha256 == first.data.generation.prompts_sha256
    assert caches[2][0].writer_logprob is None
    said = (
        "in 2 further passes the first token of rank 100 or more was replaced by one of the teacher"
    )
    assert said in _written_by(spliced[1])
    assert "replaced" not in _written_by(first)
    assert verify(str(tmp_path / "pass-3"), deep=True) == []
    assert build(synthetic(tmp_path, 3)).reused


@pytest.mark.parametrize(("seed", "first_changes"), [(5, True), (8, True), (6, False)])
def test_unchanged_answers_are_copied_and_the_cache_is_that_of_a_full_build(
    tmp_path, monkeypatch, seed, first_changes
):
    """To the last byte, whether or not the first answer, which gives the prior, has changed."""
    for module in (scoring, overlap):
        monkeypatch.setattr(module, "PRIOR_POSITIONS", 1)
    build(synthetic(tmp_path, seed=seed))
    found = rejections(CacheReader(tmp_path / "pass-1"))
    assert (found[0] is not None) == first_changes
    for store in ({"shard_tokens": 100}, {"shard_tokens": 100, "logprob_step": 1 / 32}):
        options = {"store": store, "seed": seed}
        again = build(synthetic(tmp_path, 2, **options))
        whole = build(synthetic(tmp_path, 2, output="whole", **options), reuse_known=False)
        assert whole.taken is None
        assert again.manifest.content_sha256 == whole.manifest.content_sha256
        assert again.manifest.fingerprint == whole.manifest.fingerprint
        unchanged = sum(at is None for at in found)
        if "logprob_step" in store:  # other numbers are stored
            assert again.taken is None
        else:
            assert again.taken.sequences == unchanged
            assert 0 < unchanged < len(found)
        for name in ("pass-2", "whole"):
            shutil.rmtree(tmp_path / name)


def test_an_answer_ends_at_a_spliced_end_token_and_at_its_longest(tmp_path, monkeypatch):
    build(synthetic(tmp_path))
    before = CacheReader(tmp_path / "pass-1")
    end = before.manifest.data.generation.end_tokens[0]
    with monkeypatch.context() as patch:
        patch.setattr(splicing, "teacher_sample", lambda *_: (end, True))
        build(synthetic(tmp_path, 2, output="ended"))
    found, ended = rejections(before), CacheReader(tmp_path / "ended")
    for index, at in enumerate(found):
        old = answer(before, index)
        assert answer(ended, index) == (old if at is None else [*old[:at], end])
    # The answers are not as long as they may be, unless the rejected token is their last one.
    build(synthetic(tmp_path, 2))
    lengths = [len(answer(CacheReader(tmp_path / "pass-2"), index)) for index in range(7)]
    assert max(lengths) <= LONGEST


def test_stop_strings_are_found_across_what_is_spliced(tmp_path, monkeypatch):
    """The string begins in front of the teacher's token and ends with it: the answer ends there."""
    build(synthetic(tmp_path))
    before = CacheReader(tmp_path / "pass-1")
    index, at = next((i, at) for i, at in enumerate(rejections(before)) if at)
    from logitcask.pipeline.builder.inputs import Inputs

    tokenizer = Inputs(synthetic(tmp_path)).tokenizer
    old = answer(before, index)
    letter = tokenizer.decode([old[at - 1]])
    stop = letter + "q"
    monkeypatch.setattr(splicing, "teacher_sample", lambda *_: (_id_of("q", tokenizer), True))
    for include, kept in ((True, at + 1), (False, at - 1)):
        output = f"stopped-{include}"
        build(synthetic(tmp_path, 2, output=output, stop=[stop], include_stop=include))
        after = CacheReader(tmp_path / output)
        found = answer(after, index)
        assert found[:-1] == old[:kept][: len(found) - 1]
        assert len(found) == kept


def _id_of(letter: str, tokenizer: Any) -> int:
    (index,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
    return int(index)


def test_a_build_killed_while_writing_goes_on_with_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_UNIT_ANSWERS", 2)
    build(synthetic(tmp_path))
    build(synthetic(tmp_path, 2, output="whole"))
    commit, count = generation.Generations._commit, 0

    def killed(self: Any, unit: int, answers: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("killed")
        commit(self, unit, answers)

    with monkeypatch.context() as patch:
        patch.setattr(generation.Generations, "_commit", killed)
        with pytest.raises(RuntimeError, match="killed"):
            build(synthetic(tmp_path, 2))
    build(synthetic(tmp_path, 2))
    whole, resumed = (CacheReader(tmp_path / each).manifest for each in ("whole", "pass-2"))
    assert resumed.content_sha256 == whole.content_sha256
    assert resumed.data.counters == whole.data.counters


def test_the_catalogue_and_the_output_know_the_pass_before_by_its_content(tmp_path):
    home = Home(tmp_path / "home")
    build(synthetic(tmp_path))
    first = build(synthetic(tmp_path, 2), home=home).manifest
    again = build(synthetic(tmp_path, 2, output="again"), home=home)
    assert again.taken is not None
    assert again.manifest.content_sha256 == first.content_sha256
    shutil.rmtree(tmp_path / "pass-1")
    assert build(synthetic(tmp_path, 2)).reused  # it may be gone
    build(synthetic(tmp_path, seed=1))
    with pytest.raises(UserError, match=r"pass-1, with whose answers .* goes on, has changed"):
        build(synthetic(tmp_path, 2))
    other = build(synthetic(tmp_path, 2, output="other", seed=0), home=home)
    assert other.taken is None or other.taken.how == "part"
    assert other.manifest.content_sha256 != first.content_sha256


def test_another_pass_before_is_refused(tmp_path):
    build(synthetic(tmp_path))

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UserError, match=said) as error:
            build(synthetic(tmp_path, 2, output="refused", **options))
        assert len(str(error.value).splitlines()) == 1
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)

    refused("was scored by another teacher", teacher=2)
    refused("other weights; an answer is written by one model", writer=2)
    refused("has no answer train/0/1", samples=2)
    refused("has another prompt there", system_prompt="Be brief.")
    refused("has 24 tokens there, and at most 5 here", max_new_tokens=5)
    refused("train/3/0 is not asked for here", max_prompts=3)
    refused("no token of rank 299 or more, so there is nothing to splice", splice={"top_k": 299})
    refused("which cannot be read", splice={"cache": str(tmp_path / "nowhere")})
    text = synthetic(tmp_path, output="text").model_dump(mode="json")
    text["data"] |= {"prompt_field": None, "text_field": "q", "generate": None}
    build(BuildConfig.model_validate(text))
    refused("has no answers of another model", splice={"cache": str(tmp_path / "text")})
    derive(str(tmp_path / "pass-1"), tmp_path / "small", DeriveOptions(top_k=2))
    refused("was made of other caches", splice={"cache": str(tmp_path / "small")})
    store = {"min_k": 0}
    build(synthetic(tmp_path, output="headless", store=store))
    refused("may have positions without a head", splice={"cache": str(tmp_path / "headless")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"writer": None}, "splice is set, but no writer"),
        ({"splice": {"cache": "x", "top_k": 0}}, "greater than or equal to 1"),
        ({"splice": {"cache": "x", "top_p": 0}}, "greater than 0"),
        ({"splice": {"cache": "x", "temperature": -1}}, "greater than or equal to 0"),
    ],
)
def test_mistakes_in_the_config(tmp_path, change, said):
    fields = synthetic(tmp_path, 2).model_dump(mode="json")
    fields["data"]["generate"] |= change
    with pytest.raises(ValueError, match=said):
        BuildConfig.model_validate(fields)


def test_a_pass_is_not_its_own_and_has_no_limit_of_tokens(tmp_path):
    fields = synthetic(tmp_path, 2).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"and so is data\.generate.splice\.cache, which is read"):
        BuildConfig.model_validate({**fields, "output": str(tmp_path / "pass-1")})
    fields["data"]["max_tokens"] = 500
    with pytest.raises(ValueError, match=r"max_tokens is 500 beside generate\.splice"):
        BuildConfig.model_validate(fields)


def test_draws_from_a_nucleus_that_no_head_shows_are_counted_and_said(tmp_path, caplog):
    store = {"top_k": 1, "min_k": 1, "min_probability": None}
    build(synthetic(tmp_path, store=store))
    build(synthetic(tmp_path, 2, store=store, splice={"temperature": 1.0, "top_p": 0.9}))
    counters = CacheReader(tmp_path / "pass-2").manifest.data.counters
    assert counters["splices_cut"] == counters["answers_spliced"] > 0
    assert "are drawn from the first ids of the stored head" in caplog.text


def test_ranks_that_count_ties_otherwise_are_said(tmp_path, caplog):
    build(synthetic(tmp_path))
    reader = CacheReader(tmp_path / "pass-1")
    warn_of_ties(reader, 40)
    teacher = reader.manifest.teacher.model_copy(update={"backend": "vllm"})
    reader.manifest = reader.manifest.model_copy(update={"teacher": teacher})
    warn_of_ties(reader, 32)
    assert "ties with others" not in caplog.text
    warn_of_ties(reader, 33)
    assert "asked for 32 ids, and 33 are accepted" in caplog.text
