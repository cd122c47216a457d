"""The plugin of axolotl, called as axolotl 0.19 calls it, with doubles of the classes it needs.

axolotl does not install beside this project: it asks for other versions of the same packages, and
for CUDA packages. The doubles have the signatures of ``axolotl.integrations.base``,
``axolotl.core.trainers.base`` and ``axolotl.core.builders.causal``, and their treatment of data
sets, collators and arguments.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from logitcask.cache_format.errors import ConfigError, UserError

from .conftest import BLOCKS
from .test_examples import PADDED, RATE, by_train_student


class BasePlugin:
    def __init__(self):
        """Initializes the plugin."""


@dataclass
class TrainDatasetMeta:
    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset | None = None
    total_num_steps: int | None = None


@dataclass
class Arguments(TrainingArguments):
    sample_packing: bool = field(default=False)


class AxolotlTrainer(Trainer):
    """Loses the number of items unless the model's forward names it, and makes its own loaders."""

    def __init__(
        self,
        *_args,
        bench_data_collator=None,
        eval_data_collator=None,
        dataset_tags=None,
        **kwargs,
    ):
        self.eval_data_collator = eval_data_collator
        super().__init__(*_args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **options):
        assert isinstance(dataset, datasets.Dataset)
        dataset = self._remove_unused_columns(dataset, description=description)
        if dataset.column_names and "length" in dataset.column_names:
            dataset = dataset.remove_columns(["length"])
        collate = self.data_collator if options.get("is_training") else self.eval_data_collator
        loader = DataLoader(
            dataset, batch_size=batch_size, sampler=sampler_fn(dataset), collate_fn=collate
        )
        return self.accelerator.prepare(loader)


class DictDefault(dict):
    """A config of axolotl: keys are attributes, unknown ones None."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return DictDefault(value) if isinstance(value, dict) else value


@pytest.fixture
def plugin(monkeypatch):
    doubles = {
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
        "axolotl.common.datasets": {"TrainDatasetMeta": TrainDatasetMeta},
    }
    for name, content in doubles.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(sys.modules[name]).update(content)
    module_name, class_name = yaml.safe_load(BLOCKS["axolotl.yaml"])["plugins"][0].rsplit(".", 1)
    monkeypatch.delitem(sys.modules, module_name, raising=False)
    module = importlib.import_module(module_name)
    yield getattr(module, class_name)()
    sys.modules.pop(module_name, None)


def config(**changes):
    return DictDefault({**yaml.safe_load(BLOCKS["axolotl.yaml"]), **changes})


def trainer_of(plugin, cfg, **changes):
    """The trainer that axolotl's builder would make."""
    meta = plugin.load_datasets(cfg, preprocess=False)
    model = AutoModelForCausalLM.from_pretrained(cfg.base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(cfg.base_model)
    collators = []
    for is_eval in (True, False):
        kind, options = plugin.get_collator_cls_and_kwargs(cfg, is_eval=is_eval)
        padding = {"padding": True, "pad_to_multiple_of": 64, "return_tensors": "pt"}
        collators.append(kind(tokenizer, **{**padding, **options}))
    arguments = {
        "output_dir": cfg.output_dir,
        "num_train_epochs": cfg.num_epochs,
        "per_device_train_batch_size": cfg.micro_batch_size,
        "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
        "learning_rate": RATE,
        "lr_scheduler_type": cfg.lr_scheduler,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    kind = plugin.get_trainer_cls(cfg)
    assert issubclass(kind, AxolotlTrainer)
    return kind(
        model=model,
        train_dataset=meta.train_dataset,
        eval_dataset=meta.eval_dataset,
        args=Arguments(**arguments),
        data_collator=collators[1],
        callbacks=[],
        eval_data_collator=collators[0],
        bench_data_collator=None,
        dataset_tags=["caches/mine"],
        processing_class=tokenizer,
    )


def test_the_example_trains_as_train_student_does(folder, plugin):
    trainer = trainer_of(plugin, config())
    trainer.train()
    trainer.save_model()
    losses, own = by_train_student(PADDED)
    found = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert found == pytest.approx(losses, rel=2e-6)
    weights = load_file("runs/axolotl/model.safetensors")
    for name, weight in own.items():
        assert (weights[name] - weight).norm() < 1e-5 * weight.norm()
    assert 0 < trainer.evaluate()["eval_loss"] < 2 * losses[0]


def test_the_field_of_the_config(plugin):
    """axolotl imports the class by its name, and makes it a base of its config class."""
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)

    class Config(arguments, BaseModel):
        base_model: str

    fields = yaml.safe_load(BLOCKS["axolotl.yaml"])
    assert Config(**fields).logitcask == fields["logitcask"]
    assert Config(base_model="m").logitcask is None


def test_without_the_field_axolotl_is_left_alone(plugin):
    cfg = config(logitcask=None)
    assert plugin.load_datasets(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert plugin.get_trainer_cls(cfg) is None


def test_what_would_have_no_effect_is_refused(folder, plugin):
    with pytest.raises(ConfigError, match="sample_packing is set in axolotl's config"):
        plugin.load_datasets(config(sample_packing=True))
    with pytest.raises(ConfigError, match="a Distillation has no training; it has the fields"):
        plugin.load_datasets(config(logitcask={"cache": "caches/mine", "training": {}}))
    with pytest.raises(UserError, match=r"label_smoothing_factor is 0\.1"):
        trainer_of(plugin, config(), label_smoothing_factor=0.1)


def test_another_student_than_the_config_named(folder, plugin):
    """The data was opened for the ids of ``base_model``."""
    cfg = config()
    plugin.load_datasets(cfg)
    model = AutoModelForCausalLM.from_pretrained("my-student")
    model.resize_token_embeddings(300)
    with pytest.raises(
        UserError, match="the student predicts 300 ids, but the data was opened for 384"
    ):
        plugin.get_trainer_cls(cfg)(model=model, args=Arguments(output_dir="runs/other"))
