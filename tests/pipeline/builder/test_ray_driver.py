"""Builds on a real Ray cluster of two workers on this machine: the same cache, whatever dies on
the way.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from logitcask.cache_format import CacheReader, CacheWriter, DamagedCacheError, UserError, verify
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.layout import BUILD_DIR
from logitcask.cache_format.runtime.interruption import Stopped
from logitcask.cache_format.share.remote_writer import RemoteCacheWriter
from logitcask.pipeline.builder.ray_driver import _cluster, _error, _import_ray, _resources
from logitcask.pipeline.builder.ray_worker import MAX_ATTEMPTS, Coordinator, Done, ShardWorker, Task
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig, ScaleConfig
from logitcask.pipeline.distribution.keep import MisalignedScoresError

pytest.importorskip("ray")

LEFT = ["README.md", "data", "manifest.json", "tail_prior.arrow"]


def settings(output, **changes):
    return {
        "teacher": {"model": "synthetic", "backend": "synthetic", "vocab_size": 3000},
        "data": {"path": "python-docs", "max_length": 128, "max_tokens": 60_000},
        "store": {"top_k": 8, "shard_tokens": 5_000},
        "audit": {"sequences": 0},
        "output": str(output),
        **changes,
    }


def on_ray(fields, output, workers=2, **scale):
    return {
        **fields,
        "output": str(output),
        "scale": {"engine": "ray", "workers": workers, **scale},
    }


def same_cache(path, expected):
    """Is the cache in ``path`` the one that ``expected`` describes, with every sequence in its
    place, and nothing else?
    """
    found = CacheReader(path).manifest
    assert found.fingerprint == expected.fingerprint
    assert found.content_sha256 == expected.content_sha256
    assert [s.content_sha256 for s in found.shards] == [s.content_sha256 for s in expected.shards]
    assert found.tail_prior == expected.tail_prior
    assert verify(str(path), deep=True) == []
    assert sorted(file.name for file in Path(path).iterdir()) == LEFT


class Driver:
    """``teacher-cache build`` in a process of its own."""

    def __init__(self, folder, fields, **environment):
        self.output = Path(fields["output"])
        self.said = folder / "said"
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(fields))
        command = [
            sys.executable,
            "-c",
            "from logitcask.pipeline.cli import main; main()",
            "build",
            str(config),
        ]
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=said, env=os.environ | environment
            )

    def workers(self):
        """The processes of its workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ShardWorker" in " ".join(child.cmdline())]

    def wait_for_commits(self, count):
        while len(list((self.output / BUILD_DIR / "commits").glob("*.json"))) < count:
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.005)

    def end(self):
        # Well above what it takes on any machine, and below the limit of a test.
        return self.process.wait(timeout=800), self.said.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config that keeps two workers busy for a while, and the manifest that one process makes
    of it.
    """
    fields = settings(tmp_path_factory.mktemp("whole") / "cache")
    fields["data"]["max_tokens"] = 120_000
    return fields, build(BuildConfig.model_validate(fields)).manifest


def test_the_same_cache_as_in_one_process(tmp_path):
    fields = settings(tmp_path / "one")
    expected = build(BuildConfig.model_validate(fields)).manifest
    result = build(BuildConfig.model_validate(on_ray(fields, tmp_path / "two")))
    same_cache(tmp_path / "two", expected)
    assert [s.sha256 for s in result.manifest.shards] == [s.sha256 for s in expected.shards]
    assert result.tokens_scored == sum(
        len(s) for s in CacheReader(tmp_path / "one") if len(s.positions)
    )
    assert build(BuildConfig.model_validate(fields | {"output": str(tmp_path / "two")})).reused


def test_rows_of_another_cache_are_copied(tmp_path):
    """Workers copy the sequences of a smaller cache, and score the others."""
    home, fields = Home(tmp_path / "home"), settings(tmp_path / "one")
    expected = build(BuildConfig.model_validate(fields)).manifest
    less = {**fields["data"], "max_tokens": 50_000}
    smaller = {**fields, "data": less, "output": str(tmp_path / "less")}
    known = build(BuildConfig.model_validate(smaller), home=home).manifest
    result = build(BuildConfig.model_validate(on_ray(fields, tmp_path / "two")), home=home)
    same_cache(tmp_path / "two", expected)
    assert result.taken.where == (str(tmp_path / "less"),)
    assert result.taken.sequences == known.statistics.sequences
    assert 0 < result.tokens_scored <= expected.statistics.tokens - known.statistics.tokens


def test_into_a_store(tmp_path, monkeypatch):
    """Workers write into the work folder; the driver sends each shard and removes it there."""
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "work"))
    fields = settings(tmp_path / "one")
    expected = build(BuildConfig.model_validate(fields)).manifest
    url = f"memory://{tmp_path.name}/cache"
    sent = []
    send = RemoteCacheWriter._send

    def counted(self, file):
        sent.append(file.path)
        send(self, file)

    monkeypatch.setattr(RemoteCacheWriter, "_send", counted)
    found = build(BuildConfig.model_validate({**on_ray(fields, url), "output": url})).manifest
    assert found.content_sha256 == expected.content_sha256
    assert verify(url, deep=True) == []
    assert sorted(sent) == sorted(
        [expected.tail_prior.path, *(shard.path for shard in expected.shards)]
    )
    assert not list((tmp_path / "work" / "builds").glob("*/data/*"))


def test_a_worker_finds_a_shard_that_was_sent_away(tmp_path):
    """Its first worker committed it and died before it said so; the driver has sent it since."""
    fields = settings(tmp_path / "cache")
    with CacheWriter(tmp_path / "cache") as writer:
        record = writer.build_dir / "commits" / "shard-00003.json"
        entry = build(BuildConfig.model_validate(settings(tmp_path / "one"))).manifest.shards[3]
        record.write_text(entry.model_dump_json())
        for output, adopted in ((f"memory://{tmp_path.name}/c", True), (fields["output"], None)):
            task = Task(
                config=BuildConfig.model_validate({**fields, "output": output}).model_dump_json(),
                path=str(tmp_path / "cache"),
                run=writer.run,
                folder=os.getcwd(),
            )
            worker = ShardWorker(task, None)._worker
            if adopted:
                assert worker.adopt(3)
            else:
                with pytest.raises(DamagedCacheError, match="is not the file"):
                    worker.adopt(3)
        record.unlink()


def test_a_teacher_of_the_working_directory(user_folder):
    (user_folder / "mine.py").write_text(
        "from logitcask.pipeline.teachers.synthetic import SyntheticTeacher\n"
        "from logitcask.pipeline.teachers.synthetic_tokenizer import SyntheticTokenizer\n"
        "class Mine(SyntheticTeacher):\n"
        "    open_tokenizer = staticmethod(lambda config: SyntheticTokenizer())\n"
        "    def __init__(self, config, model, *, max_length, capture):\n"
        "        super().__init__(config, capture)\n"
    )
    fields = settings(
        user_folder / "one", teacher={"model": "m", "backend": "mine:Mine", "vocab_size": 3000}
    )
    fields["data"]["max_tokens"] = 12_000
    expected = build(BuildConfig.model_validate(fields)).manifest
    build(BuildConfig.model_validate(on_ray(fields, user_folder / "two")))
    same_cache(user_folder / "two", expected)
    assert expected.teacher.backend == "mine:Mine"


def test_workers_are_killed(tmp_path, whole, rng):
    fields, expected = whole
    driver = Driver(tmp_path, on_ray(fields, tmp_path / "cache"))
    driver.wait_for_commits(int(rng.integers(3, 20)))
    while True:
        workers = driver.workers()
        for each in workers:
            each.suspend()
        if list((tmp_path / "cache" / BUILD_DIR / "runs").glob("*/shard-*/*.arrow.tmp")):
            break  # one of them at least is in the middle of a shard
        for each in workers:
            each.resume()
        time.sleep(rng.uniform(0, 0.05))
    for each in workers:
        each.kill()
    code, said = driver.end()
    assert code == 0, said
    assert "a worker died at shard" in said
    assert "Traceback" not in said
    assert "raylet" not in said
    same_cache(tmp_path / "cache", expected)


def test_the_driver_is_killed(tmp_path, whole, rng):
    """Its workers are left alone; the same command goes on, at once."""
    fields, expected = whole
    fields = on_ray(fields, tmp_path / "cache")
    driver = Driver(tmp_path, fields)
    driver.wait_for_commits(int(rng.integers(3, 20)))
    driver.process.send_signal(signal.SIGKILL)
    driver.process.wait()
    done = len(list((tmp_path / "cache" / BUILD_DIR / "commits").glob("*.json")))
    assert 3 <= done < len(expected.shards)
    code, said = Driver(tmp_path, fields).end()
    assert code == 0, said
    assert f"of {len(expected.shards)} shards are done already" in said
    same_cache(tmp_path / "cache", expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, whole, number):
    fields, expected = whole
    driver = Driver(tmp_path, on_ray(fields, tmp_path / "cache"))
    driver.wait_for_commits(3)
    workers = driver.workers()
    driver.process.send_signal(number)
    code, said = driver.end()
    done = len(list((tmp_path / "cache" / BUILD_DIR / "commits").glob("*.json")))
    word = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert (code, said.splitlines()[-1]) == (
        128 + number,
        f"{word}; run the same command again to go on",
    ), said
    assert f"{done} of {len(expected.shards)} shards are done and kept" in said
    assert "Traceback" not in said
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running()]
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    events = [
        json.loads(line)["event"]
        for line in (tmp_path / "cache.log.jsonl").read_text().splitlines()
    ]
    assert (events[0], events[-1]) == ("start", "interrupted")


def test_no_thread_uses_ray_after_its_shutdown(tmp_path, whole, monkeypatch):
    """Ray would end the process with code 1 and without a word."""
    import ray

    fields, _ = whole
    running, shutdown = [], ray.shutdown

    def look(**options):
        running.extend(thread for thread in threading.enumerate() if reads(thread))
        shutdown(**options)

    def reads(thread):
        return thread.name == "results" or type(thread).__name__ == "StreamingExecutor"

    def stop():
        if list((tmp_path / "cache" / BUILD_DIR / "commits").glob("*.json")):
            assert any(map(reads, threading.enumerate()))
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(ray, "shutdown", look)
    monkeypatch.setattr("logitcask.pipeline.builder.ray_driver.safe_point", stop)
    with pytest.raises(Stopped):
        build(BuildConfig.model_validate(on_ray(fields, tmp_path / "cache")))
    assert running == []
    assert not ray.is_initialized()


def test_a_mistake_that_a_worker_finds(tmp_path):
    fields = settings(tmp_path / "cache")
    fields["teacher"] |= {"vocab_size": 258}
    fields["data"] |= {"max_tokens": 1000}
    driver = Driver(tmp_path, on_ray(fields, tmp_path / "cache"))
    while not (tmp_path / "cache" / BUILD_DIR / "plan.json").exists():
        assert driver.process.poll() is None
        time.sleep(0.005)
    # What a worker reads, as it would be on a node that does not share the folder.
    shutil.move(tmp_path / "cache" / BUILD_DIR / "plan.json", tmp_path)
    code, said = driver.end()
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "output has to be on a file system that all nodes of the cluster share" in error
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("UserError", UserError),
        ("DamagedCacheError", DamagedCacheError),
        ("MisalignedScoresError", MisalignedScoresError),
        ("SomethingNewer", UserError),
        ("Iterator", UserError),
    ],
)
def test_a_workers_error_is_the_drivers(kind, raised):
    error = _error(kind, "the words")
    assert type(error) is raised
    assert str(error) == "the words"


def test_a_shard_that_kills_every_worker_is_given_up(tmp_path, monkeypatch):
    coordinator = Coordinator()
    assert [coordinator.attempt(7) for _ in range(MAX_ATTEMPTS + 1)] == list(
        range(1, MAX_ATTEMPTS + 2)
    )
    assert [message for _, message in coordinator.situation().messages] == [
        "a worker died at shard 7; another one takes it over"
    ]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    row = worker(tmp_path, attempt=MAX_ATTEMPTS + 1)({"shard": [7]})
    assert row["error"] == ["UserError"]
    assert "workers have died at shard 7" in row["message"][0]


def worker(path, attempt=1):
    config = BuildConfig.model_validate(settings(path / "cache")).model_dump_json()
    coordinator = SimpleNamespace(attempt=SimpleNamespace(remote=lambda _: attempt))
    return ShardWorker(
        Task(config=config, path=str(path / "cache"), run="a", folder=os.getcwd()), coordinator
    )


def test_the_first_offer_counts_and_tokens_of_an_attempt_that_died_do_not():
    coordinator = Coordinator()
    coordinator.offer("first", b"1")
    coordinator.offer("second", b"2")
    coordinator.report(0, Done(100, 90, 2.0))
    coordinator.report(0, Done(30, 20, 1.0))
    coordinator.report(1, Done(5, 5, 0.5))
    for _ in range(2):
        situation = coordinator.situation()
        assert (situation.offer, situation.done) == (("first", b"1"), Done(35, 25, 1.5))


def test_resources(tmp_path):
    config = BuildConfig.model_validate(
        settings(tmp_path, teacher={"model": "m", "tensor_parallel_size": 2})
    )

    def resources(there, **scale):
        ray = SimpleNamespace(cluster_resources=lambda: there)
        return _resources(ray, ScaleConfig.model_validate({"workers": 2, **scale}), config)

    assert resources({"CPU": 32, "GPU": 8}) == (1, 2)
    assert resources({"CPU": 32, "GPU": 8}, gpus_per_worker=4, cpus_per_worker=3) == (3, 4)
    assert resources({"CPU": 32}) == (16, 0)
    assert resources({"CPU": 1}) == (1, 0)
    with pytest.raises(
        UserError, match="2 workers with 2 GPUs each, and the Ray cluster has 2 GPUs; set fewer"
    ):
        resources({"CPU": 32, "GPU": 2})
    assert resources({"CPU": 32, "GPU": 2}, address="elsewhere:6379") == (1, 2), (
        "a cluster may grow"
    )


@pytest.mark.parametrize(
    ("teacher", "gpus"),
    [
        ({"model": "m"}, 1),
        (
            {"model": "m", "tensor_parallel_size": 2, "engine_args": {"pipeline_parallel_size": 3}},
            6,
        ),
        ({"model": "synthetic", "tensor_parallel_size": 2}, 0),
        ({"model": "m", "backend": "synthetic", "engine_args": {"pipeline_parallel_size": 3}}, 0),
    ],
)
def test_a_worker_has_the_gpus_of_its_engine(tmp_path, teacher, gpus):
    config = BuildConfig.model_validate(settings(tmp_path, teacher=teacher))
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 64, "GPU": 32})
    assert _resources(ray, ScaleConfig(workers=2), config)[1] == gpus
    assert (
        _resources(
            SimpleNamespace(cluster_resources=lambda: {"CPU": 64}), ScaleConfig(workers=2), config
        )[1]
        == 0
    )


def test_a_call_after_the_end_starts_no_second_cluster():
    """Seen on one busy core: the thread that reads results asked for one more after an
    interruption had shut Ray down.
    """
    code = (
        "from logitcask.pipeline.builder.ray_driver import _import_ray\n"
        "ray = _import_ray()\n"
        "try: ray.put(1)\n"
        "except Exception as error: print(type(error).__name__, ray.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False"], done


def test_a_start_that_takes_too_long_is_repeated(caplog):
    """Seen on a machine with six times as many processes as cores: Ray gives its own 30 s."""
    failures, shut_down = [Exception("The current node timed out during startup.")] * 2, []

    def init(**_):
        if failures:
            raise failures.pop()

    ray = SimpleNamespace(init=init, shutdown=lambda: shut_down.append(1))
    with _cluster(ray, ScaleConfig(workers=2)):
        assert len(shut_down) == 2
    assert caplog.text.count("Ray did not start, trying again") == 2
    failures[:] = [Exception("The current node timed out.\nmore")] * 9
    with (
        pytest.raises(
            UserError, match=r"^Ray did not start in 4 attempts: The .* out\.; end other"
        ),
        _cluster(ray, ScaleConfig(workers=2)),
    ):
        pass
    assert len(failures) == 5


def test_handlers_of_the_program_stay_loud():
    """Ray Data takes over the handlers of the root logger; a second build silenced them."""
    root, of_data = logging.getLogger(), logging.getLogger("ray.data")
    _import_ray()
    mine, its = logging.StreamHandler(), logging.StreamHandler()
    root.addHandler(mine)
    try:
        of_data.addHandler(mine)
        of_data.addHandler(its)
        _import_ray()
        assert mine.level == logging.NOTSET
        assert mine not in of_data.handlers
        assert its.level > logging.CRITICAL
    finally:
        root.removeHandler(mine)
        of_data.removeHandler(its)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'logitcask\[scale\]'"):
        _import_ray()


def test_a_handful_of_kills(tmp_path):
    """``benchmarks/kills.py`` in short."""
    script = Path(__file__).parents[3] / "benchmarks" / "kills.py"
    none = [f"--{kind}=0" for kind in ("vllm", "ray-worker", "ray-driver", "ray-vllm")]
    options = ["--process=4", *none, "--tokens=50000", f"--out={tmp_path / 'kills.json'}"]
    command = [sys.executable, script, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert (result["kills"], sum(result["by_phase"].values()), result["problems"]) == (4, 4, 0)
