"""The student config: one YAML file describes a training run. Unknown keys are errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.train.losses import LOSSES, SPECS


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StudentConfig(_Config):
    """Where the student's first weights come from: exactly one of the three."""

    init_from: str | None = Field(
        None, description="A model to take layers from: a folder, or a name under models/."
    )
    keep_layers: list[int] | None = Field(
        None, description="With init_from: which of its layers, in order. Default: all."
    )
    model: str | None = Field(None, description="A model folder or hub name, taken as it is.")
    config: dict[str, Any] | None = Field(
        None,
        description="A transformers config (`model_type` and its fields): random weights, drawn with training.seed.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer: str | None = Field(
        None, description="Folder or hub name. Default: that of init_from or model."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of the weights that are trained. In bfloat16 they miss small steps; training.bf16 computes in bfloat16 and "
        "keeps them in float32.",
    )
    peft: dict[str, Any] | None = Field(
        None,
        description="Train adapters instead of all weights: fields of peft.LoraConfig, or of another kind of adapter that "
        "peft_type names. The adapters are saved beside the merged student.",
    )
    attention: str | None = Field(
        None,
        description="transformers' attn_implementation, e.g. flash_attention_2, which needs training.bf16. Default: transformers' "
        "choice, or eager where the student's config caps attention scores (Gemma 2), which sdpa leaves out.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [
            name for name in ("init_from", "model", "config") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"set exactly one of init_from, model, config; found {', '.join(given) or 'none'}"
            )
        if self.keep_layers is not None and self.init_from is None:
            raise ValueError("keep_layers needs init_from")
        return self


class WeightSchedule(_Config):
    """A weight that moves from ``start`` to ``end`` over the first part of the training, and
    stays there.
    """

    start: float = Field(ge=0, allow_inf_nan=False, description="At the first step.")
    end: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="From the end of the move on. Default: start."
    )
    kind: Literal["linear", "cosine", "step", "constant"] = Field(
        "linear",
        description="How it moves; `step` jumps at the end, `constant` never leaves start.",
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps that the move takes.")
    ratio: float | None = Field(
        None, gt=0, le=1, description="The same as a share of all steps. Default: 1."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.steps is not None and self.ratio is not None:
            raise ValueError("set steps or ratio, not both")
        if self.kind == "constant" and self.end not in (None, self.start):
            raise ValueError(
                f"kind is constant, but the weight is to go from {self.start:g} to {self.end:g}"
            )
        if self.kind != "constant" and self.end is None:
            raise ValueError(
                f"kind is {self.kind}, so end is needed: where the weight goes from {self.start:g}"
            )
        return self

    def at(self, step: int, steps: int) -> float:
        """The weight after ``step`` of all ``steps`` optimizer steps."""
        if self.kind == "constant" or self.end is None:
            return self.start
        length = (
            self.steps
            if self.steps is not None
            else steps * (self.ratio if self.ratio is not None else 1.0)
        )
        done = min(1.0, step / length) if length else 1.0
        moved = {
            "linear": done,
            "cosine": (1 - math.cos(math.pi * done)) / 2,
            "step": float(done >= 1),
        }[self.kind]
        return self.start + (self.end - self.start) * moved

    def __str__(self) -> str:
        if self.kind == "constant" or self.end is None:
            return f"{self.start:g}"
        over = (
            f"{self.steps} steps"
            if self.steps is not None
            else f"{self.ratio or 1:.0%} of the steps"
        )
        return f"({self.start:g} to {self.end:g}, {self.kind} over {over})"


class LossTerm(BaseModel):
    """One term of the loss; keys beside name and weight are the loss's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="Of a loss (docs/losses.md).")
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | WeightSchedule = Field(
        1.0, description="A number, or a schedule: {start: 0, end: 2, ratio: 0.5, kind: linear}."
    )
    dynamic: bool = Field(
        False,
        description="ranking only: weigh the other teacher losses by the top-k overlap (RLKD, equation 2).",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES:
            raise ValueError(f"no loss is called {name!r}; there are {', '.join(sorted(LOSSES))}")
        return name

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        known = SPECS[self.name].options
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"{self.name} has no option {option!r}; it has {', '.join(known) or 'none'}"
                )
        k = self.options.get("k", 1)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"{self.name}: k is {k!r}; expected a whole number from 1")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the loss function."""
        return dict(self.model_extra or {})


class AnswersConfig(_Config):
    """Answers that the student writes to held-out prompts, compared with those in the cache by
    Rouge-L.

    Words are runs of letters and digits of any script. Where words are not set apart (Chinese,
    Japanese, Thai, Lao, Khmer, Burmese) each character counts as one. References without words are
    left out, and counted in a warning."""

    sequences: int = Field(32, ge=1, description="From the first so many held-out sequences.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer, and longest reference.")
    prompt_tokens: int = Field(
        64, ge=1, description="Length of the prompt where a sequence has none (documents)."
    )


class EvaluationConfig(_Config):
    """What is held out, and measured. Rows of the data are chosen by a hash of their ids: the
    same ones in every run.
    """

    held_out: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the data's rows (documents, chats, prompts) that training never sees: all pieces of a document "
        "and all answers to a prompt, or none.",
    )
    max_sequences: int | None = Field(
        64, ge=1, description="Evaluate on at most this many of them; null takes all."
    )
    k: int = Field(5, ge=1, description="k of MOR@k, CR@k and of the rank correlation.")
    answers: AnswersConfig | None = Field(
        None, description="Let the student answer, before and after. Default: no."
    )


class CacheEntry(_Config):
    """One cache of a mixture."""

    cache: str = Field(description="Folder or URL of the cache.")
    weight: float | None = Field(
        None,
        gt=0,
        description="Its share of the kept positions, relative to the others'; all caches have one or none has.",
    )
    name: str | None = Field(
        None, description="What logs call it. Default: the last part of `cache`."
    )

    @property
    def label(self) -> str:
        return self.name or self.cache.rstrip("/").rpartition("/")[2]


class DataConfig(_Config):
    """Order and shape of the training batches; docs/data.md says what each choice costs."""

    shuffle: Literal["all", "shards", "batches", "none"] = Field(
        "all",
        description="all: any order. shards: shards in random order, the sequences of shuffle_window of them mixed, for "
        "remote caches. batches: inside that, runs of record batches one after the other, for large local ones. "
        "none: as stored.",
    )
    shuffle_window: int = Field(
        8, ge=1, description="Shards, and record batches, whose sequences are mixed."
    )
    group_by_length: bool = Field(
        False, description="Batches of sequences (or rows) of similar length."
    )
    packing: bool = Field(
        False,
        description="Several sequences in one row, none seeing another; a batch is then so many rows.",
    )
    row_tokens: int | None = Field(
        None,
        ge=2,
        description="Tokens of a packed row at most. Default: the longest sequence that the caches allow.",
    )
    epoch: Literal["first", "all"] = Field(
        "first",
        description="With weights: an epoch ends when the first, or only when every cache has been gone through.",
    )

    @model_validator(mode="after")
    def _only_where_it_counts(self) -> Self:
        if self.row_tokens is not None and not self.packing:
            raise ValueError("row_tokens needs packing")
        return self


class SelectSequences(_Config):
    """Keep, of a larger batch, the sequences from which the student has most to learn (ACID,
    arXiv 2411.18674).
    """

    filter_ratio: float = Field(
        0.8, gt=0, lt=1, description="Share of each larger batch that is left out."
    )


class SelectPositions(_Config):
    """Keep, of each sequence, the positions that matter most; all others are not in the loss."""

    by: Literal["entropy", "gap"] = Field(
        description="entropy: the teacher's. gap: the student's loss on the next token minus the teacher's."
    )
    share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of each sequence's kept positions that stays, rounded up.",
    )


