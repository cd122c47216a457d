"""Fixtures of all tests: small models, a check of one engine's scores against another's, and
seeds.

The seed of every test and every fixture is a hash of its own name and of ``LOGITCASK_TEST_SEED``
(default 0). A test therefore sees the same random numbers in every run, alone, in any order and on
any worker. ``make fuzz`` sets fresh seeds (tests/fuzz.py).
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import gc
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import absl.logging
import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitcask.pipeline.distribution.capture import Capture, head_sizes
from logitcask.pipeline.distribution.draws import KEY_IDS, Draws, entropy, first_difference
from logitcask.pipeline.types import Scored, Sequence

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SEED = int(os.environ.get("LOGITCASK_TEST_SEED", "0"))

_ENGINES = [
    "pipeline/teachers/vllm/test_engine.py",
    "pipeline/builder/test_ray_engines.py",
    "pipeline/generate/test_answers.py",
    "pipeline/end_to_end/test_bad_input.py",
    "benchmarks/test_gpu.py",
    "pipeline/end_to_end/test_alignment.py",
    "pipeline/builder/test_score.py",
    "pipeline/audit/test_at_build_end.py",
]
"""Modules with vLLM in the process of the tests. One worker runs them all: to import vLLM and to
compile its first functions takes a worker as long as most of them do."""

_LONG = [
    *_ENGINES,
    "pipeline/builder/test_ray_driver.py",
    "train/test_distributed.py",
    "train/end_to_end/test_training.py",
    "pipeline/teachers/server/test_vllm_server.py",
    "pipeline/serve/test_clients.py",
    "pipeline/serve/test_kills.py",
    "pipeline/builder/test_run.py",
    "train/end_to_end/test_interruption.py",
    "train/end_to_end/test_loading.py",
    "pipeline/estimate/test_run.py",
    "pipeline/end_to_end/test_remote_build.py",
    "pipeline/end_to_end/test_catalog.py",
    "test_tutorials.py",
    "train/loop/test_trainer_options.py",
    "train/trainers/test_examples.py",
    "train/trainers/test_axolotl.py",
    "pipeline/serve/test_docs.py",
    "rounds/test_run.py",
    "rounds/test_stage.py",
    "test_namespace.py",
    "train/end_to_end/test_command.py",
    "pipeline/text/test_long_texts.py",
    "train/losses/test_kernels.py",
    "pipeline/report/test_browser.py",
    "test_site.py",
    "test_notebook.py",
]
"""Modules that start engines or processes, or train: minutes each, the longest first."""

hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("fuzz", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fuzz" if SEED else "fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Sets one thread in every process, so that the rounding of sums does not depend on the number
    of cores.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # rouge_score imports absl. Its log handler closes its stream when vLLM sets up logging, which
    # would be pytest's own stream.
    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    # Ray gives its workers the lowest priority, so beside other tests they would hardly run.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray reads this name
    config.pluginmanager.register(_ImportsFrozen())
    config.pluginmanager.register(_KernelsReplacedOnce())


def pytest_report_header() -> str:
    return f"LOGITCASK_TEST_SEED={SEED}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only-random", action="store_true", help="only tests that draw random numbers (make fuzz)"
    )
    parser.addoption(
        "--write-transcripts",
        action="store_true",
        help="write the output of the tutorials' commands into docs/ (tests/test_tutorials.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-random"):
        chosen = [item for item in items if _is_random(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
    place = {
        item: _LONG.index(name) if (name := _module(item)) in _LONG else len(_LONG)
        for item in items
    }
    for item in items:
        if place[item] < len(_LONG):
            item.add_marker("long")
    # The longest modules start first, so that no worker begins one at the end.
    items.sort(key=place.__getitem__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, with ``_ENGINES`` as if they were one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByEngine(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return _ENGINES[0] if file.removeprefix("tests/") in _ENGINES else file

    return ByEngine(config, log)


class _ImportsFrozen:
    """Keeps imported objects out of garbage collection.

    accelerate and vLLM collect often, and with so many modules each collection takes half a second.
    vLLM freezes and unfreezes too, which would undo it; in tests only this class does.
    """

    def __init__(self) -> None:
        self._modules = 0
        self._patch = pytest.MonkeyPatch()
        self._freeze, self._unfreeze = gc.freeze, gc.unfreeze
        for name in ("freeze", "unfreeze"):
            self._patch.setattr(gc, name, lambda: None)

    def pytest_runtest_setup(self) -> None:
        if len(sys.modules) > self._modules + 200:
            self._modules = len(sys.modules)
            gc.collect()
            self._freeze()

    def pytest_unconfigure(self) -> None:
        self._patch.undo()
        self._unfreeze()  # Triton's bindings report frozen objects as leaks at exit


class _KernelsReplacedOnce:
    """Spares each further engine of a process vLLM's search of all modules for its kernels.

    vLLM's CPU build replaces them at the start of an engine, again if that was done before. With so
    many modules the search takes seconds.
    """

    def pytest_runtest_setup(self) -> None:
        if (dispatcher := sys.modules.get("vllm.triton_utils.dispatcher")) is None:
            return
        register = dispatcher.register_kernels
        if hasattr(register, "done"):
            return

        def once(overrides: dict[str, Any]) -> None:
            if any(once.done.get(name) is not each for name, each in overrides.items()):
                register(overrides)
                once.done.update(overrides)

        once.done = {name: given for name, (_, given) in dispatcher._registry.items()}
        dispatcher.register_kernels = once


def _module(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _is_random(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    drawn = {"rng", "draw"} & set(item.fixturenames) or item.get_closest_marker("random")
    return bool(drawn) or hypothesis.is_hypothesis_test(item.obj)


# Without a GPU, torch.manual_seed keeps a stack trace in each call, for a GPU that may come later.
_seed_torch = (
    torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
)


def seed_of(name: str) -> int:
    """A 64-bit seed that depends only on ``name`` and the seed of this run."""
    return int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:8])


def seed_everything(name: str) -> None:
    """Seeds the global generators of ``random``, numpy and torch."""
    seed = seed_of(name)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from it
    _seed_torch(seed % 2**63)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
    """Seeds a fixture by its own name, so that it does not depend on the first test to use it."""
    seed_everything(f"{request.node.nodeid}[{fixturedef.argname}][{request.param_index}]")
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    seed_everything(item.nodeid)
    return (yield)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A numpy generator seeded by the test's name."""
    return np.random.default_rng(seed_of(request.node.nodeid))


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator seeded by the test's name."""
    return torch.Generator().manual_seed(seed_of(request.node.nodeid) % 2**63)


