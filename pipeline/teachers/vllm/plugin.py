"""The engine's side of the vLLM teacher: draws from the tail, made where the whole distributions
are.

vLLM returns only the most probable ids of a prompt's positions. So the teacher asks for more of
them than it wants, and the two functions here put other things into the columns to spare: the
draws, and one column of statistics. Shapes, transport and front end stay vLLM's own.

Model runner V1 calls ``Sampler.gather_logprobs``, also for sampled tokens; V2
``compute_topk_scores`` as imported in ``prompt_logprob``. Both are private, so the teacher checks
at every start that the draws are right. Only calls of the width that the teacher asks for are
answered so; all others pass as they are.

Engines live in this process, in forked ones or in fresh ones. ``drawing`` replaces the functions
for the first two kinds while it is entered; fresh processes, tensor-parallel workers included, load
``register`` as a plugin, which finds the request in the environment. Without that, it does nothing
and imports nothing. vLLM copies to workers on Ray's other nodes the variables it knows and those
that ``_RAY_COPIES`` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded in every process of vLLM, so whatever takes time to import waits until draws are asked for
    from logitcask.pipeline.distribution.capture import Capture
    from logitcask.pipeline.teachers.rows import ColumnRequest

ENVIRONMENT = "LOGITCASK_DRAWS"
# Of vLLM: names of more variables that its Ray executor copies to workers, with commas between
# them.
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@contextlib.contextmanager
def drawing(request: ColumnRequest) -> Iterator[None]:
    """While this is entered, engines in this process, and those started meanwhile, answer
    ``request``.
    """
    if not request.capture.samples:
        yield
        return
    with contextlib.ExitStack() as undo:
        _install(request, undo)
        users = os.environ.get(_RAY_COPIES)
        _set(ENVIRONMENT, json.dumps(dataclasses.asdict(request)), undo)
        _set(_RAY_COPIES, f"{users},{ENVIRONMENT}" if users else ENVIRONMENT, undo)
        yield


def _set(name: str, value: str, undo: contextlib.ExitStack) -> None:
    """Sets a variable of the environment; closing ``undo`` puts back what was there."""
    before = os.environ.get(name)
    if before is None:
        undo.callback(os.environ.pop, name, None)
    else:
        undo.callback(os.environ.__setitem__, name, before)
    os.environ[name] = value


def register() -> None:
    """vLLM calls this once in every process of every engine (entry point group
    ``vllm.general_plugins``).
    """
    if ENVIRONMENT in os.environ:
        from logitcask.pipeline.distribution.capture import Capture
        from logitcask.pipeline.teachers.rows import ColumnRequest

        asked = json.loads(os.environ[ENVIRONMENT])
        _install(ColumnRequest(Capture(**asked["capture"]), asked["top"]), contextlib.ExitStack())


def _install(request: ColumnRequest, undo: contextlib.ExitStack) -> None:
    """Replaces the functions, unless they have been replaced already; closing ``undo`` puts back
    what was there.

    Other versions of vLLM may lack one of the two or both. Whether the draws come is for the
    teacher to see.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.sample.sampler import Sampler

        _replace(Sampler, "gather_logprobs", request, undo, logits=False)
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.v1.worker.gpu.sample import prompt_logprob

        _replace(prompt_logprob, "compute_topk_scores", request, undo, logits=True)


def _replace(
    owner: Any, name: str, request: ColumnRequest, undo: contextlib.ExitStack, *, logits: bool
) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    if hasattr(original, "answers"):
        return

    @functools.wraps(original)
    def replacement(
        scores: Any, num_logprobs: int, token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if num_logprobs != request.columns:
            return original(scores, num_logprobs, token_ids, *args, **kwargs)
        tensors = original(scores, request.top, token_ids, *args, **kwargs)
        return _with_draws(tensors, scores, token_ids, request.capture, logits=logits)

    replacement.answers = request  # type: ignore[attr-defined]
    # The descriptor itself, so that leaving puts back exactly what was there.
    undo.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


def _with_draws(
    tensors: Any, scores: Any, target_ids: Any, capture: Capture, *, logits: bool
) -> Any:
    """vLLM's ``LogprobsTensors``, its columns (target, then ``top``) followed by the draws and
    the statistics.
    """
    import torch

    from logitcask.pipeline.distribution.draws_torch import draw

    ids = tensors.logprob_token_ids
    draws = draw(scores, ids[:, 1:].long(), target_ids.long(), capture, logits=logits)
    more_ids = [draws.samples.flatten(1).to(ids.dtype), draws.head_size[:, None].to(ids.dtype)]
    more_logprobs = [draws.sample_logprobs.flatten(1), draws.entropy[:, None]]
    return tensors._replace(
        logprob_token_ids=torch.cat([ids, *more_ids], dim=1),
        logprobs=torch.cat([tensors.logprobs, *more_logprobs], dim=1),
    )
