"""The build config: one YAML file describes a cache. Unknown keys are errors."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from logitcask.cache_format.cli.config_docs import markdown
from logitcask.cache_format.cli.config_model import ConfigModel, expanded, with_home
from logitcask.cache_format.manifest import StoreSettings
from logitcask.cache_format.runtime.extensions import TEACHER, is_named, unknown
from logitcask.cache_format.schema import MAX_DRAWS
from logitcask.cache_format.share.remote_writer import work_folder
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.text.config import DataConfig, SpliceConfig

# A name or an IPv4 address without empty parts.
_HOST = re.compile(r"[\w~-]+(\.[\w~-]+)*\.?")


BACKENDS = ("vllm", "transformers", "synthetic", "server")
"""The teacher backends of this project."""


class ServerConfig(ConfigModel):
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


class TeacherConfig(ConfigModel):
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
        return with_home(model)

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


class StoreConfig(ConfigModel):
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

    @property
    def ragged(self) -> bool:
        """Whether heads may differ in size."""
        return self.capture().ragged

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

    def settings(
        self, vocab_size: int, *, writer_logprobs: bool = False, chosen_ids: int = 0
    ) -> StoreSettings:
        """These settings in the manifest's form."""
        shared = self.model_dump(exclude={"shard_tokens", "compression_level"})
        return StoreSettings(
            **shared,
            vocab_size=vocab_size,
            capture_k=self.top_k,
            entropy=self.tail_samples > 0,
            writer_logprobs=writer_logprobs,
            chosen_ids=chosen_ids,
        )


class AuditConfig(ConfigModel):
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


class ScaleConfig(ConfigModel):
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


class BuildConfig(ConfigModel):
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

    trusted_keys: tuple[str, ...] = Field(
        (),
        description="Keys by one of which an existing cache must be signed to be reused, as "
        "`ed25519:...` or their `.pub` files (docs/trust.md). Default: no signature is asked for.",
    )

    @field_validator("output")
    @classmethod
    def _folder_or_url(cls, output: str | Path) -> str | Path:
        if isinstance(output, Path):
            return expanded(output)
        protocol, is_url, path = output.partition("://")
        if is_url and protocol not in ("file", "local"):
            return output
        if is_url and path.startswith("localhost/"):  # file://HOST/PATH, as RFC 8089 has it
            path = path.removeprefix("localhost")
        folder = path if is_url else output
        if not folder:
            raise ValueError("expected a folder, or the URL of one")
        return expanded(Path(folder))

    @field_validator("log")
    @classmethod
    def _home(cls, log: bool | Path) -> bool | Path:
        return log if isinstance(log, bool) else expanded(log)

    @property
    def writer(self) -> str | None:
        """The model that writes the text, if there is one and it is not the teacher."""
        return None if self.data.generate is None else self.data.generate.writer

    @property
    def splice(self) -> SpliceConfig | None:
        """The splices of the teacher's tokens into answers of an earlier cache, if there are any."""
        return None if self.data.generate is None else self.data.generate.splice

    @property
    def writer_logprobs(self) -> bool:
        """Whether every learnt token is the writer's, so that its logprobs are stored."""
        return self.writer is not None and self.splice is None

    def store_settings(self, vocab_size: int) -> StoreSettings:
        """The settings of the store in the manifest's form."""
        return self.store.settings(
            vocab_size, writer_logprobs=self.writer_logprobs, chosen_ids=self.chosen_ids
        )

    @property
    def chosen_ids(self) -> int:
        """Number of the writer's most probable ids that the teacher scores at each position."""
        return 0 if self.data.generate is None else self.data.generate.writer_top_k or 0

    def capture(self) -> Capture:
        """The values to request from the teacher."""
        return replace(self.store.capture(), chosen=self.chosen_ids)

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
    def _a_backend_scores_ids_of_others(self) -> Self:
        if self.chosen_ids and self.teacher.backend not in ("vllm", "transformers", "synthetic"):
            raise ValueError(
                f"data.generate.writer_top_k is {self.chosen_ids}, but a teacher.backend of {self.teacher.backend!r} scores no ids "
                "that another model chooses; set teacher.backend to transformers, or to vllm on a GPU, or remove writer_top_k"
            )
        return self

    @model_validator(mode="after")
    def _a_splice_reads_another_cache(self) -> Self:
        splice = self.splice
        if splice is not None and (
            splice.cache == self.output
            or expanded(Path(splice.cache)).absolute() == Path(self.output).absolute()
        ):
            raise ValueError(
                f"output is {self.output}, and so is data.generate.splice.cache, which is read; choose another output"
            )
        return self

    @model_validator(mode="after")
    def _a_server_can_do_it(self) -> Self:
        if self.teacher.backend == "server" and self.scale is not None:
            raise ValueError(
                "scale starts engines of its own; a server is kept busy by teacher.server.concurrency"
            )
        generate = self.data.generate
        if self.teacher.backend == "server" and generate is not None and generate.writer is None:
            raise ValueError(
                "a server only scores; for data.generate use another teacher.backend, or let another model write "
                "(data.generate.writer)"
            )
        if self.teacher.backend == "server" and self.store.tail_samples:
            raise ValueError(
                "a server sends no draws from the tail (teacher.backend is server, store.tail_samples is "
                f"{self.store.tail_samples}); set store.tail_samples=0"
            )
        return self


if __name__ == "__main__":  # for docs/config.md
    print(markdown(BuildConfig))
