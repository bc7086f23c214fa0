"""The results of a run: rows with what is needed to understand them later; files, tables and comparisons."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..lab.files import to_json, write_text, written_beside
from ..shown.html import grid_table
from .ceilings import Ceilings
from .columns import notes, table_columns
from .rows import Row

FORMAT = "cupy-mla bench 1"

# What a comparison (`compare`, report.py) reads of an earlier run.
_FACTS = ("device", "backend", "date")
_TIMES = ("us", "fastest_us", "slowest_us", "sustained_us")

_CSV_CASE = (
    *("batch", "num_heads_q", "seqlen_q", "dtype", "page_size", "storage", "causal", "fixed_split_tokens"),
    *("layout", "compute", "topk", "prefill"),
)
_CSV_HEADER = (
    *("case", "implementation", "us", "fastest_us", "slowest_us", "sustained_us", "tflops", "gigabytes_per_second"),
    *("share_of_ceiling", "error", "times_ours", "failure", *_CSV_CASE, "kv_tokens", "longest", "ragged"),
)


@dataclass(slots=True)
class Results:
    """Rows of one run.

    Attributes
    ----------
    metadata
        GPU, driver, versions of this package, its peers and the frameworks, protocol, command line and date.
    ceilings
        What the GPU can do at most, measured or published; None when that is not known.
    rows
        One for each case, in the order they were run.
    """

    metadata: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """The rows in which our side gave no result, or a wrong one."""
        return [row for row in self.rows if row.failure is not None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": FORMAT,
            "metadata": self.metadata,
            "ceilings": None if self.ceilings is None else self.ceilings.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
        }

    def write_json(self, path: Path) -> None:
        """Write everything to a file that `load_results` reads.

        Raises
        ------
        InvalidArgumentError
            The file cannot be written.
        """
        write_text(path, to_json(self.as_dict(), indent=1) + "\n", "json")

    def write_csv(self, path: Path) -> None:
        """Write a line for each case and implementation.

        Raises
        ------
        InvalidArgumentError
            The file cannot be written.
        """
        with written_beside(path, "csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _CSV_HEADER)
            writer.writeheader()
            writer.writerows(self._csv_lines())

    def _csv_lines(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            case = row.case
            for name, measurement in row.measurements.items():
                yield {
                    "case": row.name,
                    "implementation": name,
                    "us": measurement.us,
                    "fastest_us": measurement.fastest_us,
                    "slowest_us": measurement.slowest_us,
                    "sustained_us": measurement.sustained_us,
                    "tflops": row.tflops(name),
                    "gigabytes_per_second": row.gigabytes_per_second(name),
                    "share_of_ceiling": None if self.ceilings is None else row.share(self.ceilings, name),
                    "error": measurement.error,
                    "times_ours": row.ratio(name),
                    "failure": measurement.failure or measurement.skipped,
                    **{column: getattr(case, column) for column in _CSV_CASE},
                    "kv_tokens": int(case.kv_lengths.sum()),
                    "longest": int(case.kv_lengths.max()),
                    "ragged": case.ragged is not None,
                }

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        columns = table_columns(self.rows, self.ceilings)
        cells = ([column.text(row) for column in columns] for row in self.rows)
        remarks = (f"{row.name}: {note}" for row in self.rows for note in notes(row))
        where = f"{self.metadata.get('device', '')}, {self.metadata.get('date', '')}"
        return grid_table(where, [column.title for column in columns], cells, remarks)


def load_results(path: Path) -> Results:
    """Read what `Results.write_json` wrote.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"the format is {values['format']!r}, not {FORMAT!r}")
        results = Results(
            metadata=values["metadata"],
            ceilings=None if values["ceilings"] is None else Ceilings(**values["ceilings"]),
            rows=[Row.from_dict(row) for row in values["rows"]],
        )
        _check_values(results)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("results", "a file that can be read", f"{path} ({error})") from error
    # Whatever a file of something else trips over, for the user it is one thing.
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgumentError("results", "a JSON file of cupy-mla bench", f"{path} ({error!r})") from error
    return results


def _check_values(results: Results) -> None:
    """Raise one of the errors that `load_results` takes for a file of something else."""
    for name in _FACTS:
        if not isinstance(results.metadata[name], str):
            raise TypeError(f"{name} is {results.metadata[name]!r}")
    for row in results.rows:
        for measurement in row.measurements.values():
            for name in _TIMES:
                time = getattr(measurement, name)
                if time is not None and not (math.isfinite(time) and time > 0):
                    raise ValueError(f"{name} is {time!r} in {row.name}")


@dataclass(frozen=True, slots=True)
class Change:
    """Our time on one case in two runs, in microseconds."""

    name: str
    old_us: float
    new_us: float

    @property
    def percent(self) -> float:
        """How much longer it takes now; negative is faster."""
        return 100 * (self.new_us / self.old_us - 1)


def compare(old: Results, new: Results) -> list[Change]:
    """Our times on the cases that both runs measured, in the order of ``new``; names do not matter, the work does."""
    before = {row.case: row.ours.us for row in old.rows}
    changes = []
    for row in new.rows:
        old_us = before.get(row.case)
        if old_us is not None and row.ours.us is not None:
            changes.append(Change(row.name, old_us, row.ours.us))
    return changes
