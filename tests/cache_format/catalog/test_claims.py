"""Claims: of several builders one works, the others wait, and a dead one is replaced."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from logitcask.cache_format.catalog import claims, presence
from logitcask.cache_format.catalog.claims import claimed


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.01)


def test_a_claim_of_nobody_is_taken_at_once(tmp_path):
    with claimed(tmp_path, "k", "cache", lambda owner: pytest.fail("no wait")) as waited:
        assert not waited
        owner = json.loads((tmp_path / "k.json").read_text())
        assert (owner["pid"], owner["what"]) == (os.getpid(), "cache")
    assert not (tmp_path / "k.json").exists()
    with claimed(tmp_path, "k", "cache", lambda owner: pytest.fail("no wait")) as waited:
        assert not waited


def test_two_keys_do_not_wait_for_each_other(tmp_path):
    with (
        claimed(tmp_path, "one", "a", lambda owner: pytest.fail("no wait")),
        claimed(tmp_path, "two", "b", lambda owner: pytest.fail("no wait")),
    ):
        pass


def test_the_second_waits_for_the_first(tmp_path, fork):
    """Each of four processes finds the counter as the one before it has left it."""
    counter, waits = tmp_path / "counter", tmp_path / "waits"
    counter.write_text("0")
    waits.mkdir()

    def work():
        with claimed(tmp_path, "k", "cache", lambda o: (waits / str(os.getpid())).touch()):
            before = int(counter.read_text())
            while before == 0 and not list(waits.iterdir()):  # until another one waits
                time.sleep(0.01)
            counter.write_text(str(before + 1))

    children = [fork(work) for _ in range(4)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert counter.read_text() == "4"


def test_a_killed_owner_is_replaced_at_once(tmp_path, fork):
    def die():
        with claimed(tmp_path, "k", "cache", print):
            (tmp_path / "claimed").touch()
            time.sleep(600)

    child = fork(die)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    heard = threading.Event()
    owners = []

    def wait():
        with claimed(tmp_path, "k", "cache", lambda o: (owners.append(o), heard.set())) as waited:
            owners.append(waited)

    waiter = threading.Thread(target=wait)
    waiter.start()
    heard.wait()
    child.kill()
    child.join()
    waiter.join()
    assert owners[0]["pid"] == child.pid
    assert owners[1] is True


def of_another_machine(tmp_path, age):
    """The claim of a machine whose locks do not reach this one."""
    file = tmp_path / "k.json"
    file.write_text(json.dumps({"host": "another", "pid": 1, "what": "cache", "since": "today"}))
    then = presence.clock(tmp_path) - age
    os.utime(file, (then, then))
    return file


def test_another_machine_is_waited_for_while_it_lives(tmp_path):
    file = of_another_machine(tmp_path, age=presence.EXPIRES / 2)
    seen = []

    def end(owner):
        seen.append(owner["host"])
        file.unlink()

    with claimed(tmp_path, "k", "cache", end) as waited:
        assert waited
    assert seen == ["another"]


def test_another_machine_that_is_silent_is_replaced(tmp_path):
    of_another_machine(tmp_path, age=presence.EXPIRES + 1)
    with claimed(tmp_path, "k", "cache", lambda owner: pytest.fail("no wait")) as waited:
        assert not waited
        assert json.loads((tmp_path / "k.json").read_text())["pid"] == os.getpid()


def test_of_two_machines_that_start_together_one_waits(tmp_path, monkeypatch):
    """The other one's claim appears between the look and the own claim."""
    real, seen = os.link, []

    def slower(source, target):
        monkeypatch.setattr(os, "link", real)
        of_another_machine(tmp_path, age=0)
        real(source, target)

    monkeypatch.setattr(os, "link", slower)

    def end(owner):
        seen.append(owner)
        (tmp_path / "k.json").unlink()

    with claimed(tmp_path, "k", "cache", end) as waited:
        assert waited
    assert len(seen) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["k.lock"]


def test_a_folder_that_takes_no_files_has_no_claims(tmp_path):
    (tmp_path / "file").touch()
    with claimed(tmp_path / "file" / "claims", "k", "cache", print) as waited:
        assert not waited


def test_an_error_inside_ends_the_claim(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path, "k", "cache", print):
        raise ZeroDivisionError
    assert not (tmp_path / "k.json").exists()


def test_of_two_machines_that_replace_a_dead_one_one_waits(tmp_path, monkeypatch):
    """The other one has taken its place between the look and the removal."""
    of_another_machine(tmp_path, age=presence.EXPIRES + 1)
    real, seen = os.rename, []

    def slower(source, target):
        monkeypatch.setattr(os, "rename", real)
        (tmp_path / "k.json").write_text('{"host": "a third", "pid": 1}')
        real(source, target)

    monkeypatch.setattr(os, "rename", slower)

    def end(owner):
        seen.append(json.loads((tmp_path / "k.json").read_text())["host"])
        (tmp_path / "k.json").unlink()

    with claimed(tmp_path, "k", "cache", end) as waited:
        assert waited
    assert seen == ["a third"]
    assert [file.name for file in tmp_path.iterdir()] == ["k.lock"]


def test_only_the_own_claim_is_removed(tmp_path):
    """Another machine has taken this one for dead."""
    with claimed(tmp_path, "k", "cache", print):
        file = of_another_machine(tmp_path, age=0)
    assert json.loads(file.read_text())["host"] == "another"
    assert {each.name for each in tmp_path.iterdir()} == {"k.json", "k.lock"}
