"""Folders of small graphs that are made by hand, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

SIZE, DIM, LENGTH = 8, 4, 16


def graph(nodes: list[Any], source: tuple[str, int, list[Any]], result: tuple[str, list[Any]], **parts: Any) -> Any:
    """A model of ONNX with one input and one output."""
    helper = onnx.helper
    ends = [helper.make_tensor_value_info(*source), helper.make_tensor_value_info(result[0], 1, result[1])]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], **parts)
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    whole.ir_version = 9
    return whole


def image_graph(extra: list[Any] | None = None, **parts: Any) -> Any:
    """Means over the picture, D times; ``extra`` nodes beside it."""
    helper = onnx.helper
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "axes"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "sides"], ["wide"]),
        helper.make_node("Add", ["wide", "bias"], ["image_embeds"]),
    ]
    given = [
        helper.make_tensor("axes", 7, [3], [1, 2, 3]),
        helper.make_tensor("sides", 7, [2], [DIM, 1]),
        helper.make_tensor("bias", 1, [DIM], [0.5] * DIM),
    ]
    nodes[1] = helper.make_node("Unsqueeze", ["mean", "last"], ["wide"])
    given[1] = helper.make_tensor("last", 7, [1], [1])
    parts["initializer"] = given + parts.get("initializer", [])
    return graph(
        (extra or []) + nodes, ("pixel_values", 1, ["n", 3, SIZE, SIZE]), ("image_embeds", ["n", DIM]), **parts
    )


def text_graph(extra: list[Any] | None = None, **parts: Any) -> Any:
    """Each text's sum of tokens beside a constant."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=1),
        helper.make_node("ReduceMean", ["numbers", "last"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "bias"], ["text_embeds"]),
    ]
    given = [helper.make_tensor("last", 7, [1], [1]), helper.make_tensor("bias", 1, [DIM], [1.0, 2.0, 3.0, 4.0])]
    parts["initializer"] = given + parts.get("initializer", [])
    return graph(nodes + (extra or []), ("input_ids", 7, ["n", LENGTH]), ("text_embeds", ["n", DIM]), **parts)


def write_folder(folder: Path, image: Any = None, text: Any = None, **config: Any) -> Path:
    """A folder of such graphs; ``config`` takes the place of what ``onnx.json`` says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "image.onnx").write_bytes((image or image_graph()).SerializeToString())
    (folder / "text.onnx").write_bytes((text or text_graph()).SerializeToString())
    content = {
        "format": 1,
        "name": "by hand",
        "embed_dim": DIM,
        "context_length": LENGTH,
        "logit_scale": 3.0,
        "precision": "float32",
        "pad": None,
        "preprocess_cfg": {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
        "tokenizer": {"kind": "none", "why": "made by hand"},
    }
    (folder / "onnx.json").write_text(json.dumps(content | config))
    return folder
