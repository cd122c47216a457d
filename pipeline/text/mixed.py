"""Several sources as one: their rows in turn, as many of each as its weight says.

The next row is that of the source with the fewest rows so far, divided by its weight. The order
depends on nothing else, so a build that is resumed sees the same one. Each row is read once. A
source that has ended is passed over, and the others go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from logitcask.pipeline.text.config import DataConfig
from logitcask.pipeline.text.rejects import Reject, Report, ignore
from logitcask.pipeline.text.sources import Row, RowSource, Source, open_source

log = logging.getLogger(__name__)


def open_rows(config: DataConfig) -> RowSource:
    """The rows of ``data.path`` or of ``data.sources``. Raises UserError as ``open_source`` does."""
    if not config.sources:
        return open_source(config)
    parts = config.parts()
    return MixedSource(
        [open_source(part) for part in parts],
        [source.weight for source in config.sources],
        [part.path for part in parts],
    )


class MixedSource:
    """The rows of several sources. Row ids begin with the number of the source: ``1/train/17``.

    ``counters`` are the sums of those of the sources, and ``rows_of_source_NUMBER``, the usable
    rows of each.
    """

    def __init__(self, sources: list[Source], weights: list[float], names: list[str]) -> None:
        self._sources, self._weights, self._names = sources, weights, names
        self._taken = [0] * len(sources)
        self.report: Report = ignore

    @property
    def counters(self) -> dict[str, int]:
        counters: Counter[str] = Counter()
        for source in self._sources:
            counters.update(source.counters)
        taken = {f"rows_of_source_{number}": rows for number, rows in enumerate(self._taken)}
        return {**counters, **taken}

    def stamp(self) -> str:
        """An identity that changes with the data of any source."""
        stamps = json.dumps([source.stamp() for source in self._sources])
        return f"sources:{hashlib.sha256(stamps.encode()).hexdigest()}"

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError as the sources do."""
        self._taken = [0] * len(self._sources)
        for number, source in enumerate(self._sources):
            source.report = self._report_of(number)
        rows = {number: iter(source) for number, source in enumerate(self._sources)}
        while rows:
            number = min(rows, key=lambda each: (self._taken[each] / self._weights[each], each))
            row = next(rows[number], None)
            if row is None:
                del rows[number]
                if rows:
                    log.info(
                        "all %d rows of %s are used; the other sources go on",
                        self._taken[number],
                        self._names[number],
                    )
                continue
            self._taken[number] += 1
            yield replace(row, row_id=f"{number}/{row.row_id}")

    def _report_of(self, number: int) -> Report:
        def report(reject: Reject) -> None:
            of_row = not reject.of_file
            name = f"{number}/{reject.name}" if of_row else reject.name
            self.report(reject._replace(name=name))

        return report
