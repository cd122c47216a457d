"""The build config: one YAML file describes a cache. Every field has its reason here; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TeacherConfig(_Config):
    """Which model scores the text, and with what engine."""

    model: str = Field(description="A built-in name (`smollm2-135m`, `synthetic`), a model folder, or a hub name.")
    backend: Literal["vllm", "transformers", "synthetic"] = Field(
        "vllm", description="The engine. Where vLLM is not installed, `vllm` falls back to `transformers` and says so."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: str = Field(
        "auto", description="Weights and arithmetic: auto (float32 on a CPU), float32, bfloat16, float16."
    )
    route: Literal["auto", "raw", "flat"] = Field(
        "auto",
        description="How logprobs leave vLLM: `raw` keeps its arrays (self-checked at start-up), `flat` is the public way.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per engine.")
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens per engine step; bounds memory, since a step holds tokens x vocabulary logits. "
        "Default: 1024 on a CPU, 8192 on a GPU.",
    )
    engine_args: dict[str, object] = Field(
        default_factory=dict, description="Passed to `vllm.LLM(...)` (or `from_pretrained(...)`) as they are."
    )
    vocab_size: int = Field(49_152, ge=258, description="Synthetic teacher only: ids it can predict.")
    seed: int = Field(0, description="Synthetic teacher only: which distribution.")

    def step_tokens(self, *, on_cpu: bool) -> int:
        """``batch_tokens``, or its default for the device."""
        return self.batch_tokens or (1024 if on_cpu else 8192)


class DataConfig(_Config):
    """Which text, and how it becomes sequences."""

    path: str = Field(description="A built-in name (`python-docs`), a file or folder, or a hub name for load_dataset.")
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    text_field: str | None = Field(
        None, description="Column with documents. Default: `text`, unless messages_field is set."
    )
    messages_field: str | None = Field(
        None, description="Column with chats, lists of {role, content}; the loss mask covers assistant tokens only."
    )
    id_field: str | None = Field(None, description="Column with stable, unique ids. Default: the row number.")
    max_length: int = Field(512, ge=1, description="Longest sequence, in tokens.")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split", description="Documents above max_length: cut into consecutive pieces, cut off, or left out. Counted."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Stop before the sequence that would exceed this many tokens."
    )
    add_special_tokens: bool = Field(True, description="Documents: let the tokenizer add what it adds (BOS, usually).")
    append_eos: bool = Field(False, description="Documents: end each with the tokenizer's EOS.")
    chat_template: Path | None = Field(None, description="A Jinja file used instead of the tokenizer's own template.")

    @field_validator("chat_template")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        if self.text_field and self.messages_field:
            raise ValueError("text_field and messages_field are both set; a data set is documents or chats: set one")
        return self


class StoreConfig(_Config):
    """What is kept of each distribution, and in how large pieces."""

    top_k: int = Field(16, ge=1, description="Head entries stored per position.")
    logprob_step: float = Field(
        1 / 64, description="Grid of stored head logprobs, nats; the error is at most half of it. A power of two."
    )
    shard_tokens: int = Field(
        1_000_000, ge=1, description="Tokens per shard: the unit of work, of commit and of retry."
    )
    compression_level: int = Field(9, ge=1, le=22, description="zstd level of the shards.")

    @model_validator(mode="after")
    def _step_is_a_power_of_two(self) -> Self:
        from cache_format.codec import check_step

        check_step(self.logprob_step)
        return self


class BuildConfig(_Config):
    """A `teacher-cache build` config."""

    teacher: TeacherConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    output: Path = Field(description="Folder of the cache.")
