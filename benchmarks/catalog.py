"""The catalogue: the time of a listing of many caches, and ``kill -9`` at random moments of builds,
removals and garbage collections on one home.

    python benchmarks/catalog.py [--caches 10000] [--kills 50] [--seed N] [--out FILE.json]

Listing: the home has an entry and a manifest on disk for each cache. Times are those of this
process (CPU seconds, which other programs do not change, and seconds by the clock), best of five,
without the start of the interpreter.

Kills: processes are forks of this one, killed at a uniformly random moment of their work. After
each kill: every listed cache is whole (sha256 of every shard), is one of those that an undisturbed
build or ``derive`` gives, and is listed once; every folder with a manifest is whole. At the end the
undisturbed commands must give every cache again, and leave no other file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from logitcask.cache_format import CacheReader
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.catalog.listing import listing, table
from logitcask.cache_format.catalog.narrowing import narrowing
from logitcask.cache_format.catalog.removal import garbage, remove, tidy
from logitcask.cache_format.derive.derive import DeriveOptions, derive
from logitcask.cache_format.errors import UserError
from logitcask.cache_format.verify import verify
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig

STORES: list[dict[str, Any]] = [{}, {"top_k": 4}, {"seed": 3}, {"tail_samples": 0}]
OUTPUTS = ("a", "b", "c", "d", "e")


def list_many(folder: Path, count: int) -> dict[str, float]:
    """Seconds of one listing of ``count`` caches, and of its table."""
    home = Home(folder / "home")
    manifest = build(config_in(folder, "origin")).manifest
    for number in range(count):
        place = folder / "many" / f"{number:05d}"
        place.mkdir(parents=True)
        os.link(folder / "origin" / "manifest.json", place / "manifest.json")
        home.register(place, manifest)
    best = {"seconds": float("inf"), "cpu_seconds": float("inf")}
    for _ in range(5):
        clock, cpu = time.perf_counter(), time.process_time()
        lines = listing(home)
        text = table(lines)
        best["seconds"] = min(best["seconds"], time.perf_counter() - clock)
        best["cpu_seconds"] = min(best["cpu_seconds"], time.process_time() - cpu)
    assert len(lines) == count
    assert len(text.splitlines()) == count + 1
    return {name: round(value, 3) for name, value in best.items()} | {"caches": count}


def config_in(folder: Path, output: str, **store: Any) -> BuildConfig:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        texts = (f"row {i} of {'many ' * (i % 9)}texts" for i in range(400))
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return BuildConfig(
        teacher={"model": "synthetic", "vocab_size": 300},
        data={"path": str(rows)},
        store={"shard_tokens": 1500, **store},
        audit={"sequences": 0},
        log=False,
        output=folder / output,
    )


def kill_many(folder: Path, kills: int, random: np.random.Generator) -> dict[str, Any]:
    """Kills until there are ``kills`` of them. Raises AssertionError for anything wrong."""
    home = Home(folder / "home")
    truth = [
        build(config_in(folder, f"truth-{number}", **store)).manifest
        for number, store in enumerate(STORES)
    ]
    allowed = {manifest.content_sha256 for manifest in truth}
    for one, had in enumerate(truth):
        for other, wanted in enumerate(truth):
            options = narrowing(had.store, wanted.store)
            if options:
                made = derive(
                    str(folder / f"truth-{one}"),
                    folder / f"derived-{one}-{other}",
                    DeriveOptions.model_validate(options),
                    shard_tokens=1500,
                )
                allowed.add(made.content_sha256)

    def a_build(at: int) -> None:
        build(config_of(at), home=home)

    def a_restart(at: int) -> None:
        build(config_of(at), restart=True, home=home)

    def config_of(at: int) -> BuildConfig:
        # The first and the last output have the same request.
        return config_in(folder, OUTPUTS[at % 5], **STORES[at % 5 % 4])

    def a_collection(at: int) -> None:
        lines = listing(home)
        for line in garbage(lines, max_bytes=60_000).lines:
            remove(home, line.entry)
        tidy(home, lines)

    def a_removal(at: int) -> None:
        for line in listing(home)[:1]:
            remove(home, line.entry)

    works: list[Callable[[int], None]] = [a_build, a_restart, a_collection, a_build, a_removal]
    counts, undisturbed, at = Counter[str](), 0, 0
    while sum(counts.values()) < kills:
        work, at = works[int(random.integers(len(works)))], at + 1
        partner = start(a_build, at + 1) if random.random() < 0.3 else None
        child = start(work, at)
        child.join(float(random.uniform(0, 1.5)))
        if child.is_alive():
            counts[work.__name__] += 1
        else:
            undisturbed += 1
            assert child.exitcode in (0, 1), child.exitcode
        child.kill()
        child.join()
        if partner is not None:
            partner.join()
        check(home, folder, allowed)
    for number, output in enumerate(OUTPUTS):
        shutil.rmtree(folder / output, ignore_errors=True)
        a_build(number)
        assert (folder / output / "manifest.json").exists()
    for line in garbage(listing(home)).lines:
        remove(home, line.entry)
    check(home, folder, allowed)
    listed = {Path(line.entry.where).name for line in listing(home) if not line.gone}
    assert listed == set(OUTPUTS), listed
    for output in OUTPUTS:
        names = {each.name for each in (folder / output).iterdir()}
        assert names == {"README.md", "data", "manifest.json", "tail_prior.arrow"}, names
    return {"kills": dict(counts), "finished_before_the_kill": undisturbed, "problems": 0}


def start(work: Callable[[int], None], at: int) -> Any:
    def quiet() -> None:
        try:
            work(at)
        except UserError as error:  # another process writes there
            print(error, file=sys.stderr)
            os._exit(1)

    child = multiprocessing.get_context("fork").Process(target=quiet)
    child.start()
    return child


def check(home: Home, folder: Path, allowed: set[str]) -> None:
    """Raises AssertionError if a listed or finished cache is not what it should be."""
    lines = listing(home)
    places = [line.entry.where for line in lines]
    assert len(places) == len(set(places)), "a cache is listed twice"
    for line in lines:
        if not line.gone:
            manifest = CacheReader(line.entry.where).manifest
            assert manifest.fingerprint == line.entry.fingerprint
    for output in OUTPUTS:
        if (folder / output / "manifest.json").exists():
            manifest = CacheReader(str(folder / output)).manifest
            assert manifest.content_sha256 in allowed, f"{output} has other content"
            assert verify(str(folder / output)) == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--caches", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; a part that is not run keeps what is there")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        if options.caches:
            found["listing"] = {**list_many(Path(folder), options.caches), "machine": machine()}
            print(json.dumps(found["listing"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.kills:
            random = np.random.default_rng(options.seed)
            found["kills"] = {
                **kill_many(Path(folder), options.kills, random),
                "seed": options.seed,
                "machine": machine(),
            }
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
