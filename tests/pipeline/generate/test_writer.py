"""``data.generate.writer``: another model writes, the teacher scores, and both logprobs are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitcask.pipeline.builder.lazy_teacher as lazy
from logitcask.cache_format import CacheReader, ConfigError, UserError, verify
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.manifest import Manifest
from logitcask.pipeline.builder.request import as_of_today, request_of
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.generate import answers as generation
from logitcask.pipeline.generate import writer as other_writer
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.pipeline.teachers.synthetic import SyntheticTeacher

VOCAB = 3000
ROUNDING = 2.0**-9


def config_of(
    folder: Path, writer: str | None, teacher: dict[str, Any], **generate: Any
) -> BuildConfig:
    rows = folder / "questions.jsonl"
    if not rows.exists():
        rows.write_text("".join(f'{{"q": "what is {n}?"}}\n' for n in range(7)))
    return BuildConfig.model_validate(
        {
            "teacher": teacher,
            "data": {
                "path": str(rows),
                "prompt_field": "q",
                "max_length": 48,
                "generate": {"writer": writer, "max_new_tokens": 12, **generate},
            },
            "audit": {"sequences": 0},
            "log": False,
            "output": str(folder / "cache"),
        }
    )


def synthetic(folder: Path, writer: str = "synthetic:5", **generate: Any) -> BuildConfig:
    teacher = {"model": "synthetic", "backend": "synthetic", "vocab_size": VOCAB, "seed": 1}
    return config_of(folder, writer, teacher, **generate)


def tiny(folder: Path, writer: Path, teacher: Path, **generate: Any) -> BuildConfig:
    model = {"model": str(teacher), "backend": "transformers"}
    return config_of(folder, str(writer), model, **generate)


def other_weights(model: Path, folder: Path, seed: int = 1) -> Path:
    """A model like that in ``model``, with other weights and the same tokenizer."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    lm = AutoModelForCausalLM.from_pretrained(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.05)
    lm.save_pretrained(folder)
    return folder


def truth(model: SyntheticTeacher, sequence: Any) -> np.ndarray:
    """float64[P]: the dense logprobs of a sequence's targets."""
    dense = model.dense_logprobs(sequence.input_ids)
    return dense[sequence.positions, sequence.target_ids]


def test_both_logprobs_are_the_two_models_own(tmp_path):
    config = synthetic(tmp_path)
    build(config)
    cache = CacheReader(tmp_path / "cache")
    models = [
        SyntheticTeacher(
            TeacherConfig(model="synthetic", backend="synthetic", vocab_size=VOCAB, seed=seed),
            Capture(top_k=1, samples=0),
        )
        for seed in (5, 1)
    ]
    for sequence in cache:
        written, scored = (truth(model, sequence) for model in models)
        assert np.abs(sequence.writer_logprob - written).max() <= ROUNDING + 1e-6
        assert np.abs(sequence.target_logprob - scored).max() <= ROUNDING + 1e-6
    assert verify(str(tmp_path / "cache"), deep=True) == []
    writer = cache.manifest.data.generation.writer
    assert (writer.revision, writer.temperature, writer.top_p) == ("seed-5", 1.0, 1.0)
    assert cache.manifest.required_features == ("writer_logprobs",)
    assert build(config).reused


def test_the_teacher_alone_stores_what_it_always_stored(tmp_path):
    teacher = {"model": "synthetic", "backend": "synthetic", "vocab_size": VOCAB}
    rows = {"path": str(tmp_path / "q.jsonl"), "prompt_field": "q", "max_length": 48}
    (tmp_path / "q.jsonl").write_text('{"q": "why"}\n')
    config = {"teacher": teacher, "data": {**rows, "generate": {}}, "output": str(tmp_path / "c")}
    build(BuildConfig.model_validate({**config, "audit": {"sequences": 0}, "log": False}))
    text = (tmp_path / "c" / "manifest.json").read_bytes()
    assert b"writer_logprobs" not in text
    assert Manifest.from_json(text, "").contradictions() == []
    assert CacheReader(tmp_path / "c")[0].writer_logprob is None


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_a_real_writer(tmp_path, tiny_llama, temperature):
    """They are at temperature 1, whatever was sampled with, and those of the writer."""
    writer = other_weights(tiny_llama, tmp_path / "writer")
    build(tiny(tmp_path, writer, tiny_llama, temperature=temperature, top_p=0.95, samples=2))
    cache = CacheReader(tmp_path / "cache")
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(each) for each in (writer, tiny_llama)]
    assert len(cache) == 14
    for sequence in cache:
        for model, found in zip(
            models, (sequence.writer_logprob, sequence.target_logprob), strict=True
        ):
            with torch.no_grad():
                logits = model(torch.from_numpy(sequence.input_ids)[None].long()).logits[0]
            dense = logits.double().log_softmax(1).numpy()
            expected = dense[sequence.positions, sequence.target_ids]
            assert np.abs(found - expected).max() <= ROUNDING + 1e-4
    assert cache.manifest.data.generation.writer.weights_sha256 == (
        resolve_model(str(writer)).weights_sha256()
    )
    assert cache.manifest.teacher.weights_sha256 == resolve_model(str(tiny_llama)).weights_sha256()


