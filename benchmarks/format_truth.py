"""What the format benchmark compares with: a teacher's whole distributions over some text, and
distances from them.

The teacher runs once in transformers; what is measured of it lies in a work folder, so that a
second run starts at once.

Shapes: P positions, R of them with whole rows, V vocabulary, K head entries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from logitcask.cache_format import CachedSequence
from logitcask.cache_format.manifest import StoreSettings, TeacherIdentity, TokenizerIdentity
from logitcask.cache_format.shards.prior import TailPrior
from logitcask.pipeline.config import StoreConfig, TeacherConfig
from logitcask.pipeline.distribution.capture import Capture
from logitcask.pipeline.distribution.draws import Draws, no_draws
from logitcask.pipeline.distribution.keep import keep
from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.types import Scored, Sequence

TEACHER = TeacherConfig(model="smollm2-135m", backend="transformers", dtype="float32")
MAX_LENGTH = 512
# Ids kept of every position: heads are cut from them.
WIDTH = 256
# One sequence in five is kept whole: near 6,000 positions of 30,000, 0.6 GB in fp16.
DENSE_EVERY = 5
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Truth:
    """What was captured. ``scored`` has heads of WIDTH entries and no draws; ``draws`` are by
    the name of their settings.
    """

    sequences: list[Sequence]
    scored: list[Scored]
    draws: dict[str, list[Draws]]
    rows: NDArray[np.int64]
    """int64[R]: which of the P positions, in order, have whole rows."""
    dense: NDArray[np.float16]
    """float16[R, V]: logprobs, nats."""
    squares: NDArray[np.float64]
    """float64[P]: the sum of p squared over the vocabulary."""
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity

    @property
    def vocab_size(self) -> int:
        return self.dense.shape[1]

    @property
    def tokens(self) -> int:
        return sum(len(sequence.input_ids) for sequence in self.sequences)

    def kept(
        self, store: StoreSettings, capture: Capture, draws: str | None = None
    ) -> list[CachedSequence]:
        """What a build with these settings would put into its cache, by the pipeline's own
        hands.
        """
        result = []
        for index, (sequence, full) in enumerate(zip(self.sequences, self.scored, strict=True)):
            head = full.logprobs[:, : capture.top_k]
            drawn = no_draws(head, capture) if draws is None else self.draws[draws][index]
            scored = Scored(
                ids=full.ids[:, : capture.top_k],
                logprobs=head,
                target_ids=full.target_ids,
                target_logprob=full.target_logprob,
                target_rank=full.target_rank,
                draws=replace(drawn, entropy=full.draws.entropy),
            )
            result.append(keep(sequence, scored, store))
        return result


def load(folder: Path, max_tokens: int, draws: dict[str, StoreConfig]) -> Truth:
    """The capture in ``folder``; it is made there first where it is missing or was made with
    other settings.
    """
    wanted = {
        "teacher": TEACHER.model_dump(mode="json"),
        "max_tokens": max_tokens,
        "dense_every": DENSE_EVERY,
        "draws": {name: store.model_dump(mode="json") for name, store in draws.items()},
    }
    done = folder / "capture.json"
    if not done.exists() or json.loads(done.read_text())["settings"] != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        identities = _capture(folder, max_tokens, draws)
        done.write_text(json.dumps({"settings": wanted, **identities}))
    return _read(folder, list(draws))


def _capture(folder: Path, max_tokens: int, draws: dict[str, StoreConfig]) -> dict[str, Any]:
    import torch

    from logitcask.cache_format.tokenizer_identity import tokenizer_identity
    from logitcask.pipeline.distribution.draws_torch import draw, to_numpy
    from logitcask.pipeline.teachers.open import open_teacher, open_tokenizer, vocab_size_of
    from logitcask.pipeline.teachers.transformers import TransformersTeacher
    from logitcask.pipeline.text.sources import open_source
    from logitcask.pipeline.text.tokenize import Tokenization

    data = DataConfig(path="python-docs", max_length=MAX_LENGTH, max_tokens=max_tokens)
    tokenizer = open_tokenizer(TEACHER)
    sequences = list(
        Tokenization(tokenizer, data, vocab_size_of(TEACHER)).sequences(open_source(data))
    )
    teacher = open_teacher(TEACHER, max_length=MAX_LENGTH, capture=Capture(top_k=WIDTH))
    assert isinstance(teacher, TransformersTeacher)
    rows = sum(len(s.input_ids) - 1 for s in sequences[::DENSE_EVERY])
    dense = np.lib.format.open_memmap(
        folder / "dense.npy", mode="w+", dtype=np.float16, shape=(rows, teacher.vocab_size)
    )
    parts: dict[str, list[NDArray[Any]]] = {}
    written = 0

    def put(name: str, array: NDArray[Any]) -> None:
        parts.setdefault(name, []).append(array)

    for index, sequence in enumerate(tqdm(sequences, desc="teacher", unit="seq")):
        logprobs = torch.from_numpy(teacher.dense_logprobs(sequence.input_ids))
        target_ids = torch.from_numpy(sequence.input_ids[1:].astype(np.int64))
        target = logprobs.gather(1, target_ids[:, None])
        top = logprobs.topk(WIDTH, dim=1)
        probabilities = logprobs.exp()
        put("input_ids", sequence.input_ids)
        put("ids", top.indices.int().numpy())
        put("logprobs", top.values.numpy())
        put("target_logprob", target[:, 0].numpy())
        put("target_rank", (logprobs > target).sum(dim=1, dtype=torch.int32).numpy())
        put("entropy", -(probabilities * logprobs).sum(dim=1).numpy())
        put("squares", probabilities.square().sum(dim=1, dtype=torch.float64).numpy())
        for name, store in draws.items():
            drawn = to_numpy(draw(logprobs, top.indices, target_ids, store.capture()))
            put(f"{name}/head_size", drawn.head_size)
            put(f"{name}/samples", drawn.samples)
            put(f"{name}/sample_logprobs", drawn.sample_logprobs)
        if index % DENSE_EVERY == 0:
            dense[written : written + len(logprobs)] = logprobs.numpy()
            written += len(logprobs)
    dense.flush()
    np.savez(
        folder / "capture.npz",
        lengths=[len(s.input_ids) for s in sequences],
        names=[s.sequence_id for s in sequences],
        **{name.replace("/", "|"): np.concatenate(arrays) for name, arrays in parts.items()},
    )
    identities = {
        "teacher": teacher.identity().model_dump(mode="json"),
        "tokenizer": {"name": TEACHER.model, **tokenizer_identity(tokenizer, None)},
    }
    teacher.close()
    return identities


def _read(folder: Path, draws: list[str]) -> Truth:
    archive = np.load(folder / "capture.npz")
    lengths = archive["lengths"]
    of_tokens, of_rows = np.cumsum(lengths)[:-1], np.cumsum(lengths - 1)[:-1]
    per_row = {
        name: np.split(archive[name], of_rows)
        for name in archive.files
        if name not in ("lengths", "names", "input_ids", "squares")
    }
    sequences, scored = [], []
    nothing = np.empty(0)
    for index, input_ids in enumerate(np.split(archive["input_ids"], of_tokens)):
        mask = np.arange(len(input_ids)) > 0
        sequences.append(Sequence(str(archive["names"][index]), input_ids, mask))
        own = {
            name: per_row[name][index]
            for name in ("ids", "logprobs", "target_logprob", "target_rank")
        }
        draws_of_none = Draws(nothing, nothing, nothing, per_row["entropy"][index])
        scored.append(Scored(target_ids=input_ids[1:], draws=draws_of_none, **own))
    starts = np.concatenate([[0], np.cumsum(lengths - 1)])
    identities = json.loads((folder / "capture.json").read_text())
    return Truth(
        sequences=sequences,
        scored=scored,
        draws={
            name: [
                Draws(head_size=size, samples=ids, sample_logprobs=logprobs, entropy=None)
                for size, ids, logprobs in zip(
                    *(
                        per_row[f"{name}|{part}"]
                        for part in ("head_size", "samples", "sample_logprobs")
                    ),
                    strict=True,
                )
            ]
            for name in draws
        },
        rows=np.concatenate(
            [np.arange(starts[i], starts[i + 1]) for i in range(0, len(lengths), DENSE_EVERY)]
        ),
        dense=np.load(folder / "dense.npy", mmap_mode="r"),
        squares=archive["squares"],
        teacher=TeacherIdentity.model_validate(identities["teacher"]),
        tokenizer=TokenizerIdentity.model_validate(identities["tokenizer"]),
    )


@dataclass(frozen=True)
class Reconstruction:
    """A whole distribution at each of P positions, as a format tells it: a head, and the rest
    spread over all other ids.

    ids:       int[P, K], padded with -1.
    logprobs:  float[P, K], nats.
    tail_mass: float64[P].
    prior:     how the tail is spread; None: evenly.
    """

    ids: NDArray[np.integer]
    logprobs: NDArray[np.floating]
    tail_mass: NDArray[np.float64]
    prior: TailPrior | None = None


def of_cache(sequences: list[CachedSequence], prior: TailPrior | None) -> Reconstruction:
    """What decoded sequences say."""
    width = max(s.ids.shape[1] for s in sequences)

    def padded(arrays: list[NDArray[Any]], filler: float) -> NDArray[Any]:
        return np.concatenate(
            [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=filler) for a in arrays]
        )

    return Reconstruction(
        ids=padded([s.ids for s in sequences], -1),
        logprobs=padded([s.logprobs for s in sequences], -np.inf),
        tail_mass=np.exp(np.concatenate([s.tail_logprob for s in sequences]).astype(np.float64)),
        prior=prior,
    )


def distances(truth: Truth, of: dict[str, Reconstruction]) -> dict[str, dict[str, float | None]]:
    """Mean over the R dense positions of KL(teacher || reconstruction), nats, and of the total
    variation, over all V ids.

    KL is None where a reconstruction gives 0 to what the teacher does not.
    """
    flat = np.full(truth.vocab_size, 1 / truth.vocab_size)
    # Many reconstructions share a prior: the cross term with each is one product for all of them.
    spreads = {
        id(r.prior): flat if r.prior is None else r.prior.probabilities() for r in of.values()
    }
    logs = {key: np.log(b).astype(np.float32) for key, b in spreads.items()}
    totals = {name: np.zeros(2) for name in of}
    for start in tqdm(range(0, len(truth.rows), _ROWS_AT_ONCE), desc="distances", unit="chunk"):
        rows = truth.rows[start : start + _ROWS_AT_ONCE]
        p = np.exp(truth.dense[start : start + _ROWS_AT_ONCE].astype(np.float32))
        p /= p.sum(axis=1, dtype=np.float64, keepdims=True)
        negative_entropy = (p * np.log(np.maximum(p, 1e-38))).sum(axis=1, dtype=np.float64)
        cross = {key: (p @ log_b).astype(np.float64) for key, log_b in logs.items()}
        for name, r in of.items():
            totals[name] += _summed(
                p,
                negative_entropy,
                cross[id(r.prior)],
                r,
                rows,
                spreads[id(r.prior)],
                logs[id(r.prior)],
            )
    means = {name: total / len(truth.rows) for name, total in totals.items()}
    return {
        name: {"kl": float(kl) if np.isfinite(kl) else None, "tv": float(tv)}
        for name, (kl, tv) in means.items()
    }


def _summed(
    p: NDArray[np.float32],
    negative_entropy: NDArray[np.float64],
    cross: NDArray[np.float64],
    r: Reconstruction,
    rows: NDArray[np.int64],
    b: NDArray[np.float64],
    log_b: NDArray[np.float32],
) -> NDArray[np.float64]:
    """float64[2]: KL and TV, summed over some rows."""
    ids, tail = r.ids[rows], r.tail_mass[rows]
    stored = ids >= 0
    at = np.where(stored, ids, 0).astype(np.int64)
    logprobs = np.where(stored, r.logprobs[rows], 0).astype(np.float64)
    q = np.where(stored, np.exp(logprobs), 0)
    p_head = np.where(stored, np.take_along_axis(p, at, axis=1), 0).astype(np.float64)
    b_head = np.where(stored, b[at], 0)
    scale = tail / np.maximum(1 - b_head.sum(axis=1), 1e-300)
    p_tail = np.maximum(1 - p_head.sum(axis=1), 0)
    with np.errstate(divide="ignore"):
        of_tail = (
            p_tail * np.log(scale) + cross - np.where(stored, p_head * log_b[at], 0).sum(axis=1)
        )
    kl = negative_entropy - (p_head * logprobs).sum(axis=1) - of_tail
    spread = np.abs(p - scale[:, None].astype(np.float32) * b.astype(np.float32)).sum(
        axis=1, dtype=np.float64
    )
    in_head = np.where(
        stored, np.abs(p_head - q) - np.abs(p_head - scale[:, None] * b_head), 0
    ).sum(axis=1)
    return np.array([kl.sum(), (spread + in_head).sum() / 2])


def sampling_noise(truth: Truth, sequences: list[CachedSequence]) -> float:
    """Mean over all positions of ``|p_hat - p|^2``, p_hat being the head and the draws with their
    weights.

    With w = tail mass / draws: ``w^2 sum n^2 - 2 w sum over draws of p + sum over the tail of
    p^2``, n being how often an id was drawn. The noise of the estimated gradient in the logits is
    this and nothing else. Needs the draws' logprobs.
    """
    total, begin = 0.0, 0
    for s in sequences:
        assert s.samples is not None
        assert s.samples.logprobs is not None
        end = begin + len(s.positions)
        ids, stored = s.samples.ids[:, 0], s.ids >= 0
        tail = truth.squares[begin:end] - np.where(
            stored, np.exp(2 * s.logprobs.astype(np.float64)), 0
        ).sum(axis=1)
        drawn = ids >= 0
        weight = np.exp(s.tail_logprob.astype(np.float64)) / np.maximum(drawn.sum(axis=1), 1)
        # The sum of n squared over ids is the number of ordered pairs of draws that agree.
        pairs = ((ids[:, :, None] == ids[:, None, :]) & drawn[:, :, None]).sum(axis=(1, 2))
        of_draws = np.where(drawn, np.exp(s.samples.logprobs[:, 0].astype(np.float64)), 0).sum(
            axis=1
        )
        total += float((weight**2 * pairs - 2 * weight * of_draws + tail).sum())
        begin = end
    return total / begin
