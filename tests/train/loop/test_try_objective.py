"""The trial of the objective on every cache: what it says of tails and losses, and what it
refuses.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from logitcask.cache_format.errors import ConfigError
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.loop.try_objective import _warn_of_the_sampling, try_objective


@pytest.fixture
def data(write_cache):
    """Two sequences of a cache of each kind, by number."""

    def make(*kinds):
        return {
            number: CachedDataset(
                write_cache(kind, kind=kind, shards=1, sequences=2, top_k=8), [0, 1]
            )
            for number, kind in enumerate(kinds)
        }

    return make


@pytest.mark.parametrize(
    ("kinds", "tail", "kl", "order"),
    [
        (["samples"], "samples", "unbiased", "biased"),
        (["head"], "ghost", "lower", "exact"),
        # Heads of 8 entries beside such of one at least, draws beside none: the lesser of each.
        (["head", "samples"], "ghost", "lower", "biased"),
        (["samples", "head"], "ghost", "lower", "biased"),
    ],
)
def test_the_least_that_any_cache_allows(scratch_config, data, kinds, tail, kl, order):
    """``listmle`` wants 5 entries a head; "samples" has heads that end by probability."""
    config = scratch_config(
        cache="c", losses=[{"name": "forward_kl"}, {"name": "listmle", "k": 5}], ce_weight=0.5
    )
    objective, found, exactness = try_objective(config, data(*kinds))
    assert found == tail
    assert exactness["forward_kl"] == kl
    assert exactness["listmle"] == order
    assert exactness["ce"] == "exact"
    assert [name for name, _ in objective.weights()] == ["forward_kl", "listmle", "ce"]


def test_every_cache_is_said_to_have_its_own_tail(scratch_config, data, caplog):
    with caplog.at_level(logging.INFO):
        try_objective(scratch_config(cache="c"), data("head", "samples"))
    lines = [r.message for r in caplog.records if "beyond the heads" in r.message]
    assert "/head, KL uses one cell of known mass" in lines[0]
    assert "/samples, KL uses tail samples (unbiased)" in lines[1]


@pytest.mark.parametrize(
    ("name", "temperature", "top_p", "warned"),
    [
        ("policy_gradient", 0.7, 1, True),
        ("policy_gradient", 1, 0.9, True),
        ("policy_gradient", 1, 1, False),
        ("forward_kl", 0.7, 0.9, False),
        ("policy_gradient", None, None, False),
    ],
)
def test_text_that_was_not_sampled_as_a_loss_wants_it(caplog, name, temperature, top_p, warned):
    writer = None if top_p is None else SimpleNamespace(temperature=temperature, top_p=top_p)
    manifest = SimpleNamespace(data=SimpleNamespace(generation=SimpleNamespace(writer=writer)))
    data = SimpleNamespace(cache=SimpleNamespace(path="caches/own", manifest=manifest))
    _warn_of_the_sampling([name, "ce"], data)
    assert ("caches/own was sampled at temperature" in caplog.text) == warned


def test_what_a_cache_cannot_serve_is_one_line(scratch_config, data):
    config = scratch_config(cache="c", losses=[{"name": "skew_kl", "alpha": "much"}])
    with pytest.raises(ConfigError, match=r"^losses: .*; see the options") as caught:
        try_objective(config, data("head"))
    assert "\n" not in str(caught.value)
