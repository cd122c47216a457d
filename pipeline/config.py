"""The build config: one YAML file describes a cache. Every field has its reason here; unknown
keys are errors.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.schema import MAX_DRAWS
from logitcask.cache_format.share.remote_writer import work_folder
from logitcask.pipeline.distribution.capture import Capture

# Names that transformers gives a meaning of its own when it renders a chat.
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

# A name or an IPv4 address, no part of it empty.
_HOST = re.compile(r"[\w~-]+(\.[\w~-]+)*\.?")


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerConfig(_Config):
    """The server of `backend: server`."""

    url: str = Field(description="Where it listens: `http://HOST:PORT`.")
    model: str | None = Field(
        None,
        description="Its name of teacher.model (`--served-model-name`). Default: the one that is called the same.",
    )
    concurrency: int = Field(
        32, ge=1, le=1024, description="Requests with the server at a time, one sequence each."
    )
    timeout: float = Field(
        300, gt=0, description="Seconds for one answer, its time in the server's queue included."
    )
    patience: float = Field(
        900, ge=0, description="Seconds without an answer, or with errors only, until giving up."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable with the server's API key."
    )
    compare: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compare what it says of a probe with the weights of teacher.model, by transformers on this "
        "machine's CPU; auto: where they are here and take at most 2 GiB.",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="Mean difference from those weights, nats. Default: 0.01 with teacher.dtype float32, else 0.3. The "
        "server may differ from what it said before by half of it.",
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
    """Which model scores the text, and with what engine."""

    model: str = Field(
        min_length=1,
        description="A built-in name (`smollm2-135m`, `synthetic`), a model folder, or a hub name.",
    )
    backend: Literal["vllm", "transformers", "synthetic", "server"] = Field(
        "vllm",
        description="The engine; `server`: a vLLM server over HTTP. Where vLLM is not installed, `vllm` falls back to "
        "`transformers` and says so.",
    )
    server: ServerConfig | None = Field(
        None, description="With `backend: server`: where it is, and how it is asked."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: str = Field(
        "auto",
        description="Weights and arithmetic: auto (float32 on a CPU), float32, bfloat16, float16. With a server: what it "
        "was started with.",
    )
    route: Literal["auto", "raw", "flat", "stock"] = Field(
        "auto",
        description="How logprobs leave vLLM: `raw` keeps its arrays (self-checked at start-up), `flat` is the public way, "
        "`stock` vLLM's default, slow and without draws. `auto`: the first that works, saying so if it is not `raw`.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="GPUs that share every layer. With `engine_args.pipeline_parallel_size` an engine has that many times as "
        "many.",
    )
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens per engine step; bounds memory, since a step holds tokens x vocabulary logits. "
        "Default: 1024 on a CPU, 8192 on a GPU.",
    )
    engine_args: dict[str, object] = Field(
        default_factory=dict,
        description="Passed to `vllm.LLM(...)` (or `from_pretrained(...)`) as they are. `trust_remote_code: true` also lets "
        "the code of the model's config and tokenizer run, and is the only one that a server's teacher takes.",
    )
    vocab_size: int = Field(
        49_152, ge=258, description="Synthetic teacher only: ids it can predict."
    )
    seed: int = Field(0, ge=0, description="Synthetic teacher only: which distribution.")

    @field_validator("model")
    @classmethod
    def _home(cls, model: str) -> str:
        return _with_home(model)

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model may run: ``engine_args.trust_remote_code``."""
        return self.engine_args.get("trust_remote_code") is True

    @property
    def pipeline_stages(self) -> int:
        """Parts in which the layers are shared out among GPUs:
        ``engine_args.pipeline_parallel_size``.
        """
        stages = self.engine_args.get("pipeline_parallel_size", 1)
        assert isinstance(stages, int)
        return stages

    @property
    def is_synthetic(self) -> bool:
        """Whether the teacher is the synthetic one, which takes no model and no GPU. Named as
        backend or as model.
        """
        return "synthetic" in (self.backend, self.model)

    @property
    def gpus_per_engine(self) -> int:
        """GPUs that one engine takes, where there are any; 0 for the synthetic teacher, which
        has no use for them.
        """
        if self.is_synthetic:
            return 0
        return self.tensor_parallel_size * self.pipeline_stages

    def step_tokens(self, *, on_cpu: bool) -> int:
        """``batch_tokens``, or its default for the device."""
        return self.batch_tokens or (1024 if on_cpu else 8192)

    def server_tolerance(self) -> float:
        """``server.tolerance``, or its default for the dtype, nats."""
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
    """How the teacher answers the prompts of a data set, before what it wrote is scored like any
    other text.
    """

    samples: int = Field(
        1, ge=1, description="Answers to each prompt; sequences are called `row/sample`."
    )
    temperature: float = Field(
        1.0, ge=0, description="Of sampling; 0: the most probable token, always."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample among the most probable tokens that hold this mass."
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer, in tokens. Prompt and answer together never exceed data.max_length.",
    )
    stop: tuple[str, ...] = Field(
        (), description="Strings that end an answer, beside the teacher's own end-of-turn tokens."
    )
    include_stop: bool = Field(
        False,
        description="Whether the stop string belongs to the answer; else it is cut off, in whole tokens.",
    )
    seed: int = Field(
        0,
        description="Of sampling; each answer draws from (seed, row, sample), whatever the batch.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message put before every prompt that has none; chats and prompt_field only.",
    )

    @model_validator(mode="after")
    def _stops_are_strings(self) -> Self:
        if not all(self.stop):
            raise ValueError(
                "stop holds an empty string, which would end every answer before it begins; remove it"
            )
        return self


