"""Mutated caches by the hundred thousand: the reader must refuse each of them in words, or give
what the format allows.

    python benchmarks/hostile [--count 100000] [--seed N] [--out FILE.json]
    python benchmarks/hostile --seed N --case 4711          # one case again, with its traceback

Small caches of every kind are damaged (files changed, manifest as it was) and forged (every hash
made to fit again, so that nothing but the decoder stands between the bytes and the user). Each is
opened, iterated, read by index and by column, and verified deeply, in a child with a limit on its
memory and its time. A failure is whatever is neither a LogitcaskError nor a sequence that SPEC.md
allows: another exception, a crash, a hang, memory over the limit, a damage that names no file, and
values that changed without a word. Case N of a seed is the same cache in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from bombs import forge_bomb
from cases import BASES, Base, Case, lay_out, make_base
from damage import damage_bits, damage_bytes, damage_places, edit_manifest, edit_text
from forged_columns import forge_columns
from forgery import (
    forge_bytes,
    forge_manifest,
    forge_metadata,
    forge_prior,
    forge_sizes,
    forge_structure,
)
from judge import FAILED, OUTCOMES, judge

MEMORY_LIMIT = 5 << 29
"""Address space that reading may take beyond what the process had: a batch, a decoded head and
samples, and working space.
"""

CPU_SECONDS, WALL_SECONDS = 20, 60
"""Of one case, in which a cache is read about four times over."""

CHUNK = 1000
"""Cases per child process."""

MUTATIONS: list[tuple[str, float, bool, Callable[[Case], None]]] = [
    ("damaged: bit flips", 14, False, damage_bits),
    ("damaged: runs, cuts, insertions", 12, False, damage_bytes),
    ("damaged: swapped, missing, no files", 4, False, damage_places),
    ("damaged: manifest edited", 16, False, edit_manifest),
    ("damaged: manifest no JSON", 3, False, edit_text),
    ("forged: bytes of shards", 12, True, forge_bytes),
    ("forged: Arrow metadata", 14, True, forge_metadata),
    ("forged: decompressed sizes", 5, True, forge_sizes),
    ("forged: Arrow structure", 5, True, forge_structure),
    ("forged: columns", 12, True, forge_columns),
    ("forged: tail prior", 3, True, forge_prior),
    ("forged: manifest", 8, True, forge_manifest),
    ("forged: bombs", 0.15, True, forge_bomb),
]
"""(name, weight, whether the hashes fit, what it does)."""


def make_case(seed: int, index: int, bases: list[Base]) -> tuple[Case, str, bool]:
    """Case ``index`` of a run, its mutation's name, and whether its hashes fit."""
    rng = np.random.default_rng([seed, index])
    name, _, forged, mutate = MUTATIONS[mutation_of(rng)]
    case = Case(bases[int(rng.integers(len(bases)))], rng)
    mutate(case)
    return case, name, forged


def run_case(seed: int, index: int, bases: list[Base], folder: Path) -> tuple[str, str, str]:
    """(mutation, outcome, what was wrong) of one case. Raises what reading raises beyond
    LogitcaskError.
    """
    case, name, forged = make_case(seed, index, bases)
    place = folder / str(bases.index(case.base))
    if not place.exists():
        place.mkdir(parents=True)
        lay_out(place, dict(case.base.files), {})
    lay_out(place, case.files, dict(case.base.files))
    try:
        with memory_limited():
            outcome, problem = judge(str(place), case, forged)
    finally:
        if all(isinstance(content, bytes) for content in case.files.values()):
            lay_out(place, dict(case.base.files), case.files)
        else:
            shutil.rmtree(place)
    return name, outcome, problem


