"""Fixtures of the training tests: a cache scored by a real model, small random caches, configs."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from logitcask.cache_format import CacheReader, CacheWriter
from logitcask.pipeline.builder.run import build
from logitcask.pipeline.config import BuildConfig
from logitcask.train.config import TrainConfig

STEPS = 12


def _sequences():
    """The module that makes random sequences for the tests of the format."""
    file = Path(__file__).parents[1] / "cache_format" / "conftest.py"
    spec = importlib.util.spec_from_file_location("made_sequences", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = _sequences()


@pytest.fixture
def write_cache(tmp_path, rng):
    """``write_cache(name, kind=..., shards=..., sequences=..., tokens=(low, high))``: writes a
    cache of random sequences, with ids below 60.

    sequences: number per shard.
    per_batch: sequences per record batch.
    tokens:    bounds of the random lengths, or a list of the lengths in each shard.
    vocab:     the identity of the tokenizer.
    ids:       what the sequence ids begin with; default: name.
    """

    def write(
        name,
        *,
        kind="samples",
        shards=3,
        sequences=40,
        tokens=(4, 40),
        per_batch=5,
        top_k=6,
        vocab="0" * 64,
        ids=None,
    ):
        with CacheWriter(tmp_path / name) as writer:
            header = made.make_header(vocab_size=60, top_k=top_k, kind=kind)
            tokenizer = header.tokenizer.model_copy(update={"vocab_sha256": vocab})
            header = writer.begin(header.model_copy(update={"tokenizer": tokenizer}))
            for index in range(shards):
                with writer.shard(index, sequences_per_batch=lambda _: per_batch) as shard:
                    for i in range(sequences):
                        n = tokens[i] if isinstance(tokens, list) else int(rng.integers(*tokens))
                        shard.append(
                            made.make_sequence(
                                rng,
                                f"{ids or name}/{index}/{i}",
                                tokens=n,
                                vocab_size=60,
                                top_k=top_k,
                                kind=kind,
                            )
                        )
            writer.finish(header, shards)
        return CacheReader(tmp_path / name)

    return write


def scratch(**fields):
    """A student config with random weights, for caches of ``write_cache``."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    small |= {
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "head_dim": 16,
    }
    return {"config": {"model_type": "llama", **small, **fields}}


@pytest.fixture
def scratch_student(tiny_llama, tmp_path):
    """``scratch_student(tied=...)``: folder of a small Llama with random weights, for caches of the
    tiny Llama.
    """

    def make(*, tied):
        folder = tmp_path / f"student-{tied}"
        config = AutoConfig.for_model(**scratch(vocab_size=384, tie_word_embeddings=tied)["config"])
        config.max_position_embeddings = 256
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def scratch_config(tmp_path):
    """Makes a config with a small, random student; otherwise like ``config``."""

    def make(**changes):
        training = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 1000,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
        }
        fields = {
            "student": scratch(),
            "losses": [{"name": "forward_kl"}],
            "ce_weight": 0.5,
            "evaluation": {"max_sequences": 4},
            **changes,
            "training": {**training, **changes.get("training", {})},
        }
        return TrainConfig.model_validate(fields)

    return make


@pytest.fixture(scope="session")
def two_ranks():
    """``two_ranks()``: for each of two processes that train together, the variables that torchrun
    would set.
    """

    def make():
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]

    return make


@pytest.fixture(scope="session")
def cache(tiny_llama, tmp_path_factory):
    """A cache of real text, scored by the tiny Llama with transformers."""
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": str(tiny_llama), "backend": "transformers"},
            "data": {"path": "python-docs", "max_length": 64, "max_tokens": 8000},
            "store": {"top_k": 16, "shard_tokens": 3000},
            "output": str(tmp_path_factory.mktemp("train") / "cache"),
        }
    )
    build(config)
    return config.output


@pytest.fixture
def config(cache, tiny_llama, tmp_path):
    """Makes a config. Keyword arguments replace fields; ``training`` is updated."""

    def make(**changes):
        training = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 4,
            "save_total_limit": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
        }
        fields = {
            "cache": str(cache),
            "student": {"init_from": str(tiny_llama), "keep_layers": [1]},
            "losses": [{"name": "forward_kl"}, {"name": "ranking", "weight": 2.0, "k": 5}],
            "ce_weight": 0.5,
            "evaluation": {"held_out": 0.2},  # the cache is made of few documents
            **changes,
            "training": {**training, **changes.get("training", {})},
        }
        return TrainConfig.model_validate(fields)

    return make