@pytest.fixture(scope="session", autouse=True)
def _no_shards_in_the_home_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITCASK_CACHE", str(tmp_path_factory.mktemp("shards")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_caches_in_the_home_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITCASK_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _a_catalogue_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test finds the caches of another one. The folder is made by the first cache."""
    folder = tmp_path_factory.getbasetemp() / "homes" / uuid.uuid4().hex
    monkeypatch.setenv("LOGITCASK_HOME", str(folder))


@pytest.fixture(scope="session")
def fork() -> Callable[[Callable[[], object]], BaseProcess]:
    """``fork(function)``: starts ``function`` in a child of this process, to be killed.

    The child has everything imported. A new interpreter needs 10 seconds to import torch and
    transformers.
    """

    def start(function: Callable[[], object]) -> BaseProcess:
        def work() -> None:
            # Exit handlers of this process may wait for its threads, which a child does not have:
            # that of polars would wait for ever.
            atexit._clear()
            function()

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        return child

    return start


@pytest.fixture(scope="session")
def command(
    fork: Callable[[Callable[[], object]], BaseProcess], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``command(main, *words, env=...)``: a command with these words, as it runs in a shell.

    Its process is forked. What it writes to stdout and stderr is told apart, whoever in the process
    writes it.
    """
    folder = tmp_path_factory.mktemp("commands")

    def run(
        main: Callable[[], None], *words: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        files = folder / "stdout", folder / "stderr"
        for file in files:
            file.unlink(missing_ok=True)

        def work() -> None:
            os.environ.update(env or {})
            for descriptor, file in zip((1, 2), files, strict=True):
                with file.open("wb") as stream:
                    os.dup2(stream.fileno(), descriptor)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
            logging.root.handlers.clear()
            sys.argv = ["command", *map(str, words)]
            main()

        process = fork(work)
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, *map(Path.read_text, files))

    return run


@pytest.fixture(scope="session")
def run_interpreted() -> Callable[[str], None]:
    """``run_interpreted(__file__)``: asserts that a test file passes with Triton's interpreter.

    Triton chooses the interpreter at import, so the file runs again in a new process. The test that
    calls this has "interpreter" in its name and is left out there.
    """

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, file, "-k", "not interpreter"],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout.splitlines()[-1]

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with 384 ids, 256 positions and its own byte-level BPE
    tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [
            time.__doc__ or "",
            os.__doc__ or "",
            "the teacher reads what the student will read " * 20,
        ],
        trainer,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.25,  # as peaked as a trained model: at the usual 0.02 all ids are nearly tied
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)  # a fixed model: make fuzz varies only its input
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Gemma 3 that also takes images, like its larger checkpoints, with the
    tokenizer of ``tiny_llama``.
    """
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-gemma3")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    config = Gemma3Config(
        text_config={
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 256,
            "sliding_window": 32,
            "query_pre_attn_scalar": 4,
            "initializer_range": 0.25,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=380,
        eoi_token_index=381,
        image_token_index=382,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_tekken() -> Callable[[Path], None]:
    """``write_tekken(folder)``: writes a tekken.json, Mistral's tokenizer file, with 20 special
    tokens and 268 others.
    """
    merged = ["th", "he", "in", " t", " the", "er", "an", " a", "on", "re", " th", "ing"]
    named = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]"
    named += " [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    words, special = (
        [*(bytes([i]) for i in range(256)), *(each.encode() for each in merged)],
        named.split(),
    )
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(words) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(word).decode(),
                "token_str": word.decode(errors="replace"),
            }
            for rank, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": each, "is_control": True}
            for rank, each in enumerate(special)
        ],
        "type": "Tekken",
    }

    def write(folder: Path) -> None:
        (folder / "tekken.json").write_text(json.dumps(content))

    return write


