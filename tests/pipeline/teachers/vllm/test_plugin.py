"""The plugin that vLLM loads in every process of every engine."""

from __future__ import annotations

import subprocess
import sys


def test_loading_the_plugin_imports_nothing_else_of_ours() -> None:
    """Engines that ask for no draws, other people's included, load it too."""
    program = """
import sys
from logitcask.pipeline.teachers.vllm.plugin import register
register()
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("logitcask", "numpy", "torch", "vllm")))
"""
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    package = ["logitcask", "pipeline", "teachers", "vllm", "plugin"]
    assert loaded == [".".join(package[: n + 1]) for n in range(len(package))]
