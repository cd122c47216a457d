"""Names of other people's code in configs: what they name, and every way in which they do not."""

from __future__ import annotations

import hashlib
import sys

import pytest

from logitcask.cache_format.errors import ConfigError, LogitcaskError, UserError
from logitcask.cache_format.runtime.extensions import (
    LOSS,
    SOURCE,
    called,
    code_sha256,
    installed,
    is_named,
    is_reference,
    load,
    origin,
    unknown,
    yielded,
)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("my_module:my_loss", True),
        ("package.module:Name", True),
        ("forward_kl", False),
        ("s3://bucket/file", False),
        ("C:\\data", False),
        ("a:b:c", False),
        ("folder/file.jsonl:part", False),
        ("module:", False),
        (":name", False),
    ],
)
def test_references(name, holds):
    assert is_reference(name) == holds


def test_a_module_of_the_working_directory(user_folder):
    (user_folder / "mine.py").write_text("class Thing: pass\n")
    found = load(SOURCE, "mine:Thing")
    assert found.__name__ == "Thing"
    assert code_sha256(found) == hashlib.sha256(b"class Thing: pass\n").hexdigest()
    assert load(SOURCE, "mine:Thing") is found


def test_a_module_in_a_package(user_folder):
    (user_folder / "pack").mkdir()
    (user_folder / "pack" / "__init__.py").write_text("")
    (user_folder / "pack" / "inner.py").write_text(
        "from pack import other\ndef f(): return other.x\n"
    )
    (user_folder / "pack" / "other.py").write_text("x = 5\n")
    assert load(SOURCE, "pack.inner:f")() == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nothing_of_this_name\n",
            r"failed: No module named 'nothing_of_this_name' \(ModuleNotFoundError\), at .*bad.py:1 ",
        ),
        ("x = 1\nx.y\n", r"'int' object has no attribute 'y' \(AttributeError\), at .*bad.py:2 "),
        ("def f(:\n", r"invalid syntax \(bad.py, line 1\) \(SyntaxError\)"),
        ("raise SystemExit(3)\n", r"failed: 3 \(SystemExit\), at .*bad.py:1 "),
        ("raise ValueError('two\\nlines')\n", r"failed: two lines \(ValueError\)"),
        ("good = 1\n", r"the module bad \(.*bad.py\) has no 'goood'; did you mean good\?"),
        ("", r"has no 'goood'; expected a function or a class of that name"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_with_its_cause(user_folder, text, message):
    (user_folder / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(SOURCE, "bad:goood")
    assert str(caught.value).startswith("source of data 'bad:goood': ")
    assert "\n" not in str(caught.value)
    if "failed" in message:
        assert caught.value.__cause__ is not None  # --debug shows it


def test_a_module_that_is_not_there(user_folder):
    with pytest.raises(ConfigError, match=f"there is no module absent in {user_folder} or among"):
        load(LOSS, "absent:f")
    (user_folder / "pack").mkdir()
    (user_folder / "pack" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match=r"there is no module pack\.absent in"):
        load(LOSS, "pack.absent:f")


def test_errors_of_our_own_stay_as_they_are(user_folder):
    (user_folder / "ours.py").write_text(
        "from logitcask import UserError\nraise UserError('say it so')\n"
    )
    with pytest.raises(UserError, match=r"^say it so$"):
        load(LOSS, "ours:f")


def test_a_hidden_module_is_refused(user_folder):
    """The standard library has a ``queue``; the user means the file beside the config."""
    (user_folder / "queue.py").write_text("def f(): pass\n")
    with pytest.raises(
        ConfigError, match=r"queue\.py in this folder is hidden by the module queue \(/.*queue.py\)"
    ):
        load(SOURCE, "queue:f")


def test_the_working_directory_hides_nothing(user_folder):
    (user_folder / "mine.py").write_text("import tabnanny\nfound = tabnanny.__file__\n")
    (user_folder / "tabnanny.py").write_text("raise SystemExit('the wrong module')\n")
    sys.modules.pop("tabnanny", None)
    assert str(user_folder) not in load(SOURCE, "mine:found")


def test_entry_points(user_folder, install):
    (user_folder / "mine.py").write_text("def f(): return 1\n")
    assert not is_named(SOURCE, "plain")
    install("extras", "1.2", {"logitcask.sources": {"plain": "mine:f"}})
    assert list(installed(SOURCE)) == ["plain"]
    assert installed(LOSS) == {}
    assert is_named(SOURCE, "plain")
    assert not is_named(LOSS, "plain")
    assert load(SOURCE, "plain")() == 1
    assert origin(SOURCE, "plain") == "extras 1.2, mine:f"
    assert origin(SOURCE, "mine:f") == ""


def test_a_name_of_two_packages(user_folder, install):
    (user_folder / "mine.py").write_text("def f(): return 1\ndef g(): return 2\n")
    install("one", "1", {"logitcask.sources": {"plain": "mine:f"}})
    install("two", "1", {"logitcask.sources": {"plain": "mine:g"}})
    with pytest.raises(
        ConfigError,
        match=r"'plain' is in several installed packages: mine:[fg], mine:[fg]; name one",
    ):
        load(SOURCE, "plain")


def test_unknown_names(user_folder, install):
    install("extras", "1.2", {"logitcask.losses": {"other": "mine:f"}})
    assert unknown(LOSS, "forward_lk", ["forward_kl", "ce"]) == (
        "no loss is called 'forward_lk'; did you mean forward_kl? There are ce, forward_kl, other; "
        "one of your own is MODULE:NAME (docs/extending.md)"
    )
    assert unknown(LOSS, "zzz", ["ce"]).startswith("no loss is called 'zzz'; there are ce, other; ")


def test_code_without_a_file():
    assert code_sha256(len) is None
    assert code_sha256(3) is None


def test_calls_of_other_peoples_code(user_folder):
    (user_folder / "mine.py").write_text("def f():\n    yield 1\n    raise KeyError('key')\n")
    function = load(SOURCE, "mine:f")
    items = yielded("mine:f", "reading", function, function)
    assert next(items) == 1
    with pytest.raises(
        UserError,
        match=r"^mine:f: reading failed: 'key' \(KeyError\), at .*mine.py:3 \(--debug shows the traceback\)$",
    ):
        next(items)
    assert called("x", "it", len, lambda: 5) == 5
    with pytest.raises(LogitcaskError, match=r"^x: it failed: integer division or modulo by zero"):
        called("x", "it", len, lambda: 1 // 0)
    with pytest.raises(UserError, match=r"^mine$"):
        called("x", "it", len, lambda: (_ for _ in ()).throw(UserError("mine")))
