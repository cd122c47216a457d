"""How fast logprobs come out of vLLM by each way, and into a cache, beside the engine's bare
scoring.

    python benchmarks/capture.py speed [--model toy|smollm2-135m|MODEL] [--k 1 16 64 256] [--draws
    N] [--tokens N] [--rounds N] python benchmarks/capture.py memory [--tokens 20000 200000] python
    benchmarks/capture.py table

speed   tokens per second of one engine, all ways in turn in every round:
          stock       ``LLM.generate`` with prompt_logprobs=k: a dict of decoded tokens per token
          undecoded   the same with detokenize=False
          flat        and flat_logprobs=True: lists, not yet arrays
          raw         the arrays themselves
          pipeline    a cache on disk: raw, converted, encoded, committed
          bare        the same request, its results dropped as they leave the engine
memory peak resident memory of builds of different sizes, a process each, with the toy model; and
within the largest one table the results as Markdown, for docs/capture.md

The toy model has one layer and SmolLM2's vocabulary of 49,152, so that what Python does weighs
most. Text is `python-docs`. Starting the engine, tokenising and planning are in no figure. Results
are added to benchmarks/results/capture.json, a run per model, k and draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import machine

from logitcask.cache_format import CacheWriter
from logitcask.pipeline.builder.inputs import Inputs
from logitcask.pipeline.builder.lazy_teacher import LazyTeacher
from logitcask.pipeline.builder.plan import Plan, read_sequences, write_sequences
from logitcask.pipeline.builder.planner import make_plan
from logitcask.pipeline.builder.progress import Progress
from logitcask.pipeline.builder.request import request_of
from logitcask.pipeline.builder.score import estimate_prior, score_shard, score_shards
from logitcask.pipeline.builder.writer_thread import Pair
from logitcask.pipeline.config import BuildConfig, StoreConfig, TeacherConfig
from logitcask.pipeline.memory import use_huge_pages
from logitcask.pipeline.teachers.model import resolve_model
from logitcask.pipeline.teachers.vllm.engine import VllmTeacher
from logitcask.pipeline.teachers.vllm.plugin import drawing
from logitcask.pipeline.teachers.vllm.routes import capturing, sampling
from logitcask.pipeline.text.python_docs import BUILT_IN
from logitcask.pipeline.types import Sequence

RESULTS = Path(__file__).parent / "results" / "capture.json"
TOKENIZER = "smollm2-135m"
MAX_LENGTH = 512
WAYS = ("stock", "undecoded", "flat", "raw", "pipeline", "bare")
# Enough for a few seconds a way on two cores.
TOKENS = {
    "toy": {1: 8000, 16: 8000, 64: 8000, 256: 4000},
    TOKENIZER: {1: 3000, 16: 3000, 64: 5000, 256: 3000},
}


def main() -> None:
    """Runs the part that is asked for."""
    use_huge_pages()  # as the command does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed")
    speed.add_argument(
        "--model", default="toy", help="toy, smollm2-135m, or any model vLLM can run"
    )
    speed.add_argument("--k", type=int, nargs="+", default=[1, 16, 64, 256])
    speed.add_argument(
        "--draws",
        type=int,
        default=0,
        help="draws from the tail beside the k, which stock cannot carry",
    )
    speed.add_argument(
        "--tokens", type=int, help="of python-docs; default: some thousands, fewer for large k"
    )
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    speed.add_argument(
        "--label",
        help="added to the name under which the run is kept, beside others of the same sizes",
    )
    memory = parts.add_parser("memory")
    memory.add_argument("--tokens", type=int, nargs="+", default=[20_000, 200_000])
    memory.add_argument("--k", type=int, default=64)
    parts.add_parser("table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if arguments.part == "speed":
            for k in arguments.k:
                measured = measure_speed(arguments, k, Path(work))
                draws = f", {arguments.draws} draws" if arguments.draws else ""
                label = f", {arguments.label}" if arguments.label else ""
                save("speed", f"{arguments.model}, k={k}{draws}{label}", measured)
        elif arguments.part == "memory":
            save("memory", f"toy, k={arguments.k}", measure_memory(arguments, Path(work)))
        else:
            print(table(json.loads(RESULTS.read_text())))


# --- speed ----------------------------------------------------------------------------------------


def measure_speed(arguments: argparse.Namespace, k: int, work: Path) -> dict[str, Any]:
    """Tokens per second of each way in each round, on one engine."""
    store = StoreConfig(
        top_k=k,
        min_k=k,
        min_probability=None,
        tail_samples=arguments.draws,
        mass_per_sample=None,
        shard_tokens=10**9,
    )
    config = BuildConfig(
        # The baseline decodes every token, so the engine has a tokenizer here.
        teacher=TeacherConfig(
            model=model_of(arguments.model, work), engine_args={"skip_tokenizer_init": False}
        ),
        data={
            "path": "python-docs",
            "max_length": MAX_LENGTH,
            "max_tokens": tokens_of(arguments, k),
        },
        store=store,
        output=work / "cache",
    )
    teacher = VllmTeacher(
        config.teacher,
        resolve_model(config.teacher.model, None),
        max_length=MAX_LENGTH,
        capture=store.capture(),
    )
    try:
        bench = Bench.of(teacher, config, work)
        ways = [
            way for way in arguments.ways if not (arguments.draws and way in ("stock", "undecoded"))
        ]
        rounds = bench.rounds(ways, arguments.rounds, f"k={k}")
        return {
            "tokens": bench.tokens,
            "sequences": len(bench.sequences),
            "route": teacher.route,
            "teacher": teacher.identity().model_dump(
                mode="json", exclude={"model", "weights_sha256"}
            ),
            "tokens_per_second": {
                way: [round(each, 1) for each in found] for way, found in rounds.items()
            },
            "ratio_to_bare": ratios(rounds, "bare"),
            "ratio_to_stock": ratios(rounds, "stock"),
            "cache_bytes_per_token": bench.bytes_per_token,
            "machine": machine(),
        }
    finally:
        teacher.close()


class Bench:
    """One engine, and each way of having it score the same sequences."""

    def __init__(
        self,
        teacher: VllmTeacher,
        config: BuildConfig,
        plan: Plan,
        sequences: list[Sequence],
        work: Path,
    ) -> None:
        self.teacher, self.config, self.plan, self.work = teacher, config, plan, work
        self.sequences = sequences
        self.tokens = sum(len(sequence.input_ids) for sequence in sequences)
        self.bytes_per_token: float | None = None

    @classmethod
    def of(cls, teacher: VllmTeacher, config: BuildConfig, work: Path) -> Bench:
        """With the data of ``config``."""
        with CacheWriter(config.output) as writer:
            inputs = Inputs(config)
            plan = make_plan(
                writer.build_dir,
                config,
                request_of(config),
                inputs,
                LazyTeacher(config, inputs, writer.build_dir),
            )
            return cls(teacher, config, plan, list(read_sequences(writer.build_dir, 0)), work)

    def rounds(self, ways: list[str], count: int, label: str) -> dict[str, list[float]]:
        """Tokens per second of each way in each round; in every round another way is the first."""
        for way in ways:
            self.once(way, self.sequences[:2])  # whatever is compiled or loaded on first use
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(count):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                found[way].append(self.tokens / self.once(way, self.sequences))
                print(
                    f"{label} round {turn + 1} {way:10} {found[way][-1]:10,.0f} tokens/s",
                    flush=True,
                )
        return found

    def once(self, way: str, sequences: list[Sequence]) -> float:
        """Seconds."""
        if way == "pipeline":
            return self._pipeline(sequences)
        prompts = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in sequences]
        route = {"stock": "stock", "undecoded": "stock"}.get(
            way, "flat" if way == "flat" else "raw"
        )
        params = self.teacher._vllm.SamplingParams(
            prompt_logprobs=self.teacher._request.columns,
            max_tokens=1,
            temperature=0.0,
            detokenize=way == "stock",
            **sampling(route),  # type: ignore[arg-type]
        )
        started = time.perf_counter()
        with drawing(self.teacher._request), dropping() if way == "bare" else capturing(route):  # type: ignore[arg-type]
            outputs = self.teacher._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert len(outputs) == len(sequences)
        assert way == "bare" or all(output.prompt_logprobs for output in outputs)
        return seconds

    def _pipeline(self, sequences: list[Sequence]) -> float:
        output = self.work / "written"
        shutil.rmtree(output, ignore_errors=True)
        with CacheWriter(output) as writer:
            shards, _ = write_sequences(writer.build_dir, sequences, 10**9)
            plan = self.plan.model_copy(update={"shards": shards})
            header = plan.header(
                self.teacher.identity(), self.config.store.settings(self.teacher.vocab_size)
            )
            started = time.perf_counter()
            with Progress(shards[0].tokens, 1, bar=True, file=self.work / "log.jsonl") as progress:
                pairs: Iterator[Pair] = score_shard(self.teacher, writer.build_dir, 0, progress)
                prior, pairs = estimate_prior(pairs, header.store)
                header = writer.begin(header, prior)
                score_shards(self.teacher, writer, plan, [0], progress=progress, begun={0: pairs})
            manifest = writer.finish(header, 1)
            seconds = time.perf_counter() - started
        self.bytes_per_token = round(manifest.statistics.bytes / manifest.statistics.tokens, 1)
        return seconds


@contextmanager
def dropping() -> Iterator[None]:
    """While this is entered, prompt logprobs are dropped where the engine hands them to its
    front end.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    original = LogprobsProcessor._update_prompt_logprobs
    LogprobsProcessor._update_prompt_logprobs = lambda self, tensors: None
    try:
        yield
    finally:
        LogprobsProcessor._update_prompt_logprobs = original


