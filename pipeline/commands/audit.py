"""``teacher-cache audit``: the comparison of ``logitcask.pipeline.audit.run`` as a page or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from logitcask.cache_format.cli.result import print_result
from logitcask.cache_format.errors import DamagedCacheError
from logitcask.cache_format.runtime.progress import ProgressBar
from logitcask.pipeline.audit.result import Audit, Difference, Distance, DrawsAudit
from logitcask.pipeline.audit.run import SEQUENCES
from logitcask.pipeline.audit.run import audit as audit_cache


def audit(
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="A finished cache: a folder or an fsspec URL.")
    ],
    sequences: Annotated[
        int,
        typer.Option(
            "--sequences",
            min=1,
            help="Number of sequences to score again, the same ones in every audit.",
        ),
    ] = SEQUENCES,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="The teacher's model, as a folder or hub name, if the one in the manifest cannot "
            "be loaded.",
            show_default=False,
        ),
    ] = None,
    max_engine_difference: Annotated[
        float | None,
        typer.Option(
            "--max-engine-difference",
            min=0,
            help="Largest accepted mean difference of logprobs, in nats. Default: the difference "
            "that the teacher's precision can cause, 0.001 in float32, 0.05 in 16 bits, 0.3 in "
            "FP8, 0.7 in 4 bits; for a mixture of experts the last three are 0.15 higher.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own code to run.")
    ] = False,
) -> None:
    """Scores a sample of a cache again, with transformers in float32, and reports the errors of
    engine, codec and truncation. Exit code 1 if the engine differs too much.
    """
    with ProgressBar(total=sequences, unit="seq", desc="audit", leave=False) as bar:
        result = audit_cache(
            cache,
            sequences=sequences,
            teacher=teacher,
            max_engine_difference=max_engine_difference,
            trust_remote_code=trust_remote_code,
            on_sequence=bar.update,
        )
    agree = "" if result.problems else "\nengine and dense agree"
    print_result(asdict(result), describe(result) + agree)
    if result.problems:
        raise DamagedCacheError(f"{cache}: {'; '.join(result.problems)}")


def describe(result: Audit) -> str:
    """The page that the command prints."""
    even, prior = result.truncation_even, result.truncation_prior
    rows = [
        ("cache", result.cache),
        ("reference", result.reference),
        (
            "sample",
            f"{result.sequences:,} of {result.sequences_in_cache:,} sequences, {result.positions:,} positions",
        ),
        (
            "engine",
            f"nats with rounding taken out; at most {result.limit:g} for target and head logprobs",
        ),
        ("  targets", _engine(result.target)),
        ("  heads", _engine(result.head)),
        ("  entropies", "" if result.entropy is None else _engine(result.entropy)),
        (
            "  ids",
            f"{result.ids_outside:.2%} of the heads' are not the reference's, beyond near ties",
        ),
        (
            "  ranks",
            f"{result.ranks_differ:.2%} of the targets' differ, {result.ranks_wrong:.2%} beyond near ties",
        ),
        ("  tail mass", f"{result.tail_mass:.2g} off on average, with rounding"),
        (
            "  loss",
            f"{result.cached_loss:.4f} nats per target, the reference's {result.reference_loss:.4f}",
        ),
        ("codec", f"{_distance(result.codec)}; with the engine {_distance(result.stored)}"),
        ("  targets", _rounding(result.target)),
        ("  heads", _rounding(result.head)),
        ("truncation", f"{_distance(even)} with the tail spread evenly"),
        (
            "",
            ""
            if prior is None
            else f"{_distance(prior)} with the tail spread by the cache's prior",
        ),
        ("draws", "" if result.draws is None else _draws(result.draws)),
    ]
    return "\n".join(f"{name:15} {value}" for name, value in rows if value)


def _engine(of: Difference) -> str:
    return f"mean {of.engine:.2g}, signed {of.signed:+.1g}, of {of.values:,}" if of.values else ""


def _rounding(of: Difference) -> str:
    if not of.values:
        return ""
    return (
        f"stored {of.mean:.2g} nats off on average, rounding alone {of.rounding:.2g}; "
        f"at most {of.largest:.4g}, rounding alone {of.largest_allowed:.4g}"
    )


def _distance(of: Distance) -> str:
    return f"KL {of.kl:.3g} nats, TV {of.tv:.3g}"


def _draws(of: DrawsAudit) -> str:
    p_value = "" if of.p_value is None else f", chi-square p = {of.p_value:.2g}"
    z = [f"{each:+.2f}" for each in (of.z_logprob, of.z_id) if each is not None]
    bias = f", bias {' and '.join(z)} standard errors (of logprobs and ids)" if len(z) == 2 else ""
    return f"{of.draws:,}, {of.in_head or 'none'} in the head{p_value}{bias}"
