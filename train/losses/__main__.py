"""``python -m logitcask.train.losses``: the tables of docs/losses.md, from the losses' specs."""

from __future__ import annotations

from logitcask.train.losses import SPECS, LossSpec

_ORDER = (
    *(
        "forward_kl",
        "random_sampling",
        "ce",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "tvd",
        "alpha_beta",
    ),
    *(
        "adaptive_kl",
        "tail_aware",
        "taid",
        "self_evolution",
        "ranking",
        "listmle",
        "pairwise_logistic",
        "bild",
    ),
    "dpkd_token",
)


def markdown() -> str:
    """Two tables: the definition of each loss, and the data that it needs from a cache."""
    specs = [SPECS[name] for name in _ORDER]
    what: list[tuple[str, ...]] = [("loss", "source", "formula", "when")]
    what += [(f"`{s.name}`", s.source, f"`{s.formula}`", s.use) for s in specs]
    takes: list[tuple[str, ...]] = [
        (
            "loss",
            "needs",
            "from the head alone",
            "with tail samples",
            "options and defaults",
            "`tail`",
        )
    ]
    takes += [
        (
            f"`{s.name}`",
            s.needs,
            s.from_head,
            s.from_samples or "not used",
            _options(s),
            ", ".join(s.tails) or "-",
        )
        for s in specs
    ]
    return "\n".join([*_table(what), "", *_table(takes), ""])


def _options(spec: LossSpec) -> str:
    shown = {name: default for name, default in spec.options.items() if name != "tail"}
    return (
        ", ".join(
            f"{name}: {'null' if default is None else default}" for name, default in shown.items()
        )
        or "-"
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]


if __name__ == "__main__":
    print(markdown())
