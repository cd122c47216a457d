"""The student config: one YAML file describes a training run. Unknown keys are errors."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from train.losses import LOSSES


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StudentConfig(_Config):
    """Where the student's first weights come from: exactly one of the three."""

    init_from: str | None = Field(None, description="A model to take layers from: a folder, or a name under models/.")
    keep_layers: list[int] | None = Field(
        None, description="With init_from: which of its layers, in order. Default: all."
    )
    model: str | None = Field(None, description="A model folder or hub name, taken as it is.")
    config: dict[str, Any] | None = Field(
        None,
        description="A transformers config (`model_type` and its fields): random weights, drawn with training.seed.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer: str | None = Field(None, description="Folder or hub name. Default: that of init_from or model.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the weights that are trained.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("init_from", "model", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of init_from, model, config; found {', '.join(given) or 'none'}")
        if self.keep_layers is not None and self.init_from is None:
            raise ValueError("keep_layers needs init_from")
        return self


class LossTerm(BaseModel):
    """One term of the loss; keys beside name and weight are the loss's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    weight: float = Field(1.0, ge=0)
    dynamic: bool = Field(
        False, description="ranking only: weigh the other teacher losses by the top-k overlap (RLKD, equation 2)."
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES:
            raise ValueError(f"no loss is called {name!r}; there are {', '.join(sorted(LOSSES))}")
        return name

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        known = [n for n, p in signature(LOSSES[self.name]).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for option in self.options:
            if option not in known:
                raise ValueError(f"{self.name} has no option {option!r}; it has {', '.join(known)}")
        k = self.options.get("k", 1)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"{self.name}: k is {k!r}; expected a whole number from 1")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the loss function."""
        return dict(self.model_extra or {})


class EvaluationConfig(_Config):
    """The held-out sequences: chosen by a hash of their ids, so the same ones in every run on every machine."""

    held_out: float = Field(0.1, gt=0, lt=1, description="Share of the sequences that training never sees.")
    max_sequences: int | None = Field(64, ge=1, description="Evaluate on at most this many of them; null takes all.")
    k: int = Field(5, ge=1, description="k of MOR@k and CR@k.")


class TrainConfig(_Config):
    """A `train-student` config."""

    cache: str = Field(description="Folder or URL of the cache.")
    cache_config: Path | None = Field(None, description="The teacher-cache config that builds it; `make` does so.")
    student: StudentConfig
    losses: list[LossTerm] = Field([LossTerm(name="forward_kl")], min_length=1)
    ce_weight: float = Field(0.0, ge=0, description="Weight of the cross-entropy with the data's own next tokens.")
    evaluation: EvaluationConfig = EvaluationConfig()
    logits_chunk: int = Field(1024, ge=1, description="Positions whose logits are alive at a time; bounds memory.")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any field of transformers.TrainingArguments; output_dir is required."
    )

    @model_validator(mode="after")
    def _somewhere_to_write(self) -> Self:
        if not isinstance(self.training.get("output_dir"), str):
            raise ValueError("training.output_dir is missing: the folder for the student and its report")
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses are {', '.join(names)}: each may stand there once")
        dynamic = [term for term in self.losses if term.dynamic]
        if any(term.name != "ranking" for term in dynamic) or len(dynamic) > 1:
            raise ValueError("dynamic belongs to one loss, ranking")
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])
