"""The fields `data` of the build config: the text, its columns, and answers that are generated."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from logitcask.cache_format.cli.config_model import ConfigModel, expanded, with_home
from logitcask.cache_format.schema import MAX_CHOSEN
from logitcask.pipeline.text.slices import Slice, parse_slice

# Arguments that transformers itself uses when it renders a chat.
_NOT_ARGUMENTS = {
    *(
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
    ),
    *(
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    ),
    *("tokenizer_kwargs", "sanitize_control_tokens", "strftime_now", "logitcask_date"),
}


class WriterEngineConfig(ConfigModel):
    """The engine of the writer, where it differs from that of the teacher."""

    dtype: str | None = Field(None, description="As teacher.dtype. Default: that of the teacher.")
    tensor_parallel_size: int | None = Field(
        None, ge=1, description="As teacher.tensor_parallel_size. Default: that of the teacher."
    )
    engine_args: dict[str, object] | None = Field(
        None,
        description="In the place of all of teacher.engine_args. `{}` for none. Default: those of "
        "the teacher.",
    )


class SpliceConfig(ConfigModel):
    """Tokens of the teacher among those of the writer, as speculative knowledge distillation has them
    (arXiv 2410.11325): of each answer in a cache, the first token that the teacher ranks low is replaced
    by a sample of the teacher, the rest is dropped, and the writer goes on from there.
    """

    cache: str = Field(
        min_length=1,
        description="The cache of the pass before, a folder or URL: answers of the same writer to "
        "the same prompts, scored by the same teacher.",
    )
    top_k: int = Field(
        25,
        ge=1,
        description="A token is accepted if fewer than top_k ids are more probable than it.",
    )
    temperature: float = Field(
        0.2, ge=0, description="Of the teacher's sampling. 0: its most probable token."
    )
    top_p: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Of the teacher's sampling, from its top_k most probable ids at most, as far "
        "as the cache's heads hold them (docs/generate.md).",
    )

    @field_validator("cache")
    @classmethod
    def _cache_has_a_home(cls, cache: str) -> str:
        return with_home(cache)


class GenerateConfig(ConfigModel):
    """Answers that the teacher, or another model, writes to the prompts of a data set. The teacher
    then scores them like any other text.
    """

    writer: str | None = Field(
        None,
        min_length=1,
        description="The model that writes, if it is not the teacher: a folder or a hub name, such "
        "as a student's checkpoint. It needs the teacher's tokenizer, runs with the teacher's "
        "engine settings, and has left the memory when the teacher starts. The logprobs that it "
        "gave its tokens are stored, too. `synthetic:SEED` for the synthetic teacher.",
    )
    writer_engine: WriterEngineConfig | None = Field(
        None,
        description="Engine settings of the writer that are not the teacher's: a quantised teacher "
        "of many GPUs, say, has arguments that a small student cannot run with.",
    )
    writer_top_k: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOSEN,
        description="Number of the writer's most probable ids at each token that it writes. The "
        "teacher's logprobs of them are stored, too, for closer bounds of reverse KL and of other "
        "losses (docs/generate.md). Default: none.",
    )
    splice: SpliceConfig | None = Field(
        None,
        description="A further pass over answers that the writer has begun. The logprobs of the "
        "writer are not stored then.",
    )
    skip_prompts: int = Field(
        0,
        ge=0,
        description="Number of prompts that are passed over. After the last prompt of the data "
        "the first one follows again.",
    )
    max_prompts: int | None = Field(
        None, ge=1, description="Number of prompts to answer, each once. Default: all."
    )
    samples: int = Field(
        1, ge=1, description="Answers per prompt. The sequences are named `row/sample`."
    )
    temperature: float = Field(
        1.0, ge=0, description="Sampling temperature. 0: always the most probable token."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sampling is limited to the most probable tokens: as many as together reach "
        "this probability.",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer, in tokens. Default: as long as data.max_length allows. "
        "Prompt and answer together never exceed data.max_length.",
    )
    stop: tuple[str, ...] = Field(
        (),
        description="Strings that end an answer, in addition to the teacher's own end-of-turn "
        "tokens.",
    )
    include_stop: bool = Field(
        False,
        description="Whether the stop string is part of the answer. If not, the tokens that hold "
        "it are cut off.",
    )
    seed: int = Field(
        0,
        description="Seed of sampling. The random numbers of an answer depend on (seed, row, "
        "sample), not on its batch.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message for every prompt without one. Only with messages_field or "
        "prompt_field.",
    )

    @field_validator("writer")
    @classmethod
    def _writer_has_a_home(cls, writer: str | None) -> str | None:
        return None if writer is None else with_home(writer)

    @model_validator(mode="after")
    def _an_engine_is_of_a_writer(self) -> Self:
        if self.writer_engine is not None and self.writer is None:
            raise ValueError(
                "writer_engine is set, but no writer; name the model that writes, or set the engine of the teacher, which "
                "writes itself (teacher.engine_args)"
            )
        return self

    @model_validator(mode="after")
    def _chosen_ids_are_of_a_writer(self) -> Self:
        if self.writer_top_k is not None and self.writer is None:
            raise ValueError(
                f"writer_top_k is {self.writer_top_k}, but there is no writer: the teacher's own most probable ids are in the "
                "head (store.top_k); name the model that writes, or remove writer_top_k"
            )
        if self.writer_top_k is not None and self.splice is not None:
            raise ValueError(
                f"writer_top_k is {self.writer_top_k}, but with splice some tokens were written in an earlier pass, where the "
                "writer's most probable ids are not known; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _a_splice_is_of_a_writer(self) -> Self:
        if self.splice is not None and self.writer is None:
            raise ValueError(
                "splice is set, but no writer; name the model that has begun the answers in splice.cache, and goes on with them"
            )
        return self

    @model_validator(mode="after")
    def _stops_are_strings(self) -> Self:
        if not all(self.stop):
            raise ValueError(
                "stop holds an empty string, which would end every answer before it begins; remove it"
            )
        return self


class SourceConfig(ConfigModel):
    """One of several sources. A field that is left out has its value from `data`. If one of the
    four columns with text is set here, those of `data` do not count.
    """

    path: str = Field(min_length=1, description="As data.path.")
    weight: float = Field(
        1.0,
        gt=0,
        description="Rows that are taken in turn: of a source with weight 3 three times as many as "
        "of one with weight 1. Each row is read once; a source that has ended is passed over.",
    )
    name: str | None = Field(None, description="As data.name.")
    split: str | None = Field(None, description="As data.split.")
    revision: str | None = Field(None, description="As data.revision.")
    text_field: str | None = Field(None, min_length=1, description="As data.text_field.")
    messages_field: str | None = Field(None, min_length=1, description="As data.messages_field.")
    prompt_field: str | None = Field(None, min_length=1, description="As data.prompt_field.")
    completion_field: str | None = Field(
        None, min_length=1, description="As data.completion_field."
    )
    tools_field: Annotated[str, Field(min_length=1)] | Literal[False] | None = Field(
        None, description="As data.tools_field."
    )
    id_field: str | None = Field(None, min_length=1, description="As data.id_field.")


class DataConfig(ConfigModel):
    """The text, and its conversion to sequences of tokens."""

    path: str = Field(
        "",
        min_length=1,
        description="A built-in name (`python-docs`), a file, a folder, the URL of one (s3://, "
        "https://, ...), or the name of a data set on the Hugging Face Hub. If there is no such "
        "file or folder, `*`, `?` and `[]` in it are wildcards for files, and `**` is any number of "
        "folders (docs/texts.md). Or `MODULE:NAME` of a source of your own (docs/extending.md). "
        "Required, except with sources.",
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="Several sources, in place of path. The ids of rows begin with the number of "
        "the source, from 0.",
    )
    name: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    split: str = Field(
        "train",
        description="The split to read, or a part of it, as `datasets` has it: `train[:10%]`, "
        "`train[1000:2000]`. For a folder, `all` reads every data file below it, whatever its name "
        "and type.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    text_field: str | None = Field(
        None,
        min_length=1,
        description="Column with documents. Default: `text`, unless messages_field or "
        "prompt_field is set.",
    )
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="Column with chats, which are lists of {role, content} or of {from, value}. "
        "Only assistant tokens are learnt.",
    )
    prompt_field: str | None = Field(
        None,
        min_length=1,
        description="Column with prompts, only with generate or completion_field. A text is the "
        "single user message of a chat. With completion_field, a prompt may also be a list of "
        "messages.",
    )
    completion_field: str | None = Field(
        None,
        min_length=1,
        description="Column with completions, of which alone is learnt. With prompt_field: answers "
        "in a chat, as texts or lists of messages. With text_field: texts that continue that "
        "column's, without a chat template.",
    )
    generate: GenerateConfig | None = Field(
        None,
        description="Lets the teacher, or another model, write text first. It answers the prompts in prompt_field, "
        "or the last message of each chat in messages_field (an existing answer is replaced), or "
        "continues the texts in text_field.",
    )
    id_field: str | None = Field(
        None,
        min_length=1,
        description="Column with unique ids that never change. Default: the row number.",
    )
    max_length: int = Field(512, ge=1, description="Longest sequence, in tokens.")
    overlong: Literal["split", "truncate", "truncate_left", "drop_turns", "drop"] = Field(
        "split",
        description="Treatment of texts longer than max_length, which are counted. split: "
        "consecutive pieces of a document; of chats and completions the beginning only. truncate: "
        "the beginning only. truncate_left: the end only, after BOS if the text begins with it. "
        "drop_turns: chats only; their oldest turns are left out, and the system prompt and the "
        "tools stay. drop: left out. A document of more than a million characters is tokenised in "
        "overlapping parts, with the tokens of a single call, except perhaps inside a word of a "
        "megabyte.",
    )
    on_bad_rows: Literal["fail", "skip"] | None = Field(
        None,
        description="Treatment of rows that cannot be used. fail: the first one stops the build. "
        "skip: all are left out, and so are the rest of files that cannot be read. Default: lines "
        "and files that cannot be read stop the build, rows of another shape are left out. Rows "
        "that are left out or cut are named in OUTPUT.rejects.jsonl (docs/texts.md).",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens in all sequences together. The build stops before "
        "the sequence that would exceed it.",
    )
    add_special_tokens: bool = Field(
        True,
        description="Documents only: whether the tokenizer adds its special tokens, usually BOS "
        "at the start. A text that begins with BOS gets no second one; such texts are counted.",
    )
    append_eos: bool = Field(
        False, description="Documents only: whether each ends with the tokenizer's EOS."
    )
    chat_template: Path | None = Field(
        None, description="A Jinja file that replaces the tokenizer's own chat template."
    )
    tools_field: Annotated[str, Field(min_length=1)] | Literal[False] | None = Field(
        None,
        description="Chats and prompts only: column with tool definitions for the template, as "
        "lists or as JSON text of lists. Default: the column `tools`, if it exists. false: no "
        "tools.",
    )
    template_arguments: dict[str, object] = Field(
        default_factory=dict,
        description="Chats and prompts only: further arguments of the chat template, such as "
        "`enable_thinking: false`.",
    )
    template_date: date | None = Field(
        None,
        description="Chats and prompts only: the date of today, for templates that write it. "
        "Default: the day on which the build first starts. Later starts of the same build keep "
        "that day.",
    )

    @field_validator("path")
    @classmethod
    def _path_has_a_home(cls, path: str) -> str:
        return with_home(path)

    @field_validator("split")
    @classmethod
    def _split_is_one(cls, split: str) -> str:
        parse_slice(split)
        return split

    @field_validator("chat_template")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else expanded(path)

    @field_validator("template_arguments")
    @classmethod
    def _arguments_are_the_templates(cls, arguments: dict[str, object]) -> dict[str, object]:
        for name in _NOT_ARGUMENTS.intersection(arguments):
            raise ValueError(f"{name!r} is not for a config to give to a template; remove it")
        return arguments

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.path) == bool(self.sources):
            found = "both are" if self.path else "neither is"
            raise ValueError(
                f"a data set has a path or sources, but {found} set; set path, or sources for several"
            )
        if len({part.kind for part in self.parts()}) > 1:
            raise ValueError(
                "sources has documents and chats; build a cache of each, and train on both"
            )
        return self

    @model_validator(mode="after")
    def _templates_are_for_chats(self) -> Self:
        if self.kind == "documents":
            for name in ("tools_field", "template_arguments", "template_date"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is set, but documents are not rendered by a template; remove it"
                    )
        return self

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        fields = [
            name for name in ("text_field", "messages_field", "prompt_field") if getattr(self, name)
        ]
        if len(fields) > 1:
            raise ValueError(
                f"{' and '.join(fields)} are both set; a data set is documents, chats or prompts: set one"
            )
        if self.completion_field:
            self._check_completions()
        if self.generate is None:
            if self.prompt_field and not self.completion_field:
                raise ValueError(
                    "prompt_field is set, but neither generate nor completion_field; set generate if the teacher is to "
                    "answer the prompts, or completion_field if the data has the answers"
                )
            return self
        if not fields:
            raise ValueError(
                "generate is set, but not what to answer; set prompt_field (a column of questions), messages_field (chats) "
                "or text_field (texts to continue)"
            )
        if self.text_field and self.generate.system_prompt is not None:
            raise ValueError(
                "system_prompt is set, but text_field is continued as it stands; use prompt_field"
            )
        if self.generate.splice is not None and self.max_tokens is not None:
            raise ValueError(
                f"max_tokens is {self.max_tokens} beside generate.splice, which goes on with every answer of another cache; remove "
                "it, and choose prompts with generate.max_prompts"
            )
        if (self.generate.max_new_tokens or 1) >= self.max_length:
            raise ValueError(
                f"max_new_tokens is {self.generate.max_new_tokens}, which leaves no room for a prompt in max_length "
                f"{self.max_length}; raise max_length"
            )
        return self

    @model_validator(mode="after")
    def _turns_are_of_chats(self) -> Self:
        if self.overlong == "drop_turns" and self.kind == "documents":
            raise ValueError(
                "overlong is drop_turns, but documents have no turns; set overlong=truncate_left, or messages_field"
            )
        return self

    def _check_completions(self) -> None:
        if self.generate is not None:
            raise ValueError(
                "completion_field and generate are both set; the teacher writes the answers or the data has them: set one"
            )
        if self.messages_field:
            raise ValueError(
                "completion_field is set beside messages_field; name the column of the prompts in prompt_field instead, "
                "which takes lists of messages too"
            )
        if not (self.text_field or self.prompt_field):
            raise ValueError(
                "completion_field is set, but not the column of the prompts; set prompt_field (chats) or text_field "
                "(texts without a chat template)"
            )

    def parts(self) -> list[DataConfig]:
        """The config of each source; of a data set with a path, itself."""
        return [self._part(*each) for each in enumerate(self.sources)] or [self]

    def _part(self, number: int, source: SourceConfig) -> DataConfig:
        columns = {"text_field", "messages_field", "prompt_field", "completion_field"}
        given = source.model_dump(exclude={"weight"}, exclude_none=True)
        left_out = {"sources", *(columns if columns & given.keys() else ())}
        try:
            return DataConfig.model_validate({**self.model_dump(exclude=left_out), **given})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("sources", number, *first["loc"])))
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None

    @property
    def where(self) -> str:
        """The path, or the paths of all sources."""
        return " + ".join(part.path for part in self.parts())

    @property
    def splits(self) -> str:
        """The split, or ``mixed`` for sources with several."""
        splits = {part.split for part in self.parts()}
        return splits.pop() if len(splits) == 1 else "mixed"

    @property
    def slice(self) -> Slice:
        """The part of the split to read."""
        return parse_slice(self.split)

    @property
    def kind(self) -> Literal["documents", "chats"]:
        """The kind of text that the teacher reads."""
        if self.sources:
            return self.parts()[0].kind
        return "chats" if self.messages_field or self.prompt_field else "documents"

    @property
    def has_completions(self) -> bool:
        """Whether rows are prompts with completions."""
        return any(part.completion_field for part in self.parts())

    @property
    def looks_for_tools(self) -> bool:
        """Whether the default column of tool definitions is read, if it exists."""
        taken = (self.messages_field, self.prompt_field, self.completion_field, self.id_field)
        return self.kind == "chats" and self.tools_field is None and "tools" not in taken

    @property
    def mask_policy(self) -> str:
        """The rule for the tokens that are learnt."""
        if self.sources:
            policies = {part.mask_policy for part in self.parts()}
            return policies.pop() if len(policies) == 1 else "mixed"
        if self.generate is not None:
            return "generated"
        if self.completion_field:
            return "completion"
        return "assistant" if self.messages_field else "all"
