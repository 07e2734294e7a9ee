"""What a check of a network found: findings with their evidence and the likely fix, as text and as values."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

__all__ = ["Check", "Finding"]

WIDTH = 100  # characters of a line of the report
SHOWN = 5  # hypotheses in the report, those with the smallest losses; all are in Check.losses


@final
@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        name: what it is, one of a fixed list of words (``flipped_time``, ``blind_to_condition``, ...).
        text: what was found, in a sentence with its numbers.
        fix: what to do, in a sentence; empty where there is nothing to do.
        evidence: the numbers by name.
        about: the condition that it is about; empty for none.
        kind: ``fault`` for what makes training or sampling wrong, ``note`` for what is only worth knowing.
    """

    name: str
    text: str
    fix: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)
    about: str = ""
    kind: Literal["fault", "note"] = "fault"


@final
@dataclass(frozen=True)
class Check:
    """The result of :func:`~fewstep.diagnostics.check_velocity.check_velocity`.

    Args:
        findings: faults first, then notes.
        losses: flow-matching loss by hypothesis (``"v(x, t)"`` is the network as given), divided by the loss of the
            best velocity that is linear in x; empty where no loss was measured.
        sensitivity: change of the output when one input is changed (``t``, ``r``, the conditions by name), in units of
            the spread of the output over rows.
        rows: network rows evaluated.
        short: whether this was the short form.
    """

    findings: tuple[Finding, ...]
    losses: Mapping[str, float]
    sensitivity: Mapping[str, float]
    rows: int
    short: bool

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are faults."""
        return tuple(finding for finding in self.findings if finding.kind == "fault")

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def table(self) -> str:
        """The report as text: findings, then the losses and sensitivities they rest on."""
        lines = [self._head()]
        for finding in self.findings:
            about = f" ({finding.about})" if finding.about else ""
            lines += ["", f"{finding.kind}: {finding.name}{about}", *_indented(finding.text)]
            lines += _indented(f"Fix: {finding.fix}") if finding.fix else []
        if self.losses:
            lines += ["", "loss, 1 = the best velocity that is linear in x:"]
            lines += [f"  {loss:10.3g}  {name}" for name, loss in self._best_losses()]
        if self.sensitivity:
            lines += ["", "change of the output when an input changes, 1 = its spread over rows:"]
            lines += [f"  {change:10.3g}  {name}" for name, change in self.sensitivity.items()]
        return "\n".join(lines)

    def _best_losses(self) -> list[tuple[str, float]]:
        """The smallest losses with their hypotheses, ascending, and that of the network as given."""
        ordered = sorted(self.losses.items(), key=lambda item: item[1])
        given = next(iter(self.losses))  # the first hypothesis is the network as given
        return [item for place, item in enumerate(ordered) if place < SHOWN or item[0] == given]

    def _head(self) -> str:
        form = "short check" if self.short else "check"
        if self.ok:
            return f"{form}: no fault found ({self.rows} network rows)."
        names = ", ".join(f"{f.name} ({f.about})" if f.about else f.name for f in self.faults)
        return f"{form}: {len(self.faults)} fault(s): {names} ({self.rows} network rows)."

    def __str__(self) -> str:
        """The report as text."""
        return self.table

    def as_dict(self) -> dict[str, Any]:
        """The result as values that JSON can hold."""
        findings = [{**vars(finding), "evidence": dict(finding.evidence)} for finding in self.findings]
        return {
            "ok": self.ok,
            "findings": findings,
            "losses": dict(self.losses),
            "sensitivity": dict(self.sensitivity),
            "rows": self.rows,
            "short": self.short,
        }


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
