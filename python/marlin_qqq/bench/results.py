"""The saved form of a run: one JSON document with a schema version, or one CSV row a measurement.

A document is a :class:`Run`; everything that tables, plots, ``compare`` and README figures show is computed from it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "marlin-qqq-bench"
SCHEMA_VERSION = 1

OURS = "marlin_qqq"


@dataclass
class Measurement:
    """One implementation on one problem. Times are microseconds a call.

    ``median_us`` is None when nothing may be shown: a wrong result (``check`` begins with "WRONG") or an
    implementation that is not available here (``unavailable`` says why).
    """

    operation: str  # "gemm", "quantize", "linear", "layer", "epilogue" (gemm again, beside bias and bf16)
    implementation: str  # "marlin_qqq", "marlin_qqq:constant", "humming", "int_mm", "read", ...
    num_tokens: int
    out_features: int
    in_features: int
    group_size: int | None  # 128, -1 (per-channel), None: the implementation has no such mode
    label: str = ""  # the layer's name in its model
    method: str = "graph"  # "graph", "sustained", "wall"
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    num_samples: int = 0
    launches_per_sample: int = 0
    bytes_moved: int = 0
    operations: int = 0
    floor_us: float | None = None
    check: str = "not checked"
    unavailable: str = ""
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two measurements of two runs comparable."""
        return (
            self.operation,
            self.implementation,
            self.method,
            self.num_tokens,
            self.out_features,
            self.in_features,
            self.group_size,
        )

    @property
    def problem_key(self) -> tuple[Any, ...]:
        """The problem without the implementation and without the group mode."""
        return (self.operation, self.method, self.out_features, self.in_features, self.num_tokens)

    @property
    def wrong(self) -> bool:
        return self.check.startswith("WRONG")

    @property
    def tops(self) -> float | None:
        return self.operations / self.median_us / 1e6 if self.median_us and self.operations else None

    @property
    def gbps(self) -> float | None:
        return self.bytes_moved / self.median_us / 1e3 if self.median_us and self.bytes_moved else None

    @property
    def percent_of_floor(self) -> float | None:
        return 100.0 * self.floor_us / self.median_us if self.median_us and self.floor_us else None


@dataclass
class Run:
    """A whole run: where and how it was made, the ceilings measured in it, and its measurements."""

    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        return sum(measurement.wrong for measurement in self.measurements)

    def find(self, **fields: Any) -> list[Measurement]:
        """Measurements whose fields have these values, for example ``run.find(implementation="humming")``."""
        return [m for m in self.measurements if all(getattr(m, name) == value for name, value in fields.items())]

    def to_json(self) -> str:
        document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "document") -> Run:
        """Reads what :meth:`to_json` wrote. Raises ValueError that names ``origin`` for anything else."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{origin} is not JSON: {error}") from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"{origin} is not a result of marlin-qqq bench (no schema {SCHEMA!r})")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"{origin} has schema version {version!r}; this program reads version {SCHEMA_VERSION}")
        known = {f.name for f in dataclasses.fields(Measurement)}
        try:
            measurements = [
                Measurement(**{name: value for name, value in row.items() if name in known})
                for row in document["measurements"]
            ]
            return cls(
                environment=dict(document["environment"]),
                settings=dict(document["settings"]),
                ceilings=dict(document["ceilings"]),
                measurements=measurements,
                notes=list(document.get("notes", [])),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{origin} misses a part of schema version {SCHEMA_VERSION}: {error!r}") from None

    def to_csv(self) -> str:
        """One row a measurement, the derived columns included."""
        columns = [f.name for f in dataclasses.fields(Measurement) if f.name != "extra"]
        derived = ["tops", "gbps", "percent_of_floor"]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns + derived)
        for measurement in self.measurements:
            row = [getattr(measurement, name) for name in columns + derived]
            writer.writerow(["" if value is None else value for value in row])
        return buffer.getvalue()


def load_run(path: str | Path) -> Run:
    """Reads a saved run. Raises ValueError that names the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return Run.from_json(text, str(path))
