"""The engine's side of the vLLM teacher: draws from the tail, made from whole distributions.

vLLM returns only the most probable ids of a prompt's positions. The teacher therefore requests more
columns than it needs, and the two functions here put other data into the additional columns: the
draws, and one column of statistics. Shapes, transport and front end are vLLM's own.

Model runner V1 calls ``Sampler.gather_logprobs``, also for sampled tokens. V2 calls
``compute_topk_scores`` as imported in ``prompt_logprob``. Both are private, so the teacher checks
the draws at every start. Only calls with the width of the teacher's request are changed.

Engines run in this process, in forked processes or in new ones. For the first two kinds,
``drawing`` replaces the functions while it is entered. New processes, including tensor-parallel
workers, load ``register`` as a plugin, which finds the request in the environment. Without a
request it does nothing and imports nothing. vLLM copies the variables that it knows, and those that
``_RAY_COPIES`` names, to workers on Ray's other nodes.
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
# vLLM's variable with the names of further variables that its Ray executor copies to workers,
# separated by commas.
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@contextlib.contextmanager
def drawing(request: ColumnRequest) -> Iterator[None]:
    """A context in which engines of this process, and engines started in it, fulfil ``request``."""
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
    """Sets an environment variable; closing ``undo`` restores the old value."""
    before = os.environ.get(name)
    if before is None:
        undo.callback(os.environ.pop, name, None)
    else:
        undo.callback(os.environ.__setitem__, name, before)
    os.environ[name] = value


def register() -> None:
    """vLLM's entry point (``vllm.general_plugins``), called once in every process."""
    if ENVIRONMENT in os.environ:
        from logitcask.pipeline.distribution.capture import Capture
        from logitcask.pipeline.teachers.rows import ColumnRequest

        asked = json.loads(os.environ[ENVIRONMENT])
        _install(ColumnRequest(Capture(**asked["capture"]), asked["top"]), contextlib.ExitStack())


def _install(request: ColumnRequest, undo: contextlib.ExitStack) -> None:
    """Replaces the functions, unless they are already replaced; closing ``undo`` restores them.

    Other versions of vLLM may lack one of the two or both. The teacher checks whether it gets
    draws.
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
    # The descriptor itself, so that leaving restores exactly the old state.
    undo.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


def _with_draws(
    tensors: Any, scores: Any, target_ids: Any, capture: Capture, *, logits: bool
) -> Any:
    """``LogprobsTensors`` with the target, then ``top``, the draws and the statistics."""
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
