"""The student config: one YAML file describes a training run. Unknown keys are errors."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.cache_format.cli.config_model import ConfigModel
from logitcask.train.losses import SPECS
from logitcask.train.losses.others import find_loss


class StudentConfig(ConfigModel):
    """The student's initial weights: exactly one of init_from, model and config is set."""

    init_from: str | None = Field(
        None,
        description="A model whose layers the student takes: a folder, or a name under models/.",
    )
    keep_layers: list[int] | None = Field(
        None, description="Indices of the layers to take from init_from, in order. Default: all."
    )
    model: str | None = Field(None, description="A whole model, as a folder or a hub name.")
    config: dict[str, Any] | None = Field(
        None,
        description="A transformers config (`model_type` and its fields). The weights are random, "
        "from training.seed.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer: str | None = Field(
        None,
        description="Folder or hub name of the tokenizer. Default: that of init_from or model.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the trained weights. bfloat16 loses small updates of the "
        "weights. With training.bf16 the arithmetic is in bfloat16 and the weights stay in "
        "float32.",
    )
    peft: dict[str, Any] | None = Field(
        None,
        description="Adapters to train instead of all weights: fields of peft.LoraConfig, or of "
        "the adapter that peft_type names. The adapters are saved beside the merged student.",
    )
    attention: str | None = Field(
        None,
        description="attn_implementation of transformers, such as flash_attention_2, which needs "
        "training.bf16. Default: the choice of transformers, or eager if the student's config "
        "caps attention scores (Gemma 2), because sdpa does not.",
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


class WeightSchedule(ConfigModel):
    """A weight that changes from ``start`` to ``end`` in the first part of the training and is then
    constant.
    """

    start: float = Field(ge=0, allow_inf_nan=False, description="The weight at the first step.")
    end: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="The weight after the change. Default: start.",
    )
    kind: Literal["linear", "cosine", "step", "constant"] = Field(
        "linear",
        description="Shape of the change. `step`: a jump at its end. `constant`: no change.",
    )
    steps: int | None = Field(None, ge=1, description="Length of the change, in optimizer steps.")
    ratio: float | None = Field(
        None, gt=0, le=1, description="Length of the change, as a share of all steps. Default: 1."
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
    """One term of the loss. Further keys are options of the loss."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        description="Name of a loss (docs/losses.md), or `MODULE:NAME` of one of your own "
        "(docs/extending.md)."
    )
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | WeightSchedule = Field(
        1.0, description="A number, or a schedule: {start: 0, end: 2, ratio: 0.5, kind: linear}."
    )
    dynamic: bool = Field(
        False,
        description="ranking only: whether the other teacher losses are weighted by the overlap "
        "of the teacher's and the student's top k (RLKD, equation 2).",
    )
    caches: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Names of the caches of a mixture to whose positions the loss applies; `*` and "
        "`?` stand for any characters. Default: all. A loss of pairs applies to all caches that "
        "are read in pairs.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        find_loss(name)
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
        if SPECS[self.name].of_pairs and self.caches is not None:
            raise ValueError(
                f"{self.name} applies to the caches that are read in pairs; remove its caches"
            )
        return self

    def applies_to(self, label: str) -> bool:
        """Whether ``caches`` names the cache of this name."""
        return self.caches is None or any(fnmatchcase(label, each) for each in self.caches)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the loss function."""
        return dict(self.model_extra or {})


class AnswersConfig(ConfigModel):
    """Answers that the student writes to held-out prompts, compared with those in the cache by
    Rouge-L.

    Words are runs of letters and digits of any script. In scripts without spaces between words
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. References without
    words are left out, and counted in a warning."""

    sequences: int = Field(
        32, ge=1, description="Number of prompts, from the first held-out sequences."
    )
    max_new_tokens: int = Field(
        128, ge=1, description="Longest answer and longest reference, in tokens."
    )
    prompt_tokens: int = Field(
        64,
        ge=1,
        description="Length of the prompt, in tokens, for sequences without one (documents).",
    )


class EvaluationConfig(ConfigModel):
    """The held-out data and its metrics: some rows of the cache that is learnt from, or the
    sequences of a reference cache. Rows are held out by a hash of their ids, the same rows in every
    run.
    """

    cache: str | None = Field(
        None,
        description="Folder or URL of a reference cache, on whose sequences the student is "
        "evaluated. Runs that name the same one have comparable metrics (docs/evaluation.md). "
        "Sequences whose text is in it are never learnt from. Default: the held-out sequences of "
        "the cache that is learnt from.",
    )
    held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the data's rows (documents, chats, prompts) that training never "
        "sees. The pieces of a document stay together, and so do the answers to a prompt. With a "
        "reference cache the default is 0.",
    )
    max_sequences: int | None = Field(
        64,
        ge=1,
        description="Maximum number of held-out sequences to evaluate on, the first ones. null: "
        "all.",
    )
    k: int = Field(5, ge=1, description="k of the metrics MOR@k, CR@k and rank correlation.")
    answers: AnswersConfig | None = Field(
        None,
        description="Answers that the student writes before and after the training. Default: none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_held_out_twice(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("cache") is not None:
            return {"held_out": 0.0, **fields}
        return fields

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> Self:
        if self.cache is None and self.held_out == 0:
            raise ValueError(
                "held_out is 0, so there is nothing to evaluate on; give a share above 0 (0.1), or "
                "a reference cache (evaluation.cache)"
            )
        return self


class CacheEntry(ConfigModel):
    """One cache of a mixture."""

    cache: str = Field(description="Folder or URL of the cache.")
    weight: float | None = Field(
        None,
        ge=0,
        description="The cache's share of the kept positions, relative to the other caches. All "
        "caches have a weight, or none has. 0, with `part` only: the cache is evaluated on and "
        "never learnt from.",
    )
    held_out: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of this cache's rows that is held out. Default: evaluation.held_out.",
    )
    name: str | None = Field(None, description="Name in logs. Default: the last part of `cache`.")
    preferred: str | None = Field(
        None,
        description="Name of another cache of the mixture, whose texts are preferred to those of "
        "this one. The two are read in pairs: the texts of the same sequence id, always in one "
        "batch. Their weights are added. Default: none.",
    )

    @property
    def label(self) -> str:
        return self.name or self.cache.rstrip("/").rpartition("/")[2]


