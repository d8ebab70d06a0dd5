"""What a check finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ERROR, WARNING = "error", "warning"
SCHEMA = "pocketquant.check/1"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (ERROR: the file is broken or computes something else) or dubious (WARNING).

    Attributes:
        code: short name of the kind of finding, the same in every version: "tensor-missing".
        tensor: the tensor or metadata key it is about; "" for the file.
        message: what was found, with the numbers.
        advice: what to do.
    """

    severity: str
    code: str
    tensor: str
    message: str
    advice: str = ""


@dataclass(frozen=True)
class Comparison:
    """One tensor against the source: cosine of the angle between them, and signal over error in decibels.

    `snr_db` is None where nothing was lost; `limit_db` is the least that the format should keep.
    """

    tensor: str
    format: str
    cosine: float
    snr_db: float | None
    limit_db: float


@dataclass(frozen=True)
class CheckReport:
    """All of it.

    Attributes:
        findings: errors first, each in the order of the file.
        notes: what was not covered, and what is worth knowing but no fault.
        comparisons: one per tensor that was compared with the source.
        described: architecture, number of tensors and the like, for the first line.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    described: Mapping[str, Any]

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == ERROR for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "schema": SCHEMA,
            **self.described,
            "errors": sum(finding.severity == ERROR for finding in self.findings),
            "warnings": sum(finding.severity == WARNING for finding in self.findings),
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }
