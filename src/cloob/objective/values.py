"""What the rows and the scales of a call must be."""

from __future__ import annotations

from torch import Tensor

from cloob.functional.checks import (
    check_lengths,
    check_number,
    check_positive,
    extremes,
    finite_scalar,
    positive_scalar,
)

Scales = dict[str, float | Tensor]
"""τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias`` of a call: numbers where they are fixed, else 0-d
tensors."""

# Lengths further than this from one are told of: rows made unit in bfloat16 are within half of it.
UNIT_TOLERANCE = 0.01


def check_scales(scales: Scales, like: Tensor) -> Scales:
    """The scales of a call, tensors with the rows' dtype and device.

    Raises:
        ValueError: One is not positive (the bias: any number) and finite, as far as that is seen without waiting for a
            device.
    """
    for name, value in scales.items():
        if not isinstance(value, Tensor):
            _check(name, value, like)
    as_scalar = {name: finite_scalar if name == "bias" else positive_scalar for name in scales}
    return {name: as_scalar[name](name, v, like) if isinstance(v, Tensor) else v for name, v in scales.items()}


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuses a setting that is none of its options.

    Raises:
        ValueError: It is none.
    """
    if value not in options:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, options))} is expected")


def check_values(x: Tensor, y: Tensor, scales: Scales) -> str | None:
    """Looks at rows and learned scales; waits for the device once.

    Returns:
        What is to be told of rows that are no unit vectors, if there are any.

    Raises:
        NonFiniteFeaturesError: A row is NaN, infinite or zero.
        ValueError: A learned scale is no positive, finite number, or a learned bias not finite.
    """
    sides = {"image_features": x, "text_features": y}
    learned = {name: scale for name, scale in scales.items() if isinstance(scale, Tensor)}
    lengths = extremes(**sides, **learned)
    for name in learned:
        _check(name, lengths[name][0], x)
    check_lengths(lengths, **sides)
    for name in sides:
        least, greatest = lengths[name]
        if max(1 - least, greatest - 1) > UNIT_TOLERANCE:
            return (
                f"{name} has rows of length {least:.3g} to {greatest:.3g}, but the objective is one of unit rows: "
                "torch.nn.functional.normalize makes them (said once; check=False says nothing)"
            )
    return None


def _check(name: str, number: float, like: Tensor) -> None:
    check = check_number if name == "bias" else check_positive
    check(name, number, like.dtype)


def check_finite(**named: Tensor) -> None:
    """Refuses rows that are NaN, infinite or zero; waits once for the device.

    Raises:
        NonFiniteFeaturesError: Names the matrix, how many of its rows, and the first.
    """
    some = {name: rows for name, rows in named.items() if len(rows)}
    if some:
        check_lengths(extremes(**some), **some)
