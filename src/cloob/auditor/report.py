"""What an audit found, and how it prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloob.auditor.forms import Fit
from cloob.family import CONTRASTS, FAMILY, member_name


@dataclass(frozen=True)
class Finding:
    """One thing about a loss: its kind, a sentence, and whether it is a fault."""

    kind: str
    message: str
    is_fault: bool = True

    def __str__(self) -> str:
        return f"{'FAULT' if self.is_fault else 'note'}: {self.kind}: {self.message}"


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found; ``print`` shows it.

    Attributes:
        name: The member of the family that the loss is, None if it is none.
        summary: What it is, with scales and how exact.
        findings: Faults first, then notes.
        inv_tau: τ⁻¹ as the values show it, NaN if no form fits.
        beta: β likewise, None without retrieval.
        scale: ``"paper"``, ``"unit"``, ``"sum"`` (both directions without τ) or the
            factor of the sum.
        value_error: Largest difference to the form's values, relative to their size.
        gradient_error: The same of the gradient by the rows.
    """

    name: str | None
    summary: str
    findings: tuple[Finding, ...]
    inv_tau: float
    beta: float | None
    scale: str
    value_error: float
    gradient_error: float

    @property
    def faults(self) -> tuple[str, ...]:
        """The kinds of the faults."""
        return tuple(finding.kind for finding in self.findings if finding.is_fault)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["no fault found"]
        return "\n".join([self.summary, *(f"  {line}" for line in lines)])


def scale_name(fitted: Fit) -> str:
    """What the sum of both directions is multiplied by."""
    factor = fitted.factors[-1]
    names = {"paper": 1 / fitted.inv_tau, "unit": 0.5, "sum": 1.0}
    if fitted.form.contrast == "sigmoid":
        del names["paper"]
    for name, expected in names.items():
        if math.isclose(factor, expected, rel_tol=1e-3):
            return name
    return f"{factor:.4g}"


def describe(fitted: Fit | None, findings: list[Finding]) -> Audit:
    """The report, faults first."""
    ordered = tuple(sorted(findings, key=lambda finding: not finding.is_fault))
    if fitted is None:
        summary = "no form that is known here"
        return Audit(None, summary, ordered, math.nan, None, "", math.nan, math.nan)
    form = fitted.form
    right = form.terms.fault is None and form.unit
    name = member_name(form.contrast, form.terms.retrieves) if right else None
    title = CONTRASTS[form.contrast].title.partition(",")[0]
    title_of_form = FAMILY[name].title if name is not None else f"a form of {title}"
    scale = scale_name(fitted)
    named = f"{scale} scale" if scale in ("paper", "unit", "sum") else f"{scale} × sum"
    numbers = f"τ⁻¹ {fitted.inv_tau:.4g}"
    if fitted.beta is not None:
        numbers += f", β {fitted.beta:.4g}"
    if form.contrast == "sigmoid":
        numbers += f", bias {float(fitted.scales[-1]):.4g}"
    exact = (
        f"value to {fitted.value_error:.0e}, gradient to {fitted.gradient_error:.0e}"
    )
    summary = f"{name or 'no member'} ({title_of_form}), {named}, {numbers}: {exact}"
    return Audit(
        name,
        summary,
        ordered,
        fitted.inv_tau,
        fitted.beta,
        scale,
        fitted.value_error,
        fitted.gradient_error,
    )