@contextmanager
def memory_limited() -> Iterator[None]:
    """MEMORY_LIMIT on top of the address space there is; beyond it, allocations fail with a
    MemoryError.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def run_chunk(seed: int, indices: range, bases: list[Base], folder: Path, results: int) -> None:
    """In a child: one line of JSON per case into the file descriptor ``results``, whatever
    happens.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for index in indices:
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            name, outcome, problem = run_case(seed, index, bases, folder)
        except Exception as error:  # what is looked for
            name, outcome = "", FAILED
            problem = f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
        os.write(results, (json.dumps([index, name, outcome, problem[:1000]]) + "\n").encode())
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def run(
    count: int, seed: int, bases: list[Base], folder: Path, processes: int
) -> Iterator[tuple[int, str, str, str]]:
    """(index, mutation, outcome, what was wrong) of every case, chunk by chunk as they finish."""
    waiting = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)][::-1]
    running: dict[int, tuple[range, IO[bytes]]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            chunk = waiting.pop()
            results = tempfile.TemporaryFile()  # noqa: SIM115 - closed when its child has ended
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_chunk(seed, chunk, bases, folder / str(chunk.start), results.fileno())
                    code = 0
                finally:
                    os._exit(code)
            running[child] = chunk, results
        child, status = os.wait()
        chunk, results = running.pop(child)
        with results:
            results.seek(0)
            lines = [json.loads(line) for line in results]
        shutil.rmtree(folder / str(chunk.start), ignore_errors=True)
        for index, name, outcome, problem in lines:
            yield index, name or name_of(seed, index), outcome, problem
        if status:
            index = chunk.start + len(lines)
            how = (
                signal.Signals(status & 127).name if status & 127 else f"exit status {status >> 8}"
            )
            hang = " (a hang)" if how in ("SIGALRM", "SIGPROF") else ""
            yield index, name_of(seed, index), FAILED, f"the process died of {how}{hang}"
            if index + 1 < chunk.stop:
                waiting.append(range(index + 1, chunk.stop))


def mutation_of(rng: np.random.Generator) -> int:
    weights = np.array([weight for _, weight, _, _ in MUTATIONS])
    return int(rng.choice(len(MUTATIONS), p=weights / weights.sum()))


def name_of(seed: int, index: int) -> str:
    """The mutation of a case that did not live to tell."""
    return MUTATIONS[mutation_of(np.random.default_rng([seed, index]))][0]


def main() -> int:
    """Prints the table; 0 if no case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="a fresh one by default")
    parser.add_argument("--case", type=int, help="run this case alone, in this process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seed = (
        int(np.random.SeedSequence().generate_state(1)[0])
        if arguments.seed is None
        else arguments.seed
    )
    pa.set_cpu_count(1)
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        dir=shared_memory if shared_memory.is_dir() else None
    ) as temporary:
        folder = Path(temporary)
        bases = [make_base(*each, folder / f"base {index}") for index, each in enumerate(BASES)]
        if arguments.case is not None:
            print(*run_case(seed, arguments.case, bases, folder), sep="\n")
            return 0
        print(f"seed {seed}", flush=True)
        started = time.monotonic()
        cases = list(run(arguments.count, seed, bases, folder, arguments.processes))
    counts = Counter((name, outcome) for _, name, outcome, _ in cases)
    failures = [each for each in cases if each[2] == FAILED]
    print_table(counts)
    for index, name, _, problem in failures[:50]:
        print(f"--seed {seed} --case {index}  {name}: {problem}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    print(
        f"{arguments.count:,} cases, {len(failures)} failures, {time.monotonic() - started:.0f} s, seed {seed}"
    )
    if arguments.out:
        result = {
            "seed": seed,
            "cases": arguments.count,
            "failures": len(failures),
            "outcomes": {
                name: {
                    outcome: counts[name, outcome] for outcome in OUTCOMES if counts[name, outcome]
                }
                for name, *_ in MUTATIONS
            },
            "limits": {
                "address_space_bytes": MEMORY_LIMIT,
                "cpu_seconds": CPU_SECONDS,
                "wall_seconds": WALL_SECONDS,
            },
            "highest_resident_bytes_of_a_child": peak,
            "caches": [base.name for base in bases],
            "versions": {
                "python": platform.python_version(),
                "pyarrow": pa.__version__,
                "numpy": np.__version__,
            },
            "cpu": platform.processor() or platform.machine(),
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failures else 0


def print_table(counts: Counter[tuple[str, str]]) -> None:
    widths = [max(9, len(outcome) + 2) for outcome in OUTCOMES]
    print(
        f"{'':38}"
        + "".join(f"{outcome:>{width}}" for outcome, width in zip(OUTCOMES, widths, strict=True))
    )
    for name in [*(name for name, *_ in MUTATIONS), "all"]:
        row = [
            sum(n for key, n in counts.items() if name in (key[0], "all") and key[1] == each)
            for each in OUTCOMES
        ]
        print(
            f"{name:38}" + "".join(f"{n:>{width},}" for n, width in zip(row, widths, strict=True))
        )


if __name__ == "__main__":
    sys.exit(main())
