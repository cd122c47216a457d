"""What is claimed of GPUs, measured in under ten minutes on one of them: ``make bench-gpu``.

    python benchmarks/gpu.py [--parts NAME ...] [--work FOLDER] [--out FILE] [--again]
    python benchmarks/gpu.py --tiny        # on a CPU: every part of it, no figure worth reading

Parts, in this order, a process each:

capture      the routes raw, flat and stock, with and without draws from the tail, beside the engine's bare scoring; the memory
             that the first full step takes; the draws against the engine's own whole distributions.
             Writes a cache.
audit        that cache against the model in float32, loaded onto the device: differences, memory of host and device
kernels      the losses through the lm_head (Triton kernels on CUDA) against plain cross-entropy, a naive sparse KL, and
             Liger's where it is installed, at 49k and 152k ids: forward, forward and backward,
             memory
training     a training step from the cache against fine-tuning in bfloat16, and with the teacher beside it; with flash
             attention too, where it is installed
distributed  FSDP2 over NCCL on all GPUs there are (gloo on a CPU) against one process

The model is random, of 0.75 billion weights and 151,936 ids; nothing is fetched. Some 24 GB of GPU
memory are needed. Each part leaves its figures in the work folder, and a run that was stopped goes
on with the next one. At the end all of them, ratios to a baseline of the same run, go to one file
with the machine they were taken on, and the last line says what passed. Exit code 1 if anything did
not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("capture", "audit", "kernels", "training", "distributed")
# A part that takes longer than this hangs.
LIMIT_SECONDS = 600
# Needs an environment variable that is read when Triton is imported.
ALWAYS_APART = ("kernels",)


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and puts everything together; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, on a CPU")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("caches/bench-gpu"),
        help="model, cache and finished parts",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        measure(options.one, options)
        return 0
    for part in options.parts:
        file = result_file(options, part)
        if file.exists() and not options.again:
            print(f"{part}: done before ({file})", flush=True)
            continue
        started = time.perf_counter()
        failed = None
        if options.tiny and part not in ALWAYS_APART:
            measure(part, options)
        else:
            failed = apart(part, options)
        if failed:
            print(f"{part}: {failed}", flush=True)
        else:
            print(f"{part}: {time.perf_counter() - started:,.0f} s", flush=True)
    return report(options)


def apart(part: str, options: argparse.Namespace) -> str | None:
    """Measures ``part`` in a process of its own, which leaves the GPU as it was; why that did
    not work, if it did not.
    """
    command = [sys.executable, str(HERE / "gpu.py"), "--one", part, "--work", str(options.work)]
    # Asking whether there is a GPU starts its driver, unless asked so; and an engine cannot be
    # forked from where it runs.
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if part != "distributed":  # Trainer would take all GPUs that it sees
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(
            ","
        )[0]
    if options.tiny:
        command.append("--tiny")
        environment |= {"TRITON_INTERPRET": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    try:
        done = subprocess.run(command, env=environment, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_SECONDS} s"
    return f"failed with exit code {done.returncode}, see above" if done.returncode else None


def measure(part: str, options: argparse.Namespace) -> None:
    """Measures ``part`` in this process, and writes what it found."""
    import gpu_parts
    from machine import machine

    sizes = gpu_parts.TINY if options.tiny else gpu_parts.FULL
    if not options.tiny and gpu_parts.DEVICE != "cuda":
        sys.exit(
            "error: there is no NVIDIA GPU here that torch can use; --tiny tries everything out on a CPU"
        )
    started = time.perf_counter()
    found = getattr(gpu_parts, part)(sizes, options.work)
    found |= {"seconds": round(time.perf_counter() - started, 1), "machine": machine()}
    # Whole or not at all, so that a part that was killed is measured again.
    file = result_file(options, part)
    file.with_suffix(".partial").write_text(json.dumps(found, indent=1))
    file.with_suffix(".partial").rename(file)


def result_file(options: argparse.Namespace, part: str) -> Path:
    return Path(options.work / f"{part}{'-tiny' if options.tiny else ''}.json")


def report(options: argparse.Namespace) -> int:
    """Puts the parts together, prints their checks, and last how many of them passed."""
    files = {part: result_file(options, part) for part in PARTS}
    found: dict[str, Any] = {
        part: json.loads(file.read_text()) for part, file in files.items() if file.exists()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    passed, failed, skipped = (
        [],
        [f"{part} (not measured)" for part in options.parts if part not in found],
        [],
    )
    for part, one in found.items():
        for name, outcome in one["checks"].items():
            held = outcome is True
            words = "passed" if held else "FAILED" if outcome is False else f"skipped: {outcome}"
            print(f"{part:12} {name}: {words}")
            (passed if held else failed if outcome is False else skipped).append(f"{part}: {name}")
    seconds = sum(one["seconds"] for one in found.values())
    words = f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped in {seconds:,.0f} s ({options.out})"
    print(words + (f"; failed: {'; '.join(failed)}" if failed else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