class DataConfig(ConfigModel):
    """Order and shape of the training batches. docs/data.md gives the cost of each choice."""

    shuffle: Literal["all", "shards", "batches", "none"] = Field(
        "all",
        description="Order of the sequences. all: fully random. shards: shards in random order, "
        "with the sequences of shuffle_window shards mixed, for remote caches. batches: within "
        "these shards, only the sequences of shuffle_window record batches at a time are mixed, "
        "for large local caches. none: as stored.",
    )
    shuffle_window: int = Field(
        8, ge=1, description="Number of shards, and of record batches, whose sequences are mixed."
    )
    group_by_length: bool = Field(
        False, description="Whether a batch has sequences (or packed rows) of similar length."
    )
    packing: bool = Field(
        False,
        description="Whether a row holds several sequences, which do not attend to each other. "
        "The batch size then counts rows.",
    )
    row_tokens: int | None = Field(
        None,
        ge=2,
        description="Maximum number of tokens in a packed row. Default: the longest sequence that "
        "the caches allow.",
    )
    epoch: Literal["first", "all"] = Field(
        "first",
        description="End of an epoch, for caches with weights. first: as soon as one cache is "
        "used up. all: once every cache is used up.",
    )

    @model_validator(mode="after")
    def _only_where_it_counts(self) -> Self:
        if self.row_tokens is not None and not self.packing:
            raise ValueError("row_tokens needs packing")
        return self


class SelectSequences(ConfigModel):
    """Selection of the sequences of a larger batch from which the student can learn most (ACID,
    arXiv 2411.18674).
    """

    filter_ratio: float = Field(
        0.8, gt=0, lt=1, description="Share of each larger batch that is left out."
    )


class SelectPositions(ConfigModel):
    """Selection of the positions of each sequence that count in the loss."""

    by: Literal["entropy", "gap"] = Field(
        description="Measure by which the highest positions are selected. entropy: the teacher's "
        "entropy. gap: the student's loss on the next token minus the teacher's."
    )
    share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Selected share of each sequence's kept positions, rounded up.",
    )


class SelectionConfig(ConfigModel):
    """The part of the data that counts at each step. Default: all."""

    sequences: SelectSequences | None = None
    positions: SelectPositions | None = None


class PartConfig(ConfigModel):
    """A part of a longer training, such as a round of `student-rounds`: it goes on where the part
    before ended, on caches of its own. Optimizer, schedule and random state continue; the length of
    the schedule is training.max_steps.
    """

    start: Path | None = Field(
        None,
        description="The checkpoint-N folder in which the part before ended. Default: this is the "
        "first part.",
    )
    until: int = Field(ge=0, description="The step of the whole training at which this part ends.")


