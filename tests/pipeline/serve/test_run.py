"""The server over HTTP: caches, an upstream server, what is kept, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from logitcask import LOSSES, CachedDataset, collate
from logitcask.cache_format import CacheReader, CacheWriter, UserError, verify
from logitcask.cache_format.catalog import home as homes
from logitcask.cache_format.catalog.listing import listing
from logitcask.cache_format.catalog.removal import remove
from logitcask.cache_format.growing import is_growing
from logitcask.pipeline.serve import app, keeper, run, served
from tests.pipeline.serve.conftest import header

K = 8


def test_answers_are_those_of_vllm_but_for_rounding(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    assert_rows: Callable[..., None],
) -> None:
    client = running([make_cache(tmp_path / "c", texts)])
    for text in texts:
        for k in (0, 1, 5, K):
            assert_rows(client.rows(text, k), table.prompt_logprobs(text, k), 1 / 64)
    # All at once, as trl sends a batch; the order is that of the request.
    body = client.post(prompt=texts, prompt_logprobs=K, model="tiny").json()
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    for choice, text in zip(body["choices"], texts, strict=True):
        assert choice["prompt_logprobs"] == client.rows(text, K)
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
    tokens = sum(map(len, texts))
    assert body["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
    }
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    with_ids = client.post(prompt=texts[1], prompt_logprobs=1, return_token_ids=True).json()
    assert with_ids["choices"][0]["prompt_token_ids"] == texts[1]


def test_beginnings_are_answered_and_middles_are_not(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    assert_rows: Callable[..., None],
) -> None:
    client = running([make_cache(tmp_path / "c", texts)])
    text = texts[1]
    for n in range(1, len(text) + 1):
        assert_rows(client.rows(text[:n], K), table.prompt_logprobs(text[:n], K), 1 / 64)
    for other in (text[1:], text[5:20], [*text, 3]):
        answer = client.post(prompt=other, prompt_logprobs=K)
        assert answer.status_code == 400
        assert "no sequence begins with these tokens" in answer.json()["error"]["message"]


def test_what_a_cache_lacks_is_refused_with_the_reason(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Callable[..., str],
    running: Callable[..., Any],
) -> None:
    text = texts[1]
    mask = [False] * 5 + [True] * (len(text) - 5)
    masked = make_cache(
        tmp_path / "c", [text, texts[3]], masks=[mask, [False] + [True] * (len(texts[3]) - 1)]
    )
    client = running([masked])

    def refusal(**fields: Any) -> str:
        answer = client.post(**{"prompt": text, "prompt_logprobs": 4, **fields})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "outside the loss mask" in refusal()
    assert "a stored head has 8 entries, fewer than the 9 asked for" in refusal(
        prompt=texts[3], prompt_logprobs=9
    )
    assert "temperature is 0.5" in refusal(temperature=0.5)
    assert "prompt is text" in refusal(prompt="hello")
    assert "max_tokens is 2" in refusal(max_tokens=2)
    assert client.post(prompt=text, prompt_logprobs=1, model="other").status_code == 404
    assert client.http.get("/v1/completions").status_code == 405
    chat = client.http.post("/v1/chat/completions", json={"model": "m", "messages": []})
    assert chat.status_code == 400
    assert "post token ids to /v1/completions" in chat.json()["error"]["message"]


def test_null_for_what_is_not_stored(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    assert_rows: Callable[..., None],
) -> None:
    """Where it is allowed, and the last position is stored; whole texts are preferred."""
    text = texts[1]
    mask = [False] * 5 + [True] * 10 + [False] * 5 + [True] * (len(text) - 20)
    cache = make_cache(tmp_path / "c", [text, text[:8]], masks=[mask, [False] + [True] * 7])
    client = running([cache], allow_null=True)
    expected = table.prompt_logprobs(text, 4)
    for n in (15, 21, len(text)):
        rows = client.rows(text[:n], 4)
        assert [row is not None for row in rows] == mask[:n]
        stored = [t for t in range(n) if mask[t]]
        assert_rows(
            [None, *(rows[t] for t in stored)], [None, *(expected[t] for t in stored)], 1 / 64
        )
    assert_rows(client.rows(text[:8], 4), table.prompt_logprobs(text[:8], 4), 1 / 64)
    assert_rows(client.rows(text[:6], 4), table.prompt_logprobs(text[:6], 4), 1 / 64)
    assert client.post(prompt=text[:18], prompt_logprobs=4).status_code == 400


def test_several_caches_of_one_teacher(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    assert_rows: Callable[..., None],
) -> None:
    """The first that can answer does: here the first has the coarser numbers and smaller heads."""
    coarse = make_cache(tmp_path / "coarse", texts[:4], k=4, step=1 / 4)
    fine = make_cache(tmp_path / "fine", texts, k=K)
    client = running([coarse, fine])
    found = client.rows(texts[1], 4)
    assert_rows(found, table.prompt_logprobs(texts[1], 4), 1 / 4)
    with pytest.raises(AssertionError):
        assert_rows(found, table.prompt_logprobs(texts[1], 4), 1 / 64)
    for text in texts:
        assert_rows(client.rows(text, K), table.prompt_logprobs(text, K), 1 / 64)


@pytest.mark.parametrize(
    "other", [{"model": "larger"}, {"weights_sha256": "1" * 64}, {"revision": "main"}]
)
def test_caches_of_two_teachers_are_refused(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Callable[..., str],
    running: Any,
    other: dict,
) -> None:
    first = make_cache(
        tmp_path / "a", texts, weights_sha256="0" * 64 if "weights_sha256" in other else None
    )
    second = make_cache(tmp_path / "b", texts, **other)
    with pytest.raises(UserError, match=r"not of one teacher: .*; serve them apart"):
        running([first, second])


def test_the_same_text_goes_upstream_once(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    fake: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    assert_rows: Callable[..., None],
) -> None:
    """Half of the texts are in a cache. The others are kept: in this process, after a restart
    without an upstream server, and as a cache of their own.
    """
    cache = make_cache(tmp_path / "c", texts[:6])
    client = running([cache], upstream=fake.url, keep=tmp_path / "kept", top_k=12)
    fake.asked()
    answers = [client.rows(text, K) for text in texts]
    assert fake.asked() == texts[6:]
    for found, text in zip(answers, texts, strict=True):
        assert_rows(found, table.prompt_logprobs(text, K), 1 / 64)
    again = [client.rows(text, k) for text in texts for k in (K, 3)]
    assert fake.asked() == []
    assert again[::2] == answers, "an answer is the same before and after it is kept"
    assert client.sources() == {"cache": 18, "kept": 12, "upstream": 6}
    assert (
        client.metric("logitcask_upstream_requests") >= 6
    )  # with the probe of each new connection
    # More than kept heads have: upstream each time.
    for _ in range(2):
        assert_rows(client.rows(texts[7], 20), table.prompt_logprobs(texts[7], 20), 0)
        assert fake.asked() == [texts[7]]
    client.stop()
    assert verify(str(tmp_path / "kept"), deep=True) == []
    kept = CacheReader(tmp_path / "kept")
    assert is_growing(kept.manifest)
    assert [each.input_ids.tolist() for each in kept] == texts[6:]
    assert kept.manifest.teacher.engine == "vllm 0.32.0"
    client = running([cache, str(tmp_path / "kept")])
    assert [client.rows(text, K) for text in texts] == answers
    client.stop()
    with pytest.raises(UserError, match=r"begun with other settings: store\.capture_k: 12 -> 8"):
        running([cache], upstream=fake.url, keep=tmp_path / "kept", top_k=8)
    client = running([cache], upstream=fake.url, keep=tmp_path / "kept")
    fake.asked()
    assert [client.rows(text, 12) for text in texts[6:]] == [
        client.rows(text, 12) for text in texts[6:]
    ]
    assert fake.asked() == []


def test_what_is_kept_teaches(
    tmp_path: Path, texts: list[list[int]], table: Any, fake: Any, make_cache: Any, running: Any
) -> None:
    """While the server runs: the teacher's loss on a batch is that of the dense table."""
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )
    for text in texts[1:4]:
        client.rows(text, K)
    client.stop()
    running([make_cache(tmp_path / "d", texts[:1])], upstream=fake.url, keep=tmp_path / "kept")
    data = CachedDataset(CacheReader(tmp_path / "kept"), range(3))
    batch = collate([data[n] for n in range(3)])
    teacher = data.teacher(batch)
    dense = torch.tensor(np.concatenate([table.logprobs[text[:-1]] for text in texts[1:4]]))
    student = torch.randn(dense.shape).log_softmax(1)
    at = teacher.ids.clamp(min=0).long()
    p = dense.gather(1, at).exp()
    rest, others = 1 - p.sum(1), 1 - student.gather(1, at).exp().sum(1)
    expected = (p * (dense.gather(1, at) - student.gather(1, at))).sum(1) + rest * (
        rest / others
    ).log()
    found = LOSSES["forward_kl"](student, teacher, tail="ghost")
    assert torch.allclose(found, expected, atol=0.03)


