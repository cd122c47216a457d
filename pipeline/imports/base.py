"""The interface of layouts: what an import is told, and what a layout holds of one sequence.

A layout is a module of this folder with a generator of ``Held`` and a ``Layout`` that describes it;
the table of all layouts is ``logitcask.pipeline.imports.layouts``.

Shapes: n tokens, R rows, K entries of a row (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from logitcask.cache_format.cli.config_model import ConfigModel
from logitcask.cache_format.manifest import check_step

Float = Literal["float16", "bfloat16", "float32", "float64"]


class ImportOptions(ConfigModel):
    """What a layout does not hold, or holds under other names."""

    teacher: str = Field(min_length=1, description="Name of the teacher, for the manifest.")
    tokenizer: str = Field(
        min_length=1,
        description="The tokenizer of the ids: a folder, a hub name or a built-in name. Its "
        "identity goes into the manifest, and students are compared with it.",
    )
    vocab_size: int | None = Field(
        None, ge=2, description="Ids that the teacher predicts. Default: those of the tokenizer."
    )
    teacher_dtype: str = Field("unknown", description="Precision of the teacher, if it is known.")
    values: Literal["auto", "logprobs", "logits"] = Field(
        "auto",
        description="What the numbers are. logits: the mass outside a head is then unknown, unless "
        "the head is the whole vocabulary. auto: what the layout has; if that may be either, logprobs "
        "if no head's mass is above 1, and not all are 1.",
    )
    split: str = Field("train", description="Split of a folder or a hub data set.")
    tokens: str | None = Field(
        None,
        description="Data with the column input_ids, for layouts that hold none: megatron in the "
        "order of the run, sidecar in the order of its rows.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Other names of columns, NAME=COLUMN."
    )
    alignment: Literal["current", "legacy"] = Field(
        "current",
        description="axolotl-prepared only: row j is about token j + 1 (current), or about token j "
        "(legacy, axolotl up to 0.18.0).",
    )
    max_sequences: int | None = Field(None, ge=1, description="Import only the first sequences.")
    logprob_step: float = Field(
        2.0**-6, description="Step of stored logprobs, in nats, a power of two."
    )
    k: int | None = Field(
        None, ge=1, le=1 << 16, description="DistillKit's codec: entries of a row."
    )
    exact_k: int | None = Field(
        None, ge=0, description="DistillKit's codec: entries that are stored as they are."
    )
    exact_dtype: Float = Field("float32", description="DistillKit's codec: type of these entries.")
    polynomial_terms: str = Field(
        "",
        description="DistillKit's codec: terms of the fit to the other entries, such as 0,1,2,sqrt.",
    )
    term_dtype: Float = Field("float32", description="DistillKit's codec: type of the terms.")
    residual_bins: str = Field(
        "",
        description="DistillKit's codec: bins of residuals, each ENTRIES:BITS:TYPE, such as "
        "32:4:float16,64:2:float16.",
    )
    delta_encoding: bool = Field(
        True,
        description="DistillKit's codec: whether an entry is the difference to the one before. "
        "Default: yes.",
    )
    normalize_t: bool = Field(
        False, description="DistillKit's codec: whether terms are over 0 to 1 instead of 0 to k."
    )
    polynomial_degree: int | None = Field(
        None, ge=0, lt=100, description="DistillKit's legacy codec: degree of the polynomial."
    )
    invert_polynomial: bool = Field(
        True, description="DistillKit's legacy codec: whether powers are negative. Default: yes."
    )
    with_sqrt_term: bool = Field(
        False, description="DistillKit's legacy codec: whether a square root is a term."
    )

    @field_validator("logprob_step")
    @classmethod
    def _is_a_step(cls, step: float) -> float:
        return check_step(step)

    @model_validator(mode="after")
    def _codec_is_possible(self) -> Self:
        if self.k is not None and self.exact_k is not None and self.exact_k > self.k:
            raise ValueError(f"exact_k is {self.exact_k}, more than the {self.k} entries of a row")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a layout holds of one sequence.

    name:      where it comes from, for messages.
    input_ids: int64[n].
    first:     the position of row 0; row r is about the token ``first + r + 1``.
    ids:       int64[R, K], in any order, padded with -1.
    values:    float64[R, K], logprobs or logits; entries that are not finite are padding.
    learnt:    bool[n], by token; None: every token that a row is about.
    """

    name: str
    input_ids: NDArray[np.int64]
    first: int
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    learnt: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The data of an import: its place, the options, and what was opened for it.

    vocab_size: ids that the teacher predicts. tokenizer: of the ids.
    """

    path: str
    options: ImportOptions
    vocab_size: int
    tokenizer: Any
    layout: Layout

    def column(self, name: str) -> str:
        """The name in the data of the layout's column ``name``."""
        return self.options.columns.get(name, name)


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout, as users name it.

    summary: one line for ``--help``.
    read:    the sequences of a source, in order, at most some of them in memory.
    columns: columns by which a table is known to have this layout; empty for other files.
    suffix:  of its files, if they are no tables.
    needs:   options that must be given.
    values:  what ``--values auto`` means; auto: the numbers tell.
    forced:  whether a row may have the next token beside the most probable ones.
    """

    name: str
    summary: str
    read: Callable[[Source], Iterator[Held]]
    columns: tuple[str, ...] = ()
    suffix: str = ""
    needs: tuple[str, ...] = ()
    values: Literal["auto", "logprobs"] = "auto"
    forced: bool = False