class TrainConfig(ConfigModel):
    """A `train-student` config."""

    cache: str | list[CacheEntry] = Field(
        description="Folder or URL of the cache, or a mixture: a list of {cache, weight, name}."
    )
    cache_config: Path | None = Field(
        None,
        description="The teacher-cache config that builds the cache. `make train-student` builds "
        "the cache from it.",
    )
    trusted_keys: tuple[str, ...] = Field(
        (),
        description="Keys by one of which every cache must be signed, as `ed25519:...` or their "
        "`.pub` files (docs/trust.md). Default: no signature is asked for.",
    )
    student: StudentConfig = Field(description="The model to train.")
    losses: list[LossTerm] = Field(
        [LossTerm(name="forward_kl")],
        min_length=1,
        description="Terms of the minimised loss, a weighted sum.",
    )
    ce_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | WeightSchedule = Field(
        0.0,
        description="Weight of the cross-entropy with the next tokens in the data: a number, or a "
        "schedule as for losses.",
    )
    data: DataConfig = DataConfig()
    selection: SelectionConfig = SelectionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logits_chunk: int | None = Field(
        None,
        ge=1,
        description="Positions whose logits are in memory at a time. Default: as many as have 96 "
        "MiB of float32 logits (512 MiB on a GPU), at least 512.",
    )
    part: PartConfig | None = Field(
        None, description="A part of a longer training. Default: a training of its own."
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of transformers.TrainingArguments. output_dir is required.",
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
        if self.part is not None:
            steps = self.training.get("max_steps")
            if not isinstance(steps, int) or steps < max(1, self.part.until):
                raise ValueError(
                    f"part.until is {self.part.until} and training.max_steps {steps}; with part, max_steps is the number of steps "
                    "of all parts together, at least part.until"
                )
            if self.training.get("load_best_model_at_end"):
                raise ValueError(
                    "training.load_best_model_at_end is set, but a part ends with its last student, from which the next part "
                    "goes on; remove it"
                )
        elif any(entry.weight == 0 for entry in self.caches):
            raise ValueError(
                "a cache has weight 0; only with part may caches be evaluated on alone: remove it, or name it as "
                "evaluation.cache"
            )
        if not any(entry.weight is None or entry.weight > 0 for entry in self.caches):
            raise ValueError("all caches have weight 0, so there is nothing to learn from")
        self._check_pairs()
        self._check_that_losses_apply()
        if self.data.packing and self.selection.sequences is not None:
            raise ValueError(
                "selection.sequences chooses sequences one by one and cannot have them packed; set data.packing to false"
            )
        return self

    @property
    def caches(self) -> list[CacheEntry]:
        """The caches to learn from. A single cache has no weight."""
        return [CacheEntry(cache=self.cache)] if isinstance(self.cache, str) else self.cache

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The caches that are read in pairs, by number: the preferred one, then the other."""
        number = {entry.label: each for each, entry in enumerate(self.caches)}
        return [
            (number[entry.preferred], each)
            for each, entry in enumerate(self.caches)
            if entry.preferred is not None
        ]

    @property
    def learnt(self) -> list[int]:
        """The caches that are learnt from, by number: all but those of weight 0. Two that are read
        in pairs have one weight.
        """
        weights = [entry.weight for entry in self.caches]
        found = {number for number, weight in enumerate(weights) if weight != 0}
        for pair in self.pairs:
            found |= set(pair) if found & set(pair) else set()
        return sorted(found)

    def applying(self, number: int) -> list[LossTerm]:
        """The losses that apply to the positions of a cache, by its number."""
        paired = any(number in pair for pair in self.pairs)
        label = self.caches[number].label
        return [
            term
            for term in self.losses
            if (paired if SPECS[term.name].of_pairs else term.applies_to(label))
        ]

    def _check_pairs(self) -> None:
        """Raises ValueError for pairs that cannot be, or that something else would part."""
        labels = [entry.label for entry in self.caches]
        for entry in self.caches:
            if entry.preferred is not None and entry.preferred not in labels:
                raise ValueError(
                    f"{entry.label} has preferred: {entry.preferred}, and no cache is called so; the caches are {', '.join(labels)}"
                )
        numbers = [number for pair in self.pairs for number in pair]
        if len(set(numbers)) < len(numbers):
            twice = next(each for each in numbers if numbers.count(each) > 1)
            raise ValueError(
                f"{labels[twice]} is in two pairs, or in one with itself; a cache may be in one pair (preferred)"
            )
        if not numbers:
            return
        parting = {
            "data.packing": self.data.packing,
            "selection.sequences": self.selection.sequences is not None,
            "selection.positions": self.selection.positions is not None,
        }
        for name, asked in parting.items():
            if asked:
                raise ValueError(
                    f"{name} would part the texts that are read in pairs (preferred); leave it out"
                )

    def _check_that_losses_apply(self) -> None:
        """Raises ValueError for a loss that applies to no cache, or a cache to which none does."""
        here = {number: {term.name for term in self.applying(number)} for number in self.learnt}
        names = ", ".join(self.caches[number].label for number in here)
        for term in self.losses:
            if any(term.name in applied for applied in here.values()):
                continue
            if SPECS[term.name].of_pairs:
                raise ValueError(
                    f"{term.name} is a loss of two texts of a prompt, but no caches are read in pairs; name the cache of the "
                    "preferred texts (preferred)"
                )
            raise ValueError(
                f"{term.name} has caches: {', '.join(term.caches or ())}, but none of the caches to learn from is called so: {names}"
            )
        for number, applied in here.items():
            if not applied and self.ce_weight == 0.0:
                raise ValueError(
                    f"no loss applies to the cache {self.caches[number].label}; name it in the caches of a loss, or leave it out"
                )

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
