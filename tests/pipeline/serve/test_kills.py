"""``kill -9`` under load: no answer is wrong, and what was answered is kept or is asked again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from logitcask.cache_format import CacheReader, verify
from logitcask.pipeline.serve import keeper
from logitcask.pipeline.serve.run import ServeOptions, serve

K, KILLS, CLIENTS = 6, 5, 4


def test_killed_under_load(
    tmp_path: Path,
    table: Any,
    fake: Any,
    make_cache: Callable[..., str],
    fork: Callable[..., Any],
    assert_rows: Callable[..., None],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "SHARD_TOKENS", 60)
    texts = [rng.integers(0, 384, rng.integers(2, 40)).tolist() for _ in range(90)]
    cache, kept = make_cache(tmp_path / "c", texts[:5], k=K), tmp_path / "kept"
    answered: list[list[int]] = []

    for _ in range(KILLS):
        ours, theirs = multiprocessing.Pipe()
        options = ServeOptions([cache], upstream=fake.url, keep=kept, port=0)
        send = theirs.send
        child = fork(lambda o=options, s=send: serve(o, on_ready=lambda _, address: s(address)))
        assert ours.poll(60), "the server does not start"
        before, stop = _kept(kept), len(answered) + int(rng.integers(5, 25))
        fake.asked()

        def ask(
            text: list[int], client: httpx.Client, child: Any = child, stop: int = stop
        ) -> None:
            request = {"prompt": text, "prompt_logprobs": K, "max_tokens": 1}
            try:
                answer = client.post("/v1/completions", json=request)
            except httpx.TransportError:
                assert len(answered) >= stop, "the server ended on its own"
                return
            assert answer.status_code == 200, answer.text
            rows = answer.json()["choices"][0]["prompt_logprobs"]
            assert_rows(rows, table.prompt_logprobs(text, K), 1 / 64)
            answered.append(text)
            if len(answered) >= stop:
                child.kill()

        order = [texts[i] for i in rng.permutation(len(texts))]
        with (
            httpx.Client(base_url=ours.recv(), timeout=60) as client,
            ThreadPoolExecutor(CLIENTS) as pool,
        ):
            for each in [pool.submit(ask, text, client) for text in order]:
                each.result()
        child.join()
        asked = [tuple(each) for each in fake.asked()]
        assert not before & set(asked), "what is on disk is not asked again"
        if (kept / "manifest.json").exists():
            assert verify(str(kept), deep=True) == []
            for sequence in CacheReader(kept):
                text = sequence.input_ids.tolist()
                exact = table.cached("s", text, [False] + [True] * (len(text) - 1), K)
                assert np.array_equal(sequence.ids, exact.ids)
                assert np.abs(sequence.logprobs - exact.logprobs).max() <= keeper.LOGPROB_STEP / 2
                assert np.abs(sequence.target_logprob - exact.target_logprob).max() <= 2.0**-9
    assert len(_kept(kept)) > 10, "the kills came before anything was kept"


def _kept(path: Path) -> set[tuple[int, ...]]:
    if not (path / "manifest.json").exists():
        return set()
    texts = [tuple(each.input_ids.tolist()) for each in CacheReader(path)]
    assert len(texts) == len(set(texts)), "a text is kept twice"
    return set(texts)
