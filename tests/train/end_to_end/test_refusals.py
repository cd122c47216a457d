"""What training cannot do is said in one line, before the first step, and nothing is left
behind.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.mistral import convert_tekken_tokenizer

from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.train.config import StudentConfig
from logitcask.train.loop.arguments import check_optimizer, check_schedule, training_arguments
from logitcask.train.model.student import build_student, load_student_tokenizer
from logitcask.train.run import train

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}

MODE = {"lr_scheduler_kwargs": {"mode": "best"}}


@pytest.fixture
def sound_cache(write_cache):
    return str(write_cache("sound", shards=1).path)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches would cut cached batches",
        ),
        ({"accelerator_config": {"split_batches": True}}, "split_batches would cut cached batches"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "its own loss",
        ),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size is True, .*; set per_device_train_batch_size",
        ),
        ({"report_to": "carrier_pigeon"}, "report_to: carrier_pigeon is not supported"),
        ({"optim": "adamw_bnb_8bit"}, r"training.optim is '.*adamw_bnb_8bit'"),
        ({"adam_beta1": 2.0}, "training.optim is 'adamw_torch.*': Invalid beta parameter"),
        ({"learning_rate": -1.0}, "training.optim is 'adamw_torch.*': Invalid learning rate"),
        ({"optim": "sgd", "optim_args": "nope"}, "training.optim is 'sgd': "),
        (
            {"optim": "adamw_torch", "optim_args": "nope=3"},
            "optim_args sets nope, and .*adamw_torch', which does not",
        ),
        (
            {"lr_scheduler_kwargs": {"nope": 1}},
            "lr_scheduler_kwargs is .*'nope': 1.*, with lr_scheduler_type 'linear': ",
        ),
        ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs is x, with .*'linear': "),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs is {}, with .*: One of min_lr",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_kwargs is {}, with .*'num_decay_steps'",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}},
            "must be smaller than initial lr",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            "with .* 'cosine': could not",
        ),
        ({"seed": -1}, "training.seed is -1; expected a whole number from 0"),
        ({"data_seed": 1.5}, "training.data_seed is 1.5; expected a whole number from 0"),
        ({"accelerator_config": "no-file.json"}, "No such file"),
        ({"torch_compile_backend": "nope"}, "training.torch_compile: 'NOPE' is not a valid"),
        (
            {"torch_compile": True, "torch_compile_mode": "nope"},
            "training.torch_compile: Unrecognized mode=nope",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}},
            "_kwargs sets nope, which",
        ),
        (
            {"dataloader_num_workers": -1},
            "dataloader fields: num_workers option should be non-negative",
        ),
        (
            {"dataloader_persistent_workers": True},
            "dataloader fields: persistent_workers option needs num_workers",
        ),
        (
            {**BEST, "save_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", **MODE},
            "mode best is unknown",
        ),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size is 0; expected a whole number",
        ),
        (
            {"gradient_accumulation_steps": 1.5},
            "gradient_accumulation_steps is 1.5; expected a whole number",
        ),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number"),
        (
            {**BEST, "metric_for_best_model": "accuracy"},
            "'accuracy'; expected one of kl, reverse_kl, ce",
        ),
        ({**BEST, "metric_for_best_model": "eval_loss"}, "'eval_loss'; expected one of kl"),
    ],
)
def test_training_arguments(sound_cache, scratch_config, training, message):
    config = scratch_config(cache=sound_cache, training=training)
    with pytest.raises(ConfigError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (config.output_dir / "run.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"losses": [{"name": "taid", "t_start": None}]}, "losses: "),
        ({"student": {"config": {"model_type": "vit"}}}, "no causal language model"),
        (
            {"student": {"config": {"model_type": "gpt2", "n_embd": 33, "n_head": 2}}},
            "no causal language model",
        ),
    ],
)
def test_configs(sound_cache, scratch_config, fields, message):
    config = scratch_config(cache=sound_cache, **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (config.output_dir / "run.json").exists()


def test_metrics_that_need_heads_on_a_cache_without(write_cache, scratch_config):
    cache = write_cache("sampled", kind="random sampling", shards=1)
    training = {**BEST, "metric_for_best_model": "mor@5", "save_steps": 2}
    with pytest.raises(ConfigError, match="'mor@5', and what is measured on this cache is kl, ce"):
        train(
            scratch_config(
                cache=str(cache.path), losses=[{"name": "random_sampling"}], training=training
            )
        )


def test_adapters_on_both_ends_of_a_tied_student(config, scratch_student):
    for target in ("lm_head", "embed_tokens"):
        peft = {"r": 4, "target_modules": ["q_proj", target]}
        with pytest.raises(ConfigError, match="in which they are one weight"):
            train(config(student={"model": str(scratch_student(tied=True)), "peft": peft}))
    peft = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    metrics, _ = train(config(student={"model": str(scratch_student(tied=False)), "peft": peft}))
    assert metrics["steps"] > 0


def test_a_learned_prompt(config, tiny_llama):
    peft = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    with pytest.raises(ConfigError, match="learns a prompt"):
        train(config(student={"model": str(tiny_llama), "peft": peft}))


def test_a_student_with_weights_missing(config, scratch_student, tmp_path):
    whole = scratch_student(tied=False)
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "backbone")
    with pytest.raises(UserError, match=r"has no weights for lm_head.weight \(1 missing"):
        train(config(student={"model": str(tmp_path / "backbone")}))
    model = AutoModelForCausalLM.from_pretrained(whole)
    state = model.state_dict()
    state["lm_head.weight"] = torch.zeros(7, model.config.hidden_size)
    model.save_pretrained(tmp_path / "other", state_dict=state)
    with pytest.raises(UserError, match="not a causal language model that transformers can load"):
        train(config(student={"model": str(tmp_path / "other")}))


def test_adapters_in_place_of_a_student(config, tiny_llama, tmp_path):
    adapters = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    folder = shutil.copytree(tiny_llama, tmp_path / "adapters")
    for whole in (True, False):
        (folder / "adapter_config.json").write_text(json.dumps(adapters))
        for student in ({"model": str(folder)}, {"init_from": str(folder), "keep_layers": [0]}):
            with pytest.raises(
                UserError,
                match=r"holds adapters of org/base.*expected whole weights alone; merge them first",
            ):
                train(config(student=student))
        if whole:
            (folder / "config.json").unlink()


@pytest.mark.parametrize("kept", [None, [1]], ids=["whole", "layers"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "text_config"])
def test_weights_that_are_quantised(scratch_student, monkeypatch, kept, nested):
    """Whether transformers cannot load them here (a package is missing), or loads them as they
    are.
    """
    folder = scratch_student(tied=False)
    origin = (
        {"model": str(folder)} if kept is None else {"init_from": str(folder), "keep_layers": kept}
    )
    config = StudentConfig.model_validate(origin)
    fields = json.loads((folder / "config.json").read_text())
    made = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(
        json.dumps(fields | ({"text_config": made} if nested else made))
    )
    loader = "_whole" if kept is None else "from_layers"

    def missing(*args):
        raise ImportError("Loading a GPTQ quantized model requires optimum\nand more")

    monkeypatch.setattr(f"logitcask.train.model.student.{loader}", missing)
    with pytest.raises(
        UserError,
        match=r"are quantised \(gptq\), and .* requires optimum\); give the student as it was",
    ):
        build_student(config, seed=0)
    loaded = SimpleNamespace(hf_quantizer=SimpleNamespace(is_trainable=False))
    monkeypatch.setattr(f"logitcask.train.model.student.{loader}", lambda *args: loaded)
    for peft, what in ((None, "them"), ({"target_modules": ["q_proj"]}, "adapters on them")):
        with pytest.raises(
            UserError,
            match=rf"are quantised \(gptq\), and transformers does not train {what}; give",
        ):
            build_student(config.model_copy(update={"peft": peft}), seed=0)


def test_quantised_weights_of_which_the_package_is_missing(scratch_student):
    """None of these packages is among those of this project."""
    folder = scratch_student(tied=False)
    fields = json.loads((folder / "config.json").read_text())
    for method in ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "hqq"}):
        (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": method}))
        with pytest.raises(
            UserError, match=r"are quantised \(.*\), and transformers does not load them here"
        ):
            build_student(StudentConfig(model=str(folder)), seed=0)


def test_a_tokenizer_that_mistral_common_alone_can_read(tmp_path, write_tekken):
    write_tekken(tmp_path)
    AutoConfig.for_model("mistral", vocab_size=288).save_pretrained(tmp_path)
    wanted = StudentConfig(config={"model_type": "llama"}, tokenizer=str(tmp_path))
    with pytest.raises(
        UserError, match=r"has a tekken.json and no tokenizer.json; .*convert_tekken_tokenizer"
    ):
        load_student_tokenizer(wanted)
    convert_tekken_tokenizer(str(tmp_path / "tekken.json")).save_pretrained(tmp_path)
    assert load_student_tokenizer(wanted).backend_tokenizer is not None


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "own")
    file = folder / "tokenizer_config.json"
    own = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    for model in (folder, None):  # beside weights, and alone
        if model is None:
            (folder / "config.json").unlink()
        with pytest.raises(
            UserError, match=r"own needs code of its own, .*; set student\.tokenizer to one"
        ):
            load_student_tokenizer(
                StudentConfig(config={"model_type": "llama"}, tokenizer=str(folder))
            )


def test_a_hub_that_does_not_know_the_user(scratch_config, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError("Token is required, but no token found.\nLog in.")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse)
    with pytest.raises(
        ConfigError, match=r"push_to_hub is set, .*\(Token is required, but no token found\.\)"
    ):
        training_arguments(scratch_config(cache="c", training={"push_to_hub": True}))


@pytest.mark.parametrize(
    "training",
    [
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 1,
        },
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "lr_scheduler_kwargs": {"patience": 2},
        },
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 1},
            "warmup_steps": 500,
        },
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "rmsprop", "lr_scheduler_type": "inverse_sqrt"},
    ],
)
def test_what_fits_is_not_refused(scratch_config, tiny_llama, training):
    arguments = training_arguments(scratch_config(cache="c", training=training))
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for steps in (1, 2, 1000):
        check_schedule(arguments, check_optimizer(arguments, student), steps)
