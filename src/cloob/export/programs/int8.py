"""Dynamic quantisation to 8-bit integers by onnxruntime, and what it costs on labelled sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled
from cloob.evaluation.suite import evaluate
from cloob.export.exported import quiet

DEFAULT_SET = "demo:noto-emoji"
"""Measured on where no set is given: it comes with the package."""
_FLOAT, _INT = "float32", "int8"


def quantise(source: Path, target: Path) -> None:
    """Writes a graph whose matrix products run in integers; weights a column at a time, activations as they come.

    Weights have 7 bits: on x86 processors without VNNI a product of 8 bits with 8 bits would saturate, and figures that
    are measured on one machine would not hold on another. Convolutions stay as they are, since onnxruntime's integer
    convolution is slower on a CPU than that of floats.

    Args:
        source: The graph in float32.
        target: Where to.

    Raises:
        InputError: onnxruntime cannot do it.
    """
    quantization: Any = require("onnxruntime.quantization", "onnx")
    try:
        with quiet():  # it advises a preparation that the exporter has done
            quantization.quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "Gather"],
                per_channel=True,
                reduce_range=True,
                weight_type=quantization.QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
    except Exception as error:  # onnx's and onnxruntime's have no common class
        raise InputError(f"{source.stem} tower: onnxruntime cannot quantise it ({one_line(error, 200)})") from error


def open_sets(names: Sequence[str]) -> list[LabelledSet]:
    """The labelled sets to measure on."""
    return [open_labelled(name) for name in names or (DEFAULT_SET,)]


def measured(plain: Path, quantised: Path, sets: Sequence[LabelledSet]) -> tuple[str, ...]:
    """What quantisation costs: a sentence a set, as ``cloob eval`` measures it.

    Args:
        plain: The ONNX folder in float32.
        quantised: That in int8.
        sets: Labelled sets.

    Raises:
        InputError: A set cannot be evaluated.
    """
    results = evaluate({_FLOAT: str(plain), _INT: str(quantised)}, sets)
    for failure in results.get("failures", ()):
        raise InputError(f"{failure['set'] or failure['model']}: {failure['error']}")
    rows = {row["model"]: row["zeroshot"] for row in results["rows"]}
    return tuple(_sentence(data.name, rows, results["differences"]) for data in sets)


def _sentence(name: str, rows: dict[str, Any], differences: list[dict[str, Any]]) -> str:
    plain, quantised = (100 * rows[kind][name]["acc1"] for kind in (_FLOAT, _INT))
    what = f"zero-shot {name}, top-1 of {rows[_INT][name]['n']:,} pictures"
    said = f"{what}: {plain:.1f} % in float32, {quantised:.1f} % in int8"
    for found in differences:
        if found["metric"] == "acc1" and found["set"] == name:
            sign = 1 if found["model"] == _INT else -1
            low, high = sorted(100 * sign * found[end] for end in ("low", "high"))
            return f"{said} (difference {quantised - plain:+.1f} points, 95 % interval {low:+.1f} … {high:+.1f})"
    return said
