"""``make bench-gpu`` at its smallest, on a CPU: every part of it runs, its checks hold, and it
goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("gpu", "gpu_parts", "capture", "loss", "training", "machine")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture
def gpu() -> Iterator[Any]:
    """The script, which is no package's."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield __import__("gpu")
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@needs_vllm
def test_all_of_it_runs_on_a_cpu(
    gpu: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "gpu.json")]
    assert gpu.main(arguments) == 0, capfd.readouterr()
    said = capfd.readouterr().out.splitlines()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == list(gpu.PARTS)
    assert all("cores" in one["machine"] for one in found.values())
    checks = {
        f"{part}: {name}": outcome
        for part, one in found.items()
        for name, outcome in one["checks"].items()
    }
    assert False not in checks.values()
    for name in (
        "capture: the raw route works",
        "capture: draws are those of the engine's whole distributions",
        "audit: cache and reference agree",
        "kernels: the Triton kernels run",
        "kernels: their gradient is that of the naive loss",
        "distributed: the losses of every step are those of one process",
    ):
        assert checks[name] is True
    ratios = found["capture"]["draws"]["ratio_to_bare"], found["capture"]["heads"]["ratio_to_bare"]
    assert [sorted(one) for one in ratios] == [
        ["bare", "flat", "pipeline", "raw"],
        ["bare", "flat", "pipeline", "raw", "stock"],
    ]
    assert set(found["training"]["sdpa"]["step_over_sft"]) == {"sft", "live", "kd", "kd+rank"}
    passed = sum(outcome is True for outcome in checks.values())
    assert said[-1].startswith(f"{passed} passed, 0 failed, {len(checks) - passed} skipped")

    # What is done is not done again, and a part that is missing or fails is no part that passed.
    (tmp_path / "work" / "kernels-tiny.json").unlink()
    monkeypatch.setattr(gpu, "apart", lambda part, options: "failed with exit code 1, see above")
    assert gpu.main(arguments) == 1
    said = capfd.readouterr().out
    assert "capture: done before" in said
    assert "1 failed" in said
    assert said.rstrip().endswith("failed: kernels (not measured)")


def test_without_a_gpu_it_says_so(gpu: Any, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no NVIDIA GPU here that torch can use; --tiny"):
        gpu.main(["--one", "kernels", "--work", str(tmp_path)])
