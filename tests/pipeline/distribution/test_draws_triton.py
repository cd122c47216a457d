"""The kernels that draw on GPUs against the reference: under Triton's interpreter on a CPU,
compiled on CUDA.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logitcask.pipeline.distribution import draws_torch
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import (
    KEY_IDS,
    LEAST_LOGPROB,
    SET_STRIDE,
    Draws,
    draw,
    first_difference,
)

pytest.importorskip("triton")
from logitcask.pipeline.distribution import draws_triton

DEVICE = "cpu" if draws_triton.INTERPRETED else "cuda"
CAPTURES = [
    Capture(16, samples=8),
    Capture(0, samples=4, sets=3, seed=5),
    Capture(4, samples=12, top_p=0.5, mass_per_sample=0.05, independent=True, seed=-3),
    Capture(16, min_k=2, samples=8, min_probability=0.01, sets=2, seed=2**70),
    Capture(258, samples=2),
]


def test_under_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    if draws_triton.INTERPRETED:
        pytest.skip("this is the process that interprets")
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def triton_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "interpreter" not in request.node.name and not (
        draws_triton.INTERPRETED or torch.cuda.is_available()
    ):
        pytest.skip("no CUDA, and Triton does not interpret")
    if draws_triton.INTERPRETED and "as_many" not in request.node.name:
        # A program takes the interpreter as long, however many it has.
        monkeypatch.setattr(draws_triton, "_LANES", 16)


def some_rows(
    rng: np.random.Generator, rows: int, vocab_size: int, top: int
) -> tuple[Any, Any, Any]:
    """Logprobs of laws from flat to sharp, some with impossible ids, the most probable ids, and
    targets.
    """
    logits = rng.normal(size=(rows, vocab_size)) * rng.uniform(0.5, 8, (rows, 1))
    logits[:: rows // 3, rng.choice(vocab_size, vocab_size // 3)] = -np.inf
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    top_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : max(top, KEY_IDS)].astype(np.int32)
    return logprobs, top_ids, rng.integers(0, vocab_size, rows).astype(np.int32)


def by_kernels(rows: tuple[Any, Any, Any], capture: Capture, *, logits: bool = False) -> Draws:
    """Of rows that lie in a wider buffer, as an engine's do, and of ids in columns behind the
    target's.
    """
    logprobs, top_ids, target_ids = (torch.from_numpy(each).to(DEVICE) for each in rows)
    top_ids = torch.cat([target_ids[:, None], top_ids], dim=1).long()[:, 1:]
    wide = torch.full((len(logprobs), logprobs.shape[1] + 7), 99.0, device=DEVICE)
    wide[:, : logprobs.shape[1]] = logprobs
    scores = wide[:, : logprobs.shape[1]]
    return draws_torch.to_numpy(
        draws_torch._by_triton(scores, top_ids, target_ids.long(), capture, logits),
    )


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_the_kernels_draw_what_the_reference_draws(
    rng: np.random.Generator, capture: Capture, logits: bool
) -> None:
    rows = some_rows(rng, 6, int(rng.choice([258, 1000, 1024, 5003])), capture.top_k)
    expected = draw(*rows, capture)
    shift = rng.normal(size=(6, 1)).astype(np.float32) if logits else np.zeros((6, 1), np.float32)
    found = by_kernels((rows[0] + shift, *rows[1:]), capture, logits=logits)
    # A row whose key hangs on the last bit of a logit may be drawn from otherwise (``test_draws``).
    named = np.take_along_axis(rows[0], np.stack([rows[1][:, 0], rows[2]], 1).astype(np.int64), 1)
    decided = (np.abs(8 * np.maximum(named, LEAST_LOGPROB) % 1 - 0.5) > 1e-3).all(axis=1)
    assert decided.sum() >= 4
    np.testing.assert_array_equal(found.head_size, expected.head_size)
    np.testing.assert_array_equal(found.samples >= 0, expected.samples >= 0)
    same = found.samples == expected.samples
    assert same[decided].mean() > 0.97, "more differ than fall between two ids"
    np.testing.assert_allclose(
        found.sample_logprobs[same], expected.sample_logprobs[same], atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-5, rtol=0)
    for field in dataclasses.fields(Draws):
        assert getattr(found, field.name).dtype == getattr(expected, field.name).dtype
    if not logits:
        assert first_difference(found, *rows, capture) is None


def test_as_many_lanes_as_on_a_gpu(rng: np.random.Generator) -> None:
    """Some of a set in one program and some in the next, and lanes to spare in the last one."""
    rows, capture = some_rows(rng, 3, 300, 8), Capture(8, samples=5, sets=3)
    assert capture.draws % draws_triton._LANES
    assert first_difference(by_kernels(rows, capture), *rows, capture) is None


class Operations(TorchDispatchMode):
    """The operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_as_many_launches_for_many_rows_as_for_few(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four kernels and some operations on tensors of a column or so, however many rows there
    are.
    """
    launched: list[str] = []
    for name in ("_norms", "_mark", "_tails", "_find"):

        class Launch:
            def __getitem__(self, grid: Any, name: str = name) -> Any:
                return lambda *args, **fixed: launched.append(name)

        monkeypatch.setattr(draws_triton, name, Launch())
    capture = Capture(16, samples=16, min_probability=0.01, mass_per_sample=0.02)
    logprobs, top_ids, target_ids = (
        torch.from_numpy(each).to(DEVICE) for each in some_rows(rng, 300, 300, 16)
    )
    with Operations() as operations:
        draws_torch._by_triton(logprobs, top_ids.long(), target_ids.long(), capture, True)
    assert launched == ["_norms", "_mark", "_tails", "_find"]
    assert len(operations.names) <= 35, operations.names


def test_the_hash_is_the_references_to_the_last_bit(rng: np.random.Generator) -> None:
    """Of an even law, a draw tells its point of the CDF to within one id; its eighths are ties,
    rounded to even.
    """
    size, capture = 4096, Capture(0, samples=20, sets=2, independent=True, seed=-(2**62) - 1)
    logprobs = np.full((2, size), -np.log(size), np.float32)
    logprobs[:, :2] = [-2.0625, -4.1875]  # 16.5 and 33.5 eighths
    rows = logprobs, np.tile(np.arange(4, dtype=np.int32), (2, 1)), np.arange(2, dtype=np.int32)
    expected = draw(*rows, capture)
    found = by_kernels(rows, capture)
    assert (found.samples == expected.samples).mean() > 0.99
    assert len(np.unique(found.samples)) > 40


def test_where_nothing_is_to_be_drawn(rng: np.random.Generator) -> None:
    """Certain laws, laws whose tail underflows, whole heads; with nothing in the head, the one
    possible id every time.
    """
    certain = np.full((3, 258), -np.inf, np.float32)
    certain[:, 0] = 0
    underflows = np.full((3, 258), -120, np.float32)
    underflows[:, 7] = 0
    for capture, logprobs in (
        (Capture(258, samples=4, sets=2), some_rows(rng, 3, 258, 258)[0]),
        (Capture(1, samples=4, sets=2), certain),
        (Capture(2, samples=4, sets=2, mass_per_sample=0.1), underflows),
    ):
        top_ids = np.argsort(-logprobs, axis=1, kind="stable").astype(np.int32)
        found = by_kernels((logprobs, top_ids, np.zeros(3, np.int32)), capture)
        assert (found.samples == -1).all()
        assert np.isneginf(found.sample_logprobs).all()
        assert np.isfinite(found.entropy).all()
    top_ids = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    only = by_kernels((certain, top_ids, np.zeros(3, np.int32)), Capture(0, samples=4))
    assert (only.samples == 0).all()
    assert (only.sample_logprobs == 0).all()


def test_rows_that_are_not_numbers_name_ids_all_the_same() -> None:
    """Such rows are refused later, where they can be named; a kernel must not read beyond them."""
    logprobs = np.full((3, 300), np.nan, np.float32)
    rows = logprobs, np.tile(np.arange(4, dtype=np.int32), (3, 1)), np.zeros(3, np.int32)
    found = by_kernels(rows, Capture(2, samples=4, independent=True))
    assert ((found.samples >= -1) & (found.samples < 300)).all()


def test_bfloat16_scores(rng: np.random.Generator) -> None:
    logprobs, top_ids, target_ids = some_rows(rng, 3, 700, 8)
    scores = torch.from_numpy(logprobs).to(DEVICE).bfloat16()
    ids, targets = (torch.from_numpy(each).to(DEVICE).long() for each in (top_ids, target_ids))
    capture = Capture(8, samples=8)
    found = draws_torch._by_triton(scores, ids, targets, capture, True)
    expected = draws_torch._by_torch(scores, ids, targets, capture, True)
    assert (found.samples == expected.samples).double().mean() > 0.97
    torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-5, rtol=0)


def spoilt(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, logprobs = FIND(*args)
    return torch.where(ids >= 0, (ids + 1) % 300, ids), logprobs


def broken(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("no compiler\nhere")


FIND = draws_triton.find


@pytest.mark.parametrize(
    ("find", "words"), [(spoilt, "they draw other ids"), (broken, "no compiler here"), (FIND, "")]
)
def test_kernels_that_are_wrong_are_not_used(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    find: Any,
    words: str,
) -> None:
    """And it is said once; right ones are used from the first call on."""
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(len(args[0]))
        return find(*args)

    monkeypatch.setattr(draws_triton, "find", counted)
    monkeypatch.setattr(draws_torch, "_kernels_agree", {})
    logprobs, top_ids, target_ids = (
        torch.from_numpy(each).to(DEVICE) for each in some_rows(rng, 12, 300, 8)
    )
    rows, capture = (logprobs, top_ids.long(), target_ids.long()), Capture(8, samples=8)
    with caplog.at_level(logging.WARNING, "pipeline"):
        found = [draws_torch.draw(*rows, capture) for _ in range(2)]
    assert calls == ([8] if words else [8, 12, 12])
    assert len(caplog.messages) == bool(words)
    assert words in caplog.text
    expected = draws_torch._by_torch(*rows, capture, False)
    for each in found:
        assert (each.samples == expected.samples).double().mean() > 0.97


@pytest.mark.skipif(draws_triton.INTERPRETED, reason="interpreted functions cannot be compiled")
def test_interpreter_or_not_they_compile_for_nvidia() -> None:
    """Down to machine code for compute capability 9.0, which needs no GPU: interpreting proves
    nothing about that.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "scores": "*fp32", "norms": "*fp32", "bits": "*i32", "sums": "*fp32", "entropy": "*fp32", "out": "*fp32",
        "keys": "*i64", "head_size": "*i32", "counts": "*i64", "top_ids": "*i64", "target_ids": "*i64",
        "ids_out": "*i32", "logprobs_out": "*fp32", "seed": "i64",
    }  # fmt: skip
    for name, fixed in (
        ("norms", {"TILE": 4096}),
        ("mark", {"WIDTH": 64}),
        ("tails", {"KEYS": KEY_IDS, "LEAST": LEAST_LOGPROB, "GROUP": 16, "BLOCK": 256}),
        (
            "find",
            {
                "INDEPENDENT": False,
                "STRIDE": SET_STRIDE,
                "LANES": draws_triton._LANES,
                "BLOCKS": 256,
                "BLOCK": 256,
            },
        ),
    ):
        function = getattr(draws_triton, f"_{name}")
        signature = {arg: pointers.get(arg, "i32") for arg in function.arg_names}
        signature |= dict.fromkeys(fixed, "constexpr")
        source = ASTSource(function, signature, fixed)
        options = {"num_warps": draws_triton._WARPS[name]}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
