"""The saved form of a run: one JSON document with a schema version, or one CSV row a measurement.

A document is a :class:`Run`; everything that tables, plots, ``compare`` and README figures show is computed from it.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import reprlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "marlin-qqq-bench"
SCHEMA_VERSION = 1

OURS = "marlin_qqq"

GZIP_MAGIC = b"\x1f\x8b"
MOST_BYTES = 1 << 28  # of a gzipped run, unpacked


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
            document = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin} is not JSON: {error}") from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"{origin} is not a result of marlin-qqq bench (no schema {SCHEMA!r})")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"{origin} has schema version {version!r}; this program reads version {SCHEMA_VERSION}")
        for name, kind in (("environment", dict), ("settings", dict), ("ceilings", dict), ("measurements", list)):
            if not isinstance(document.get(name), kind):
                raise ValueError(f"{origin} misses a part of schema version {SCHEMA_VERSION}: {name}")
        notes = document.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"{origin}: notes is no list of texts")
        for name in ("gpu", "host"):
            if not isinstance(document["environment"].get(name, {}), dict):
                raise ValueError(f"{origin}: {name} of the environment is {document['environment'][name]!r}, no object")
        for name, value in document["ceilings"].items():
            if name.endswith(("_gbps", "_tops")) and not (value is None or _is_number(value)):
                raise ValueError(f"{origin}: {name} of the ceilings is {value!r}, no number")
        rows = [_measurement(row, f"{origin}: measurement {i}") for i, row in enumerate(document["measurements"], 1)]
        return cls(document["environment"], document["settings"], document["ceilings"], rows, notes)

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


def _measurement(row: Any, origin: str) -> Measurement:
    """A row of a document, whatever it holds: checked, for tables, plots and comparisons compute with it."""
    if not isinstance(row, dict):
        raise ValueError(f"{origin} is {reprlib.repr(row)}, no object")
    values = {}
    for known in dataclasses.fields(Measurement):
        if known.name not in row:
            required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
            if required:
                raise ValueError(f"{origin} misses a part of schema version {SCHEMA_VERSION}: {known.name}")
            continue
        value = values[known.name] = row[known.name]
        kind, _, optional = str(known.type).partition(" | ")
        if value is None and optional:
            continue
        matches = {
            "str": isinstance(value, str),
            "dict[str, Any]": isinstance(value, dict),
            "int": _is_number(value) and isinstance(value, int),
            "float": _is_number(value),
        }
        if not matches[kind]:
            raise ValueError(f"{origin}: {known.name} is {reprlib.repr(value)}; {known.type} is needed")
        if kind in ("int", "float") and value < (1 if known.name == "num_tokens" else 0) and known.name != "group_size":
            raise ValueError(f"{origin}: {known.name} is {reprlib.repr(value)}, too small")
    return Measurement(**values)


def _is_number(value: Any) -> bool:
    # No measurement comes near the limit, beyond which an integer is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def load_run(path: str | Path) -> Run:
    """Reads a saved run, plain or gzipped. Raises ValueError that names the file."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            # A few bytes may stand for more than the memory holds.
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError(f"it holds more than {MOST_BYTES} bytes")
        text = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return Run.from_json(text, str(path))