def test_texts_longer_than_upstream_takes(
    tmp_path: Path, texts: list[list[int]], fake: Any, make_cache: Any, running: Any
) -> None:
    """They are answered if a cache has them."""
    fake.models = [("tiny", "/models/tiny", 60)]
    client = running([make_cache(tmp_path / "c", texts[:2])], upstream=fake.url)
    assert client.rows(texts[1], K)
    answer = client.post(prompt=[1, *texts[1]], prompt_logprobs=K)
    assert answer.status_code == 400
    assert "takes at most 59" in answer.json()["error"]["message"]


def test_a_shard_is_committed_when_it_is_full_or_old(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "SHARD_TOKENS", 100)
    cache = make_cache(tmp_path / "c", texts[:1])
    client = running([cache], upstream=fake.url, keep=tmp_path / "kept")
    client.rows(texts[1], K)  # 100 tokens
    assert [s.input_ids.tolist() for s in CacheReader(tmp_path / "kept")] == [texts[1]]
    client.rows(texts[2][:9], K)
    assert client.metric("logitcask_open_tokens") == 9
    assert len(CacheReader(tmp_path / "kept")) == 1
    monkeypatch.setattr(keeper, "SHARD_SECONDS", 0)
    waited = threading.Event()
    # The manifest is seen a moment before the commit ends.
    while len(CacheReader(tmp_path / "kept")) < 2 or client.metric("logitcask_open_tokens"):
        waited.wait(0.1)
    fake.asked()
    client.rows(texts[2][:9], K)
    client.rows(texts[1], K)
    assert fake.asked() == []


