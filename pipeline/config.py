"""The build config: one YAML file describes a cache. Unknown keys are errors."""

from __future__ import annotations

import ipaddress
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.cache_format.extensions import TEACHER, is_named, unknown
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.schema import MAX_DRAWS
from logitcask.cache_format.share.remote_writer import work_folder
from logitcask.pipeline.distribution.capture import Capture
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

# A name or an IPv4 address without empty parts.
_HOST = re.compile(r"[\w~-]+(\.[\w~-]+)*\.?")


BACKENDS = ("vllm", "transformers", "synthetic", "server")
"""The teacher backends of this project."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerConfig(_Config):
    """The server of `backend: server`."""

    url: str = Field(description="Address of the server: `http://HOST:PORT`.")
    model: str | None = Field(
        None,
        description="The server's name for teacher.model (`--served-model-name`). Default: the "
        "served model with the name of teacher.model, or with the last part of its path.",
    )
    concurrency: int = Field(
        32, ge=1, le=1024, description="Simultaneous requests, one sequence each."
    )
    timeout: float = Field(
        300, gt=0, description="Seconds for one answer, including its time in the server's queue."
    )
    patience: float = Field(
        900,
        ge=0,
        description="Seconds without any success (no answer, or only errors) after which the "
        "build stops.",
    )
    api_key_env: str | None = Field(
        None, description="Name of the environment variable with the server's API key."
    )
    compare: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the server's scores of a probe text are compared with those of "
        "transformers, which runs the weights of teacher.model on this machine's CPU. auto: if "
        "the weights are on this machine and take at most 2 GiB.",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest accepted mean difference of that comparison, in nats. Default: 0.01 "
        "with teacher.dtype float32, else 0.3. From one start of a build to the next, the "
        "server's own scores may change by half of it.",
    )

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        expected = "expected http://HOST:PORT or https://HOST:PORT"
        if " " in url or not url.isprintable():
            raise ValueError(f"a URL holds no white space; {expected}")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            bracketed = parts.netloc.rpartition("@")[2].startswith("[")
            if bracketed:
                ipaddress.IPv6Address(host)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}; {expected}") from None
        if parts.scheme not in ("http", "https"):
            raise ValueError(expected)
        if not (bracketed or _HOST.fullmatch(host)):
            raise ValueError(f"{host!r} is no host; {expected}")
        if port == 0:
            raise ValueError(f"no server listens at port 0; {expected}")
        if parts.query or parts.fragment:
            raise ValueError(f"nothing may come after ? or #; {expected}")
        return url.rstrip("/").removesuffix("/v1")


class TeacherConfig(_Config):
    """The model that scores the text, and its engine."""

    model: str = Field(
        min_length=1,
        description="A built-in name (`smollm2-135m`, `synthetic`), a model folder, or a name on "
        "the Hugging Face Hub.",
    )
    backend: str = Field(
        "vllm",
        description="The engine that runs the model: `vllm`, `transformers`, `synthetic`, or "
        "`server`, a running vLLM server, over HTTP. If vLLM is not installed, `vllm` falls back "
        "to `transformers` with a warning. `MODULE:CLASS`: one of your own (docs/extending.md).",
    )
    server: ServerConfig | None = Field(None, description="The server, for `backend: server` only.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: str = Field(
        "auto",
        description="Precision of the weights and of the arithmetic: auto (the engine's choice, "
        "on a CPU float32), float32, bfloat16, float16. With a server: the precision that it was "
        "started with.",
    )
    route: Literal["auto", "raw", "flat", "stock"] = Field(
        "auto",
        description="The form in which vLLM hands over logprobs. `raw`: its internal arrays, "
        "checked at every start. `flat`: its public flat form. `stock`: its default form, which "
        "is slow and cannot carry draws. `auto`: the first of these that works, with a warning if "
        "it is not `raw`.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="Number of GPUs over which every layer is split. An engine takes this number "
        "times `engine_args.pipeline_parallel_size`.",
    )
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens per step of the engine. It limits memory, because a step holds tokens "
        "x vocabulary logits. Default: 1024 on a CPU, 8192 on a GPU.",
    )
    engine_args: dict[str, object] = Field(
        default_factory=dict,
        description="Further arguments, passed unchanged to `vllm.LLM(...)` (or "
        "`from_pretrained(...)`, or a backend of your own). `trust_remote_code: true` also allows the code of the model's "
        "config and tokenizer to run. It is the only argument allowed with `backend: server`.",
    )
    vocab_size: int = Field(
        49_152, ge=258, description="Synthetic teacher only: number of ids that it can predict."
    )
    seed: int = Field(0, ge=0, description="Synthetic teacher only: seed of its distributions.")

    @field_validator("model")
    @classmethod
    def _home(cls, model: str) -> str:
        return _with_home(model)

    @field_validator("backend")
    @classmethod
    def _known(cls, backend: str) -> str:
        # Its module is imported only where a teacher is opened: a config may be that of a cache.
        if backend not in BACKENDS and not is_named(TEACHER, backend):
            raise ValueError(unknown(TEACHER, backend, BACKENDS))
        return backend

    @property
    def has_own_backend(self) -> bool:
        """Whether the backend is one outside this project."""
        return self.backend not in BACKENDS

    @property
    def trust_remote_code(self) -> bool:
        """Whether the model's own code may run: ``engine_args.trust_remote_code``."""
        return self.engine_args.get("trust_remote_code") is True

    @property
    def pipeline_stages(self) -> int:
        """Number of groups of layers on GPUs of their own:
        ``engine_args.pipeline_parallel_size``.
        """
        stages = self.engine_args.get("pipeline_parallel_size", 1)
        assert isinstance(stages, int)
        return stages

    @property
    def is_synthetic(self) -> bool:
        """Whether the backend or the model is ``synthetic``, which needs no weights and no GPU."""
        return not self.has_own_backend and "synthetic" in (self.backend, self.model)

    @property
    def gpus_per_engine(self) -> int:
        """Number of GPUs for one engine, on a machine with GPUs; 0 for the synthetic teacher."""
        if self.is_synthetic:
            return 0
        return self.tensor_parallel_size * self.pipeline_stages

    def step_tokens(self, *, on_cpu: bool) -> int:
        """``batch_tokens``, or the default for the device."""
        return self.batch_tokens or (1024 if on_cpu else 8192)

    def server_tolerance(self) -> float:
        """``server.tolerance``, or the default for the dtype, in nats."""
        default = 0.01 if self.dtype == "float32" else 0.3
        return default if self.server is None else self.server.tolerance or default

    @field_validator("engine_args")
    @classmethod
    def _trust_is_yes_or_no(cls, engine_args: dict[str, object]) -> dict[str, object]:
        trust = engine_args.get("trust_remote_code", False)
        if not isinstance(trust, bool):
            raise ValueError(f"trust_remote_code is {trust!r}; expected true or false")
        return engine_args

    @field_validator("engine_args")
    @classmethod
    def _stages_are_a_number(cls, engine_args: dict[str, object]) -> dict[str, object]:
        stages = engine_args.get("pipeline_parallel_size", 1)
        if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
            raise ValueError(
                f"pipeline_parallel_size is {stages!r}; expected a whole number of 1 or more"
            )
        return engine_args

    @model_validator(mode="after")
    def _served(self) -> Self:
        if self.backend != "server":
            return self
        if self.server is None:
            raise ValueError(
                "backend is server, but not which: set teacher.server.url=http://HOST:PORT"
            )
        if self.engine_args.keys() - {"trust_remote_code"}:
            raise ValueError(
                "engine_args are for engines started here; give the server its options when starting it"
            )
        return self


