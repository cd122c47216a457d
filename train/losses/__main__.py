"""``python -m logitcask.train.losses``: the tables of docs/losses.md, from the specs of losses."""

from __future__ import annotations

from logitcask.train.losses import LOSSES, SPECS, LossSpec

# Modules in the order of the tables; losses of one module in that of their definitions.
_ORDER = ("forward_kl", "divergences", "alpha_beta", "adaptive", "ranking", "pairs")


def markdown() -> str:
    """Two tables: the definition of each loss, and the data that it needs from a cache."""
    specs = [SPECS[name] for name in sorted(LOSSES, key=_place)]
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


def _place(name: str) -> int:
    """The place of a loss's module in the tables. Modules not in ``_ORDER`` come last."""
    module = LOSSES[name].__module__.rpartition(".")[2]
    return _ORDER.index(module) if module in _ORDER else len(_ORDER)


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
