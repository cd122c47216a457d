"""What users of transformers expect to pass through: adapters, checkpoints of other runs,
answers, mixed precision.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_flash_attention_utils,
)

from logitcask.cache_format import UserError
from logitcask.cache_format.errors import ConfigError
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import LossTerm, TrainConfig
from logitcask.train.head.lm_head import LogitsHead
from logitcask.train.run import train


@pytest.fixture(scope="session")
def caches(tiny_llama, tmp_path_factory):
    """Two caches of chats, as different teachers would answer: the second knows one chat more."""
    folder = tmp_path_factory.mktemp("chats")
    made = []
    for number in (24, 25):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"what is the {i}th thing that the teacher reads"},
                    {
                        "role": "assistant",
                        "content": f"the {i}th thing that the student will read, and {i % 7} more",
                    },
                ]
            }
            for i in range(number)
        ]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": str(tiny_llama), "backend": "transformers"},
                "data": {
                    "path": str(folder / f"{number}.jsonl"),
                    "messages_field": "messages",
                    "max_length": 200,
                },
                "store": {"top_k": 16},
                "audit": {"sequences": 0},
                "output": str(folder / f"cache-{number}"),
            }
        )
        build(config)
        made.append(str(config.output))
    return made


@pytest.fixture
def config(caches, tiny_llama, tmp_path):
    def make(**changes):
        training = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        fields = {
            "cache": caches[0],
            "student": {"init_from": str(tiny_llama), "keep_layers": [1]},
            "evaluation": {"held_out": 0.3},
            **changes,
            "training": {**training, **changes.get("training", {})},
        }
        return TrainConfig.model_validate(fields)

    return make


def test_adapters_train_and_come_out_merged(config, tiny_llama, tmp_path):
    """The saved student is an ordinary model: the base with the saved adapters merged into it,
    and nothing else moved.
    """
    from peft import PeftModel

    student = {
        "model": str(tiny_llama),
        "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
    }
    metrics, _ = train(config(student=student))
    output = config().output_dir
    assert metrics["after"]["kl"] < metrics["before"]["kl"] or metrics["before"]["kl"] < 0.05
    assert 0 < metrics["student"]["trained"] < 0.1 * metrics["student"]["parameters"]
    merged = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    again = PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    moved = {
        name for name, value in merged.state_dict().items() if not torch.equal(value, plain[name])
    }
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
    assert AutoTokenizer.from_pretrained(output).vocab_size

    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoint-6")
    resumed, _ = train(config(student=student))
    assert resumed["final_loss"] == pytest.approx(metrics["final_loss"], abs=1e-5)
    assert resumed["after"] == pytest.approx(metrics["after"], abs=1e-5)


def test_adapters_that_are_none_are_one_line(config, tiny_llama):
    with pytest.raises(ConfigError, match="does not describe adapters"):
        train(
            config(
                student={"model": str(tiny_llama), "peft": {"r": 4, "target_modules": ["nowhere"]}}
            )
        )
    with pytest.raises(ConfigError, match="does not describe adapters"):
        train(config(student={"model": str(tiny_llama), "peft": {"rank": 4}}))


def test_a_checkpoint_knows_its_cache(config, caches, tmp_path):
    """Another run may go on from it on the same cache, and is refused on another, naming both."""
    whole, _ = train(config())
    checkpoint = config().output_dir / "checkpoint-4"
    elsewhere = {"output_dir": str(tmp_path / "second"), "resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(UserError, match="was trained from another cache: fingerprint"):
        train(config(cache=caches[1], training=elsewhere))
    resumed, _ = train(config(training={**elsewhere, "output_dir": str(tmp_path / "third")}))
    assert resumed["steps"] == 6
    finished = {
        "output_dir": str(tmp_path / "longer"),
        "resume_from_checkpoint": str(checkpoint.parent / "checkpoint-6"),
    }
    with pytest.raises(UserError, match="has made 6 steps, and this run is to make 6 in all"):
        train(config(training=finished))
    longer, _ = train(config(training={**finished, "max_steps": 9}), restart=True)
    assert longer["steps"] == 9
    assert resumed["final_loss"] == pytest.approx(whole["final_loss"], abs=1e-5)
    history = json.loads((tmp_path / "third" / "log.json").read_text())
    assert sum("loss" in record and record["step"] > 4 for record in history) == 2
    with pytest.raises(UserError, match="no complete checkpoint"):
        train(
            config(
                training={
                    "output_dir": str(tmp_path / "fourth"),
                    "resume_from_checkpoint": str(tmp_path / "none"),
                }
            )
        )


def test_answers_are_compared_with_those_in_the_cache(config):
    evaluation = {"held_out": 0.3, "answers": {"sequences": 4, "max_new_tokens": 24}}
    metrics, _ = train(config(evaluation=evaluation))
    output = config().output_dir
    written = json.loads((output / "answers.json").read_text())
    assert metrics["rouge_l"]["answers"] == len(written) == 4
    assert metrics["rouge_l"]["after"] == pytest.approx(
        sum(each["rouge_l"] for each in written) / 4
    )
    assert all("thing that the teacher reads" in each["prompt"] for each in written)
    assert all("thing that the student will" in each["reference"] for each in written)
    assert "What it answers" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"optim": "sgd", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda training: next(iter(training)),
)
def test_options_of_trainer_pass_through(config, training):
    metrics, _ = train(config(training=training))
    assert metrics["steps"] == 6
    assert metrics["after"]["kl"] < metrics["before"]["kl"]


@pytest.fixture
def flash(monkeypatch):
    """transformers' own flash path on a CPU, with a kernel like the real one in what it takes and
    what it computes.

    Gives the numbers of sequences of its calls.
    """
    calls = []

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
    ):
        if {each.dtype for each in (q, k, v)} != {torch.bfloat16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        calls.append(len(cu_seqlens_q) - 1)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        found = torch.empty_like(q)
        for (a, b), (c, d) in zip(
            pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
        ):
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            parts = (each.transpose(0, 1)[None] for each in (q[a:b], k[c:d], v[c:d]))
            found[a:b] = scaled_dot_product_attention(*parts, attn_mask=seen, scale=softmax_scale)[
                0
            ].transpose(0, 1)
        return found

    def whole(q, k, v, softmax_scale=None, causal=False):
        borders = (torch.arange(len(each) + 1) * each.shape[1] for each in (q, k))
        parts = (each.flatten(0, 1) for each in (q, k, v))
        return varlen(*parts, *borders, q.shape[1], k.shape[1], softmax_scale).view_as(q)

    def load(*args, **kwargs):
        process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
        pads = (
            modeling_flash_attention_utils._pad_input,
            modeling_flash_attention_utils._unpad_input,
        )
        return (whole, varlen, None, *pads), (process, dict)

    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", load)
    # Else it looks for the package, and for a GPU.
    monkeypatch.setattr(
        PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, name, *args, **kwargs: name,
    )
    return calls


def test_flash_attention_computes_in_bfloat16_and_trains_float32(config, tiny_llama, flash):
    """In every run of the student: checks, metrics, examples, answers, the choice of positions,
    training itself.
    """
    fields = {
        "student": {
            "init_from": str(tiny_llama),
            "keep_layers": [1],
            "attention": "flash_attention_2",
        },
        "data": {"packing": True},
        "selection": {"positions": {"by": "gap"}},
        "evaluation": {"held_out": 0.3, "answers": {"sequences": 2, "max_new_tokens": 4}},
    }
    with pytest.raises(
        ConfigError, match=r"which does not compute in float32; set training\.bf16 to true"
    ):
        train(config(**fields))
    assert not flash
    made = config(
        training={"bf16": True, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}, **fields
    )
    metrics, _ = train(made)
    assert metrics["after"]["kl"] < metrics["before"]["kl"]
    assert max(flash) > 4  # sequences in one row
    weights = AutoModelForCausalLM.from_pretrained(made.output_dir).parameters()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_what_is_measured_is_computed_as_in_training(config, monkeypatch):
    """Under autocast, but for the check of the student's halves, which sees more in float32."""
    states = []
    hidden = LogitsHead.hidden

    def watched(self, **inputs):
        states.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return hidden(self, **inputs)

    monkeypatch.setattr(LogitsHead, "hidden", watched)
    selection = {"sequences": {"filter_ratio": 0.5}}
    training = {"bf16": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    train(config(training=training, selection=selection))
    assert not states[0][0]
    # A check; 2 steps, each with a choice; 1 + 2 + 1 evaluations; examples twice.
    assert len(states) == 11
    assert set(states[1:]) == {(True, torch.bfloat16)}
    states.clear()
    train(config(training={"max_steps": 1}), restart=True)
    assert not any(on for on, _ in states)


def test_compiled(config):
    """The backbone alone, in training and where sequences are chosen; nothing changes."""
    fields = {"selection": {"sequences": {"filter_ratio": 0.5}}}
    plain, _ = train(config(training={"max_steps": 1}, **fields))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = {"max_steps": 1, "torch_compile": True, "torch_compile_backend": "eager"}
    found, _ = train(config(training=compiled, **fields), restart=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # one is the trial
    assert found["final_loss"] == pytest.approx(plain["final_loss"], rel=1e-5)
    assert found["after"] == pytest.approx(plain["after"], rel=1e-5)


def test_going_on_with_other_processes_is_said(config, caplog):
    train(config())
    output = config().output_dir
    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoint-6")
    state = output / "checkpoint-4" / "trainer_state.json"
    assert '"processes": 1' in state.read_text()
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 4'))
    with caplog.at_level("WARNING"):
        train(config())
    assert "checkpoint-4 was made by 4 process(es), and 1 go on" in caplog.text


@pytest.mark.parametrize(
    ("chosen", "metric", "best"),
    [
        ({}, "kl", min),
        ({"metric_for_best_model": "eval_ce"}, "ce", min),
        ({"metric_for_best_model": "mor@5"}, "mor@5", max),
    ],
    ids=["by default", "falling", "rising"],
)
def test_the_best_student_is_kept(config, chosen, metric, best):
    """So large a learning rate that students get worse as well as better."""
    every = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 8,
        "learning_rate": 0.05,
    }
    metrics, _ = train(config(training={**every, "load_best_model_at_end": True, **chosen}))
    history = json.loads((config().output_dir / "log.json").read_text())
    found = [record[f"eval_{metric}"] for record in history if f"eval_{metric}" in record]
    assert len(found) == 8
    assert len(set(found)) > 1
    assert metrics["after"][metric] == pytest.approx(best(found), abs=1e-6)


def test_losses_are_logged_up_to_whatever_may_be_saved(config):
    """Else those between a log and the checkpoint after it would be missing from a resumed
    run's.
    """
    training = {
        "save_strategy": "best",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 100,
    }
    train(config(training=training))
    history = json.loads((config().output_dir / "log.json").read_text())
    assert [record["step"] for record in history if "loss" in record] == [2, 4, 6]


def test_a_home_folder_is_found_once(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    metrics, _ = train(config(training={"output_dir": "~/run", "max_steps": 2}))
    assert metrics["steps"] == 2
    assert {"metrics.json", "checkpoint-2"} <= {
        each.name for each in (tmp_path / "home" / "run").iterdir()
    }


def test_adapters_on_the_head_are_measured_without_dropout(config, scratch_student):
    adapters = {
        "r": 4,
        "target_modules": ["lm_head"],
        "lora_dropout": 0.5,
        "init_lora_weights": False,
    }
    student = {"model": str(scratch_student(tied=False)), "peft": adapters}
    adapted, _ = train(config(student=student, training={"max_steps": 1}))
    saved, elsewhere = config().output_dir, str(config().output_dir.parent / "again")
    merged, _ = train(
        config(student={"model": str(saved)}, training={"output_dir": elsewhere, "max_steps": 1})
    )
    assert merged["before"] == pytest.approx(adapted["after"], abs=1e-4)


def test_answers_stay_inside_the_students_context(config, tiny_llama):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 200, "vocab_size": 384}
    evaluation = {"held_out": 0.3, "answers": {"sequences": 4, "max_new_tokens": 400}}
    student = {"config": {"model_type": "gpt2", **sizes}, "tokenizer": str(tiny_llama)}
    metrics, _ = train(config(student=student, evaluation=evaluation, training={"max_steps": 1}))
    assert metrics["rouge_l"]["answers"] == 4


def test_adapters_with_gradient_checkpointing(config, tiny_llama):
    student = {"model": str(tiny_llama), "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
    plain, _ = train(config(student=student, training={"max_steps": 2}))
    again, _ = train(
        config(student=student, training={"max_steps": 2, "gradient_checkpointing": True}),
        restart=True,
    )
    assert again["final_loss"] == pytest.approx(plain["final_loss"], abs=1e-5)


def test_a_cache_without_heads(write_cache, scratch_config):
    """Pure random sampling: everything but what compares with the teacher's most probable ids,
    and its report.
    """
    cache = write_cache("sampled", kind="random sampling", shards=1)
    losses = [{"name": "random_sampling"}]
    config = scratch_config(cache=str(cache.path), losses=losses)
    metrics, _ = train(config)
    assert list(metrics["after"]) == ["kl", "ce", "perplexity", "ece"]
    assert "MOR@" not in (config.output_dir / "report.html").read_text()
    with pytest.raises(UserError, match="ranking asks for the teacher's top 5"):
        train(
            config.model_copy(update={"losses": [*config.losses, LossTerm(name="ranking", k=5)]}),
            restart=True,
        )


def test_sharding_on_cpus_is_refused(write_cache, scratch_config):
    """accelerate would quietly not shard."""
    cache = write_cache("any", shards=1)
    with pytest.raises(
        ConfigError, match=r"training.fsdp is set, but accelerate shards over several GPUs only"
    ):
        train(
            scratch_config(
                cache=str(cache.path), training={"fsdp": True, "fsdp_config": {"version": 2}}
            )
        )