class GenerateConfig(_Config):
    """Answers that the teacher writes to the prompts of a data set. They are then scored like any
    other text.
    """

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

    @model_validator(mode="after")
    def _stops_are_strings(self) -> Self:
        if not all(self.stop):
            raise ValueError(
                "stop holds an empty string, which would end every answer before it begins; remove it"
            )
        return self


class SourceConfig(_Config):
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


class DataConfig(_Config):
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
        description="Lets the teacher write text first. It answers the prompts in prompt_field, "
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
        return _with_home(path)

    @field_validator("split")
    @classmethod
    def _split_is_one(cls, split: str) -> str:
        parse_slice(split)
        return split

    @field_validator("chat_template")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else _expanded(path)

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


class StoreConfig(_Config):
    """The part of each distribution that is kept, and the size of the shards.

    The head of a distribution is its most probable tokens, kept with their probabilities. The tail
    is the rest, kept as its total mass and as tokens drawn from it at random. By default the head
    has the tokens above 2 %, at least 8 of them, and the tail has a draw for each 2 % of its mass.
    At equal bytes these teach with less noise than fixed numbers of both (docs/format.md).
    """

    top_k: int = Field(
        32, ge=0, description="Maximum number of head entries per position. 0: no head, only draws."
    )
    min_k: int = Field(
        8,
        ge=0,
        description="Minimum number of head entries per position, whatever top_p and "
        "min_probability say.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="A head ends as soon as its entries add up to this probability.",
    )
    min_probability: float | None = Field(
        0.02,
        gt=0,
        lt=1,
        description="A head ends before the first entry less probable than this. null: no such "
        "bound.",
    )
    tail_samples: int = Field(
        32,
        ge=0,
        le=MAX_DRAWS,
        description="Maximum number of draws from the tail, per position and set. With draws, KL "
        "losses are unbiased. 0: none.",
    )
    sample_sets: int = Field(
        1, ge=1, le=255, description="Number of independent sets of draws. Training pools them."
    )
    mass_per_sample: float | None = Field(
        0.02,
        gt=0,
        lt=1,
        description="Tail mass per draw: a larger tail gets more draws. null: tail_samples draws "
        "at every position.",
    )
    draws: Literal["systematic", "independent"] = Field(
        "systematic",
        description="Method of drawing: systematic (evenly spaced points of the tail's CDF) or "
        "independent.",
    )
    seed: int = Field(0, description="Seed of the draws.")
    sample_logprobs: bool = Field(
        False,
        description="Whether the logprobs of the draws are stored. Some losses need them. They "
        "take 0.8 bytes a draw.",
    )
    logprob_step: float = Field(
        1 / 16,
        description="Step of stored logprobs, in nats, a power of two. The rounding error is at "
        "most half a step.",
    )
    shard_tokens: int = Field(
        1_000_000,
        ge=1,
        description="Tokens per shard. A build works, commits and resumes in whole shards.",
    )
    compression_level: int = Field(
        1,
        ge=1,
        le=22,
        description="zstd level of the shards. Higher levels save no bytes on this data.",
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        from logitcask.cache_format.manifest import check_step

        check_step(self.logprob_step)
        if self.top_k == 0 and self.tail_samples == 0:
            raise ValueError("top_k and tail_samples are both 0: nothing would be kept")
        if self.sample_logprobs and self.tail_samples == 0:
            raise ValueError("sample_logprobs is set, but tail_samples is 0")
        return self

    def capture(self) -> Capture:
        """The values to request from the teacher."""
        return Capture(
            top_k=self.top_k,
            min_k=self.min_k,
            top_p=self.top_p,
            min_probability=self.min_probability,
            samples=self.tail_samples,
            sets=self.sample_sets,
            mass_per_sample=self.mass_per_sample,
            independent=self.draws == "independent",
            seed=self.seed,
        )

    def settings(self, vocab_size: int) -> StoreSettings:
        """These settings in the manifest's form."""
        shared = self.model_dump(exclude={"shard_tokens", "compression_level"})
        return StoreSettings(
            **shared, vocab_size=vocab_size, capture_k=self.top_k, entropy=self.tail_samples > 0
        )


class AuditConfig(_Config):
    """The audit at the end of a build: transformers scores a few of its sequences again, in
    float32.
    """

    sequences: int = Field(
        4,
        ge=0,
        description="Number of sequences compared before the cache is complete. 0: no audit.",
    )
    max_engine_difference: float | None = Field(
        None,
        ge=0,
        description="Largest accepted mean difference of logprobs, in nats; above it the build "
        "fails. Default: the difference that the teacher's precision can cause, 0.001 in float32, "
        "0.05 in 16 bits, 0.3 in FP8 and 0.7 in 4 bits. For a mixture of experts the last three "
        "are 0.15 higher (docs/capture.md).",
    )


class ScaleConfig(_Config):
    """Several engines at once, on the GPUs of a machine or of a cluster (docs/scale.md)."""

    engine: Literal["ray"] = Field("ray", description="The scheduler of the engines: Ray Data.")
    workers: int = Field(ge=1, description="Number of engines.")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="GPUs per engine. Default: teacher.tensor_parallel_size times "
        "engine_args.pipeline_parallel_size, or 0 without GPUs.",
    )
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="CPU cores per engine. Default: 1 with GPUs, else all cores divided by "
        "workers.",
    )
    address: str | None = Field(
        None,
        description="Address of a Ray cluster. Default: $RAY_ADDRESS, or else a new cluster on "
        "this machine for this build.",
    )


