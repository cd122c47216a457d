"""``examples/look.ipynb``, run cell by cell in an empty folder, and what it shows."""

from __future__ import annotations

import html
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from logitcask import CacheReader

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "look.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_it_is_committed_without_outputs(cells):
    """They would hold paths and times of a machine."""
    for cell in cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_its_links_lead_to_files(cells):
    prose = [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)]+)\)", "".join(prose))
    assert len(targets) > 1
    assert [target for target in targets if not (NOTEBOOK.parent / target).exists()] == []


def test_it_runs(cells, user_folder, monkeypatch, capsys):
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    code = [source(cell) for cell in cells if cell["cell_type"] == "code"]
    assert sum("STEPS = 300" in text for text in code) == 1
    names: dict = {"__name__": "__main__"}
    for text in code:
        exec(text.replace("STEPS = 300", "STEPS = 30"), names)
    shown = capsys.readouterr().out

    cache = CacheReader("caches/notebook")
    assert f"{cache.manifest.statistics.tokens:,} tokens" in shown
    sequence = cache[0]
    spans = re.findall(r'<span style="(.*?)" title="(.*?)">(.*?)</span>', names["view"])
    assert len(spans) == min(200, len(sequence))
    assert spans[0][:2] == ("", "")  # nothing predicts the first token
    for row, (_, hint, letter) in enumerate(spans[1:]):
        surprise, rank = re.match(r"(.*) nats, rank (\d+); expected ", html.unescape(hint)).groups()
        assert float(surprise) == pytest.approx(-sequence.target_logprob[row], abs=0.006)
        assert int(rank) == sequence.target_rank[row]
        byte = int(sequence.target_ids[row])
        if chr(byte).isalnum() and byte < 128:
            assert letter == chr(byte)

    # KL to even logits, from its definition: mass x log V - entropy. Rounding moves the mass from 1.
    both = [cache[0], cache[1]]
    entropy = np.concatenate([each.entropy for each in both])
    mass = np.concatenate(
        [np.exp(each.logprobs).sum(axis=1) + np.exp(each.tail_logprob) for each in both]
    )
    expected = (mass * math.log(258) - entropy).mean()
    assert float(names["estimate"]) == pytest.approx(expected, abs=1e-4)
    assert float(names["cross_entropy"]) == pytest.approx(math.log(258), abs=1e-5)
    assert 0 < names["bound"] < names["estimate"]
    assert len(names["losses"]) == 30
    assert np.mean(names["losses"][-5:]) < 0.8 * np.mean(names["losses"][:5])
