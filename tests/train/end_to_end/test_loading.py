"""Interrupted and resumed, with any number of workers, or from far away: the same batches, each
shard fetched once.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import logitcask.cache_format.reader
import logitcask.cache_format.storage.files
import logitcask.train.preparation
from logitcask.cache_format import CacheReader, UserError
from logitcask.cache_format.catalog.home import Home
from logitcask.cache_format.share.copy import push
from logitcask.cache_format.storage.shard_cache import ShardCache
from logitcask.train.config import DataConfig
from logitcask.train.data.dataset import CachedDataset
from logitcask.train.data.mixture import Collator, Mixture, open_data
from logitcask.train.data.order import Batches
from logitcask.train.loop.arguments import training_arguments
from logitcask.train.loop.trainer import DistillationTrainer
from logitcask.train.run import train

STEPS = 14
"""Two epochs and a half of 5 steps, with two batches in a step and a short last one."""


def history(output):
    records = json.loads((output / "log.json").read_text())
    return [
        {name: record[name] for name in ("step", "epoch", "loss", "grad_norm", "positions")}
        for record in records
        if "loss" in record
    ]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"packing": True, "row_tokens": 64},
        {"group_by_length": True, "shuffle": "batches", "shuffle_window": 2},
    ],
    ids=["unpacked", "packed", "grouped"],
)
def test_resumed_training_is_uninterrupted_training(write_cache, scratch_config, data, tmp_path):
    """Bit-equal losses, whether interrupted inside an epoch or at its end, and with 0, 1 and 2
    workers.
    """
    cache = write_cache("c", shards=2, sequences=30)

    def config(output, workers):
        size = 3 if data.get("packing") else 6
        training = {
            "output_dir": str(output),
            "max_steps": STEPS,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 2,
            "save_steps": 1,
            "dataloader_num_workers": workers,
        }
        dropout = {"attention_dropout": 0.1}
        base = scratch_config(cache="c").student.config
        return scratch_config(
            cache=cache.path, data=data, student={"config": {**base, **dropout}}, training=training
        )

    train(config(tmp_path / "whole", 0))
    expected = history(tmp_path / "whole")
    assert len(expected) == STEPS
    ends = [record["step"] for record in expected if record["epoch"] == int(record["epoch"])]
    assert ends
    assert expected[-1]["epoch"] > 2
    for workers, stop in ((0, 2), (0, ends[0]), (1, ends[0] + 1), (2, ends[0] - 1)):
        output = tmp_path / f"resumed-{workers}-{stop}"
        shutil.copytree(tmp_path / "whole", output)
        (output / "metrics.json").unlink()
        for folder in output.glob("checkpoint-*"):
            if int(folder.name.rpartition("-")[2]) > stop:
                shutil.rmtree(folder)
        _, found = train(config(output, workers))
        assert not found
        assert history(output) == expected, (workers, stop)


def test_skipped_batches_are_not_decoded(write_cache, scratch_config, monkeypatch):
    cache = write_cache("c", shards=2, sequences=30)
    training = {"max_steps": 6, "save_steps": 5, "per_device_train_batch_size": 4}
    config = scratch_config(cache=cache.path, training=training)
    train(config)
    (config.output_dir / "metrics.json").unlink()
    shutil.rmtree(config.output_dir / "checkpoint-6")
    read = []
    plain = Mixture.__getitems__
    monkeypatch.setattr(
        Mixture, "__getitems__", lambda self, units: read.append(units) or plain(self, units)
    )
    train(config)
    assert len(read) <= 2  # the sixth batch, and one that accelerate fetches ahead


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_main_process_reads(write_cache, scratch_config, method):
    """Started by either method, after the main process has opened the files itself."""
    cache = write_cache("c", shards=2, sequences=30)
    data, _ = open_data(scratch_config(cache=cache.path), [cache], 0)

    def batches(**options):
        loader = DataLoader(
            data, batch_sampler=Batches(data.plan, 7), collate_fn=Collator(), **options
        )
        return list(loader)

    expected = batches()
    found = batches(num_workers=1 if method == "spawn" else 2, multiprocessing_context=method)
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one.pop("layout") == other.pop("layout")
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_streaming_fetches_each_shard_once_an_epoch(
    write_cache, scratch_config, monkeypatch, tmp_path, workers, packing
):
    """A remote cache of 12 shards, room for 4 of them here: two windows of 2, each longer than
    what is fetched ahead.
    """
    local = write_cache("c", shards=12, sequences=14)
    url = f"memory://{tmp_path}"
    push(local.path, url)
    log = tmp_path / "fetched"
    log.touch()
    plain = logitcask.cache_format.storage.shard_cache.download

    def download(filesystem, path, *args, **kwargs):
        with log.open("a") as handle:
            handle.write(path.rpartition("/")[2] + "\n")
        return plain(filesystem, path, *args, **kwargs)

    monkeypatch.setattr(logitcask.cache_format.storage.shard_cache, "download", download)
    # Shards that are open stay readable when they have gone from the disk; these few are of no
    # help.
    monkeypatch.setattr(logitcask.cache_format.reader, "OPEN_SHARDS", 2)
    room = 4 * max(shard.bytes for shard in local.manifest.shards)

    def epochs(shuffle):
        """What is fetched in each of three epochs, the pass that reads the index apart."""
        shard_cache = ShardCache(tmp_path / f"{shuffle}-{workers}", room)
        cache = CacheReader(url, shard_cache=shard_cache)
        config = scratch_config(
            cache=url,
            data=DataConfig(shuffle=shuffle, shuffle_window=2, packing=packing).model_dump(),
        )
        log.write_text("")
        data, _ = open_data(config, [cache], 0)
        counts = [Counter(log.read_text().split())]
        batches = Batches(data.plan, 2)
        for epoch in range(2):
            log.write_text("")
            batches.set_epoch(epoch)
            # Fresh readers: what is open in one process is no longer on the disk, and is not
            # fetched again.
            fresh = Mixture(
                [
                    CachedDataset(CacheReader(url, shard_cache=shard_cache), source.indices)
                    for source in data.sources
                ],
                data.names,
                data.units,
                data.plan,
            )
            for _ in DataLoader(
                fresh,
                batch_sampler=batches,
                collate_fn=Collator(packed=packing),
                num_workers=workers,
            ):
                pass
            counts.append(Counter(log.read_text().split()))
        return counts

    names = {shard.path.rpartition("/")[2] for shard in local.manifest.shards}
    for number, fetched in enumerate(epochs("shards")):
        assert max(fetched.values()) == 1, number
        if number == 0:
            assert set(fetched) == names
        # What is still here from before needs no fetching.
        assert len(fetched) >= len(names) - 4
    if not workers:  # and this is what it saves
        assert sum(epochs("all")[1].values()) > 2 * len(names)


def test_caches_are_in_use_while_a_training_reads_them(
    write_cache, scratch_config, monkeypatch, tmp_path
):
    home = Home(tmp_path / "home")
    monkeypatch.setenv("LOGITCASK_HOME", str(home.folder))
    cache = write_cache("c", sequences=60)
    used = []

    class Looks(DistillationTrainer):
        def training_step(self, *arguments, **options):
            used.append([entry.where for entry, _ in home.entries() if entry.name in home.used()])
            return super().training_step(*arguments, **options)

    monkeypatch.setattr(logitcask.train.preparation, "DistillationTrainer", Looks)
    train(scratch_config(cache=cache.path, training={"max_steps": 2}))
    assert used
    assert all(each == [str(Path(cache.path).resolve())] for each in used)
    assert home.used() == set()


def test_the_wait_for_data_is_logged_as_a_share(write_cache, scratch_config):
    cache = write_cache("c", sequences=60)
    train(scratch_config(cache=cache.path, training={"max_steps": 5}))
    output = scratch_config(cache="c").output_dir
    shares = [r["data_wait"] for r in json.loads((output / "log.json").read_text()) if "loss" in r]
    assert len(shares) == 5
    assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize(
    ("training", "match"),
    [
        ({"group_by_length": True}, r"data\.group_by_length"),
        ({"train_sampling_strategy": "group_by_length"}, r"data\.shuffle"),
    ],
)
def test_orders_that_know_nothing_of_caches_are_refused(scratch_config, training, match):
    with pytest.raises(UserError, match=match) as caught:
        training_arguments(scratch_config(cache="c", training=training))
    assert "\n" not in str(caught.value)


def test_a_remote_cache_that_would_be_fetched_over_and_over_is_warned_of(
    write_cache, scratch_config, monkeypatch, tmp_path, caplog
):
    local = write_cache("c")
    url = f"memory://{tmp_path}"
    push(local.path, url)
    monkeypatch.setenv("LOGITCASK_CACHE", str(tmp_path / "here"))
    for room, shuffle, warned in ((1, "all", True), (1, "shards", False), (10**9, "all", False)):
        size = sum(shard.bytes for shard in local.manifest.shards)
        monkeypatch.setenv("LOGITCASK_CACHE_BYTES", str(size - 1 if room == 1 else room))
        caplog.clear()
        open_data(scratch_config(cache=url, data={"shuffle": shuffle}), [CacheReader(url)], 0)
        assert ("over and over" in caplog.text) == warned