class BuildConfig(_Config):
    """A `teacher-cache build` config."""

    teacher: TeacherConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    audit: AuditConfig = AuditConfig()
    scale: ScaleConfig | None = Field(
        None, description="Several engines. Default: one engine, in this process."
    )
    output: str | Path = Field(
        description="Place of the cache: a folder, or an fsspec URL (s3://, gs://, ...). With a "
        "URL, each shard is sent as soon as it is committed, and the state of the build is in "
        "`builds/` under LOGITCASK_CACHE (docs/remote.md)."
    )
    log: bool | Path = Field(
        True,
        description="Log of the running build, as JSON lines (docs/capture.md). A path: lines are "
        "appended to that file. true: the file is OUTPUT.log.jsonl, beside the cache's folder. "
        "false: no log.",
    )

    @field_validator("output")
    @classmethod
    def _folder_or_url(cls, output: str | Path) -> str | Path:
        if isinstance(output, Path):
            return _expanded(output)
        protocol, is_url, path = output.partition("://")
        if is_url and protocol not in ("file", "local"):
            return output
        if is_url and path.startswith("localhost/"):  # file://HOST/PATH, as RFC 8089 has it
            path = path.removeprefix("localhost")
        folder = path if is_url else output
        if not folder:
            raise ValueError("expected a folder, or the URL of one")
        return _expanded(Path(folder))

    @field_validator("log")
    @classmethod
    def _home(cls, log: bool | Path) -> bool | Path:
        return log if isinstance(log, bool) else _expanded(log)

    @property
    def folder(self) -> Path:
        """The folder on this machine where the build works: ``output``, or a URL's work folder."""
        return self.output if isinstance(self.output, Path) else work_folder(self.output)

    def log_file(self) -> Path | None:
        """The file of the log; None if there is no log."""
        if isinstance(self.log, bool):
            return Path(f"{self.folder.absolute()}.log.jsonl") if self.log else None
        return self.log

    def rejects_file(self) -> Path:
        """The file with the rows that are left out or cut, beside the folder of the cache."""
        return Path(f"{self.folder.absolute()}.rejects.jsonl")

    @model_validator(mode="after")
    def _stock_cannot_draw(self) -> Self:
        if self.teacher.route == "stock" and self.store.tail_samples:
            raise ValueError(
                "teacher.route=stock merges equal ids, so it cannot carry draws; set store.tail_samples=0 or another route"
            )
        return self

    @model_validator(mode="after")
    def _a_server_can_do_it(self) -> Self:
        if self.teacher.backend == "server" and self.scale is not None:
            raise ValueError(
                "scale starts engines of its own; a server is kept busy by teacher.server.concurrency"
            )
        if self.teacher.backend == "server" and self.data.generate is not None:
            raise ValueError("a server only scores; for data.generate use another teacher.backend")
        if self.teacher.backend == "server" and self.store.tail_samples:
            raise ValueError(
                "a server sends no draws from the tail (teacher.backend is server, store.tail_samples is "
                f"{self.store.tail_samples}); set store.tail_samples=0"
            )
        return self


def _expanded(path: Path) -> Path:
    """``path`` with ``~`` expanded, so that all readers of a config get the same folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~NOBODY, or no home at all
        raise ValueError(f"{str(error).rstrip('.')}; name the folder without ~") from None


def _with_home(name: str) -> str:
    """``name`` unchanged, for the manifest. A wrong ``~`` in it raises ValueError here."""
    _expanded(Path(name))
    return name


if __name__ == "__main__":  # for docs/config.md
    print(markdown(BuildConfig))
