"""Writes the binary files that we made anew: ``python tests/corpus/make.py``. Text files are written by hand.

A marker that must never be there is /tmp/cloob-was-here-NAME.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from make import encoded, noise_image  # noqa: E402

TOUCH = "touch /tmp/cloob-was-here-"
EVIL = (
    "import os\nos.system('touch /tmp/cloob-was-here-{}')\nfrom transformers import"
    " BertConfig as Config\n"
)
DIM, SIZE, LENGTH = 4, 8, 16


def write(name, content):
    (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    (HERE / name).write_bytes(content)


def saved(kind, mode="RGB", **options):
    return encoded(noise_image(7, 4, 3).resize((40, 24)).convert(mode), kind, **options)


PNG = saved("PNG")


def chunk(kind, data):
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def pictures():
    jpeg, turned = saved("JPEG"), Image.Exif()
    turned[0x0112] = 6
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    files = {
        "good.png": PNG,
        "good.jpg": jpeg,
        "png_named.jpg": PNG,
        "turned.jpg": saved("JPEG", exif=turned.tobytes()),
        "damaged_exif.png": saved("PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\x12"),
        "cmyk.jpg": saved("JPEG", "CMYK"),
        "alpha.webp": saved("WEBP", "RGBA", lossless=True),
        "moves.gif": saved(
            "GIF", "P", save_all=True, append_images=[Image.new("P", (40, 24), 3)]
        ),
        "cut.jpg": jpeg[: len(jpeg) * 3 // 4],
        "cut.png": PNG[:-40],
        "empty.png": b"",
        "page.png": b"<html>" * 20,
        "script.png": (
            b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
        ),
        "postscript.png": (
            f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%{TOUCH}ps) (w)"
            " file\n".encode()
        ),
        "random.png": np.random.default_rng(0).bytes(500),
        "no_pixels.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "huge.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IEND", b""),
    }
    for name, content in files.items():
        write(f"pictures/{name}", content)


def arrow(table):
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, table.schema) as file:
        file.write_table(table)
    return stream.getvalue()


def packed(table):
    stream = io.BytesIO()
    parquet.write_table(table, stream, store_schema=False)
    return stream.getvalue()


def tables():
    write("tables/a.png", PNG)
    rows = pa.table(
        {"image": pa.array([PNG] * 3), "title": ["aaaaa", "bbbbb", "ccccc"]}
    )
    paths = pa.table({"filepath": ["a.png"] * 3, "title": ["a red car", "b", "c"]})
    for kind, made in (("arrow", arrow), ("parquet", packed)):
        whole = made(rows)
        write(f"tables/good.{kind}", whole)
        write(f"tables/cut.{kind}", whole[: len(whole) // 2])
        write(f"tables/no_table.{kind}", b"<html>" * 40)
        write(f"tables/empty.{kind}", b"")
        write(f"tables/bad_name.{kind}", made(paths).replace(b"title", b"\xff" * 5))
    whole = packed(rows)
    write("tables/bad_page.parquet", b"PAR1" + b"\xff" * 200 + whole[204:])
    write("tables/paths.parquet", packed(paths))
    good, lies = struct.pack("<4i", 0, 5, 10, 15), struct.pack("<4i", 0, 5, 10**9, 15)
    write("tables/bad_offsets.arrow", arrow(rows).replace(good, lies))


def tar(*members, **links):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in links.items() if name.startswith("link") else ():
                setattr(info, key, value)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def header(name, size, kind=tarfile.REGTYPE, content=b""):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tars():
    pairs = [
        (f"{i}.{ext}", data)
        for i in range(4)
        for ext, data in (("png", PNG), ("txt", b"a cat"))
    ]
    good = tar(*pairs)
    with tarfile.open(fileobj=io.BytesIO(good)) as file:
        third = file.getmember("2.png")
    begin = good[: third.offset]
    files = {
        "good.tar": good,
        "good.tar.gz": gzip.compress(good, mtime=0),
        "cut.tar.gz": gzip.compress(good, mtime=0)[:-60],
        "gzip_named.tar": gzip.compress(good, mtime=0),
        "cut_in_data.tar": good[: third.offset_data + 10],
        "cut_in_header.tar": good[: third.offset + 100],
        "bad_header.tar": begin + b"\xff" * 512 + good[third.offset + 512 :],
        "huge_member.tar": begin + header("9.png", 2**80) + bytes(1024),
        "negative_member.tar": begin + header("9.png", -1536) + bytes(1024),
        "bad_records.tar": (
            begin
            + header("pax", 18, tarfile.XHDTYPE, b"18 size=-1536abcd\n")
            + good[third.offset :]
        ),
        "no_tar.tar": b"<html>" * 200,
        "empty.tar": b"",
        "outside.tar": tar(
            *((f"../../{name}", data) for name, data in pairs),
            *((f"/tmp/{n}", d) for n, d in pairs),
        ),
        "links.tar": tar(
            *pairs,
            ("link.png", b""),
            ("link.txt", b""),
            type=tarfile.SYMTYPE,
            linkname="/etc/passwd",
        ),
    }
    for name, content in files.items():
        write(f"tars/{name}", content)


def graph(source, result, axes, nodes=(), given=()):
    """Means of what comes in, beside a constant: ``nodes`` and tensors are added to
    it.
    """
    helper = onnx.helper
    ends = [
        helper.make_tensor_value_info(*source),
        helper.make_tensor_value_info(result, 1, ["n", DIM]),
    ]
    made = [
        helper.make_node("Cast", [source[0]], ["numbers"], to=1),
        helper.make_node("ReduceMean", ["numbers", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["wide"]),
        helper.make_node("Add", ["wide", given[0].name if given else "bias"], [result]),
    ]
    tensors = [
        helper.make_tensor("axes", 7, [len(axes)], axes),
        helper.make_tensor("last", 7, [1], [1]),
    ]
    tensors += [helper.make_tensor("bias", 1, [DIM], [1.0, 2.0, 3.0, 4.0]), *given]
    whole = helper.make_graph(
        [*nodes, *made], "g", ends[:1], ends[1:], initializer=tensors
    )
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    return model.SerializeToString()


def far(location):
    """A tensor whose bytes lie in another file."""
    tensor = onnx.TensorProto(name="far", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graphs():
    port = ("pixel_values", 1, ["n", 3, SIZE, SIZE])
    good = graph(port, "image_embeds", [1, 2, 3])
    write("models/onnx/good/onnx/vision_model.onnx", good)
    write(
        "models/onnx/good/onnx/text_model.onnx",
        graph(("input_ids", 7, ["n", LENGTH]), "text_embeds", [1]),
    )
    for case, location in {
        "absolute": "/etc/passwd",
        "outside": "../../secret",
        "gone": "gone.onnx_data",
    }.items():
        content = graph(port, "image_embeds", [1, 2, 3], given=[far(location)])
        write(f"models/onnx/weights_{case}/onnx/vision_model.onnx", content)
    run = onnx.helper.make_node("Run", ["pixel_values"], ["x"], domain="evil")
    write(
        "models/onnx/another_domain/onnx/vision_model.onnx",
        graph(port, "image_embeds", [1, 2, 3], [run]),
    )
    for case, content in {
        "cut": good[:-50],
        "empty": b"",
        "no_graph": b"{}" * 50,
        "zip": b"PK\x03\x04",
    }.items():
        write(f"models/onnx/{case}/onnx/vision_model.onnx", content)


if __name__ == "__main__":
    for work in (pictures, tables, tars, graphs):
        work()
