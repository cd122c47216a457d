"""A student of an imported cache that does not know the mass outside its heads: what the run says,
and what it refuses.
"""

from __future__ import annotations

import json
import logging
import math

import pytest

from logitcask.cache_format import UserError
from logitcask.train.run import train
from tests.pipeline.imports.conftest import V, imported, make_texts
from tests.pipeline.imports.test_distillkit_raw import write
from tests.train.conftest import scratch

pytestmark = pytest.mark.long


@pytest.fixture
def cache(rng, tmp_path):
    source = write(tmp_path / "rows.parquet", make_texts(rng, 80, 12), lambda text: text.logits)
    imported("distillkit-raw", source, tmp_path / "cache")
    return str(tmp_path / "cache")


def test_a_run(cache, scratch_config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = scratch_config(cache=cache, student=scratch(vocab_size=V))
    train(config)
    assert "both heads are scaled to 1, since the mass outside them is not known" in caplog.text
    assert "with this cache, forward_kl is an approximation" in caplog.text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["teacher"]["ce"] is None
    assert "ece" not in metrics["teacher"]
    assert metrics["kl_tail"] == "renormalised"
    assert metrics["kl_kind"].startswith("The KL is between the stored heads alone")
    assert (metrics["kinds"]["kl"], metrics["kinds"]["reverse_kl"]) == ("biased", "biased")
    assert metrics["kinds"]["ce"] == "exact"
    assert all(math.isfinite(value) for value in metrics["after"].values())
    assert (tmp_path / "run" / "report.html").exists()
    assert "own cross-entropy" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": [{"name": "taid"}]}, "taid needs the mass outside each head"),
        ({"losses": [{"name": "forward_kl", "tail": "ghost"}]}, "with tail 'ghost' needs the mass"),
        ({"selection": {"positions": {"by": "gap"}}}, "needs the teacher's logprob of every next"),
        ({"selection": {"sequences": {}}}, "needs the teacher's logprob of every next token"),
    ],
    ids=["taid", "ghost", "gap", "sequences"],
)
def test_what_is_refused(changes, said, cache, scratch_config):
    config = scratch_config(cache=cache, student=scratch(vocab_size=V), **changes)
    with pytest.raises(UserError, match=said):
        train(config)
