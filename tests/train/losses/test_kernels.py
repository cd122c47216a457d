"""The Triton kernels against the torch path: under Triton's interpreter on a CPU, compiled on
CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from logitcask.train.losses import LOSSES, SparseTeacher, StudentPass, TailDraws, kernels

pytestmark = pytest.mark.random

pytest.importorskip("triton")
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"


def test_under_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    if kernels.INTERPRETED:
        pytest.skip("this is the process that interprets")
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def triton_there(request: pytest.FixtureRequest) -> None:
    if "interpreter" not in request.node.name and not (
        kernels.INTERPRETED or torch.cuda.is_available()
    ):
        pytest.skip("no CUDA, and Triton does not interpret")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "split"), [(9001, 9001), (5000, 4097), (300, 300), (300, 0), (4096, 4095)]
)
def test_kernels(dtype: torch.dtype, size: int, split: int) -> None:
    """Rows of a wider buffer, of several blocks and of less than one; a part that is empty and
    one that is all -inf.
    """
    logits = (40 * torch.randn(4, size + 16, device=DEVICE)).to(dtype)[:, :size]
    logits[1, :split] = -torch.inf
    logits[2, ::2] = -torch.inf
    exact = logits.double()
    low, high = kernels.log_sums(logits, split)
    for found, part in ((low, exact[:, :split]), (high, exact[:, split:])):
        expected = (
            part.logsumexp(1) if part.shape[1] else torch.full((4,), -torch.inf, device=DEVICE)
        )
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-5)
    slopes = torch.randn(2, 4, device=DEVICE)
    kernels.spread(logits, split, low, slopes[0], high, slopes[1])
    for found, part, slope in (
        (logits[:, :split], exact[:, :split], slopes[0]),
        (logits[:, split:], exact[:, split:], slopes[1]),
    ):
        expected = (
            (part.softmax(1) * slope.unsqueeze(1).double()).nan_to_num(0) if part.shape[1] else part
        )
        rtol = 1e-4 if dtype is torch.float32 else 8e-3
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("tail", ["ghost", "samples", "prior"])
@pytest.mark.parametrize(
    ("dtype", "overwrite"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_losses(
    tail: str, dtype: torch.dtype, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward KL + ranking through the kernels and without them: the same values, gradients, and
    logits left as they were.
    """
    vocab, padded, k, rows = 5000, 5003, 12, 5
    start = 2 * torch.randn(rows, padded, device=DEVICE)
    logprobs, ids = (
        (3 * torch.randn(rows, vocab, device=DEVICE)).log_softmax(1).sort(1, descending=True)
    )
    head = ids[:, :k].clone()
    head[0, 4:] = -1
    logp = logprobs[:, :k].masked_fill(head < 0, -torch.inf)
    tail_logprob = (-torch.expm1(logp.logsumexp(1))).clamp_min(1e-9).log()
    teacher = SparseTeacher(
        head, logp, tail_logprob, ids[:, 0], logprobs[:, 0], vocab,
        draws=TailDraws(ids[:, 100:108], logprobs[:, 100:108]),
        prior=torch.rand(vocab, device=DEVICE).softmax(0),
    )  # fmt: skip
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "_ENABLED", enabled)
        logits = start.to(dtype, copy=True).requires_grad_()
        student = StudentPass(
            logits, teacher, top_k=5, prior=True, scale=0.7, may_overwrite=overwrite
        )
        loss = sum(LOSSES[name](student, teacher) for name in ("ranking", "ce"))
        loss = loss + 2 * LOSSES["forward_kl"](student, teacher, tail=tail)
        assert torch.equal(logits, start.to(dtype))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.equal(logits, start.to(dtype)) != overwrite
        found.append((loss.detach(), gradient))
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=tolerance, atol=tolerance / 10)
    assert found[0][1].abs().sum() > 0.1


@pytest.mark.parametrize(
    "name", sorted(set(LOSSES) - {"random_sampling", "policy_gradient", "dpkd_sequence"})
)
def test_whole_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left beside the head: no tail, no unpredictable ids."""
    vocab, rows = 50, 3
    logprobs, ids = (
        (2 * torch.randn(rows, vocab, device=DEVICE)).log_softmax(1).sort(1, descending=True)
    )
    nothing = torch.full((rows,), -torch.inf, device=DEVICE)
    teacher = SparseTeacher(ids, logprobs, nothing, ids[:, 2], logprobs[:, 2], vocab)
    start, found = 2 * torch.randn(rows, vocab, device=DEVICE), []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "_ENABLED", enabled)
        logits = start.clone().requires_grad_()
        value = LOSSES[name](logits, teacher)
        found.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
    for mine, theirs in zip(*found, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_prior_is_added_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the optimum the softmax and the prior nearly cancel: rounded apart, bfloat16 would
    leave noise.
    """
    vocab, k, rows = 5000, 8, 3
    prior = torch.rand(vocab, device=DEVICE).mul(6).softmax(0)
    logprobs, ids = prior.log().expand(rows, -1).sort(1, descending=True)
    tail = (1 - logprobs[:, :k].exp().sum(1)).log()
    teacher = SparseTeacher(
        ids[:, :k], logprobs[:, :k], tail, ids[:, 0], logprobs[:, 0], vocab, prior=prior
    )
    start = (prior.log() + 0.02 * torch.randn(rows, vocab, device=DEVICE)).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(kernels, "_ENABLED", dtype is torch.bfloat16)
        logits = start.to(dtype).requires_grad_()
        value = LOSSES["forward_kl"](logits, teacher, tail="prior")
        gradients.append(torch.autograd.grad(value.sum(), logits)[0].float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


@pytest.mark.skipif(kernels.INTERPRETED, reason="interpreted functions cannot be compiled")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_interpreter_or_not_they_compile_for_nvidia(dtype: str) -> None:
    """Down to machine code for compute capability 9.0, which needs no GPU: interpreting proves
    nothing about that.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for function, vectors in (
        (kernels._log_sums, ("low", "high")),
        (kernels._spread, ("low", "slope_low", "high", "slope_high", "prior", "slope_prior")),
    ):
        fixed: dict[str, object] = {"BLOCK": kernels._BLOCK}
        if function is kernels._spread:
            fixed["PRIOR"] = True
        signature = {"logits": f"*{dtype}", "stride": "i32", **dict.fromkeys(vectors, "*fp32")}
        signature |= {
            "split": "i32",
            "size": "i32",
            "scale": "fp32",
            **dict.fromkeys(fixed, "constexpr"),
        }
        source = ASTSource(function, signature, fixed)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels._WARPS}
        )
        assert len(compiled.asm["cubin"]) > 0
