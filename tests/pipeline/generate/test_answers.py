"""``data.generate``: the teacher's own answers, from prompts to a cache; what is sampled, cut,
kept, and never lost.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import logitcask.pipeline.builder.lazy_teacher
from logitcask.cache_format import CacheReader, UserError, verify
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.generate import answers as generation
from logitcask.pipeline.generate.answers import answer_seed, cut
from logitcask.pipeline.generate.prompts import Prompts
from logitcask.pipeline.teachers.base import Prompt, Sampling
from logitcask.pipeline.teachers.model import load_tokenizer, resolve_model
from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, sampling_of
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher
from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.sources import Row

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
BACKENDS = ["synthetic", "transformers", pytest.param("vllm", marks=needs_vllm)]
VOCAB = 3000
QUESTIONS = [
    "the teacher",
    "what is time?",
    "2+2?",
    "read this",
    "Grüße",
    "why",
    "日本",
    "who reads the time",
]


def config_of(tmp_path: Path, teacher: dict[str, Any] | None = None, **fields: Any) -> BuildConfig:
    """Questions in a file, answered by the synthetic teacher unless another is named."""
    rows = fields.pop("rows", [{"q": question} for question in QUESTIONS])
    file = tmp_path / "prompts.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    generate = {"max_new_tokens": 12, **fields.pop("generate", {})}
    output = str(tmp_path / fields.pop("output", "cache"))
    return BuildConfig.model_validate(
        {
            "teacher": teacher
            or {"model": "synthetic", "backend": "synthetic", "vocab_size": VOCAB},
            "data": {
                "path": str(file),
                "prompt_field": "q",
                "max_length": 96,
                "generate": generate,
                **fields,
            },
            "store": {"top_k": 8, "shard_tokens": 400},
            "audit": {"sequences": 0},
            "output": output,
        }
    )


def open_generator(backend: str, folder: Path, sampling: Sampling, max_length: int = 96) -> Any:
    model = "synthetic" if backend == "synthetic" else str(folder)
    config = TeacherConfig(model=model, backend=backend, vocab_size=VOCAB, batch_tokens=64)
    return open_teacher(config, max_length=max_length, capture=Capture(8), sampling=sampling)


@pytest.fixture(scope="module")
def engines(tiny_llama: Path) -> Iterator[Callable[[str, Sampling], Any]]:
    """``engines(backend, sampling)``: a teacher that writes so. One vLLM engine, which can find
    stop strings, serves all.
    """
    made: dict[str, Any] = {}

    def get(backend: str, sampling: Sampling) -> Any:
        if backend not in made:
            made[backend] = open_generator(backend, tiny_llama, Sampling(1.0, 1.0, (2,), ("stop",)))
        made[backend]._sampling = sampling
        return made[backend]

    yield get
    for teacher in made.values():
        teacher.close()


def prompts_of(
    folder: Path, rng: np.random.Generator, count: int, longest: int = 12
) -> list[Prompt]:
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    texts = [
        "".join(rng.choice(list("abcde the\n"), int(rng.integers(1, 40)))) for _ in range(count)
    ]
    return [
        Prompt(
            np.array(tokenizer(text)["input_ids"], np.int32),
            int(rng.integers(1, longest)),
            int(rng.integers(2**63)),
        )
        for text in texts
    ]


# --- sampling


def wanted(logprobs: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that is sampled from, the long way."""
    weights = np.exp(logprobs.astype(np.float64) / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    kept = 1 + int(np.searchsorted(np.cumsum(weights[order]), top_p))
    weights[order[kept:]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_come_as_often_as_they_are_probable(
    tiny_llama, rng, tail_p_value, engines, backend
) -> None:
    """The first token of many answers to one prompt, against the teacher's own distribution,
    tempered and cut.
    """
    temperature, top_p = 0.7, 0.9
    prompt = prompts_of(tiny_llama, rng, 1)[0].input_ids
    teacher = engines(backend, Sampling(temperature, top_p, (2,)))
    answers = teacher.generate(
        Prompt(prompt, 1, int(seed)) for seed in rng.integers(2**63, size=1000)
    )
    tokens = np.array([int(answer[0]) for answer in answers])
    reference = (
        teacher if backend == "synthetic" else engines("transformers", Sampling(1.0, 1.0, ()))
    )
    dense = reference.dense_logprobs(np.append(prompt, 0).astype(np.int32))[-1]
    assert tail_p_value(tokens[None], wanted(dense, temperature, top_p)[None]) > 1e-6
    assert tail_p_value(tokens[None], wanted(dense, 1.0, top_p)[None]) < 1e-6, (
        "the test cannot see temperature"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_does_not_depend_on_its_batch(tiny_llama, rng, engines, backend) -> None:
    teacher = engines(backend, Sampling(1.0, 1.0, (2,)))
    prompts = prompts_of(tiny_llama, rng, 40)
    together = list(teacher.generate(prompts))
    order = rng.permutation(len(prompts))[:17]
    apart = list(teacher.generate([prompts[index] for index in order]))
    for index, answer in zip(order, apart, strict=True):
        np.testing.assert_array_equal(answer, together[index])
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.dtype == np.int32
        assert 1 <= len(answer) <= prompt.max_tokens
        assert 2 not in answer[:-1], "goes on after an end token"
        assert len(answer) == prompt.max_tokens or answer[-1] == 2
    assert len({tuple(answer) for answer in together}) > 20


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_greedy_is_what_transformers_says(tiny_llama, rng, engines, backend) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = prompts_of(tiny_llama, rng, 24)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    answers = list(engines(backend, Sampling(0.0, 1.0, (2,))).generate(prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
        whole = model.generate(
            ids, max_new_tokens=prompt.max_tokens, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert answer.tolist() == whole[0, len(prompt.input_ids) :].tolist()


def test_a_models_own_generation_settings_do_not_count(tiny_llama, rng, tmp_path) -> None:
    """Chat models ship penalties and temperatures; answers are the distribution's that is asked
    for, and scored.
    """
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    own = {
        "repetition_penalty": 3.0,
        "min_new_tokens": 9,
        "eos_token_id": [2, 7],
        "temperature": 0.1,
    }
    (folder / "generation_config.json").write_text(json.dumps(own))
    prompts = prompts_of(tiny_llama, rng, 12)
    answers = []
    for model in (tiny_llama, folder):
        teacher = open_generator("transformers", model, Sampling(0.0, 1.0, (2,)))
        answers.append([answer.tolist() for answer in teacher.generate(prompts)])
    assert answers[0] == answers[1]
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(folder)},
            "data": {"path": "x", "prompt_field": "q", "generate": {}},
            "output": "x",
        }
    )
    tokenizer = open_tokenizer(config.teacher)
    assert sampling_of(config.teacher, config.data.generate, tokenizer).end_tokens == (2, 7)
    stops = config.data.generate.model_copy(update={"stop": ("<|im_start|>", "\n\n")})
    sampling = sampling_of(config.teacher, stops, tokenizer)
    assert (sampling.end_tokens, sampling.stop) == ((1, 2, 7), ("\n\n",))


# --- where answers end


LLAMA_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}{{ end }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)


def test_an_answer_ends_where_the_template_ends_a_turn(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first Llama 3 Instruct named <|end_of_text|> alone in its configs, and its template
    wrote <|eot_id|>.
    """
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**fields, "eos_token_id": 0}))
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**fields, "eos_token": "<|endoftext|>"})
    )
    teacher = {"model": str(folder), "backend": "transformers"}
    file = tmp_path / "template.jinja"

    def ends(template: str) -> tuple[int, ...]:
        file.write_text(template)
        config = config_of(tmp_path, teacher, chat_template=str(file))
        prompts = Prompts(open_tokenizer(config.teacher), config.data, 384)
        caplog.clear()
        return sampling_of(
            config.teacher, config.data.generate, prompts.tokenizer, prompts.template
        ).end_tokens

    assert ends(LLAMA_3.replace("{{ end }}", "<|im_end|>")) == (0, 2)
    assert "ends an answer with <|im_end|>" in caplog.text
    assert ends(LLAMA_3.replace("{{ end }}", "\n<|im_end|>\n<|endoftext|>")) == (0, 2)
    for nothing_else in ("<|endoftext|>", "", "### end", "{{ raise_exception('no') }}"):
        assert ends(LLAMA_3.replace("{{ end }}", nothing_else)) == (0,)
        assert not caplog.text

    file.write_text(LLAMA_3.replace("{{ end }}", "<|im_end|>"))
    build(config_of(tmp_path, teacher, chat_template=str(file)))
    assert CacheReader(tmp_path / "cache").manifest.data.generation.end_tokens == (0, 2)


def byte_decode(ids: np.ndarray) -> str:
    return SyntheticTokenizer().decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", "ab", "é", "日", "<end>"]), max_size=12),
    stop=st.sampled_from([(), ("ab",), ("b", "aé"), ("日",), ("zz",), ("éa", "a日")]),
    include=st.booleans(),
)
def test_answers_end_at_the_first_stop(
    pieces: list[str], stop: tuple[str, ...], include: bool
) -> None:
    """Against a search through the text, byte for byte (a byte is a token)."""
    ids = [token for piece in pieces for token in ([257] if piece == "<end>" else piece.encode())]
    answer = cut(
        np.array(ids, np.int32), Sampling(1.0, 1.0, (257,), stop), byte_decode, include_stop=include
    )
    ended = ids.index(257) if 257 in ids else len(ids)
    text = bytes(ids[:ended]).decode()
    # The first to be complete counts; of two that end together, the one that begins first.
    found = min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=None)
    if found is None:
        assert answer.input_ids.tolist() == ids[: ended + 1]
        assert answer.finish == (
            "empty" if ended == 0 else "stop" if ended < len(ids) else "length"
        )
        return
    before, through = len(text[: found[1]].encode()), len(text[: found[0]].encode())
    assert answer.input_ids.tolist() == ids[: through if include else before]
    assert answer.finish == ("stop" if before else "empty")


def test_a_token_in_which_answer_and_stop_meet_stays(tiny_llama) -> None:
    tokenizer = load_tokenizer(resolve_model(str(tiny_llama)))
    ids = np.array(
        tokenizer("the teacher reads the student", add_special_tokens=False)["input_ids"], np.int32
    )
    assert tokenizer.convert_ids_to_tokens(ids[:4].tolist()) == ["t", "he", "Ġteacher", "Ġreads"]
    for stop, kept, with_stop in (
        ("eacher", 3, 3),
        (" teacher", 2, 3),
        ("acher re", 3, 4),
        ("the", 0, 2),
        ("r", 3, 3),
    ):
        sampling = Sampling(1.0, 1.0, (2,), (stop,))
        assert len(cut(ids, sampling, tokenizer.decode, include_stop=False).input_ids) == kept
        assert len(cut(ids, sampling, tokenizer.decode, include_stop=True).input_ids) == with_stop


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_engines_stop_at_a_stop_string(tiny_llama, rng, engines, backend) -> None:
    """The answer is the unstopped one up to the token that completes the string: nothing is
    lost, no time wasted.
    """
    prompts = prompts_of(tiny_llama, rng, 24, longest=40)
    answers = {}
    for stop in ((), ("e", " t")):
        answers[stop] = list(engines(backend, Sampling(1.0, 1.0, (2,), stop)).generate(prompts))
    decode = load_tokenizer(resolve_model(str(tiny_llama))).decode
    sampling, shorter = Sampling(1.0, 1.0, (2,), ("e", " t")), 0
    for whole, stopped in zip(*answers.values(), strict=True):
        expected = cut(
            whole, sampling, lambda ids: decode(ids, skip_special_tokens=True), include_stop=True
        )
        np.testing.assert_array_equal(stopped, expected.input_ids)
        shorter += len(stopped) < len(whole)
    assert shorter > 5


# --- prompts

TEMPLATE = SyntheticTokenizer.chat_template


def prompts_from(
    messages: list[list[dict[str, str]]], **data: Any
) -> tuple[list[str], dict[str, int]]:
    generate = data.pop("generate", {})
    config = DataConfig.model_validate(
        {"path": "x", "messages_field": "m", "generate": generate, **data}
    )
    prompts = Prompts(SyntheticTokenizer(), config, VOCAB)
    rows = [Row(f"train/{index}", None, chat) for index, chat in enumerate(messages)]
    texts = [SyntheticTokenizer().decode(row.input_ids.tolist()) for row in prompts.prompts(rows)]
    return texts, prompts.counters


def chat(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]


def test_a_chat_is_asked_up_to_where_the_assistant_speaks() -> None:
    texts, counters = prompts_from(
        [
            chat("uhi"),
            chat("sbe", "uhi", "ayes", "umore"),
            chat("uhi", "aold answer"),
            chat("uhi", "tresult"),
        ]
    )
    ask = "<|im_start|>assistant\n"
    assert texts == [
        f"<|im_start|>user\nhi<|im_end|>\n{ask}",
        f"<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        f"<|im_start|>user\nmore<|im_end|>\n{ask}",
        f"<|im_start|>user\nhi<|im_end|>\n{ask}",
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>tool\nresult<|im_end|>\n{ask}",
    ]
    assert counters["prompts"] == 4
    assert counters["answers_replaced"] == 1


def test_a_system_prompt_goes_before_chats_without_one() -> None:
    texts, _ = prompts_from(
        [chat("uhi"), chat("sown", "uhi")], generate={"system_prompt": "be brief"}
    )
    assert texts[0].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert texts[1].startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nhi")


def test_prompts_that_cannot_be_asked_are_counted() -> None:
    rows = [chat("ahello"), chat("salone"), chat("u" + "x" * 200), chat("uhi")]
    texts, counters = prompts_from(rows, max_length=100)
    assert len(texts) == 1
    assert (counters["without_prompt"], counters["overlong_prompts"], counters["prompts"]) == (
        2,
        1,
        1,
    )
    with pytest.raises(
        UserError, match=r"no prompt came out of x: 1 overlong_prompts; look at data\.max_length"
    ):
        prompts_from([chat("u" + "x" * 200)], max_length=100)


def test_a_prompt_that_fills_max_length_leaves_no_room() -> None:
    n = len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n") - 12 - 10 - 12 + 3
    for length, fits in ((n + 5, True), (n + 4, False)):
        if fits:
            assert len(prompts_from([chat("uabcd")], max_length=length)[0]) == 1
        else:
            with pytest.raises(UserError, match="1 overlong_prompts"):
                prompts_from([chat("uabcd")], max_length=length)


def test_texts_are_continued_as_they_stand(tmp_path) -> None:
    config = config_of(tmp_path, prompt_field=None, text_field="q", add_special_tokens=False)
    manifest = build(config).manifest
    assert (manifest.data.kind, manifest.data.mask_policy) == ("documents", "generated")
    for sequence, question in zip(CacheReader(config.output), QUESTIONS, strict=True):
        begin = int(sequence.positions[0]) + 1
        assert SyntheticTokenizer().decode(sequence.input_ids[:begin].tolist()) == question


# --- from prompts to a cache


def test_a_cache_of_answers(tmp_path) -> None:
    """Ids, masks and counters; and that every token was drawn from the distribution that is
    stored for it.
    """
    config = config_of(tmp_path, generate={"samples": 3, "max_new_tokens": 7})
    result = build(config)
    manifest, tokenizer = result.manifest, SyntheticTokenizer()
    assert verify(str(config.output), deep=True) == []
    cache = CacheReader(config.output)
    assert [s.sequence_id for s in cache] == [
        f"train/{row}/{n}" for row in range(len(QUESTIONS)) for n in range(3)
    ]
    teacher = SyntheticTeacher(config.teacher, Capture(1), Sampling(1.0, 1.0, (257,)))
    for index, sequence in enumerate(cache):
        messages = [{"role": "user", "content": QUESTIONS[index // 3]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        assert sequence.loss_mask.tolist() == [False] * len(prompt) + [True] * (
            len(sequence) - len(prompt)
        )
        seed = answer_seed(0, f"train/{index // 3}", index % 3)
        (answer,) = teacher.generate([Prompt(np.array(prompt, np.int32), 7, seed)])
        assert sequence.input_ids[len(prompt) :].tolist() == answer.tolist()
        dense = teacher.dense_logprobs(sequence.input_ids)[sequence.positions]
        np.testing.assert_allclose(
            sequence.target_logprob, dense[np.arange(len(dense)), sequence.target_ids], atol=2e-3
        )
    counters = manifest.data.counters
    assert counters["prompts"] == len(QUESTIONS)
    assert counters["generations"] == counters["sequences"] == 3 * len(QUESTIONS)
    assert (
        counters["generated_tokens"] == counters["kept_positions"] == manifest.statistics.positions
    )
    assert (
        sum(counters.get(f"finished_{why}", 0) for why in ("stop", "length", "empty"))
        == counters["generations"]
    )
    assert manifest.data.mask_policy == "generated"
    assert manifest.data.generation.end_tokens == (257,)


def test_samples_differ_at_temperature_1_and_agree_at_0(tmp_path) -> None:
    for temperature, distinct in ((1.0, 5), (0.0, 1)):
        config = config_of(
            tmp_path, generate={"samples": 5, "temperature": temperature}, output=f"t{temperature}"
        )
        build(config)
        of_row: dict[str, set[bytes]] = {}
        for sequence in CacheReader(config.output):
            of_row.setdefault(sequence.sequence_id.rsplit("/", 1)[0], set()).add(
                sequence.input_ids.tobytes()
            )
        assert {len(answers) for answers in of_row.values()} == {distinct}


def test_another_seed_gives_other_answers(tmp_path) -> None:
    manifests = [
        build(config_of(tmp_path, generate={"seed": seed}, output=f"s{seed}")).manifest
        for seed in (0, 1)
    ]
    assert manifests[0].data.sha256 != manifests[1].data.sha256
    assert manifests[0].fingerprint != manifests[1].fingerprint


def test_prompt_and_answer_never_exceed_max_length(tmp_path) -> None:
    config = config_of(tmp_path, generate={"max_new_tokens": None}, max_length=36)
    manifest = build(config).manifest
    assert [len(s) for s in CacheReader(config.output)] == [36] * manifest.data.counters[
        "sequences"
    ]
    assert manifest.data.counters["finished_length"] == manifest.data.counters["sequences"]
    assert manifest.data.counters["overlong_prompts"] > 0


def test_max_tokens_ends_the_writing_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("logitcask.pipeline.generate.answers._UNIT_ANSWERS", 4)
    asked = counting(monkeypatch)
    rows = [{"q": f"question {n}"} for n in range(400)]
    config = config_of(tmp_path, rows=rows, max_tokens=600, generate={"max_new_tokens": 20})
    counters = build(config).manifest.data.counters
    assert counters["stopped_at_max_tokens"] == 1
    assert 500 < counters["tokens"] <= 600
    assert len(asked) < 20
    with pytest.raises(UserError, match=r"the first sequence \(train/0/0\) alone has"):
        build(config_of(tmp_path, max_tokens=5, output="small"))


def test_a_finished_cache_needs_no_engine(tmp_path, monkeypatch) -> None:
    config = config_of(tmp_path)
    build(config)
    monkeypatch.setattr(
        logitcask.pipeline.builder.lazy_teacher,
        "open_teacher",
        lambda *_, **__: pytest.fail("the engine was started"),
    )
    assert build(config).reused
    os.utime(config.data.path, (1, 1))
    assert build(config).reused, "the same prompts, only touched"
    Path(config.data.path).write_text(json.dumps({"q": "something else"}) + "\n")
    with pytest.raises(UserError, match="has changed since"):
        build(config)
    with pytest.raises(UserError, match=r"data\.generate\.temperature: 1\.0 -> 0\.5"):
        build(config_of(tmp_path, generate={"temperature": 0.5}))


def test_the_engine_is_started_once(tmp_path, monkeypatch) -> None:
    starts = Counter()

    def counted(*arguments: Any, **options: Any) -> Any:
        starts["teacher"] += 1
        return open_teacher(*arguments, **options)

    monkeypatch.setattr(logitcask.pipeline.builder.lazy_teacher, "open_teacher", counted)
    build(config_of(tmp_path))
    assert starts["teacher"] == 1


# --- what a kill costs


def counting(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """The seeds of all answers that the synthetic teacher is asked for; it dies after so many."""
    asked: list[int] = []
    original = SyntheticTeacher.generate

    def generate(self: Any, prompts: Any) -> Any:
        for prompt in prompts:
            if fail_after is not None and len(asked) == fail_after:
                raise KeyboardInterrupt
            asked.append(prompt.seed)
            yield from original(self, [prompt])

    monkeypatch.setattr(SyntheticTeacher, "generate", generate)
    return asked


def test_what_is_committed_is_never_written_again(tmp_path, monkeypatch, rng) -> None:
    monkeypatch.setattr("logitcask.pipeline.generate.answers._UNIT_ANSWERS", 4)
    expected = build(config_of(tmp_path, generate={"samples": 2}, output="whole")).manifest
    config, total = config_of(tmp_path, generate={"samples": 2}), 2 * len(QUESTIONS)
    asked: list[int] = []
    first = int(rng.integers(5, total))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        asked = counting(patch, first)
        build(config)
    with pytest.raises(
        UserError, match=r"unfinished build with other settings: data\.generate\.samples: 2 -> 3"
    ):
        build(config_of(tmp_path, generate={"samples": 3}))
    other = {"model": "synthetic", "backend": "synthetic", "vocab_size": VOCAB, "seed": 9}
    with pytest.raises(UserError, match=r"teacher\.seed"):
        build(config_of(tmp_path, other, generate={"samples": 2}))
    again = counting(monkeypatch)
    found = build(config).manifest
    assert len(again) == total - first // 4 * 4, "units that were committed are not written again"
    assert len(set(asked) | set(again)) == total
    assert found.content_sha256 == expected.content_sha256
    assert found.data.counters == expected.data.counters


@pytest.fixture
def interrupted(tmp_path, tiny_llama, monkeypatch):
    """``interrupted(*steps)``: a build whose model is the test's own to change, interrupted at
    these steps.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = config_of(tmp_path, {"model": str(model), "backend": "transformers"})

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def begin(*steps: str) -> tuple[BuildConfig, Path]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for step in steps:
                patch.setattr(f"logitcask.pipeline.builder.{step}", stop)
            build(config)
        return config, model

    return begin


def test_answers_of_another_model_are_refused(interrupted) -> None:
    """The weights in the folder change while a build is interrupted, after the last answer."""
    config, model = interrupted("run.score_shards", "run.estimate_prior")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="answers of another teacher: weights_sha256"):
        build(config)


@pytest.mark.parametrize("what", ["its chat template", "how it turns text into ids"])
def test_prompts_of_another_tokenizer_are_refused(interrupted, what) -> None:
    """The manifest would name a tokenizer and a template that did not make the prompts."""
    config, model = interrupted("planner.write_sequences")
    if what == "its chat template":
        file = model / "chat_template.jinja"
        edited = file.read_text().replace("<|im_start|>", "<|im_start|>the ")
    else:
        file = model / "tokenizer.json"
        edited = json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}})
    before = file.read_text()
    file.write_text(edited)
    with pytest.raises(
        UserError, match=rf"prompts of another tokenizer: .* \({what}\); put it back"
    ) as error:
        build(config)
    assert "\n" not in str(error.value)
    file.write_text(before)
    assert build(config).manifest.tokenizer.chat_template_sha256