def test_equal_requests_at_once_go_upstream_once(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Callable[..., str],
    running: Callable[..., Any],
) -> None:
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )
    fake.asked()
    arrived, go = threading.Event(), threading.Event()

    def wait(prompt: list[int]) -> None:
        arrived.set()
        assert go.wait(60)

    fake.before = wait
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(
                httpx.post,
                f"{client.url}/v1/completions",
                json={"prompt": [texts[1]] * 3, "max_tokens": 1, "prompt_logprobs": K},
                timeout=60,
            )
            for _ in range(8)
        ]
        arrived.wait(60)
        go.set()
        bodies = [each.result().json()["choices"] for each in asked]
    assert len(fake.asked()) == 1
    assert all(body == bodies[0] for body in bodies)


def test_a_client_that_goes_away_costs_nothing(
    tmp_path: Path, texts: list[list[int]], fake: Any, make_cache: Any, running: Any
) -> None:
    """Its answer is kept all the same."""
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )
    fake.asked()
    arrived, go = threading.Event(), threading.Event()
    fake.before = lambda prompt: (arrived.set(), go.wait(60), None)[-1]
    body = json.dumps({"prompt": texts[1], "max_tokens": 1, "prompt_logprobs": K})
    address = httpx.URL(client.url)
    with socket.create_connection((address.host, address.port)) as leaving:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall((head + body).encode())
        assert arrived.wait(60)
    go.set()
    client.rows(texts[1], K)
    assert fake.asked() == [texts[1]]


