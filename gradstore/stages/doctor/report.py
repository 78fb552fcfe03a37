"""What doctor found, as values, as an error and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gradstore.errors import DoctorError

if TYPE_CHECKING:
    from rich.console import RenderableType

Verdict = Literal["ok", "warning", "failed"]
STYLES: Mapping[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that doctor looked at.

    Attributes
    ----------
    name
        What was looked at.
    verdict
        ``failed``: the run's numbers would be wrong, or it would not end. ``warning``: they mean less than one may think.
    summary
        What was found, and what to change if that is to be otherwise, in one line.
    figures
        The same for a program.
    """

    name: str
    verdict: Verdict
    summary: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that doctor looked at, of the run of that name."""

    run: str
    examples: int
    device: str
    precision: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all checks."""
        found = {check.verdict for check in self.checks}
        return "failed" if "failed" in found else "warning" if "warning" in found else "ok"

    def refuse_failed(self) -> None:
        """Raise what failed as an error.

        Raises
        ------
        DoctorError
            Naming every check that failed.
        """
        failed = [f"{check.name}: {check.summary}" for check in self.checks if check.verdict == "failed"]
        if failed:
            raise DoctorError(" ".join(failed))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a number that is not finite is None."""
        checks = {
            check.name: {"verdict": check.verdict, "summary": check.summary, **_plain(check.figures)}
            for check in self.checks
        }
        return {
            "run": self.run,
            "verdict": self.verdict,
            "examples": self.examples,
            "device": self.device,
            "precision": self.precision,
            "checks": checks,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_diagnosis(found: Diagnosis) -> RenderableType:
    """Draw a diagnosis as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    title = f"{found.run}: {found.examples} examples on {found.device}, in {found.precision}"
    table = Table("check", "verdict", "found", title=title, title_justify="left")
    for check in found.checks:
        table.add_row(check.name, Text(check.verdict, style=STYLES[check.verdict]), Text(check.summary))
    return table
