"""``kill -9`` at random moments of builds, by the hundred: every build, resumed, must give the
cache of an undisturbed one.

    python benchmarks/kills.py [--process 45] [--vllm 15] [--ray-worker 20] [--ray-driver 15]
    [--ray-vllm 5]
                               [--tokens 200000] [--seed N] [--out FILE.json]

Every build is killed a few times and started again by the same command, until a last run gets
through. Most kills come at a uniformly random moment; some wait for the short phases, a commit and
the end. Kinds:

process     one process, synthetic teacher
vllm        one process, vLLM with a tiny Llama
ray-worker two workers on a local Ray cluster, synthetic teacher; a random worker is killed, and Ray
has to replace it ray-driver the same; the driver is killed and its workers are left alone, while
the next driver starts ray-vllm two workers with vLLM; now a worker, now the driver

After every kill each committed shard must have its sha256. After every build: the logical hash of
the whole and of each shard is that of the undisturbed build, the sequences are the same in the same
order, ``verify --deep`` finds nothing, and nothing but the cache is left in its folder. The phase
of a kill is read off the files that it leaves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from logitcask.cache_format import CacheReader, Manifest, verify
from logitcask.cache_format.layout import BUILD_DIR, MANIFEST

KINDS = {"process": 45, "vllm": 15, "ray-worker": 20, "ray-driver": 15, "ray-vllm": 5}
PHASES = ("planning", "starting", "scoring", "committing", "finishing")
CACHE = ["README.md", "data", MANIFEST, "tail_prior.arrow"]
AIMS = {"any": 0.7, "committing": 0.15, "finishing": 0.15}
MOST_KILLS_OF_A_BUILD = 5


@dataclass
class Tally:
    """What came of one kind of builds."""

    kind: str
    kills: Counter[str] = field(default_factory=Counter)
    builds: int = 0
    problems: list[str] = field(default_factory=list)


class Build:
    """One cache in the making: the command that makes it, and what is on disk."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.output = folder / "cache"
        self.config = folder / "config.yaml"
        folder.mkdir()
        self.config.write_text(yaml.safe_dump({**fields, "output": str(self.output)}))
        self.stderr = folder / "stderr"

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            "from logitcask.pipeline.cli import main; main()",
            "build",
            "--no-reuse",
            str(self.config),
        ]
        with open(self.stderr, "ab") as stderr:
            return subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment()
            )

    @property
    def build_dir(self) -> Path:
        return self.output / BUILD_DIR

    def records(self) -> list[Path]:
        return list((self.build_dir / "commits").glob("shard-*.json"))

    def phase(self, shards: int) -> str:
        """What the build was doing, by what is there of it."""
        if (self.output / MANIFEST).exists():
            return "finishing"
        if not (self.build_dir / "plan.json").exists():
            return "planning"
        if not (self.build_dir / "header.json").exists():
            return "starting"
        if self.committing():
            return "committing"
        return "finishing" if len(self.records()) == shards else "scoring"

    def committing(self) -> bool:
        """Is a shard whole, but not yet vouched for?"""
        if any((self.build_dir / "runs").glob("*/*/*.json.tmp")):
            return True
        committed = {record.stem for record in self.records()}
        return any(file.stem not in committed for file in (self.output / "data").glob("*.arrow"))

    def damaged(self) -> list[str]:
        """Committed shards that are not what their records say."""
        found = []
        for record in self.records():
            entry = json.loads(record.read_text())
            if (
                hashlib.sha256((self.output / entry["path"]).read_bytes()).hexdigest()
                != entry["sha256"]
            ):
                found.append(f"{entry['path']} is not what its commit record says")
        return found


def environment() -> dict[str, str]:
    # With equal threads, vLLM gives equal bits.
    home = str(Path(tempfile.gettempdir()) / "logitcask-kills")  # no entries in the user's own
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LOGITCASK_HOME": home,
    }


def settings(kind: str, model: Path | None, tokens: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 128, "max_tokens": tokens},
        "store": {"top_k": 8, "shard_tokens": tokens // 25},
        "audit": {"sequences": 0},
    }
    if kind.endswith("vllm"):
        fields["teacher"] = {"model": str(model)}
        fields["data"] |= {"max_tokens": 12_000}
        fields["store"] |= {"shard_tokens": 1_000}
    if kind.startswith("ray"):
        fields["scale"] = {"engine": "ray", "workers": 2}
    return fields


def run_kind(
    kind: str,
    kills: int,
    rng: np.random.Generator,
    folder: Path,
    model: Path | None,
    tokens: int,
) -> Tally:
    tally = Tally(kind)
    fields = settings(kind, model, tokens)
    alone = Build(
        folder / f"{kind}-alone", {name: value for name, value in fields.items() if name != "scale"}
    )
    seconds = finish(alone)
    if "scale" in fields:
        seconds = finish(Build(folder / f"{kind}-undisturbed", fields))
    expected = CacheReader(alone.output).manifest
    names = [sequence.sequence_id for sequence in CacheReader(alone.output)]
    print(f"{kind}: {len(expected.shards)} shards, {seconds:.1f} s undisturbed", flush=True)
    while (missing := kills - tally.kills.total()) > 0:
        build = Build(folder / f"{kind}-{tally.builds}", fields)
        planned = min(missing, int(rng.integers(1, MOST_KILLS_OF_A_BUILD + 1)))
        try:
            disturb(build, kind, planned, seconds, len(expected.shards), rng, tally)
            finish(build)
            found = problems(build, expected, names)
        except RuntimeError as error:
            found = [str(error)]
        tally.builds += 1
        tally.problems += [f"build {tally.builds}: {problem}" for problem in found]
        shutil.rmtree(build.config.parent)
        print(f"  build {tally.builds}: {dict(tally.kills)} {found or 'ok'}", flush=True)
    return tally


def disturb(
    build: Build,
    kind: str,
    kills: int,
    seconds: float,
    shards: int,
    rng: np.random.Generator,
    tally: Tally,
) -> None:
    """Kills runs of ``build`` ``kills`` times, or less often if one gets through before."""
    process = build.start()
    try:
        if kind == "ray-worker":
            # A worker's life begins late in that of the driver, and it has several to lose.
            while process.poll() is None and not (build.build_dir / "header.json").exists():
                time.sleep(0.01)
            seconds /= 2 * MOST_KILLS_OF_A_BUILD
        for _ in range(kills):
            aim = str(rng.choice(list(AIMS), p=list(AIMS.values())))
            if not wait_for(aim, build, process, rng.uniform(0, seconds), shards):
                break
            worker = kind == "ray-worker" or (kind == "ray-vllm" and rng.random() < 0.5)
            if not (kill_a_worker if worker else kill)(process, rng):
                break
            tally.kills[build.phase(shards)] += 1
            tally.problems += build.damaged()
            if not worker:
                process = build.start()
        if process.wait() != 0:
            raise RuntimeError(f"a run failed: {build.stderr.read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()


def wait_for(
    aim: str, build: Build, process: subprocess.Popen[bytes], seconds: float, shards: int
) -> bool:
    """Waits for the moment to kill; False if the run ends before."""
    until = time.monotonic() + seconds
    arrived: Callable[[], bool] = {
        "any": lambda: time.monotonic() >= until,
        "committing": build.committing,
        "finishing": lambda: len(build.records()) == shards,
    }[aim]
    while not arrived():
        if process.poll() is not None:
            return False
        time.sleep(0.01 if aim == "any" else 0.0005)
    return process.poll() is None


def kill(process: subprocess.Popen[bytes], _: np.random.Generator) -> bool:
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def kill_a_worker(process: subprocess.Popen[bytes], rng: np.random.Generator) -> bool:
    """Waits until there is one; False if the run ends before."""
    while process.poll() is None:
        try:
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "ShardWorker" in " ".join(child.cmdline())]
            if workers:
                workers[rng.integers(len(workers))].kill()
                return True
        except psutil.NoSuchProcess:
            pass  # one of them has ended in between
        time.sleep(0.05)
    return False


def finish(build: Build) -> float:
    """Runs the command to its end; returns seconds."""
    started = time.monotonic()
    if build.start().wait() != 0:
        raise RuntimeError(f"the build does not go on: {build.stderr.read_text()[-2000:]}")
    return time.monotonic() - started


def problems(build: Build, expected: Manifest, names: list[str]) -> list[str]:
    cache = CacheReader(build.output)
    found = [f"verify: {problem}" for problem in verify(str(build.output), deep=True)]
    if cache.manifest.content_sha256 != expected.content_sha256:
        found.append("another logical hash")
    if [s.content_sha256 for s in cache.manifest.shards] != [
        s.content_sha256 for s in expected.shards
    ]:
        found.append("other shards")
    read = [sequence.sequence_id for sequence in cache]
    if len(set(read)) < len(read):
        found.append("a sequence twice")
    if set(names) - set(read):
        found.append("a sequence is missing")
    if read != names:
        found.append("another order")
    left = sorted(file.name for file in build.output.iterdir())
    if left != CACHE or list(build.output.rglob("*.tmp")):
        found.append(f"left over: {sorted(set(left) - set(CACHE)) or 'temporary files'}")
    return found


def tiny_llama(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0]).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.25,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, count in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"kills; {count} by default")
    parser.add_argument(
        "--tokens",
        type=int,
        default=200_000,
        help="of each build with the synthetic teacher; 200000 by default",
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--out", type=Path, help="JSON; kinds that are not run keep what stands there"
    )
    arguments = parser.parse_args()
    seed = (
        arguments.seed
        if arguments.seed is not None
        else int(np.random.SeedSequence().entropy) % 2**32
    )
    print(f"seed {seed}")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = None
        for number, kind in enumerate(KINDS):
            kills = getattr(arguments, kind.replace("-", "_"))
            if not kills:
                continue
            if kind.endswith("vllm") and model is None:
                model = tiny_llama(folder / "model")
            started = time.monotonic()
            rng = np.random.default_rng([seed, number])
            tally = run_kind(kind, kills, rng, folder, model, arguments.tokens)
            failed |= bool(tally.problems)
            if arguments.out:
                write_result(arguments.out, tally, seed, time.monotonic() - started)
    return 1 if failed else 0


def write_result(file: Path, tally: Tally, seed: int, seconds: float) -> None:
    result = json.loads(file.read_text()) if file.exists() else {"kinds": {}}
    result["kinds"][tally.kind] = {
        "seed": seed,
        "kills": tally.kills.total(),
        "by_phase": {phase: tally.kills[phase] for phase in PHASES},
        "builds": tally.builds,
        "problems": tally.problems,
        "seconds": round(seconds),
    }
    kinds = result["kinds"].values()
    result["kills"] = sum(kind["kills"] for kind in kinds)
    result["by_phase"] = {phase: sum(kind["by_phase"][phase] for kind in kinds) for phase in PHASES}
    result["problems"] = sum(len(kind["problems"]) for kind in kinds)
    result["versions"] = {"python": platform.python_version(), "ray": version("ray")}
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