class DataConfig(_Config):
    """Which text, and how it becomes sequences."""

    path: str = Field(
        min_length=1,
        description="A built-in name (`python-docs`), a file or folder, or a hub name for load_dataset. A path is taken "
        "literally, never as a pattern.",
    )
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field(
        "train",
        description="Split to read. Of a folder also `all`: every data file below it, whatever its name and type.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    text_field: str | None = Field(
        None,
        min_length=1,
        description="Column with documents. Default: `text`, unless another field is set.",
    )
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="Column with chats, lists of {role, content}; the loss mask covers assistant tokens only.",
    )
    prompt_field: str | None = Field(
        None,
        min_length=1,
        description="With generate: column with prompts, each the one user message of a chat.",
    )
    generate: GenerateConfig | None = Field(
        None,
        description="Let the teacher write the text first: it answers prompt_field, or the end of each chat in "
        "messages_field (an answer that is there already is replaced), or continues text_field.",
    )
    id_field: str | None = Field(
        None, min_length=1, description="Column with stable, unique ids. Default: the row number."
    )
    max_length: int = Field(512, ge=1, description="Longest sequence, in tokens.")
    overlong: Literal["split", "truncate", "drop"] = Field(
        "split",
        description="Documents above max_length: cut into consecutive pieces, cut off, or left out. Counted. One above a "
        "million characters is tokenised in overlapping parts, with the tokens of one call wherever words end.",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Stop before the sequence that would exceed this many tokens."
    )
    add_special_tokens: bool = Field(
        True,
        description="Documents: let the tokenizer add what it adds (BOS, usually); a text that has it already gets no second "
        "one, which is counted.",
    )
    append_eos: bool = Field(False, description="Documents: end each with the tokenizer's EOS.")
    chat_template: Path | None = Field(
        None, description="A Jinja file used instead of the tokenizer's own template."
    )
    tools_field: Annotated[str, Field(min_length=1)] | Literal[False] | None = Field(
        None,
        description="Chats and prompts: column with the tool definitions that the template is given, lists or JSON text of "
        "lists. Default: `tools`, if there is one; false: none.",
    )
    template_arguments: dict[str, object] = Field(
        default_factory=dict,
        description="Chats and prompts: given to the chat template beside messages and tools, such as "
        "`enable_thinking: false`.",
    )
    template_date: date | None = Field(
        None,
        description="Chats and prompts: today, for a template that writes the date. Default: the day on which the build "
        "begins, which is written down and holds for all of it.",
    )

    @field_validator("path")
    @classmethod
    def _path_has_a_home(cls, path: str) -> str:
        return _with_home(path)

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
        if self.generate is None:
            if self.prompt_field:
                raise ValueError(
                    "prompt_field is set, but not generate; prompts are for the teacher to answer: set it"
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

    @property
    def kind(self) -> Literal["documents", "chats"]:
        """What the teacher reads."""
        return "chats" if self.messages_field or self.prompt_field else "documents"

    @property
    def looks_for_tools(self) -> bool:
        """Whether a column of tool definitions is read if there is one, without being asked for."""
        taken = (self.messages_field, self.prompt_field, self.id_field)
        return self.kind == "chats" and self.tools_field is None and "tools" not in taken

    @property
    def mask_policy(self) -> str:
        """Which tokens are learnt."""
        if self.generate is not None:
            return "generated"
        return "assistant" if self.messages_field else "all"


class StoreConfig(_Config):
    """What is kept of each distribution, and in how large pieces.

    By default a head of the entries above 2 %, at least 8 of them, and draws from the tail, one for
    each 2 % of its mass: at equal bytes these teach with less noise than a fixed number of each
    (docs/format.md).
    """

    top_k: int = Field(32, ge=0, description="Head entries per position, at most; 0: draws alone.")
    min_k: int = Field(
        8, ge=0, description="Head entries per position at least, whatever the next two say."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="A head ends once it holds this mass."
    )
    min_probability: float | None = Field(
        0.02,
        gt=0,
        lt=1,
        description="A head ends before the first entry less probable than this; null: top_k entries.",
    )
    tail_samples: int = Field(
        32,
        ge=0,
        le=MAX_DRAWS,
        description="Draws from the tail per position and set, at most: they make KL losses unbiased. 0: none.",
    )
    sample_sets: int = Field(
        1, ge=1, le=255, description="Independent sets of draws; training pools them."
    )
    mass_per_sample: float | None = Field(
        0.02,
        gt=0,
        lt=1,
        description="Tail mass that one draw stands for; null: tail_samples draws everywhere.",
    )
    draws: Literal["systematic", "independent"] = Field(
        "systematic", description="Evenly spaced points of the tail's CDF, or independent draws."
    )
    seed: int = Field(0, description="Of the draws.")
    sample_logprobs: bool = Field(
        False, description="Store the draws' logprobs, which some losses need; 0.8 B a draw."
    )
    logprob_step: float = Field(
        1 / 16,
        description="Grid of stored logprobs, nats; the error is at most half of it. A power of two.",
    )
    shard_tokens: int = Field(
        1_000_000, ge=1, description="Tokens per shard: the unit of work, of commit and of retry."
    )
    compression_level: int = Field(
        1, ge=1, le=22, description="zstd level of the shards; higher ones save nothing here."
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
        """What the teacher is asked for."""
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
        """The same as the manifest states it."""
        shared = self.model_dump(exclude={"shard_tokens", "compression_level"})
        return StoreSettings(
            **shared, vocab_size=vocab_size, capture_k=self.top_k, entropy=self.tail_samples > 0
        )


class AuditConfig(_Config):
    """The check that ends a build: a few of its sequences, scored again by transformers in
    float32.
    """

    sequences: int = Field(
        4,
        ge=0,
        description="How many sequences are compared before the cache is complete; 0: none.",
    )
    max_engine_difference: float | None = Field(
        None,
        ge=0,
        description="Nats, mean over logprobs, above which the build fails. Default: what the teacher's arithmetic explains, "
        "0.001 in float32, 0.05 in 16 bits, 0.3 in FP8, 0.7 in 4 bits, and 0.15 more than the last three with experts "
        "(docs/capture.md).",
    )


class ScaleConfig(_Config):
    """Many engines at once, over the GPUs of a machine or of a cluster (docs/scale.md)."""

    engine: Literal["ray"] = Field("ray", description="What hands out the shards: Ray Data.")
    workers: int = Field(ge=1, description="Engines.")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="Default where there are GPUs: those of an engine, teacher.tensor_parallel_size times "
        "engine_args.pipeline_parallel_size; else 0.",
    )
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="Default: 1 beside GPUs, else the cores there are, divided by the workers.",
    )
    address: str | None = Field(
        None,
        description="A Ray cluster. Default: $RAY_ADDRESS, or else one on this machine, for this build.",
    )