@pytest.fixture(scope="session")
def tiny_gemma2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Gemma 2 with the tokenizer of ``tiny_llama``. Its soft cap is
    far below its attention scores.
    """
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny-gemma2")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=32,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=1.0,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Path]:
    """Folder of the built-in model, prepared once in the repository's models folder (or in
    $LOGITCASK_MODELS).
    """
    from logitcask.pipeline.teachers.model import prepare_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "LOGITCASK_MODELS",
            os.environ.get("LOGITCASK_MODELS") or str(Path(__file__).parents[1] / "models"),
        )
        yield Path(prepare_model("smollm2-135m"))


@pytest.fixture(scope="session")
def as_sequence() -> Callable[[str, list[int]], Sequence]:
    """Makes a sequence of ids, all tokens to be learnt."""

    def make(name: str, ids: list[int]) -> Sequence:
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[0] = False
        return Sequence(name, np.array(ids, dtype=np.int32), mask)

    return make


@pytest.fixture(scope="session")
def rolled() -> Callable[..., Scored]:
    """``rolled(scored, names, by)``: moves row i of the named arrays, also those of the draws, to
    row i + ``by``.
    """

    def roll(scored: Scored, names: Iterable[str], by: int) -> Scored:
        moved = {name: np.roll(scored.arrays()[name], by, axis=0) for name in names}
        of_draws = {field.name for field in dataclasses.fields(Draws)} & moved.keys()
        draws = dataclasses.replace(scored.draws, **{name: moved.pop(name) for name in of_draws})
        return dataclasses.replace(scored, draws=draws, **moved)

    return roll


@pytest.fixture(scope="session")
def assert_same_scores() -> Callable[..., None]:
    """``assert_same_scores(found, dense, input_ids, tolerance=4e-3)``: asserts that ``found`` are
    the scores of this text by ``dense``.

    dense:     float[n-1, V], the whole distributions of another engine.
    tolerance: largest difference of a logprob, nats, because engines round differently. Ids that
               are closer to each other may have any order and be on either side of the cut.
    capture:   None, or the values asked for: head sizes and draws must then equal those of
               ``logitcask.pipeline.distribution.draws``.
    """

    def check(
        found: Scored,
        dense: NDArray[np.floating],
        input_ids: NDArray[np.int32],
        tolerance: float = 4e-3,
        capture: Capture | None = None,
    ) -> None:
        rows, top_k = len(input_ids) - 1, found.ids.shape[1]
        assert dense.shape[0] == rows
        assert found.ids.shape == found.logprobs.shape == (rows, top_k)
        assert found.ids.dtype == found.target_ids.dtype == found.target_rank.dtype == np.int32
        assert found.logprobs.dtype == found.target_logprob.dtype == np.float32

        np.testing.assert_array_equal(
            found.target_ids, input_ids[1:], err_msg="target_ids are not the text, shifted by one"
        )
        target = np.take_along_axis(dense, found.target_ids[:, None].astype(np.int64), axis=1)
        np.testing.assert_allclose(
            found.target_logprob, target[:, 0], atol=tolerance, rtol=0, err_msg="target_logprob"
        )
        surely_higher = (dense > target + 2 * tolerance).sum(axis=1)
        perhaps_higher = (dense > target - 2 * tolerance).sum(axis=1) - 1
        assert (surely_higher <= found.target_rank).all(), "target_rank is too low"
        assert (found.target_rank <= perhaps_higher).all(), "target_rank is too high"

        assert (np.diff(found.logprobs, axis=1) <= 0).all(), "logprobs do not fall"
        assert all(len(set(row)) == top_k for row in found.ids.tolist()), (
            "an id occurs twice in a head"
        )
        named = np.take_along_axis(dense, found.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(
            found.logprobs, named, atol=tolerance, rtol=0, err_msg="logprobs of the named ids"
        )
        if top_k:
            cut = np.partition(dense, -top_k, axis=1)[:, -top_k, None]
            assert (named >= cut - 2 * tolerance).all(), (
                "an id is in the head that does not belong there"
            )
            belongs = (dense > cut + 2 * tolerance).sum(axis=1)
            present = (named > cut + 2 * tolerance).sum(axis=1)
            np.testing.assert_array_equal(
                present, belongs, err_msg="an id that belongs in the head is missing"
            )
        check_draws(found.ids, found.draws, dense, tolerance)
        if capture is not None:
            check_against_reference(found, dense, tolerance, capture)

    def check_draws(
        head_ids: NDArray[np.int32], found: Draws, dense: NDArray[np.floating], tolerance: float
    ) -> None:
        assert found.samples.shape == found.sample_logprobs.shape
        assert (found.samples.dtype, found.sample_logprobs.dtype, found.head_size.dtype) == (
            np.int32,
            np.float32,
            np.int32,
        )
        if not found.samples.size:
            assert found.entropy is None
            return
        flat, logprobs = (
            each.reshape(len(dense), -1) for each in (found.samples, found.sample_logprobs)
        )
        real = flat >= 0
        named = np.take_along_axis(dense, flat.clip(0).astype(np.int64), axis=1)
        np.testing.assert_allclose(
            logprobs[real], named[real], atol=tolerance, rtol=0, err_msg="sample_logprobs"
        )
        assert np.isneginf(logprobs[~real]).all()
        heads = np.where(np.arange(head_ids.shape[1]) < found.head_size[:, None], head_ids, -2)
        assert not (flat[:, :, None] == heads[:, None]).any(), "a draw lies in the head"
        assert found.entropy is not None
        assert found.entropy.dtype == np.float32
        np.testing.assert_allclose(
            found.entropy, entropy(dense), atol=tolerance, rtol=0, err_msg="entropy"
        )

    def check_against_reference(
        found: Scored, dense: NDArray[np.floating], tolerance: float, capture: Capture
    ) -> None:
        draws = found.draws
        np.testing.assert_array_equal(draws.head_size, head_sizes(found.logprobs, capture))
        if not capture.samples:
            return
        # Head sizes and keys depend on the last bit of this engine's own logprobs.
        exact = dense.astype(np.float32)
        np.put_along_axis(
            exact, found.target_ids[:, None].astype(np.int64), found.target_logprob[:, None], axis=1
        )
        np.put_along_axis(exact, found.ids.astype(np.int64), found.logprobs, axis=1)
        order = np.argsort(-exact, axis=1, kind="stable")[:, : KEY_IDS + 1].astype(np.int32)
        top_ids = found.ids
        sure = np.ones(len(dense), np.bool_)
        if capture.top_k < KEY_IDS:
            # The engine did not return all keys: check only positions that rounding cannot change.
            top_ids = order[:, :KEY_IDS]
            highest = np.take_along_axis(exact, order.astype(np.int64), axis=1)
            sure = (np.diff(highest, axis=1) < -2 * tolerance).all(axis=1)
            sure &= np.abs(highest[:, 0] * 8 % 1 - 0.5) > 16 * tolerance
        draws = Draws(*(getattr(draws, field.name)[sure] for field in dataclasses.fields(Draws)))
        wrong = first_difference(
            draws, exact[sure], top_ids[sure], found.target_ids[sure], capture, tolerance
        )
        assert wrong is None, wrong

    return check


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory. Modules imported from it, losses registered by them and changes
    of ``sys.path`` are undone.
    """
    from logitcask.train.losses import LOSSES, SPECS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules, losses = set(sys.modules), set(LOSSES)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    for registry in (LOSSES, SPECS):
        for name in set(registry) - losses:
            del registry[name]


@pytest.fixture
def install(user_folder: Path) -> Callable[..., None]:
    """``install(name, version, {group: {name: value}})``: an installed package with these entry
    points, as pip would leave it.
    """

    def make(package: str, version: str, groups: dict[str, dict[str, str]]) -> None:
        info = user_folder / "site" / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in groups.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        if str(info.parent) not in sys.path:
            sys.path.append(str(info.parent))
        importlib.invalidate_caches()

    return make


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a real S3 server on the loopback. The server has a process of its own, because
    vLLM cannot start in one that has imported flask.
    """
    import fsspec
    import s3fs

    server = subprocess.Popen([sys.executable, "-c", _S3_SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.stdout.readline().strip()}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            # An instance made earlier has not seen these variables.
            s3fs.S3FileSystem.clear_instance_cache()
            fsspec.filesystem("s3").mkdir("caches")
            yield "s3://caches"
            s3fs.S3FileSystem.clear_instance_cache()
    finally:
        server.kill()
        server.wait()


_S3_SERVER = """
import time
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium of this machine, driven by playwright. Skips where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        # Chromium's sandbox does not run as root.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = started.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else [], timeout=300_000
        )
        yield browser
        browser.close()
