"""``--watch``: the report of a run that is going on, and that watching changes nothing."""

from __future__ import annotations

import json
import re

import pytest

from logitcask.cache_format.errors import UserError
from logitcask.train.loop.callbacks import TellEvaluation
from logitcask.train.run import train

FIELDS = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}


def test_the_page_is_written_at_every_evaluation(config, tmp_path, monkeypatch):
    output, pages = tmp_path / "watched", []
    tell = TellEvaluation.on_evaluate

    def on_evaluate(self, *args, **kwargs):
        pages.append((output / "report.html").read_text())
        tell(self, *args, **kwargs)
        pages.append((output / "report.html").read_text())

    monkeypatch.setattr(TellEvaluation, "on_evaluate", on_evaluate)
    watched, _ = train(config(training={**FIELDS, "output_dir": str(output)}), watch=True)
    plain, _ = train(config(training=FIELDS))
    assert watched["after"] == plain["after"], "watching does not change the training"

    steps = [re.search(r"The page is of step (\d+) of (\d+)", page).groups() for page in pages]
    assert steps == [("0", "4"), ("2", "4"), ("2", "4"), ("4", "4")]
    log = json.loads((output / "log.json").read_text())
    (kl,) = [record["eval_kl"] for record in log if record.get("step") == 2 and "eval_kl" in record]
    assert f'<td>2</td><td class="n">{kl:.3g}</td>' in pages[1]
    assert f'<span class="now">{kl:.3f} nats</span>' in pages[1]
    assert f'<span class="now">{watched["before"]["kl"]:.3f} nats</span>' in pages[0]
    assert all('id="refresh"' in page and page.count("<script>") == 1 for page in pages)
    final = (output / "report.html").read_text()
    assert "This run is going on" not in final
    assert "<script" not in final
    assert not list(output.glob("*.tmp"))


def test_without_evaluations_there_is_nothing_to_watch(config):
    with pytest.raises(UserError, match=r"set training\.eval_strategy=steps"):
        train(config(), watch=True)
    assert not config().output_dir.exists()
