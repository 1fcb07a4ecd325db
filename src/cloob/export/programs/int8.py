"""Dynamic quantisation to 8-bit integers by onnxruntime, and what it costs on labelled sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.labelled import LabelledSet
from cloob.evaluation.suite import evaluate
from cloob.export.exported import quiet


def quantise(source: Path, target: Path) -> None:
    """Writes a graph whose matrix products run in integers; weights a column at a time, activations as they come.

    Weights have 7 bits: on x86 processors without VNNI a product of 8 bits with 8 bits would saturate, and figures that
    are measured on one machine would not hold on another. Convolutions stay as they are, since onnxruntime's integer
    convolution is slower on a CPU than that of floats.
    """
    quantization: Any = require("onnxruntime.quantization", "export")
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


def measured(plain: Path, quantised: Path, sets: Sequence[LabelledSet]) -> list[str]:
    """What quantisation costs: a sentence for each labelled set, as ``cloob eval`` measures it."""
    results = evaluate({"float32": str(plain), "int8": str(quantised)}, sets)
    for failure in results.get("failures", ()):
        raise InputError(f"{failure['set'] or failure['model']}: {failure['error']}")
    rows = {row["model"]: row["zeroshot"] for row in results["rows"]}
    sentences = []
    for name in (data.name for data in sets):
        before, after = (100 * rows[kind][name]["acc1"] for kind in ("float32", "int8"))
        count = rows["int8"][name]["n"]
        sentence = f"zero-shot {name}, top-1 of {count:,} pictures: {before:.1f} % in float32, {after:.1f} % in int8"
        for pair in results["differences"]:
            if pair["metric"] == "acc1" and pair["set"] == name:
                sign = 1 if pair["model"] == "int8" else -1
                low, high = sorted(100 * sign * pair[end] for end in ("low", "high"))
                around = f"95 % interval {low:+.1f} … {high:+.1f}"
                sentence += f" (difference {after - before:+.1f} points, {around})"
        sentences.append(sentence)
    return sentences