def test_killed_while_writing_the_cache_is_the_same(
    tmp_path, rng, fork, monkeypatch, teacher_cache
) -> None:
    rows = [{"q": f"question {n}"} for n in range(160)]
    generate = {"samples": 2, "max_new_tokens": 60}
    whole = config_of(tmp_path, rows=rows, generate=generate, output="whole")
    expected = build(whole).manifest
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    units = killed.output / ".build" / "generations"
    with monkeypatch.context() as patch:
        # Slow enough to be killed between units.
        commit = generation.write_durably
        patch.setattr(generation, "write_durably", lambda *each: (time.sleep(0.05), commit(*each)))
        patch.setattr(generation, "_UNIT_ANSWERS", 16)
        for target in np.sort(rng.choice(np.arange(1, 15), 3, replace=False)):
            process = fork(lambda: build(killed))
            while len(list(units.glob("answers-*.arrow"))) < target:
                assert process.is_alive()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    done = teacher_cache("build", file)
    assert done.returncode == 0, done.stderr
    found = CacheReader(tmp_path / "killed").manifest
    assert found.content_sha256 == expected.content_sha256
    assert found.data.counters == expected.data.counters
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["README.md", "data", "manifest.json", "tail_prior.arrow"]


# --- real engines


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_model_answers_and_is_scored(tmp_path, tiny_llama, backend) -> None:
    """What the engine wrote, as it wrote it, scored as transformers scores it; greedy, stop
    strings and all.
    """
    generate = {
        "temperature": 0.8,
        "samples": 2,
        "stop": ["e"],
        "include_stop": True,
        "max_new_tokens": 30,
    }
    config = config_of(
        tmp_path, {"model": str(tiny_llama), "backend": backend}, generate=generate, max_length=128
    )
    manifest = build(config).manifest
    assert manifest.teacher.backend == backend
    assert manifest.data.counters["generations"] == 2 * len(QUESTIONS)
    assert manifest.data.counters["finished_stop"] > 0
    reference = open_generator("transformers", tiny_llama, None, 128)
    tokenizer = load_tokenizer(resolve_model(str(tiny_llama)))
    for sequence in CacheReader(config.output):
        dense = reference.dense_logprobs(sequence.input_ids)[sequence.positions]
        exact = dense[np.arange(len(dense)), sequence.target_ids]
        np.testing.assert_allclose(sequence.target_logprob, exact, atol=6e-3)
        begin = int(sequence.positions[0]) + 1
        assert tokenizer.decode(sequence.input_ids[:begin]).endswith(
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        text = tokenizer.decode(sequence.input_ids[begin:-1], skip_special_tokens=True)
        assert "e" not in text
    assert build(config).reused


# --- what the user sees


def test_answers_can_be_exported(tmp_path, teacher_cache) -> None:
    config = config_of(tmp_path, generate={"samples": 2, "max_new_tokens": 40})
    build(config)
    file = tmp_path / "answers.jsonl"
    done = teacher_cache("generations", config.output, "--out", file)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    tokenizer = SyntheticTokenizer()
    assert len(rows) == 2 * len(QUESTIONS)
    counts = Counter(row["finish"] for row in rows)
    assert counts["length"] == CacheReader(config.output).manifest.data.counters["finished_length"]
    for row, sequence in zip(rows, CacheReader(config.output), strict=True):
        assert row["id"] == sequence.sequence_id
        assert row["tokens"] == len(sequence.positions)
        begin = len(sequence) - row["tokens"]
        assert row["prompt"] == tokenizer.decode(sequence.input_ids[:begin])
        assert row["answer"] == tokenizer.decode(
            sequence.input_ids[begin:], skip_special_tokens=True
        )
    assert teacher_cache("generations", config.output).stdout == file.read_text("utf-8")


def test_a_cache_of_other_text_has_no_answers(tmp_path, teacher_cache) -> None:
    config = config_of(tmp_path)
    plain = config.model_dump(mode="json")
    plain["data"] |= {"generate": None, "prompt_field": None, "text_field": "q"}
    build(BuildConfig.model_validate(plain))
    done = teacher_cache("generations", config.output)
    assert done.returncode == 2
    assert "holds no generations" in done.stderr
