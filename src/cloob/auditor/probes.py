"""What is looked for: precision, masks, terms, learned scales, ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cloob.auditor.forms import Fit
from cloob.auditor.ranks import Ranks
from cloob.auditor.report import Finding, scale_name
from cloob.auditor.subject import (
    EXACT,
    NOISES,
    Subject,
    batch,
    gradient_error,
    relative,
    value_and_gradient,
)
from cloob.functional.private import tree_flatten
from cloob.objective.notices import logarithm_notice

LARGE = 500.0  # τ⁻¹ from which it must be a mistake


def probe_no_form(subject: Subject) -> Iterator[Finding]:
    """What can be said of a loss that has no form."""
    values = [subject.number(*batch(8, 5, noise, 3)) for noise in NOISES]
    if not all(map(isfinite, values)):
        shown = [round(value, 4) for value in values]
        yield Finding("not finite", f"of random unit rows the loss is {shown}")


# --- precision ---


def probe_precision(subject: Subject, fitted: Fit) -> Iterator[Finding]:
    """How far value and gradient are from the form's: anywhere, where positives
    dominate, and in a cone.
    """
    if fitted.value_error > EXACT:
        yield Finding(
            "values off",
            f"they differ by {fitted.value_error:.1%} from the form: low precision"
            " inside, or something is added",
        )
    yield from probe_dominant(subject, fitted)
    if fitted.value_error < EXACT and fitted.gradient_error > 1e-3:
        yield Finding(
            "gradient of another function",
            "the value is that of the form, and its gradient off by"
            f" {fitted.gradient_error:.0%}: something on the way is detached",
        )
    elif fitted.inv_tau < LARGE:
        yield from probe_cone(subject, fitted)


def probe_dominant(subject: Subject, fitted: Fit) -> Iterator[Finding]:
    """The float32 value of pairs that match and are far from all others."""
    shared, noise = batch(8, 12, 1.0, 5)
    apart = torch.linalg.qr(shared.T)[0].T
    apart = apart - apart.mean(dim=0)  # as far from each other as eight rows can be
    x = F.normalize(apart, dim=1).float()
    y = F.normalize(apart + 1e-3 * noise, dim=1).float()
    exact = float(fitted.value(x, y))
    got = subject.number(x, y, torch.float32)
    if not abs(got - exact) < max(1e-4, 10 * fitted.value_error) * (1 + abs(exact)):
        yield Finding(
            "subtract after exp",
            f"of pairs that match, and are far from all others, the float32 loss is"
            f" {got:.4g} instead of {exact:.4g}: ln(Σ exp s − exp s_ii) cancels, a"
            " log-sum-exp over all but the positive does not",
        )


def probe_cone(subject: Subject, fitted: Fit) -> Iterator[Finding]:
    """The float32 gradient of rows with a mean cosine of 0.99, as of fresh towers."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.randn(1, 32, generator=generator)
    x, y = F.normalize(axis + 0.1 * torch.randn(2, 64, 32, generator=generator), dim=2)
    try:
        error = gradient_error(subject, fitted, x, y, torch.float32)
    except (RuntimeError, TypeError):
        return  # it takes float64 alone
    if error > 0.5:
        yield Finding(
            "gradients lost in a cone",
            f"where rows have a mean cosine of 0.99 the float32 gradient is off by"
            f" {error:.0%}: low precision inside, a bound on a norm or a sum",
        )


