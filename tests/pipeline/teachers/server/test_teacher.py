"""The server backend against a server of the tests' own, which fails, lies and changes in every way
that we know of.

A real vLLM server is in ``test_teachers_server_vllm.py``.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.cache_format.cli.config_file import load_config
from logitcask.cache_format.errors import ConfigError, UserError
from logitcask.pipeline.config import BuildConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.keep import MisalignedScoresError
from logitcask.pipeline.teachers.open import open_teacher
from logitcask.pipeline.teachers.server import http
from logitcask.pipeline.teachers.server.rows import parse_rows
from logitcask.pipeline.types import Sequence

VOCAB = 384
Make = Callable[[str, list[int]], Sequence]


class FakeServer:
    """Speaks as much of vLLM's API as the teacher uses. Token i + 1 depends on token i alone, by
    a table of logprobs.
    """

    def __init__(self, seed: int) -> None:
        self.change_model(seed)
        self.version, self.max_logprobs, self.models = "0.32.0", 64, [("tiny", "/models/tiny", 200)]
        self.key: str | None = None
        self.before: Callable[[int, list[int]], Any] = lambda number, prompt: None
        self.after: Callable[[int, dict[str, Any]], Any] = lambda number, answer: answer
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, content: Any) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                    self.answer(401, {"error": "Unauthorized"})
                elif self.path == "/v1/models":
                    self.answer(
                        200,
                        {
                            "data": [
                                {"id": i, "root": r, "max_model_len": n} for i, r, n in fake.models
                            ]
                        },
                    )
                elif self.path == "/version" and fake.version:
                    self.answer(200, {"version": fake.version})
                else:
                    self.answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    number = len(fake.requests)
                    fake.requests.append(request)
                failure = fake.before(number, request["prompt"])
                if failure == "drop":
                    self.connection.close()
                    self.close_connection = True
                elif failure is not None:
                    status, message = (
                        failure if isinstance(failure, tuple) else (failure, "out of order")
                    )
                    self.answer(status, {"error": {"message": message}})
                elif request["prompt_logprobs"] > fake.max_logprobs:
                    message = f"Requested prompt logprobs of {request['prompt_logprobs']}, which is greater than max allowed: {fake.max_logprobs}"
                    self.answer(400, {"error": {"message": message}})
                else:
                    self.answer(
                        200,
                        fake.after(
                            number, fake.completion(request["prompt"], request["prompt_logprobs"])
                        ),
                    )

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def change_model(self, seed: int) -> None:
        logits = np.random.default_rng(seed).normal(0, 3, (VOCAB, VOCAB))
        self.table = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)

    def completion(self, prompt: list[int], k: int) -> dict[str, Any]:
        rows: list[Any] = [None]
        for token, target in itertools.pairwise(prompt):
            logprobs = self.table[token]
            rank = int((logprobs >= logprobs[target]).sum())
            top = np.argsort(-logprobs, kind="stable")[:k].tolist()
            row = {target: rank} | {each: i + 1 for i, each in enumerate(top)}
            rows.append(
                {
                    str(i): {"logprob": float(logprobs[i]), "rank": r, "decoded_token": '"1":{'}
                    for i, r in row.items()
                }
            )
        return {"choices": [{"index": 0, "finish_reason": "length", "prompt_logprobs": rows}]}

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def fake(rng: np.random.Generator) -> Iterator[FakeServer]:
    running = FakeServer(int(rng.integers(1 << 31)))
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_DELAY", 0.02)
    monkeypatch.setattr(http, "_LONGEST_DELAY", 0.1)


@pytest.fixture
def start(fake: FakeServer, tiny_llama: Path) -> Iterator[Callable[..., Any]]:
    """``start(top_k=8, state=None, **settings of the server)`` opens the teacher on the fake."""
    opened: list[Any] = []

    def open_on(top_k: int = 8, state: Path | None = None, **settings: Any) -> Any:
        settings = {
            "url": fake.url,
            "model": "tiny",
            "concurrency": 4,
            "compare": "never",
            **settings,
        }
        config = TeacherConfig(
            model=str(tiny_llama), backend="server", dtype="float32", server=settings
        )
        teacher = open_teacher(config, max_length=100, capture=Capture(top_k), state=state)
        opened.append(teacher)
        return teacher

    yield open_on
    for teacher in opened:
        teacher.close()


@pytest.fixture
def texts(rng: np.random.Generator, as_sequence: Make) -> list[Sequence]:
    """Some random ids, from the shortest to the longest that there may be."""
    lengths = [2, 100, *rng.integers(2, 100, 28).tolist()]
    return [as_sequence(f"s{i}", rng.integers(0, VOCAB, n).tolist()) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("top_k", [1, 8, 64])
def test_scores_are_the_servers_in_the_order_of_the_text(
    fake: FakeServer,
    start: Any,
    texts: list[Sequence],
    assert_same_scores: Any,
    top_k: int,
    rng: np.random.Generator,
) -> None:
    pauses = rng.uniform(0, 0.02, 100)
    fake.before = lambda number, prompt: time.sleep(pauses[number % 100])
    teacher = start(top_k)
    assert teacher.identity().engine == "vllm 0.32.0"
    scored = list(teacher.score(iter(texts)))
    assert len(scored) == len(texts)
    for found, text in zip(scored, texts, strict=True):
        assert_same_scores(
            found, fake.table[text.input_ids[:-1]], text.input_ids, 1e-6, Capture(top_k)
        )
    # The least that does it: nothing is sampled that is not asked for, no logprobs of the sampled
    # token.
    assert {tuple(sorted(request)) for request in fake.requests} == {
        ("add_special_tokens", "max_tokens", "model", "prompt", "prompt_logprobs", "temperature")
    }


def test_no_more_is_read_ahead_than_twice_the_concurrency(
    start: Any, texts: list[Sequence]
) -> None:
    read = 0

    def counted() -> Iterator[Sequence]:
        nonlocal read
        for text in texts:
            read += 1
            yield text

    for done, _ in enumerate(start(concurrency=3).score(counted())):
        assert read <= done + 6
        time.sleep(0.001)


@pytest.mark.parametrize("failure", [500, 503, 429, "drop", "slow"])
def test_a_server_that_fails_for_a_while_is_waited_for(
    fake: FakeServer,
    start: Any,
    texts: list[Sequence],
    failure: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Long enough that a busy machine does not add absences of its own.
    teacher = start(timeout=0.3 if failure == "slow" else 60)
    began = len(fake.requests)

    def before(number: int, prompt: list[int]) -> Any:
        if not began + 10 <= number < began + 20:
            return None
        return time.sleep(0.6) if failure == "slow" else failure

    fake.before = before
    with caplog.at_level(logging.INFO):
        scored = list(teacher.score(texts))
    for found, text in zip(scored, texts, strict=True):
        np.testing.assert_array_equal(
            found.target_logprob, fake.table[text.input_ids[:-1], text.input_ids[1:]]
        )
    waiting = [
        line
        for line in caplog.messages
        if line.startswith(f"waiting for the server at {fake.url} (")
    ]
    # One line an absence: another begins only where a request came through between two that failed.
    assert 1 <= len(waiting) <= 1 + sum("answers again" in line for line in caplog.messages)
    assert {
        500: "500 out of order",
        503: "503",
        429: "429",
        "drop": "isconnect",
        "slow": "no answer in 0.3 s",
    }[failure] in waiting[0]


def test_patience_ends(fake: FakeServer, start: Any, texts: list[Sequence]) -> None:
    teacher = start(patience=0.5)
    fake.before = lambda number, prompt: 503
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"has not answered for 0\.5 s \(503 out of order\); start it and run the same",
    ):
        list(teacher.score(texts))
    assert time.monotonic() - began > 0.5
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9 has not answered for 0\.1 s \(.*refused|connect"
    ):
        start(url="http://127.0.0.1:9", patience=0.1)


def test_a_server_that_is_not_up_yet_is_waited_for(fake: FakeServer, start: Any) -> None:
    failures = iter([503, 503])
    fake.before = lambda number, prompt: next(failures, None)
    start()


def test_a_refusal_is_final(fake: FakeServer, start: Any, texts: list[Sequence]) -> None:
    teacher = start(patience=60)
    asked = len(fake.requests)
    fake.before = lambda number, prompt: 422 if len(prompt) == 100 else None
    with pytest.raises(
        UserError, match=r"refuses to score \(422\): out of order; start it with: vllm serve"
    ):
        list(teacher.score(texts))
    assert [len(request["prompt"]) for request in fake.requests[asked:]].count(100) == 1


def test_a_server_that_lost_the_model_is_refused(
    fake: FakeServer, start: Any, texts: list[Sequence]
) -> None:
    teacher = start()
    fake.before = lambda number, prompt: 404
    with pytest.raises(
        UserError,
        match=r"no longer serves tiny \(out of order\): it was restarted with another model",
    ):
        list(teacher.score(texts))


def test_an_aborted_answer_is_asked_for_again(
    fake: FakeServer, start: Any, texts: list[Sequence]
) -> None:
    teacher = start()
    began = len(fake.requests)

    def after(number: int, answer: dict[str, Any]) -> dict[str, Any]:
        if number - began in (2, 5, 6):
            answer["choices"][0].update(finish_reason="abort", prompt_logprobs=None)
        return answer

    fake.after = after
    assert len(list(teacher.score(texts))) == len(texts)


def spoil(answer: dict[str, Any], how: str) -> Any:
    rows = answer["choices"][0]["prompt_logprobs"]
    row, first = rows[len(rows) // 2], rows[1]
    target = next(iter(first))
    if how == "a row short":
        del rows[-1]
    elif how == "a row is null":
        rows[-1] = None
    elif how == "no rows":
        answer["choices"][0]["prompt_logprobs"] = None
    elif how == "shifted":
        rows.insert(1, rows.pop())
    elif how == "no target":
        entry = first.pop(target)
        first[str(int(target) + VOCAB)] = entry
    elif how == "an entry short":
        del row[next(i for i, entry in row.items() if entry["rank"] == 3)]
    elif how == "a rank twice":
        next(entry for entry in row.values() if entry["rank"] == 3)["rank"] = 4
    elif how == "ranks against logprobs":
        next(entry for entry in row.values() if entry["rank"] == 1)["logprob"] = -50.0
    elif how == "another document":
        return {"choices": "many"}
    else:
        return b"<html>it works</html>"
    return answer


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a row short", "rows; expected"),
        ("a row is null", "rows; expected"),
        ("no rows", "has 0 rows"),
        ("shifted", "does not say in row"),
        ("no target", "does not say in row 0"),
        ("an entry short", "expected 8, and the target|does not say in row|by rank"),
        ("a rank twice", "most probable ids by rank"),
        ("ranks against logprobs", "do not follow the logprobs"),
        ("another document", "not what a vLLM server says"),
        ("a page", "not what a vLLM server says"),
    ],
)
def test_nothing_of_a_wrong_answer_is_used(
    fake: FakeServer, start: Any, rng: np.random.Generator, as_sequence: Make, how: str, says: str
) -> None:
    teacher = start()
    fake.after = lambda number, answer: spoil(answer, how)
    text = as_sequence("spoilt", rng.permutation(VOCAB)[:60].tolist())
    with pytest.raises(MisalignedScoresError, match=f"'spoilt' of 60 tokens .*({says})"):
        list(teacher.score([text]))


def test_rows_in_any_order_of_keys(fake: FakeServer, rng: np.random.Generator) -> None:
    fake.table[rng.random(fake.table.shape) < 0.5] = -np.inf
    ids = rng.integers(0, VOCAB, 200).astype(np.int32)
    answer = fake.completion(ids.tolist(), 8)
    rows = answer["choices"][0]["prompt_logprobs"]
    for i in range(1, len(rows)):
        entries = list(rows[i].items())
        rows[i] = dict(entries[j] for j in rng.permutation(len(entries)))
        for entry in rows[i].values():
            entry["logprob"] = max(entry["logprob"], -9999.0)
    found = parse_rows(json.dumps(answer).encode(), ids, 8, "x")
    assert found is not None
    found_ids, logprobs, ranks = found
    dense = fake.table[ids[:-1]]
    np.testing.assert_array_equal(found_ids[:, 0], ids[1:])
    np.testing.assert_array_equal(logprobs[:, 1:], -np.sort(-dense, axis=1)[:, :8])
    np.testing.assert_array_equal(
        np.take_along_axis(dense, found_ids.astype(np.int64), axis=1), logprobs
    )
    # As vLLM counts, or the place among the most probable ones.
    assert (ranks <= (dense >= logprobs[:, :1]).sum(axis=1)).all()
    assert (ranks > (dense > logprobs[:, :1]).sum(axis=1)).all()


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (
            {"models": [("a", "/b/c", 200)]},
            {"model": None},
            r"serves a, not .*start it with: vllm serve .*set teacher.server.model",
        ),
        ({"models": [("a", "/b/c", 200)]}, {}, "serves a, not tiny"),
        (
            {"models": [("tiny", "x", 100)]},
            {},
            "takes 100 tokens, data.max_length is 100 .*--max-model-len 101",
        ),
        (
            {"max_logprobs": 5},
            {},
            r"max allowed: 5 \(store.top_k is 8\); start it with: .*--max-logprobs 8",
        ),
        ({"version": None}, {}, "/version answers 404: .*expected a vLLM server"),
        ({"key": "secret"}, {}, r"wants another API key \(401\); set teacher.server.api_key_env"),
        (
            {},
            {"api_key_env": "NO_SUCH_KEY"},
            "api_key_env is NO_SUCH_KEY, but no such environment variable is set",
        ),
        ({}, {"compare": "always"}, "does not say what .* says .*it serves another model"),
    ],
)
def test_a_server_that_will_not_do_is_refused_at_the_start(
    fake: FakeServer, start: Any, change: dict[str, Any], settings: dict[str, Any], says: str
) -> None:
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(UserError, match=says) as error:
        start(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("served", [("tiny", "/elsewhere/{}", 200), ("{}", None, None)])
def test_a_model_goes_by_its_own_name(
    fake: FakeServer, start: Any, tiny_llama: Path, served: Any
) -> None:
    fake.models = [
        ("another", "x", 1),
        tuple(x.format(tiny_llama.name) if isinstance(x, str) else x for x in served),
    ]
    assert start(model=None)._served == fake.models[1][0]


def test_a_server_that_reads_short_texts_as_long_ones(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 200 tokens, more than data.max_length, and chooses RoPE factors by that."""
    monkeypatch.setattr(
        "logitcask.pipeline.teachers.model.longest_with_short_rope", lambda model: 200
    )
    start()
    monkeypatch.setattr(
        "logitcask.pipeline.teachers.model.longest_with_short_rope", lambda model: 150
    )
    with pytest.raises(
        UserError, match=r"takes 200 tokens .* start a server with --max-model-len 150"
    ):
        start()


