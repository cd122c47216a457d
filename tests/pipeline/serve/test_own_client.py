"""Our own ``backend: server`` at this server: its checks pass, and its scores are the teacher's.

A real vLLM server is in ``test_clients.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format import UserError
from logitcask.pipeline.config import TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.serve.keeper import LOGPROB_STEP
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.types import Sequence

K = 8


@pytest.fixture
def score(tiny_llama: Path, as_sequence: Callable[..., Sequence]) -> Callable[..., list[Any]]:
    def run(url: str, texts: list[list[int]]) -> list[Any]:
        config = TeacherConfig(
            model=str(tiny_llama),
            backend="server",
            dtype="float32",
            server={"url": url, "model": "tiny", "compare": "never", "patience": 1},
        )
        teacher = open_teacher(config, max_length=112, capture=Capture(K))
        try:
            assert teacher.identity().engine == "vllm 0.32.0"
            return list(teacher.score(as_sequence(f"s{n}", t) for n, t in enumerate(texts)))
        finally:
            teacher.close()

    return run


def test_its_checks_pass(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    fake: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    score: Callable[..., list[Any]],
    assert_same_scores: Any,
) -> None:
    """With upstream; and without it once the probes have been kept, as any text is."""
    cache, kept = make_cache(tmp_path / "c", texts[:5], step=1 / 256), tmp_path / "kept"
    client = running([cache], upstream=fake.url, keep=kept)
    first = score(client.url, texts)
    for scored, text in zip(first, texts, strict=True):
        ids = np.array(text, np.int32)
        rounding = LOGPROB_STEP / 2 + 1e-6
        assert_same_scores(scored, table.logprobs[ids[:-1]], ids, rounding, Capture(K))
    client.stop()
    fake.asked()
    client = running([cache, str(kept)])
    for one, other in zip(first, score(client.url, texts), strict=True):
        for name, values in one.arrays().items():
            assert np.array_equal(values, other.arrays()[name]), name
    assert fake.asked() == []
    client.stop()
    client = running([cache])
    with pytest.raises(UserError, match=r"refuses to score .*in none of the caches"):
        score(client.url, texts[:5])
