"""A plugin of axolotl: data, collator and loss come from a cache. Only axolotl imports this module.

In axolotl's config:

    plugins: [logitcask.train.trainers.axolotl.LogitcaskPlugin]
    logitcask: {cache: caches/mine, losses: [{name: forward_kl}]}

The interface is that of ``axolotl.integrations.base.BasePlugin``, version 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import AutoConfig

from logitcask.cache_format.errors import ConfigError
from logitcask.train.trainers.distillation import Distillation
from logitcask.train.trainers.transformers_trainer import DistillationMixin


class LogitcaskArgs(BaseModel):
    """The field that the plugin adds to axolotl's config.

    logitcask: the fields of a ``Distillation``: those of a ``train-student`` config that name the
        cache, the losses and the data.
    """

    logitcask: dict[str, Any] | None = None


class CacheCollator:
    """The collator of a ``Distillation``, called as axolotl makes its collators. Their options of
    padding change nothing.
    """

    def __init__(self, tokenizer: Any, *, distillation: Distillation, **options: Any) -> None:
        self._distillation = distillation

    def __call__(self, items: list[Mapping[str, Any]]) -> dict[str, Any]:
        return self._distillation.collate(items)


class LogitcaskPlugin(BasePlugin):
    """Replaces axolotl's data, collator and trainer class if its config has ``logitcask``."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: Distillation | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.{LogitcaskArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The training and held-out data; None without ``logitcask``."""
        if not cfg.logitcask:
            return None
        from axolotl.common.datasets import TrainDatasetMeta

        found = self._distillation(cfg)
        return TrainDatasetMeta(
            train_dataset=found.train.as_datasets(), eval_dataset=found.held_out.as_datasets()
        )

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        if not cfg.logitcask:
            return None
        return CacheCollator, {"distillation": self._distillation(cfg)}

    def get_trainer_cls(self, cfg: Any) -> Any:
        if not cfg.logitcask:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer

        return type(
            "LogitcaskTrainer",
            (DistillationMixin, AxolotlTrainer),
            {"distillation": self._distillation(cfg)},
        )

    def _distillation(self, cfg: Any) -> Distillation:
        """The one of this config, opened before the model is there; the trainer compares both."""
        if self._opened is not None:
            return self._opened
        for name in ("sample_packing", "eval_sample_packing", "pretraining_dataset", "rl"):
            if cfg.get(name):
                raise ConfigError(
                    f"{name} is set in axolotl's config, but the rows come from the cache; remove it (packed rows: "
                    "data: {packing: true} under logitcask)"
                )
        model = AutoConfig.from_pretrained(
            cfg.base_model,
            revision=cfg.get("revision_of_model"),
            trust_remote_code=bool(cfg.get("trust_remote_code")),
        )
        self._opened = Distillation(
            rows=model.get_text_config().vocab_size,
            seed=cfg.get("seed") or 0,
            **_plain(cfg.logitcask),
        )
        return self._opened


def _plain(value: Any) -> Any:
    """Dictionaries of axolotl, which know every key, as ordinary ones."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