def ratios(rounds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of every way to ``base``, round by round: median, least and most."""
    if base not in rounds:
        return {}
    found = {
        way: [a / b for a, b in zip(speeds, rounds[base], strict=True)]
        for way, speeds in rounds.items()
    }
    return {
        way: {
            "median": round(statistics.median(each), 3),
            "min": round(min(each), 3),
            "max": round(max(each), 3),
        }
        for way, each in found.items()
    }


def tokens_of(arguments: argparse.Namespace, k: int) -> int:
    if arguments.tokens:
        return int(arguments.tokens)
    known = TOKENS.get(arguments.model, {})
    return known.get(k, 8000 if known else 200_000)


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Peak resident memory of a whole build, a process each, as the build's own log says it."""
    model, text = toy(work), work / "text.jsonl"
    # python-docs has some 113,000 tokens; the tokens of another copy are as many again.
    documents = [text for _, text in BUILT_IN["python-docs"]()]
    copies = -(-max(arguments.tokens) // 100_000)
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents * copies))
    peaks: dict[str, int] = {}
    for tokens in arguments.tokens:
        config = {
            "teacher": {"model": model},
            "data": {"path": str(text), "max_length": MAX_LENGTH, "max_tokens": tokens},
            "store": {
                "top_k": arguments.k,
                "min_probability": None,
                "tail_samples": 0,
                "mass_per_sample": None,
            },
            "audit": {"sequences": 0},
            "output": str(work / f"cache-{tokens}"),
        }
        file = work / "config.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        subprocess.run(
            [
                sys.executable,
                "-c",
                "from logitcask.pipeline.cli import main; main()",
                "build",
                "--no-reuse",
                str(file),
            ],
            check=True,
        )
        records = [
            json.loads(line)
            for line in Path(f"{config['output']}.log.jsonl").read_text().splitlines()
        ]
        last = records[-1]
        course = {
            str(each["tokens"]): each["peak_rss_bytes"]
            for each in records
            if "peak_rss_bytes" in each
        }
        peaks[str(last["tokens"])] = last["peak_rss_bytes"]
        print(
            f"{last['tokens']:,} tokens: peak {last['peak_rss_bytes'] / 2**20:,.0f} MiB", flush=True
        )
    growth = list(peaks.values())[-1] / next(iter(peaks.values())) - 1
    return {
        "peak_rss_bytes": peaks,
        "growth": round(growth, 4),
        "within_the_last_build": course,
        "machine": machine(),
    }


