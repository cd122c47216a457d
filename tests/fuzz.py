"""``make fuzz``: the tests that draw random numbers, round after round, each round with a fresh
seed.

A failure names its seed. The same seed repeats the round to the last number; what it found then
becomes a fixed case.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs the tests that draw random numbers with fresh seeds."
    )
    parser.add_argument("--rounds", type=int, default=3, help="how many seeds to try (default 3)")
    parser.add_argument(
        "--minutes", type=float, help="begin new rounds for this long, however many they are"
    )
    parser.add_argument("--seed", type=int, help="repeat the round with this seed")
    parser.add_argument(
        "rest", nargs="*", metavar="PYTEST", help="files, or options of pytest after --"
    )
    options = parser.parse_args()
    if options.seed == 0:
        parser.error("seed 0 is that of make test; fresh rounds have others")

    began, passed, failed, rounds = time.monotonic(), 0, 0, 0
    while True:
        seed = options.seed or secrets.randbits(32) or 1
        rounds += 1
        good, bad = round_of(seed, options.rest)
        passed, failed = passed + good, failed + len(bad)
        print(f"round {rounds}, seed {seed}: {good} passed, {len(bad)} failed", flush=True)
        for name in bad:
            print(f"  {name}")
        if bad:
            print(f"  make fuzz SEED={seed} repeats it", flush=True)
        minutes = (time.monotonic() - began) / 60
        if options.seed or (
            minutes >= options.minutes if options.minutes else rounds >= options.rounds
        ):
            break
    print(f"{rounds} rounds in {minutes:.0f} minutes: {passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


def round_of(seed: int, rest: list[str]) -> tuple[int, list[str]]:
    """How many tests passed with this seed, and the names of those that failed.

    Ends the command where pytest did not run them: a round without tests is no round that passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--only-random", "--quiet", "--tb=short"]
        command += [f"--hypothesis-seed={seed}", f"--junitxml={report}", *rest]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "LOGITCASK_TEST_SEED": str(seed)}
        )
        if done.returncode not in (0, 1):
            sys.exit(
                f"seed {seed}: pytest ended with code {done.returncode} before it had run the tests"
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - len(bad) - skipped, [
        f"{case.get('classname')}::{case.get('name')}" for case in bad
    ]


if __name__ == "__main__":
    main()