def test_one_model_in_memory_at_a_time(tmp_path, monkeypatch):
    events: list[str] = []
    opened = lazy.open_teacher

    def watched(config: TeacherConfig, *args: Any, **options: Any) -> Any:
        model = opened(config, *args, **options)
        close = model.close
        events.append(f"open {config.seed}")
        model.close = lambda: (events.append(f"close {config.seed}"), close())
        return model

    monkeypatch.setattr(lazy, "open_teacher", watched)
    build(synthetic(tmp_path))
    assert events == ["open 5", "close 5", "open 1", "close 1"]


def test_a_build_killed_while_writing_goes_on_with_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_UNIT_ANSWERS", 2)
    (tmp_path / "whole").mkdir()
    build(synthetic(tmp_path / "whole"))
    config = synthetic(tmp_path)
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
            build(config)
    build(config)
    whole, resumed = (CacheReader(each / "cache") for each in (tmp_path / "whole", tmp_path))
    assert resumed.manifest.content_sha256 == whole.manifest.content_sha256
    with monkeypatch.context() as patch:  # a unit that is there is not written again
        patch.setattr(SyntheticTeacher, "sample", None)
        assert build(config).reused


def test_answers_of_other_weights_are_not_mixed(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(generation, "_UNIT_ANSWERS", 2)
    writer = other_weights(tiny_llama, tmp_path / "writer")
    config = tiny(tmp_path, writer, tiny_llama)
    commit = generation.Generations._commit

    def once(self: Any, unit: int, answers: Any) -> None:
        commit(self, unit, answers)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(generation.Generations, "_commit", once)
        with pytest.raises(RuntimeError):
            build(config)
    shutil.rmtree(writer)
    other_weights(tiny_llama, writer, seed=2)
    with pytest.raises(UserError, match="answers of another writer: weights_sha256"):
        build(config)


def test_the_catalogue_knows_a_writer_by_its_weights(tmp_path, tiny_llama):
    """A student's folder is written again and again, under one name."""
    home = Home(tmp_path / "home")
    writer = other_weights(tiny_llama, tmp_path / "writer")
    config = tiny(tmp_path, writer, tiny_llama)
    first = build(config, home=home).manifest
    again = build(config.model_copy(update={"output": tmp_path / "again"}), home=home)
    assert again.taken is not None
    assert again.manifest.content_sha256 == first.content_sha256
    shutil.rmtree(writer)
    other_weights(tiny_llama, writer, seed=2)
    trained = build(config.model_copy(update={"output": tmp_path / "trained"}), home=home)
    assert trained.taken is None
    assert trained.manifest.content_sha256 != first.content_sha256


def test_a_writer_with_another_tokenizer_is_named(tmp_path, tiny_llama):
    from transformers import AutoTokenizer

    writer = other_weights(tiny_llama, tmp_path / "writer")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(writer)
    with pytest.raises(UserError, match=r"id 384 is no token for the teacher .* '<extra>' for"):
        build(tiny(tmp_path, writer, tiny_llama))


def test_a_writer_that_writes_nothing(tmp_path, monkeypatch):
    from logitcask.pipeline.teachers.base import SampledAnswer

    def nothing(self: SyntheticTeacher, prompts: Any) -> Any:
        end = np.array(self._sampling.end_tokens[:1], np.int32)
        return (SampledAnswer(end, np.zeros(1, np.float32)) for _ in prompts)

    monkeypatch.setattr(SyntheticTeacher, "sample", nothing)
    with pytest.raises(UserError, match="wrote nothing: all of its 7 answers are empty"):
        build(synthetic(tmp_path))


def test_ids_that_the_teacher_lacks(tmp_path, monkeypatch):
    from logitcask.pipeline.teachers.base import SampledAnswer

    def beyond(self: SyntheticTeacher, prompts: Any) -> Any:
        return (
            SampledAnswer(np.array([VOCAB], np.int32), np.zeros(1, np.float32)) for _ in prompts
        )

    monkeypatch.setattr(SyntheticTeacher, "sample", beyond)
    with pytest.raises(UserError, match=f"sampled id {VOCAB}"):
        build(synthetic(tmp_path))


@pytest.mark.parametrize("name", ["synthetic", "synthetic:-1", "somewhere/else"])
def test_the_synthetic_teachers_writer_is_synthetic(tmp_path, name):
    with pytest.raises(UserError, match="synthetic:SEED"):
        other_writer.as_teacher(synthetic(tmp_path, name))


def test_a_writer_has_the_teachers_engine_or_its_own(tmp_path):
    teacher = {
        "model": "big",
        "dtype": "bfloat16",
        "tensor_parallel_size": 8,
        "engine_args": {"quantization": "awq", "max_num_seqs": 4},
    }
    as_it_is = other_writer.as_teacher(config_of(tmp_path, "small", teacher)).teacher
    assert as_it_is.model_dump() == TeacherConfig(**{**teacher, "model": "small"}).model_dump()
    own = {"engine_args": {}, "tensor_parallel_size": 1}
    config = config_of(tmp_path, "small", teacher, writer_engine=own)
    writer = other_writer.as_teacher(config).teacher
    assert (writer.engine_args, writer.tensor_parallel_size, writer.dtype) == ({}, 1, "bfloat16")
    assert config.teacher.engine_args == teacher["engine_args"]
    server = {"model": "big", "backend": "server", "server": {"url": "http://h:1"}}
    scored = {"tail_samples": 0, "min_probability": None}
    fields = config_of(tmp_path, "small", {"model": "big"}, writer_engine=own).model_dump()
    behind = BuildConfig.model_validate({**fields, "teacher": server, "store": scored})
    assert other_writer.as_teacher(behind).teacher.backend == "vllm"
    assert other_writer.as_teacher(behind).teacher.engine_args == {}


def test_mistakes_about_the_writers_engine(tmp_path):
    wrong = {"engine_args": {"enable_prefix_caching": True}}
    config = config_of(tmp_path, "small", {"model": "big"}, writer_engine=wrong)
    with pytest.raises(
        ConfigError,
        match=r"data.generate.writer_engine.engine_args.enable_prefix_caching cannot be",
    ):
        other_writer.as_teacher(config)
    with pytest.raises(ValueError, match="writer_engine is set, but no writer"):
        config_of(tmp_path, None, {"model": "big"}, writer_engine=wrong)


def test_the_writers_engine_is_a_part_of_the_request(tmp_path):
    """Its arguments may change the text, its GPUs do not; earlier caches had none of it."""

    def request(**engine: Any) -> dict[str, Any]:
        return request_of(config_of(tmp_path, "small", {"model": "big"}, **engine))

    plain = request()
    assert request(writer_engine={"engine_args": {"seed": 1}}) != plain
    one, two = (request(writer_engine={"tensor_parallel_size": n}) for n in (1, 2))
    assert one == two == plain
    earlier = json.loads(json.dumps(plain))
    del earlier["data"]["generate"]["writer_engine"]
    assert as_of_today(earlier, config_of(tmp_path, "small", {"model": "big"})) == plain


def test_rows_that_are_read_again_are_counted_and_reported_once(tmp_path):
    config = synthetic(tmp_path, skip_prompts=599, max_prompts=3)
    rows = [f'{{"q": "what is {n}?"}}' for n in range(600)]
    rows[1:1] = ['{"q": null}']
    rows.append('{"q": 3}')
    Path(config.data.path).write_text("\n".join(rows))
    counters = build(config).manifest.data.counters
    assert (counters["rows_read"], counters["prompts"]) == (602, 3)
    rejects = [json.loads(line) for line in config.rejects_file().read_text().splitlines()]
    assert [each["id"] for each in rejects] == ["train/1", "train/601"]
    skipped = sum(n for name, n in counters.items() if name.startswith("rows_skipped"))
    assert skipped == 2


@pytest.mark.parametrize(
    ("skip", "most"), [(0, 3), (2, 3), (5, 4), (6, 7), (7, 2), (16, 3), (3, None), (0, 9), (9, 99)]
)
def test_prompts_follow_each_other_around(tmp_path, skip, most):
    """The slice is that of a list repeated for ever, with each prompt once."""
    chosen = {"skip_prompts": skip} | ({} if most is None else {"max_prompts": most})
    build(synthetic(tmp_path, **chosen))
    cache = CacheReader(tmp_path / "cache")
    wanted = [(skip + n) % 7 for n in range(min(7, 7 if most is None else most))]
    found = [sequence.sequence_id for sequence in cache]
    assert found == [f"train/{n}/0" for n in wanted]
    assert cache.manifest.data.counters["prompts"] == len(wanted)


def test_vllms_dicts_of_logprobs():
    """The sampled token of each step is named in its dict, perhaps beside others."""
    from types import SimpleNamespace

    from logitcask.pipeline.teachers.vllm.writing import _answer

    steps = [{7: -0.5}, {3: -0.1, 9: -2.0}]
    dicts = [{i: SimpleNamespace(logprob=p) for i, p in each.items()} for each in steps]
    found = _answer(SimpleNamespace(token_ids=[7, 9], logprobs=dicts), 0)
    assert found.input_ids.tolist() == [7, 9]
    assert found.logprobs.tolist() == [-0.5, -2.0]
    with pytest.raises(UserError, match="does not say the logprobs"):
        _answer(SimpleNamespace(token_ids=[7, 8], logprobs=dicts), 0)
    with pytest.raises(UserError, match="does not say the logprobs"):
        _answer(SimpleNamespace(token_ids=[7], logprobs=None), 0)