class SelectionConfig(_Config):
    """What of the data counts at each step. Default: all of it."""

    sequences: SelectSequences | None = None
    positions: SelectPositions | None = None


class TrainConfig(_Config):
    """A `train-student` config."""

    cache: str | list[CacheEntry] = Field(
        description="Folder or URL of the cache, or a mixture: a list of {cache, weight, name}."
    )
    cache_config: Path | None = Field(
        None, description="The teacher-cache config that builds it; `make` does so."
    )
    student: StudentConfig = Field(description="What is trained.")
    losses: list[LossTerm] = Field(
        [LossTerm(name="forward_kl")],
        min_length=1,
        description="What is minimised: a weighted sum.",
    )
    ce_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | WeightSchedule = Field(
        0.0,
        description="Weight of the cross-entropy with the data's own next tokens: a number, or a schedule as for losses.",
    )
    data: DataConfig = DataConfig()
    selection: SelectionConfig = SelectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logits_chunk: int | None = Field(
        None,
        ge=1,
        description="Positions whose logits are alive at a time. Default: 96 MiB of logits, on a GPU 512, or 512 positions.",
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of transformers.TrainingArguments; output_dir is required.",
    )

    @field_validator("cache")
    @classmethod
    def _a_mixture(cls, cache: str | list[CacheEntry]) -> str | list[CacheEntry]:
        if isinstance(cache, str):
            return cache
        labels = [entry.label for entry in cache]
        if not cache:
            raise ValueError("the list of caches is empty")
        if len(set(labels)) < len(labels):
            raise ValueError(f"caches are called {', '.join(labels)}: give each a name of its own")
        if len({entry.weight is None for entry in cache}) > 1:
            raise ValueError(
                "some caches have a weight and others none; give all of them one, or none"
            )
        return cache

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.cache_config is not None and not isinstance(self.cache, str):
            raise ValueError(
                "cache_config builds one cache; with a list of caches, build them before"
            )
        if self.data.packing and self.selection.sequences is not None:
            raise ValueError(
                "selection.sequences chooses sequences one by one and cannot have them packed; set data.packing to false"
            )
        return self

    @property
    def caches(self) -> list[CacheEntry]:
        """The caches to learn from; a single one without a weight."""
        return [CacheEntry(cache=self.cache)] if isinstance(self.cache, str) else self.cache

    @model_validator(mode="after")
    def _somewhere_to_write(self) -> Self:
        if not isinstance(self.training.get("output_dir"), str):
            raise ValueError(
                "training.output_dir is missing: the folder for the student and its report"
            )
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses are {', '.join(names)}: each may stand there once")
        if "ce" in names and self.ce_weight != 0.0:
            raise ValueError("ce_weight is the weight of the loss ce; set one of the two")
        dynamic = [term.name for term in self.losses if term.dynamic]
        may_be = [name for name, spec in SPECS.items() if spec.dynamic]
        if not set(dynamic) <= set(may_be) or len(dynamic) > 1:
            raise ValueError(f"dynamic belongs to one loss, {' or '.join(may_be)}")
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"]).expanduser()


if __name__ == "__main__":  # for docs/config.md
    print(markdown(TrainConfig))
