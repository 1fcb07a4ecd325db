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

from cloob.auditor.forms import LENGTH, Fit
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
from cloob.objective.batch import logarithm_notice

LARGE = 500.0  # τ⁻¹ from which it must be a mistake


def probe_numbers(
    subject: Subject, found: Fit | None, error: float
) -> Iterator[Finding]:
    """What precision does to it: where positives dominate, in a cone, of one pair."""
    if found is None:
        values = [subject.number(*batch(8, 5, noise, 3)) for noise in NOISES]
        if not all(map(isfinite, values)):
            says = f"of random unit rows the loss is {[round(v, 4) for v in values]}"
            yield Finding("not finite", says)
        return
    if found.error > EXACT:
        yield Finding(
            "values off",
            f"they differ by {found.error:.1%} from the form: low precision inside, or"
            " something is added",
        )
    yield from probe_dominant(subject, found)
    if found.error < EXACT and error > 1e-3:
        yield Finding(
            "gradient of another function",
            f"the value is that of the form, and its gradient off by {error:.0%}:"
            " something on the way is detached",
        )
    elif found.inv_tau < LARGE:
        yield from probe_cone(subject, found)
    one = subject.number(*(side[:1] for side in batch(6, 5, 1.0, 0)))
    if isfinite(one):
        yield Finding(
            "one pair", f"the loss of a single pair is {one:.4g}, no error", False
        )


def probe_dominant(subject: Subject, found: Fit) -> Iterator[Finding]:
    """The float32 value of pairs that match and are far from all others."""
    shared, noise = batch(8, 12, 1.0, 5)
    apart = torch.linalg.qr(shared.T)[0].T
    apart = apart - apart.mean(dim=0)  # as far from each other as eight rows can be
    x, y = (F.normalize(side, dim=1).float() for side in (apart, apart + 1e-3 * noise))
    exact = float(found.value(x, y))
    got = subject.number(x, y, dtype=torch.float32)
    if not abs(got - exact) < max(1e-4, 10 * found.error) * (1 + abs(exact)):
        yield Finding(
            "subtract after exp",
            f"of pairs that match, and are far from all others, the float32 loss is"
            f" {got:.4g} instead of {exact:.4g}: ln(Σ exp s − exp s_ii) cancels, a"
            " log-sum-exp over all but the positive does not",
        )


def probe_cone(subject: Subject, found: Fit) -> Iterator[Finding]:
    """The float32 gradient of rows with a mean cosine of 0.99, as of fresh towers."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.randn(1, 32, generator=generator)
    x, y = (
        F.normalize(axis + 0.1 * torch.randn(64, 32, generator=generator), dim=1)
        for _ in range(2)
    )
    try:
        error = gradient_error(subject, found, x, y, torch.float32)
    except (RuntimeError, TypeError):
        return  # it takes float64 alone
    if error > 0.5:
        yield Finding(
            "gradients lost in a cone",
            f"where rows have a mean cosine of 0.99 the float32 gradient is off by"
            f" {error:.0%}: low precision inside, a bound on a norm or a sum",
        )


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
        for tensor in tree_flatten(result)[0]:
            self._look_for_sentinel(tensor)
        if len(args) > 1 and "mm" in func.overloadpacket.__name__:
            self._look_for_retrieval([a for a in args if isinstance(a, Tensor)])
        return result

    def _matrix(self, tensor: Any) -> Tensor | None:
        """A tensor as (N, N), None if it is none."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return None
        square = tensor.ndim >= 2 and tensor.shape[-2:] == (self.n, self.n)
        return (
            tensor.reshape(self.n, self.n)
            if square and tensor.numel() == self.n**2
            else None
        )

    def _look_for_sentinel(self, tensor: Any) -> None:
        matrix = self._matrix(tensor)
        if matrix is None:
            return
        diagonal = matrix.diagonal()
        others = matrix[~torch.eye(self.n, dtype=torch.bool)]
        if not matrix.isfinite().all() or not others.any():  # the mask itself
            return
        if float(diagonal.max()) < float(others.min()) - 45:
            self.sentinel = float(diagonal.double().mean())

    def _look_for_retrieval(self, factors: list[Tensor]) -> None:
        """A product of a softmax, whose rows sum to 1, with rows."""
        for matrix in map(self._matrix, factors):
            for side in (matrix, None if matrix is None else matrix.T):
                if side is None or not bool((side >= 0).all()):
                    continue
                if float((side.double().sum(dim=1) - 1).abs().max()) < 1e-3:
                    self.retrieves = True


