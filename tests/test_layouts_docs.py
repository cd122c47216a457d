"""The commands of docs/layouts.md and docs/trust.md, as a user would run them, and their configs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.cli.config_file import load_config
from logitcask.pipeline.cli import app
from logitcask.pipeline.imports.layouts import LAYOUTS
from logitcask.train.config import TrainConfig
from logitcask.train.identity import open_caches
from tests.pipeline.imports import test_distillkit_packed
from tests.pipeline.imports.conftest import make_texts

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = re.compile(r"^\$ teacher-cache (.*)\n((?:error: .*\n)?)", re.MULTILINE)


def commands(page):
    """(arguments, expected error or "") of each command of a page."""
    return [
        (shlex.split(line), said.strip())
        for line, said in COMMAND.findall((DOCS / page).read_text())
    ]


def run(page, capsys):
    done = 0
    for arguments, said in commands(page):
        if said:
            with pytest.raises(UserError) as error:
                app(arguments, standalone_mode=False)
            assert f"error: {error.value}" == said
        else:
            app(arguments, standalone_mode=False)
        done += 1
    return done


def test_the_layouts(user_folder, rng, capsys):
    test_distillkit_packed.write(
        user_folder / "rows.parquet", make_texts(rng, 40), 12, exact_k=4, terms=(0, 1, 2)
    )
    assert run("layouts.md", capsys) == 5
    theirs, back = CacheReader("caches/theirs"), CacheReader("caches/back")
    for one, other in zip(theirs, back, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_every_layout_is_in_the_table():
    rows = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "layouts.md").read_text(), re.MULTILINE)
    assert set(rows) >= set(LAYOUTS)


def test_trust(user_folder, rng, capsys):
    test_distillkit_packed.write(
        user_folder / "rows.parquet", make_texts(rng, 40), 12, exact_k=4, terms=(0, 1, 2)
    )
    for arguments, _ in commands("layouts.md")[:1]:
        app([*arguments[:3], "caches/mine", *arguments[4:]], standalone_mode=False)
    assert run("trust.md", capsys) == 3
    assert "signed by Ada (ed25519:" in capsys.readouterr().out
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "trust.md").read_text(), re.DOTALL)
    Path("student.yaml").write_text(text)
    config = load_config(TrainConfig, Path("student.yaml"), [])
    assert config.trusted_keys == tuple(yaml.safe_load(text)["trusted_keys"])
    open_caches(config)
    manifest = Path("caches/mine/manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match="is not of this"):
        open_caches(config)