# --- models ---------------------------------------------------------------------------------------


def model_of(name: str, work: Path) -> str:
    return toy(work) if name == "toy" else name


def toy(work: Path) -> str:
    """Folder of a random one-layer Llama with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = work / "toy"
    if folder.exists():
        return str(folder)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TOKENIZER, None).location)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.25,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save(part: str, name: str, result: dict[str, Any]) -> None:
    """Adds a run to the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(part, {})[name] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Markdown: tokens per second where they come from one run, and ratios within it."""
    lines = [
        f"| engine's bare scoring = 1 | tokens | {' | '.join(WAYS[:-1])} | bare, tokens/s | pipeline / stock |",
        "| --- " * (len(WAYS) + 3) + "|",
    ]
    for name, run in results["speed"].items():
        ratio, speeds = run["ratio_to_bare"], run["tokens_per_second"]
        cells = [
            f"{ratio[way]['median']:.2f} ({ratio[way]['min']:.2f}-{ratio[way]['max']:.2f})"
            if way in ratio
            else ""
            for way in WAYS[:-1]
        ]
        stock = run["ratio_to_stock"].get("pipeline")
        bare = statistics.median(speeds["bare"])
        lines.append(
            f"| {name} | {run['tokens']:,} | {' | '.join(cells)} | {bare:,.0f} | {'' if stock is None else stock['median']} |"
        )
    for name, run in results.get("memory", {}).items():
        peaks = ", ".join(
            f"{int(n):,} tokens {size / 2**20:,.0f} MiB"
            for n, size in run["peak_rss_bytes"].items()
        )
        lines.append(f"\n{name}: {peaks}, growth {run['growth']:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