def probe_structure(subject: Subject, found: Fit | None) -> Iterator[Finding]:
    """How it is computed: masks, unused retrieval, terms, lengths of rows."""
    n = 9
    x, y = batch(n, 5, 0.1, 11)
    with Watch(n) as watch, torch.no_grad():
        subject.value(x, y)
    if isfinite(watch.sentinel):
        yield Finding(
            "sentinel as mask",
            f"the positives are masked by about {watch.sentinel:.4g}, which is a score"
            " like any other: of one pair, of a large τ⁻¹ or in low precision it"
            " counts; mask with −inf",
        )
    if found is not None:
        terms = found.form.terms
        if watch.retrieves and not terms.retrieves:
            yield Finding(
                "retrieval not used",
                "rows are retrieved, and the loss is that of the plain ones",
            )
        if terms.fault is not None:
            yield Finding(terms.fault, terms.says)
        if found.power != 0:
            yield Finding(
                "sum", "summed over the pairs: it grows with the batch", False
            )
        if not found.form.unit:
            yield Finding(
                LENGTH, "retrieved averages are not made unit again: U = norm(…), Eq. 4"
            )
    value, tripled = subject.number(x, y), subject.number(3 * x, 3 * y)
    if not abs(value - tripled) < 1e-4 * (1 + abs(value)):
        yield Finding(
            "lengths", "rows are taken as they are: give rows of unit length", False
        )


def probe_scales(subject: Subject, found: Fit | None) -> Iterator[Finding]:
    """τ⁻¹, and whether it is learned where it must not be."""
    if found is None:
        return
    notice = logarithm_notice("τ⁻¹", found.inv_tau)
    if notice is not None:
        yield Finding("logarithm as τ⁻¹", notice)
    if found.inv_tau > LARGE:
        yield Finding(
            "exponential as τ⁻¹",
            f"τ⁻¹ is about {found.inv_tau:.0g}: is exp taken of τ⁻¹ itself?",
        )
    if found.form.contrast == "sigmoid":
        return
    kind = scale_name(found)
    for name, learned in learned_scales(subject, found):
        if kind == "paper" or learned == "falls":
            yield Finding(
                "learned τ under τ·loss",
                f"{name} is learned, and τ · loss falls with τ⁻¹ for all embeddings: it"
                " climbs to its bound; fix it, or leave out the factor τ",
            )
        elif found.form.contrast == "infoloob":
            yield Finding(
                "learned τ",
                f"{name} is learned: InfoLOOB of pairs that match falls with τ⁻¹",
                False,
            )


def learned_scales(subject: Subject, found: Fit) -> Iterator[tuple[str, str]]:
    """Scalars in the graph that move τ⁻¹, and whether the loss ``"falls"`` with τ⁻¹ in
    every batch or not (``"turns"``).

    With the factor τ, the derivative by such a scalar is that of τ · sum by τ⁻¹ times
    one number, in every batch.
    """
    batches = [batch(8, 5, noise, 21) for noise in (0.1, 0.6, 9.0)]
    batches.append((batches[0][0], -batches[0][1]))
    scalars: dict[int, list[float]] = {}
    for x, y in batches:
        value = subject.value(x, y)
        for leaf in scalars_of(value):
            slope = torch.autograd.grad(value, leaf, retain_graph=True)[0]
            scalars.setdefault(id(leaf), []).append(float(slope))
    for slopes in scalars.values():
        for by_tau, kind in (
            (slopes_by_tau(found, batches), "turns"),
            (slopes_by_tau(found, batches, paper=True), "falls"),
        ):
            given = torch.tensor(slopes, dtype=torch.float64)
            along = float(given @ by_tau / by_tau.square().sum())
            if given.any() and relative(along * by_tau, given) < 1e-2:
                yield "τ⁻¹", kind
                break


def slopes_by_tau(
    found: Fit, batches: list[tuple[Tensor, Tensor]], paper: bool = False
) -> Tensor:
    """The derivative of a form by ln τ⁻¹ in some batches; ``paper``: of τ · sum."""
    slopes = []
    for x, y in batches:
        scales = found.scales.clone().requires_grad_()
        value = found.form.values(x[None], y[None], scales[None])[0, 0]
        if paper:
            value = value / scales[0].exp()
        slopes.append(torch.autograd.grad(value, scales)[0][0])
    return torch.stack(slopes)


def scalars_of(value: Tensor) -> list[Tensor]:
    """The scalar parameters that a value depends on."""
    nodes, seen, found = [value.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.numel() == 1:
            found.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return found


def probe_ranks(subject: Subject) -> Iterator[Finding]:
    """Two ranks of four pairs, against one process of eight."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    x, y = batch(8, 5, 0.6, 31)
    whole, exact = subject.number(x, y), subject.gradient(x, y)
    ranks = Ranks(2)

    def of_rank(rank: int) -> tuple[float, Tensor]:
        own = slice(4 * rank, 4 * rank + 4)
        rows = [side[own].to(subject.dtype) for side in (x, y)]
        return value_and_gradient(subject.value, rows)

    try:
        results = ranks.run(of_rank)
    except Exception as fault:
        yield Finding("ranks", f"could not be tried on two ranks: {fault}", False)
        return
    if not ranks.calls:
        yield Finding("ranks", "every rank contrasts its own rows alone", False)
        return
    mean = sum(value for value, _ in results) / 2
    averaged = torch.cat([gradient for _, gradient in results], dim=1) / 2
    error = relative(averaged, exact)
    if error > 1e-3:
        same = abs(mean - whole) < 1e-4 * (1 + abs(whole))
        yield Finding(
            "gather without gradient",
            f"on two ranks the loss is {mean:.4g} ({whole:.4g} of one process), and the"
            f" gradient after DDP's averaging off by {error:.0%}"
            + (": the rows of other ranks have none" if same else ""),
        )