# --- structure ---


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the (N, N) matrices that a call makes."""

    def __init__(self, n: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n = n
        self.sentinel = math.nan
        self.retrieves = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for matrix in self.matrices(result):
            self.look_for_sentinel(matrix)
        if "mm" in func.overloadpacket.__name__:
            # a product of a softmax, whose rows sum to 1, with rows
            for matrix in self.matrices(args):
                self.retrieves |= is_softmax(matrix) or is_softmax(matrix.T)
        return result

    def matrices(self, values: Any) -> list[Tensor]:
        """The tensors of N × N numbers, as matrices."""
        matrices = []
        for tensor in tree_flatten(values)[0]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                is_square = tensor.shape[-2:] == (self.n, self.n)
                if is_square and tensor.numel() == self.n**2:
                    matrices.append(tensor.reshape(self.n, self.n))
        return matrices

    def look_for_sentinel(self, matrix: Tensor) -> None:
        """A diagonal that lies far below all else, and is finite."""
        diagonal = matrix.diagonal()
        off_diagonal = matrix[~torch.eye(self.n, dtype=torch.bool)]
        if not matrix.isfinite().all() or not off_diagonal.any():  # the mask itself
            return
        if float(diagonal.max()) < float(off_diagonal.min()) - 45:
            self.sentinel = float(diagonal.double().mean())


def is_softmax(matrix: Tensor) -> bool:
    """Whether rows are positive and sum to 1."""
    sums = matrix.double().sum(dim=1)
    return bool((matrix >= 0).all() and ((sums - 1).abs() < 1e-3).all())


def probe_structure(subject: Subject, fitted: Fit | None) -> Iterator[Finding]:
    """How it is computed: masks, unused retrieval, terms, lengths of rows."""
    n = 9
    with Watch(n) as watch, torch.no_grad():
        subject.value(*batch(n, 5, 0.1, 11))
    if isfinite(watch.sentinel):
        yield Finding(
            "sentinel as mask",
            f"the positives are masked by about {watch.sentinel:.4g}, which is a score"
            " like any other: of one pair, of a large τ⁻¹ or in low precision it"
            " counts; mask with −inf",
        )
    if fitted is None:
        return
    terms = fitted.form.terms
    if watch.retrieves and not terms.retrieves:
        yield Finding(
            "retrieval not used",
            "rows are retrieved, and the loss is that of the plain ones",
        )
    if terms.fault is not None:
        yield Finding(terms.fault, terms.message)
    if not fitted.form.unit:
        yield Finding(
            "rows not of unit length",
            "retrieved averages are not made unit again: U = norm(…), Eq. 4",
        )
    if fitted.power != 0:
        yield Finding("sum", "summed over the pairs: it grows with the batch", False)


# --- scales ---


def probe_scales(subject: Subject, fitted: Fit) -> Iterator[Finding]:
    """τ⁻¹, and whether it is learned where it must not be."""
    notice = logarithm_notice("τ⁻¹", fitted.inv_tau)
    if notice is not None:
        yield Finding("logarithm as τ⁻¹", notice)
    if fitted.inv_tau > LARGE:
        yield Finding(
            "exponential as τ⁻¹",
            f"τ⁻¹ is about {fitted.inv_tau:.0g}: is exp taken of τ⁻¹ itself?",
        )
    if fitted.form.contrast == "sigmoid":
        return
    has_factor = scale_name(fitted) == "paper"
    for slopes, batches in loss_slopes(subject):
        # with the factor τ the derivative is that of τ · sum in every batch
        is_plain = is_along(slopes, form_slopes(fitted, batches))
        falls = is_along(slopes, form_slopes(fitted, batches, times_tau=True))
        if falls or (is_plain and has_factor):
            yield Finding(
                "learned τ under τ·loss",
                "τ⁻¹ is learned, and τ · loss falls with τ⁻¹ for all embeddings: it"
                " climbs to its bound; fix it, or leave out the factor τ",
            )
        elif is_plain and fitted.form.contrast == "infoloob":
            yield Finding(
                "learned τ",
                "τ⁻¹ is learned: InfoLOOB of pairs that match falls with τ⁻¹",
                False,
            )


Batches = list[tuple[Tensor, Tensor]]


def loss_slopes(subject: Subject) -> Iterator[tuple[Tensor, Batches]]:
    """The loss's derivatives by every scalar that it depends on: one a batch."""
    batches = [batch(8, 5, noise, 21) for noise in (0.1, 0.6, 9.0)]
    batches.append((batches[0][0], -batches[0][1]))
    slopes: dict[int, list[float]] = {}
    for x, y in batches:
        value = subject.value(x, y)
        for leaf in scalars_of(value):
            slope = torch.autograd.grad(value, leaf, retain_graph=True)[0]
            slopes.setdefault(id(leaf), []).append(float(slope))
    for numbers in slopes.values():
        if any(numbers):
            yield torch.tensor(numbers, dtype=torch.float64), batches


def form_slopes(fitted: Fit, batches: Batches, *, times_tau: bool = False) -> Tensor:
    """The derivatives of the form's sum, or of τ · sum, by ln τ⁻¹: one a batch."""
    slopes = []
    for x, y in batches:
        scales = fitted.scales.clone().requires_grad_()
        log_inv_tau = scales[0]
        value = fitted.form.values(x[None], y[None], scales[None])[0, 0]
        if times_tau:
            value = value / log_inv_tau.exp()
        [by_scale] = torch.autograd.grad(value, scales)
        slopes.append(by_scale[0])
    return torch.stack(slopes)


def is_along(slopes: Tensor, direction: Tensor) -> bool:
    """Whether derivatives are one number times others."""
    along = float(slopes @ direction / direction.square().sum())
    return relative(along * direction, slopes) < 1e-2


def scalars_of(value: Tensor) -> list[Tensor]:
    """The scalar parameters that a value depends on."""
    nodes, seen, leaves = [value.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.numel() == 1:
            leaves.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return leaves


# --- ranks ---


def probe_ranks(subject: Subject) -> Iterator[Finding]:
    """Two ranks of four pairs, against one process of eight."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    x, y = batch(8, 5, 0.6, 31)
    x, y = x.to(subject.dtype), y.to(subject.dtype)
    ranks = Ranks(2)

    def on_rank(rank: int) -> tuple[float, Tensor]:
        own = slice(4 * rank, 4 * rank + 4)
        return value_and_gradient(subject.value, x[own], y[own])

    try:
        results = ranks.run(on_rank)
    except Exception as fault:
        yield Finding("ranks", f"could not be tried on two ranks: {fault}", False)
        return
    if not ranks.calls:
        yield Finding("ranks", "every rank contrasts its own rows alone", False)
        return
    value_of_one, exact = value_and_gradient(subject.value, x, y)
    value_of_ranks = sum(value for value, _ in results) / 2
    averaged = torch.cat([gradient for _, gradient in results], dim=1) / 2
    error = relative(averaged, exact)
    if error > 1e-3:
        yield Finding(
            "gather without gradient",
            f"on two ranks the loss is {value_of_ranks:.4g} ({value_of_one:.4g} of one"
            f" process), and the gradient after DDP's averaging off by {error:.0%}:"
            " rows of other ranks have none",
        )