class BuildConfig(_Config):
    """A `teacher-cache build` config."""

    teacher: TeacherConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    audit: AuditConfig = AuditConfig()
    scale: ScaleConfig | None = Field(None, description="Default: one engine, in this process.")
    output: str | Path = Field(
        description="Where the cache goes: a folder, or an fsspec URL (s3://, gs://, ...), to which each shard is sent once "
        "it is committed; the build's state then lies in `builds/` under LOGITCASK_CACHE (docs/remote.md)."
    )
    log: bool | Path = Field(
        True,
        description="JSON lines about the build as it runs (docs/capture.md), appended to: a file, or true for "
        "OUTPUT.log.jsonl beside the cache's folder, or false for none.",
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
        """Where the build works on this machine: ``output``, or the work folder of that URL."""
        return self.output if isinstance(self.output, Path) else work_folder(self.output)

    def log_file(self) -> Path | None:
        """Where the log goes; None for none."""
        if isinstance(self.log, bool):
            return Path(f"{self.folder.absolute()}.log.jsonl") if self.log else None
        return self.log

    @model_validator(mode="after")
    def _workers_share_a_folder(self) -> Self:
        if self.scale is not None and isinstance(self.output, str):
            raise ValueError(
                f"with scale all workers write to one folder, output is {self.output}; build into a folder that they share, "
                "then `teacher-cache push` it"
            )
        return self

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
    """``path`` with ``~`` as the home folder, so that all who read a config mean the same place."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~NOBODY, or no home at all
        raise ValueError(f"{str(error).rstrip('.')}; name the folder without ~") from None


def _with_home(name: str) -> str:
    """``name`` as it is, which a manifest repeats; a mistake in its ``~`` is found here."""
    _expanded(Path(name))
    return name


if __name__ == "__main__":  # for docs/config.md
    print(markdown(BuildConfig))