@pytest.mark.parametrize(
    ("failure", "status"), [(500, 502), (503, 503), (429, 503), (404, 502), (400, 400)]
)
def test_errors_of_upstream_are_passed_on_in_one_line(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Any,
    running: Any,
    failure: int,
    status: int,
) -> None:
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )
    fake.before = lambda prompt: failure
    answer = client.post(prompt=texts[1], prompt_logprobs=K)
    assert answer.status_code == status
    assert f"answers {failure}: out of order" in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]
    fake.before = lambda prompt: None
    assert client.rows(texts[1], K)


def test_upstream_that_fails_now_and_then_is_asked_again(
    tmp_path: Path, texts: list[list[int]], fake: Any, make_cache: Any, running: Any
) -> None:
    client = running([make_cache(tmp_path / "c", texts[:1])], upstream=fake.url)
    failures = [503, 500]
    fake.before = lambda prompt: failures.pop() if failures else None
    assert client.rows(texts[1], K)
    fake.before = lambda prompt: "drop"
    answer = client.post(prompt=texts[2], prompt_logprobs=K)
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["error"]["message"]
    assert client.rows(texts[0], K), "what is in a cache needs nobody"


def test_wrong_answers_of_upstream_are_never_kept(
    tmp_path: Path, texts: list[list[int]], fake: Any, make_cache: Any, running: Any
) -> None:
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )

    def shifted(answer: dict[str, Any]) -> Any:
        rows = answer["choices"][0]["prompt_logprobs"]
        answer["choices"][0]["prompt_logprobs"] = [None, *rows[2:], rows[1]]
        return answer

    for wrong in (shifted, lambda answer: b"not JSON", lambda answer: {"choices": []}):
        fake.after = wrong
        answer = client.post(prompt=texts[1], prompt_logprobs=K)
        assert answer.status_code == 502
    client.stop()
    assert not (tmp_path / "kept" / "manifest.json").exists()


def test_another_model_behind_the_address_is_refused(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    another_table: Any,
    make_cache: Any,
    running: Any,
) -> None:
    """At the start, by what the caches hold; later, by the probe over each new connection."""
    cache = make_cache(tmp_path / "c", texts)
    right, fake.table = fake.table, another_table
    with pytest.raises(UserError, match=r"does not say what .*c holds \(logprobs differ by"):
        running([cache], upstream=fake.url)
    fake.table = right
    client = running([cache], upstream=fake.url, keep=tmp_path / "kept")
    new = [*texts[1], 1]
    fake.table = another_table
    # A restart closes its connections.
    fake.before = lambda prompt: 503 if len(fake.prompts) % 2 else None
    answer = client.post(prompt=new, prompt_logprobs=K)
    assert answer.status_code == 502
    assert "says something else than at the start" in answer.json()["error"]["message"]
    client.stop()
    assert not (tmp_path / "kept" / "manifest.json").exists()


