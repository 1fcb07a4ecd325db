"""What is wrong with a contrastive loss, and what it is, from its values alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from cloob.auditor.probes import (
    probe_no_form,
    probe_precision,
    probe_ranks,
    probe_scales,
    probe_structure,
)
from cloob.auditor.report import Audit, Finding, describe
from cloob.auditor.subject import Loss, Subject, identify
from cloob.family import OBJECTIVES
from cloob.functional.checks import one_of

__all__ = ["Audit", "Finding", "audit"]


def audit(
    loss: Loss, *, scale: float | Tensor | None = None, expect: str | None = None
) -> Audit:
    """Names what is wrong with a contrastive loss of pairs, and what it is.

    The loss runs on a dozen small fixed batches, in float64 if it takes that and in
    float32, by itself, and on two ranks that are threads of this process (unless there
    is a process group). Its values are compared with those of right and of wrong
    formulas; parameters stay as they are. It takes a few seconds of one core.

    Args:
        loss: ``loss(x, y)`` of two (N, D) matrices of unit rows, row i of one belongs
            to row i of the other -> 0-d tensor. A module, a function or a closure.
        scale: Given, the loss is called ``loss(x, y, scale)``: a number, or a 0-d
            tensor that requires grad if your training learns it.
        expect: The name of a member, as for ``make_objective``, that the loss is meant
            to be; another one is a fault.

    Returns:
        What it is, and the findings. ``faults`` of a report are kinds:

        - ``logarithm as τ⁻¹``, ``exponential as τ⁻¹``, ``learned τ under τ·loss``;
        - ``one direction``, ``U and V exchanged``, ``other terms``, ``rows not of unit
          length``, ``retrieval not used``, ``not what was expected``;
        - ``sentinel as mask``, ``subtract after exp``, ``not finite``, ``values off``;
        - ``gradients lost in a cone``, ``gradient of another function``, ``gather
          without gradient``.

    Raises:
        TypeError: The loss returns no 0-d tensor.
        ValueError: ``expect`` is no member; and what the loss itself raises.

    Example:
        >>> import cloob
        >>> report = cloob.audit(cloob.make_objective("cloob", check=False))
        >>> report.name, report.scale, round(report.inv_tau), report.faults
        ('cloob', 'paper', 30, ())
    """
    if expect is not None:
        one_of("expect", expect, OBJECTIVES)
    with quietly():
        subject = Subject(loss, scale)
        fitted = identify(subject)
        findings = [*probe_structure(subject, fitted), *probe_ranks(subject)]
        if fitted is None:
            findings += probe_no_form(subject)
        else:
            findings += probe_precision(subject, fitted)
            findings += probe_scales(subject, fitted)
    report = describe(fitted, findings)
    if expect not in (None, report.name):
        message = f"{expect} was meant, and the values are those of {report.summary}"
        meant = Finding("not what was expected", message)
        report = replace(report, findings=(meant, *report.findings))
    return report


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of the loss, and with the caller's random state after it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
