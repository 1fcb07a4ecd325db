"""ONNX folders of unknown origin: refused in one line before onnxruntime opens them, or bounded when they run."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graphs_by_hand import DIM, LENGTH, SIZE, graph, image_graph, text_graph, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from cloob import load_model
from cloob.errors import InputError
from cloob.models.onnx.protobuf import fields
from support import run_script

helper = onnx.helper


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as found:
        load_model(folder, device="cpu")
    line = str(found.value)
    assert "\n" not in line and len(line) < 500
    return line


def external(location: str, length: int = 16, offset: int = 0) -> Any:
    """A tensor that says that its bytes lie elsewhere."""
    tensor = onnx.TensorProto(name="far", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_graphs_made_by_hand_run(tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path / "m"), device="cpu")
    rows = model.encode_text(torch.arange(2 * LENGTH).view(2, LENGTH))
    means = torch.arange(2 * LENGTH).view(2, LENGTH).float().mean(1, keepdim=True)
    wanted = torch.nn.functional.normalize(means + torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=1)
    torch.testing.assert_close(rows, wanted)
    assert model.encode_image(torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (3, DIM)


@pytest.mark.parametrize("shape", [[7, 3], [DIM], [1, DIM]])
def test_a_graph_gives_the_rows_that_it_says(shape: list[int], tmp_path: Path) -> None:
    of = helper.make_tensor("of", 1, [1], [1.0])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["image_embeds"], value=of)]
    ports = ("pixel_values", 1, ["n", 3, SIZE, SIZE]), ("image_embeds", ["n", DIM])
    image = graph(nodes, *ports, initializer=[helper.make_tensor("shape", 7, [len(shape)], shape)])
    folder = write_folder(tmp_path / "m", image=image)
    pixels = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    said = rf"image\.onnx: gave float32 .+ for 2 items; float32 \(2, {DIM}\) wanted"
    with pytest.raises(InputError, match=said):
        load_model(folder, device="cpu").encode_image(pixels)


@pytest.mark.parametrize(
    ("location", "length", "offset", "said"),
    [
        ("/etc/passwd", 16, 0, "'/etc/passwd'"),
        ("../secret", 16, 0, "'../secret'"),
        ("sub/../../secret", 16, 0, "alone is read"),
        ("C:\\secret", 16, 0, "alone is read"),
        ("onnx.json", 16, 0, "alone is read"),
        ("", 16, 0, "alone is read"),
        ("image.onnx.data", 16, 0, "not there"),
        ("text.onnx.data", 16, 0, "alone is read"),
    ],
)
def test_weights_in_other_files_are_refused(tmp_path: Path, location: str, length: int, offset: int, said: str) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 64)
    image = image_graph(initializer=[external(location, length, offset)])
    assert said in refusal(write_folder(tmp_path / "m", image=image))


@pytest.mark.parametrize(("length", "offset"), [(16, 8), (1 << 50, 0), (16, -1), (8, 0), (16, 1 << 62)])
def test_weights_beside_the_graph_are_held_against_their_file(tmp_path: Path, length: int, offset: int) -> None:
    folder = write_folder(tmp_path / "m", image=image_graph(initializer=[external("image.onnx.data", length, offset)]))
    (folder / "image.onnx.data").write_bytes(b"\0" * 16)
    assert "image.onnx.data" in refusal(folder)


def test_weights_beside_the_graph_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", image=image_graph(initializer=[external("image.onnx.data")]))
    (folder / "image.onnx.data").write_bytes(b"\0" * 16)
    assert load_model(folder, device="cpu").encode_image(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, DIM)


def loop() -> list[Any]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("go", 9, [])],
        [helper.make_tensor_value_info("on", 9, [])],
    )
    return [helper.make_node("Loop", ["", "go"], [], body=body)]


def big(dims: list[int], **more: Any) -> Any:
    return onnx.TensorProto(name="big", data_type=1, dims=dims, **more)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a loop": ({"image": lambda: image_graph(loop())}, "holds a graph of its own"),
    "another domain": (
        {"image": lambda: image_graph([helper.make_node("Run", ["pixel_values"], ["x"], domain="evil")])},
        "'Run' of 'evil'",
    ),
    "huge dims": ({"image": lambda: image_graph(initializer=[big([1 << 40, 1 << 20], raw_data=b"\0" * 16)])}, "bytes"),
    "no data": ({"image": lambda: image_graph(initializer=[big([1 << 30])])}, "bytes"),
    "negative dims": ({"image": lambda: image_graph(initializer=[big([-1])])}, "shape"),
    "many dims": ({"image": lambda: image_graph(initializer=[big([1] * 1000)])}, "shape"),
    "strings": (
        {"image": lambda: image_graph(initializer=[onnx.TensorProto(name="s", data_type=8, dims=[1])])},
        "dtype 8",
    ),
    "a constant in a node": (
        {"image": lambda: image_graph([helper.make_node("Constant", [], ["c"], value=big([1 << 40]))])},
        "bytes",
    ),
    "another width": ({"embed_dim": 8}, "(n, 4)"),
    "another size": ({"preprocess_cfg": {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}}, "(n, 3, 8, 8)"),
    "another length": ({"context_length": 17}, "(n, 16)"),
    "texts of any length": ({"pad": 0}, "(n, n)"),
    "the text tower twice": ({"image": lambda: text_graph()}, "input_ids"),
    "a format to come": ({"format": 2}, "format"),
    "a size beyond all": ({"preprocess_cfg": {"size": 1 << 20, "mean": [0.5] * 3, "std": [0.5] * 3}}, "size"),
    "a deviation of nothing": ({"preprocess_cfg": {"size": SIZE, "mean": [0.5] * 3, "std": [0, 1, 1]}}, "std"),
    "code as a tokenizer": ({"tokenizer": {"kind": "os.system"}}, "kind"),
    "no tokenizer file": ({"tokenizer": {"kind": "clip", "specials": ["a", "b"], "ending": "kept"}}, "tokenizer.json"),
    "a tokenizer elsewhere": ({"tokenizer": {"kind": "json", "clean": "../x"}}, "tokenizer.json"),
    "no number": ({"logit_scale": "1e999"}, "logit_scale"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_before_a_graph_is_opened(tmp_path: Path, what: str) -> None:
    parts, said = REFUSED[what]
    made = {key: value() if callable(value) else value for key, value in parts.items()}
    assert said in refusal(write_folder(tmp_path / "m", **made))


def test_functions_are_refused(tmp_path: Path) -> None:
    image = image_graph()
    image.functions.append(onnx.FunctionProto(name="f", domain="d"))
    assert "functions" in refusal(write_folder(tmp_path / "m", image=image))


@pytest.mark.parametrize("content", [b"", b"\x00", b"PK\x03\x04", b"\x3a\xff\xff\xff\xff\x0f", b"{}" * 50])
def test_what_is_no_graph(tmp_path: Path, content: bytes) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "text.onnx").write_bytes(content)
    assert "text.onnx" in refusal(folder)


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx"])
def test_a_missing_graph(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"model": {"vocab": {"a": 1}, "merges": []}}',
        '{"model": {"vocab": {"a": 0, "a</w>": 1}, "merges": ["a"]}}',
        '{"model": {"vocab": [], "merges": {}}}',
        '{"model": {"vocab": {"a": "0"}, "merges": [1]}}',
        "[" * 1000,
        '{"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "%s"}}' % ("a" * 300),
    ],
)
def test_a_tokenizer_that_is_none(tmp_path: Path, content: str) -> None:
    specials = ["<start_of_text>", "<end_of_text>"]
    folder = write_folder(tmp_path / "m", tokenizer={"kind": "clip", "specials": specials, "ending": "kept"})
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refusal(folder)
    config = json.loads((folder / "onnx.json").read_text()) | {"tokenizer": {"kind": "json", "clean": None}}
    (folder / "onnx.json").write_text(json.dumps(config))
    assert "tokenizer.json" in refusal(folder)


def test_mutated_graphs_are_refused_or_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    content = (folder / "text.onnx").read_bytes()
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    refused = ran = 0
    for seed in range(150):
        source = random.Random(seed)
        changed = bytearray(content)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(changed))
            changed[at : at + source.randint(1, 4)] = source.randbytes(source.randint(0, 4))
        (folder / "text.onnx").write_bytes(changed)
        try:
            assert load_model(folder, device="cpu").encode_text(tokens).shape == (2, DIM)
        except InputError as error:
            refused += "\n" not in str(error)
        else:
            ran += 1
    assert refused > 75 and refused + ran == 150


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_fields_or_an_error(content: bytes) -> None:
    data = memoryview(content)
    end = 0
    try:
        for field in fields(data, 0, len(data)):
            assert field.start == -1 or end <= field.start <= field.end <= len(data)
            end = max(end, field.end)
    except ValueError:
        pass


BOMB = """
import sys, resource
import torch
from cloob import load_model
from cloob.errors import InputError
from cloob.models.onnx import session

