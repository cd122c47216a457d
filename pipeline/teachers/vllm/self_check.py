"""The checks of a started vLLM engine: the draws and the routes.

At every start, short prompts are scored. Draws are compared with whole distributions, and the
private route with a public one. If a version of vLLM has changed its internals, this is found
before anything is stored.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logitcask.cache_format.errors import UserError, one_line
from logitcask.pipeline.distribution.draws import first_difference
from logitcask.pipeline.distribution.keep import check_numbers, not_a_number
from logitcask.pipeline.teachers.rows import ColumnRequest, Rows, drawn, scored_rows
from logitcask.pipeline.teachers.vllm.routes import Route, convert
from logitcask.pipeline.types import Scored

logger = logging.getLogger(__name__)

_AT_START = "for a first prompt"
# Nats by which two runs of an engine may always differ; and the number of attempts if draws seem
# wrong.
_TOLERANCE = 1e-3
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class SelfCheck:
    """The checks of one engine, for texts of up to ``max_length`` tokens.

    stream:  scores prompts: (prompts, columns, route, beside) to each one's length and logprobs.
    request: the teacher's request per position.
    version: vLLM's.
    """

    stream: Callable[..., Iterator[tuple[int, Any]]]
    request: ColumnRequest
    vocab_size: int
    max_length: int
    version: str

    def check_draws(self) -> None:
        """Compares the draws of a short prompt, if draws are requested, with whole distributions.

        Engines differ from run to run, some by much more than rounding (mixtures of experts,
        weights of 4 bits). Whole distributions are therefore computed twice, and twice their
        difference is the tolerance. A real error occurs every time, so if there seems to be one,
        the check is repeated.

        Raises UserError if they differ from ``logitcask.pipeline.distribution.draws``.
        """
        if not self.request.capture.samples:
            return
        prompt = prompt_of(min(9, max(2, self.max_length)), self.vocab_size)
        reason: str | None = None
        try:
            dense, spread = self.dense(prompt), 0.0
            for _ in range(_ATTEMPTS):
                spread = max(spread, _spread(self.dense(prompt), dense))
                (rows,) = self._rows([prompt], self.request.columns, "flat")
                reason = _wrong_draws(rows, dense, self.request, max(_TOLERANCE, 2 * spread))
                if reason is None:
                    return
        except UserError:
            raise
        except Exception as error:
            reason = one_line(error)
        raise UserError(
            f"draws from the tail do not work with vLLM {self.version}: {reason}; "
            "set store.tail_samples=0 or teacher.backend=transformers"
        )

    def dense(self, prompt: list[int]) -> NDArray[np.float32]:
        """float32[n-1, V]: the whole distributions of a prompt. Raises UserError for NaN."""
        ((ids, logprobs, _),) = self._rows([prompt], self.vocab_size, "flat")
        dense = np.empty((len(ids), self.vocab_size), np.float32)
        np.put_along_axis(dense, ids[:, 1:].astype(np.int64), logprobs[:, 1:], axis=1)
        if np.isnan(dense).any():
            raise not_a_number(_AT_START)
        return dense

    def choose_route(self, asked: Literal["auto"] | Route) -> Route:
        """The route ``asked`` for, checked on two short prompts.

        Every entry of ``raw`` is compared with a public route's entry for the same result.

        Raises UserError if the requested route does not work.
        """
        public: Route = "stock" if asked == "stock" else "flat"
        reason = self._fails(public)
        if reason is not None and asked == "auto" and not self.request.capture.samples:
            logger.warning(
                "%s; using the stock route in its place", self._does_not_work(public, reason)
            )
            public = "stock"
            reason = self._fails(public)
        if reason is not None:
            raise UserError(
                f"{self._does_not_work(public, reason)}; set teacher.backend=transformers"
            )
        if asked in ("flat", "stock"):
            return public
        reason = self._fails("raw", beside=public)
        if reason is None:
            return "raw"
        if asked == "raw":
            raise UserError(
                f"{self._does_not_work('raw', reason)}; set teacher.route=auto, flat or stock"
            )
        logger.warning(
            "%s; using the %s route, which gives the same numbers more slowly",
            self._does_not_work("raw", reason),
            public,
        )
        return public

    def _fails(self, route: Route, beside: Route | None = None) -> str | None:
        """The reason why ``route`` does not work; None if it works.

        beside: another route, which must give the same for each result.
        """
        columns, request = self.request.columns, self.request
        prompts = [
            prompt_of(length, self.vocab_size)
            for length in sorted({2, min(16, max(2, self.max_length))})
        ]
        try:
            for _, answer in self.stream(prompts, columns, route, beside):
                scored = scored_rows(convert(route, answer, columns), request)
                check_numbers(scored, _AT_START)
                if beside is None:
                    continue
                differs = _difference(
                    scored, scored_rows(convert(beside, answer.public, columns), request)
                )
                if differs is not None:
                    return f"{differs} differ from the {beside} route's"
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            return one_line(error)
        return None

    def _rows(self, prompts: list[list[int]], columns: int, route: Route) -> list[Rows]:
        """vLLM's rows of each prompt, with so many prompt logprobs."""
        return [
            convert(route, output, columns) for _, output in self.stream(prompts, columns, route)
        ]

    def _does_not_work(self, route: Route, reason: str) -> str:
        return f"the {route} route does not work with vLLM {self.version}: {reason}"


def prompt_of(length: int, vocab_size: int) -> list[int]:
    """Ids from all over the vocabulary, for checks."""
    ids: list[int] = (np.arange(length) * 7919 % vocab_size).tolist()
    return ids


def _spread(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Largest difference of two logprobs, nats; both may be -inf."""
    with np.errstate(invalid="ignore"):
        return float(np.nanmax(np.abs(a - b), initial=0))


def _wrong_draws(
    rows: Rows, dense: NDArray[np.float32], request: ColumnRequest, tolerance: float
) -> str | None:
    """The error in the draws of ``rows``; None if they are right.

    dense:     float32[n-1, V], the whole distributions from another run.
    tolerance: nats by which two runs may differ.
    """
    ids, logprobs, _ = rows
    top_ids, target_ids = ids[:, 1 : 1 + request.top], ids[:, 0]
    draws = drawn(ids, logprobs, request)
    if (draws.head_size > request.capture.top_k).all():
        return "the engine answers without draws (it loads them as a plugin; is VLLM_PLUGINS set?)"
    # Sizes and keys depend on the last bits of this run, which a second run may not repeat.
    exact = dense.copy()
    np.put_along_axis(
        exact, ids[:, : 1 + request.top].astype(np.int64), logprobs[:, : 1 + request.top], axis=1
    )
    if not np.allclose(exact, dense, atol=tolerance, rtol=0):
        return "the logprobs of the most probable ids change with what is asked for"
    return first_difference(draws, exact, top_ids, target_ids, request.capture, tolerance)


def _difference(a: Scored, b: Scored) -> str | None:
    """Name of the first array that is not the same in both."""
    others = b.arrays()
    differ = (name for name, one in a.arrays().items() if not np.array_equal(one, others[name]))
    return next(differ, None)
