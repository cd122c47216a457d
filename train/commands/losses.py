"""``train-student losses``: the losses that a config can name."""

from __future__ import annotations

from logitcask.cache_format.cli.result import print_result


def losses() -> None:
    """Lists all losses: where each comes from, its options and their defaults."""
    from logitcask.train.losses.others import listed

    found = listed()
    rows = [
        (
            each.name,
            each.origin,
            each.error
            or ", ".join(
                f"{key}: {'null' if default is None else default}"
                for key, default in each.options.items()
            )
            or "-",
        )
        for each in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {where:{widths[1]}}  {rest}" for name, where, rest in rows]
    print_result(
        {"losses": [each._asdict() for each in found]},
        "\n".join([*lines, "", "a loss of your own: name: MODULE:NAME (docs/extending.md)"]),
        summary=False,
    )