def test_keys_are_sent(fake: FakeServer, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "secret"
    monkeypatch.setenv("SOME_KEY", "secret")
    start(api_key_env="SOME_KEY")


def test_a_key_from_a_file_ends_with_its_newline(
    fake: FakeServer, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key = "secret"
    monkeypatch.setenv("SOME_KEY", " secret\n")
    start(api_key_env="SOME_KEY")


@pytest.mark.parametrize("key", ["clé", "two\nlines"])
def test_a_key_that_no_header_can_hold(
    start: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(UserError, match=r"SOME_KEY .*a key is printable ASCII") as error:
        start(api_key_env="SOME_KEY")
    assert "\n" not in str(error.value)
    assert key not in str(error.value)


@pytest.mark.parametrize("shift", [5.0, -8.0])
def test_logits_are_not_taken_for_logprobs(fake: FakeServer, start: Any, shift: float) -> None:
    fake.table += np.float32(shift)
    with pytest.raises(
        UserError,
        match=r"does not send logprobs of whole distributions.*--logprobs-mode raw_logprobs",
    ):
        start()


@pytest.mark.parametrize("nan", [b"NaN", b"null"])
def test_nan_is_named(nan: bytes) -> None:
    entry = b'{"7": {"logprob": ' + nan + b', "rank": 1, "decoded_token": null}}'
    body = b'{"choices": [{"prompt_logprobs": [null, ' + entry + b'], "finish_reason": "length"}]}'
    with pytest.raises(
        UserError, match=r"logprobs are NaN in sequence 'x': .*float16.*weights are damaged"
    ):
        parse_rows(body, np.array([3, 7], np.int32), 1, "x")


def test_nan_that_a_server_cannot_send_is_named(fake: FakeServer, start: Any) -> None:
    message = "Out of range float values are not JSON compliant: nan"
    fake.before = lambda number, prompt: (400, message)
    with pytest.raises(UserError, match=r"logprobs are NaN on the server at http://127.*float16"):
        start()


def test_stale_rows_of_a_prefix_cache_are_noticed(fake: FakeServer, start: Any) -> None:
    seen: set[int] = set()

    def before(number: int, prompt: list[int]) -> None:
        if len(prompt) in seen:
            fake.change_model(3)
        seen.add(len(prompt))

    fake.before = before
    with pytest.raises(
        UserError,
        match=r"other logprobs when it reads the same text again .*--no-enable-prefix-caching",
    ):
        start()


def test_another_model_is_refused_when_a_build_goes_on(
    fake: FakeServer, start: Any, tmp_path: Path
) -> None:
    start(state=tmp_path)
    fake.table += np.random.default_rng(0).normal(0, 0.001, fake.table.shape).astype(np.float32)
    start(state=tmp_path)
    fake.change_model(4)
    start()
    with pytest.raises(
        UserError, match=r"something else than when this build began .*begin afresh with --restart"
    ):
        start(state=tmp_path)


@pytest.mark.parametrize("proxied", [False, True])
@pytest.mark.parametrize("becomes", ["another model", "another version"])
def test_another_model_is_refused_in_the_middle(
    fake: FakeServer, start: Any, texts: list[Sequence], proxied: bool, becomes: str
) -> None:
    """Nothing of the new one is handed out where its connections are new; behind a proxy, not
    all of a shard.
    """
    teacher = start(concurrency=2)
    began, before_it = len(fake.requests), fake.table

    def before(number: int, prompt: list[int]) -> Any:
        if number < began + 10:
            return None
        if becomes == "another model":
            fake.change_model(4)
        else:
            fake.version = "0.33.0"
        return "drop" if number < began + 14 and not proxied else None

    fake.before = before
    handed_out = []
    says = (
        "something else than when this build began"
        if becomes == "another model"
        else r"is vLLM 0\.33\.0 now"
    )
    with pytest.raises(UserError, match=rf"{says}.*start it as before, with: vllm serve"):
        handed_out.extend(teacher.score(texts))
    assert len(handed_out) < len(texts)
    if not proxied:
        for found, text in zip(handed_out, texts, strict=False):
            np.testing.assert_array_equal(
                found.target_logprob, before_it[text.input_ids[:-1], text.input_ids[1:]]
            )


def test_closing_does_not_wait_for_answers(
    fake: FakeServer, start: Any, texts: list[Sequence]
) -> None:
    teacher, over = start(), threading.Event()

    def before(number: int, prompt: list[int]) -> None:
        if len(prompt) > 2:
            over.wait(300)

    fake.before = before
    scores = teacher.score(texts)
    next(scores)
    began = time.monotonic()
    scores.close()
    teacher.close()
    assert time.monotonic() - began < 200
    over.set()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], r"a server sends no draws .*store.tail_samples is 32\); set store.tail_samples=0"),
        (
            ["teacher.server=null", "store.tail_samples=0"],
            "set teacher.server.url=http://HOST:PORT",
        ),
        (
            ["teacher.engine_args.x=1", "store.tail_samples=0"],
            "engine_args are for engines started here",
        ),
        (["scale.workers=2", "store.tail_samples=0"], "scale starts engines of its own"),
        (["teacher.server.url=host:8000"], "teacher.server.url: expected http://HOST:PORT"),
        (["teacher.server.url=ftp://host:8000"], "teacher.server.url: expected http://HOST:PORT"),
        (["teacher.server.url=http://"], "teacher.server.url: '' is no host"),
        (["teacher.server.url=http://a..b"], "teacher.server.url: 'a..b' is no host"),
        (["teacher.server.url=http://h:99999"], "teacher.server.url: Port out of range"),
        (["teacher.server.url=http://h:0"], "teacher.server.url: no server listens at port 0"),
        (["teacher.server.url=http://h:80a0"], "teacher.server.url: Port could not be cast"),
        (["teacher.server.url='http://[::1'"], "teacher.server.url: Invalid IPv6 URL"),
        (
            ["teacher.server.url='http://[host]:80'"],
            "teacher.server.url: 'host' does not appear to be",
        ),
        (["teacher.server.url='http://a b'"], "teacher.server.url: a URL holds no white space"),
        (["teacher.server.url='http://h/v1?x=1'"], "teacher.server.url: nothing may come after"),
        (["teacher.server.patients=3"], "did you mean patience"),
    ],
)
def test_mistakes_in_the_config_are_one_line(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "teacher: {model: m, backend: server, server: {url: 'http://h:8000/v1/'}}\ndata: {path: python-docs}\noutput: o\n"
    )
    with pytest.raises(ConfigError, match=says) as error:
        load_config(BuildConfig, file, overrides)
    assert "\n" not in str(error.value)
    good = load_config(BuildConfig, file, ["store.tail_samples=0"])
    assert good.teacher.server is not None
    assert good.teacher.server.url == "http://h:8000"
    bracketed = load_config(
        BuildConfig, file, ["store.tail_samples=0", "teacher.server.url='https://[::1]:80/x/v1'"]
    )
    assert bracketed.teacher.server is not None
    assert bracketed.teacher.server.url == "https://[::1]:80/x"
