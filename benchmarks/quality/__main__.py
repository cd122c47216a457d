"""What a cache keeps, and which loss is trained on it, against what the student learns: the quality
study.

    python benchmarks/quality [PART ...]

prepare  the text, both teachers' whole distributions over it, a pre-trained student
run      every student: a line in runs.jsonl each; runs that stand there are not repeated
bytes    bytes per token of every store with SmolLM2's own 49,152 ids
tables   benchmarks/results/quality.json, the tables in docs/quality.md and docs/quality.svg, from what has been run

All parts by default. Seeds are the outermost loop, so that what is there after any time is
balanced. Everything can be stopped and run again; --minutes stops by itself. Work is kept in --work
(5 GB).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from study import SCALES, Study
from teachers import OutOfTime

PARTS = ("prepare", "run", "bytes", "tables")


def main() -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--scale", choices=SCALES, default="cpu", help="gpu wants one; smoke is a test"
    )
    parser.add_argument("--seeds", type=int, default=3, help="students per arm")
    parser.add_argument(
        "--workers", type=int, help="processes of one thread each (default: CPU cores; 1 on a GPU)"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="run every Nth student only, from the Ith"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start nothing new after so many"
    )
    parser.add_argument(
        "--strong", default="smollm2-135m", help="the strong teacher: a built-in name or a folder"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("caches/benchmark-quality"), help="what is kept"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    wanted = arguments.parts or PARTS
    deadline = time.monotonic() + 60 * arguments.minutes
    study = Study(arguments.work, arguments.scale, arguments.strong, deadline)
    workers = arguments.workers or (1 if study.device.type == "cuda" else os.cpu_count() or 1)
    torch.set_num_threads(workers)
    try:
        if "prepare" in wanted:
            study.prepare(arguments.seeds)
        if "run" in wanted and workers == 1:
            part, parts = map(int, arguments.part.split("/"))
            study.run(arguments.seeds, part, parts)
        elif "run" in wanted:
            run_in_processes(workers)
        if "bytes" in wanted:
            study.native_bytes()
    except OutOfTime:
        print("out of time; the same command goes on")
        sys.exit(3)
    if "tables" in wanted:
        study.tables(arguments.seeds, publish=arguments.scale == "cpu")


def run_in_processes(workers: int) -> None:
    """This command's ``run`` in so many processes. Exits as the first that fails does."""
    options = [each for each in sys.argv[1:] if each not in PARTS]
    command = [sys.executable, str(Path(__file__).parent), "run", *options, "--workers", "1"]
    started = [
        subprocess.Popen([*command, "--part", f"{part}/{workers}"]) for part in range(workers)
    ]
    codes = [process.wait() for process in started]
    if failed := [code for code in codes if code]:
        sys.exit(failed[0])


if __name__ == "__main__":
    main()