session._memory = lambda: 1 << 30  # of which half may be used
for folder in sys.argv[1:]:
    model = load_model(folder, device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model.encode_text(torch.zeros(2, 16, dtype=torch.int64))
    except InputError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


def bomb(*, constant: bool) -> Any:
    """A text tower that doubles what it has thirty times, or asks for 32 GB at once."""
    if constant:
        given = [helper.make_tensor("sides", 7, [2], [1 << 17, 1 << 16])]
        nodes = [helper.make_node("ConstantOfShape", ["sides"], ["x30"])]
    else:
        given = []
        nodes = [helper.make_node("Concat", [f"x{i}"] * 2, [f"x{i + 1}"], axis=1) for i in range(30)]
        nodes.insert(0, helper.make_node("Identity", ["numbers"], ["x0"]))
    nodes.append(helper.make_node("ReduceMean", ["x30"], ["unused"], keepdims=0))
    nodes.append(helper.make_node("Add", ["early", "unused"], ["text_embeds"]))
    text = text_graph(nodes, initializer=given)
    text.graph.node[2].output[0] = "early"
    return text


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_graph_of_a_few_bytes_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    folders = [str(write_folder(tmp_path / f"{kind}", text=bomb(constant=kind))) for kind in (False, True)]
    run = run_script(BOMB, *folders)
    lines = run.stdout.splitlines()
    assert len(lines) == 2, run.stderr
    for line in lines:
        megabytes, _, said = line.partition(" ")
        assert "onnxruntime cannot run it" in said and int(megabytes) < 700