def test_upstream_that_cannot_serve_is_refused_at_the_start(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache(tmp_path / "c", texts)

    def refusal(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            running([cache], **{"upstream": fake.url, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert (
        "greater than max allowed: 64; start it with: vllm serve tiny --max-logprobs 65"
        in refusal(top_k=65)
    )
    assert "does not answer" in refusal(upstream="http://127.0.0.1:9")
    assert "expected http://HOST:PORT" in refusal(upstream="gpu-box:8000")
    assert "secret" not in refusal(upstream="http://me:secret@gpu-box:8000")
    fake.key = "secret"
    assert "wants another API key (401); set --upstream-key-env" in refusal()
    monkeypatch.setenv("UPSTREAM_KEY", "secret\n")
    assert running([cache], upstream=fake.url, upstream_key_env="UPSTREAM_KEY").rows(texts[1], K)
    assert "no such environment variable" in refusal(upstream_key_env="NOT_SET")
    fake.key = None
    fake.models = [("other", "/models/other", 200)]
    assert "serves other, not tiny" in refusal()
    assert running([cache], upstream=fake.url, upstream_model="other").rows(texts[1], K)


def test_keys_and_limits(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVE_KEY", "key")
    client = running([make_cache(tmp_path / "c", texts)], api_key_env="SERVE_KEY", max_body=10_000)
    assert client.http.get("/v1/models").status_code == 401
    assert client.post(prompt=texts[1], prompt_logprobs=1).status_code == 401
    for wrong in ("Bearer other", "Bearer", "Basic key", "key", "Bearer é"):
        headers = {"Authorization": wrong.encode()}
        assert client.http.get("/v1/models", headers=headers).status_code == 401
    client.http.headers["Authorization"] = "Bearer key"
    assert client.rows(texts[1], 1)
    (card,) = client.http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("tiny", "tiny", 113)
    assert client.http.get("/version").json()["version"] == "0.32.0"
    assert client.post(prompt=[1] * 10_000, prompt_logprobs=1).status_code == 413

    def parts() -> Any:  # no Content-Length
        for _ in range(20):
            yield b" " * 1000

    assert client.http.post("/v1/completions", content=parts()).status_code == 413
    answer = client.post(prompt=texts[:1], prompt_logprobs=1, max_tokens=1)
    assert answer.status_code == 200


def test_what_cannot_be_served(
    tmp_path: Path, texts: list[list[int]], fake: Any, make_cache: Any, running: Any
) -> None:
    cache = make_cache(tmp_path / "c", texts)
    client = running([cache])
    port = int(client.url.rsplit(":", 1)[1])
    for options, message in [
        ({}, "nothing to serve"),
        ({"keep": tmp_path / "k"}, "there is none: add --upstream"),
        ({"upstream": fake.url}, "no cache says who the teacher is"),
    ]:
        with pytest.raises(UserError, match=message):
            running([], **options)
    with pytest.raises(UserError, match=r"--teacher is larger, but .* is of tiny"):
        running([cache], upstream=fake.url, teacher="larger")
    with pytest.raises(UserError, match="CACHE and --keep at once"):
        running([cache], upstream=fake.url, keep=Path(cache))
    with pytest.raises(UserError, match=r"cannot listen at 127\.0\.0\.1, port"):
        run.serve(run.ServeOptions(caches=[cache], port=port))
    with pytest.raises(UserError, match=r"holds distributions at temperature 0\.7, and those at 1"):
        running([make_cache(tmp_path / "cool", texts, temperature=0.7)])
    with CacheWriter(tmp_path / "empty") as writer:
        writer.finish(writer.begin(header(K)), 0)
    with pytest.raises(UserError, match="has no sequences, so there is nothing to serve"):
        running([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="finished cache, which does not grow"):
        running([cache], upstream=fake.url, keep=Path(make_cache(tmp_path / "d", texts)))


def test_a_connection_waits_for_a_slow_trainer(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Longer than uvicorn's five seconds."""
    configs: list[Any] = []
    real = run.uvicorn.Config
    monkeypatch.setattr(
        run.uvicorn, "Config", lambda *a, **k: (configs.append(real(*a, **k)), configs[-1])[1]
    )
    assert running([make_cache(tmp_path / "c", texts)]).rows(texts[1], 1)
    assert configs[0].timeout_keep_alive >= 60


def test_a_damaged_shard_is_no_answer(
    tmp_path: Path, texts: list[list[int]], make_cache: Any, running: Any
) -> None:
    cache = make_cache(tmp_path / "c", texts)
    client = running([cache])
    shard = tmp_path / "c/data/shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    client.stop()
    with pytest.raises(UserError, match="shard-00001"):
        running([cache])


def test_metrics_and_log(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(app, "_LOG_SECONDS", 1e6)  # one line at the end
    with caplog.at_level("INFO"):
        client = running([make_cache(tmp_path / "c", texts)])
        for text in texts:
            client.rows(text, 2)
        client.post(prompt="text", prompt_logprobs=2)
        assert client.metric('logitcask_requests_total{status="200"}') == len(texts)
        assert client.metric('logitcask_requests_total{status="400"}') == 1
        assert client.metric('logitcask_tokens_total{source="cache"}') == sum(map(len, texts))
        assert client.metric("logitcask_request_seconds_count") == len(texts)
        client.stop()
    (line,) = [each for each in caplog.messages if "from upstream" in each]
    assert (
        f"{len(texts)} prompts of {sum(map(len, texts))} tokens: {len(texts)} from caches" in line
    )


def test_a_served_cache_is_in_use(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGITCASK_HOME", str(tmp_path / "home"))
    cache, kept = make_cache(tmp_path / "c", texts[:3], k=K), tmp_path / "kept"
    for _ in range(2):  # the second server finds the kept cache of the first
        client = running([cache], upstream=fake.url, keep=kept)
        client.rows(texts[5], K)
        lines = listing(homes.home())
        assert all(line.in_use for line in lines)
        assert not any(remove(homes.home(), line.entry) for line in lines)
        client.stop()
    assert [Path(line.entry.where) for line in lines] == [kept, Path(cache)]
    assert not any(line.in_use for line in listing(homes.home()))


def test_the_target_alone_from_upstream(
    tmp_path: Path,
    texts: list[list[int]],
    table: Any,
    fake: Any,
    make_cache: Any,
    running: Any,
    assert_rows: Any,
) -> None:
    client = running([make_cache(tmp_path / "c", texts[:1])], upstream=fake.url)
    assert_rows(client.rows(texts[3], 0), table.prompt_logprobs(texts[3], 0), 0)


def test_errors_of_its_own_are_answered_and_logged(
    tmp_path: Path,
    texts: list[list[int]],
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = running([make_cache(tmp_path / "c", texts)])
    with monkeypatch.context() as patch:
        patch.setattr(served.ServedCache, "find", lambda *_, **__: 1 / 0)
        answer = client.post(prompt=texts[1], prompt_logprobs=1)
    assert answer.status_code == 500
    assert (
        answer.json()["error"]["message"] == "an error of this server, of which its log says more"
    )
    assert "ZeroDivisionError" in caplog.text
    assert client.metric('logitcask_requests_total{status="500"}') == 1
    assert client.rows(texts[1], 1)


def test_a_commit_that_fails_is_tried_again(
    tmp_path: Path,
    texts: list[list[int]],
    fake: Any,
    make_cache: Any,
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(keeper, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(app, "_COMMIT_SECONDS", 0.01)
    real, failed, went_on = keeper.Keeper.commit, threading.Event(), threading.Event()

    def commit(self: Any) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("out of order")
        real(self)
        went_on.set()

    monkeypatch.setattr(keeper.Keeper, "commit", commit)
    client = running(
        [make_cache(tmp_path / "c", texts[:1])], upstream=fake.url, keep=tmp_path / "kept"
    )
    client.rows(texts[2], K)
    assert went_on.wait(60)
    assert "RuntimeError: out of order" in caplog.text
    assert len(CacheReader(tmp_path / "kept")) == 1
