"""What tests make: pictures, archives, tables, folders of pairs and of classes, a tiny
BERT, servers of the web.
"""

import io
import json
import pickle
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from cloob.data.loader import Loader, PicturePairs
from cloob.data.source import Source

PURE = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "grey": (128, 128, 128),
}
THINGS = (
    "disc",
    "bar",
    "frame",
    "cross",
    "noise",
    "corner",
    "stripe",
    "field",
    "dot",
    "edge",
)
WORDS = (
    "red",
    "green",
    "blue",
    "round",
    "flat",
    "old",
    "new",
    "car",
    "tree",
    "house",
    "a",
    "the",
    "of",
    "there",
    "is",
)

# Pictures


def encoded(image, kind="PNG", **options):
    """The file of a picture."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(colour, size=(16, 16), kind="PNG"):
    """An encoded picture of one colour; ``size`` is width and height."""
    return encoded(Image.new("RGB", size, colour), kind)


def noise_image(seed, width=12, height=10):
    """A picture that no other seed gives."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise(i=0, width=8, height=8, kind="PNG"):
    """An encoded picture of noise that differs for each i; the top left pixel is (i %
    256, i // 256, 7).
    """
    image = noise_image(i, width, height)
    image.putpixel((0, 0), (i % 256, i // 256, 7))
    return encoded(image, kind)


# Files


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


def write_tar(path, files, kind=tarfile.PAX_FORMAT, *, sized=False):
    """A tar, compressed as the path's ending says; ``sized``: a PAX record alone has a
    file's size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix[1:]
    if suffix not in ("gz", "xz", "bz2"):
        suffix = ""
    with tarfile.open(path, f"w:{suffix}", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"size": str(len(data))} if sized else {}
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path, rows):
    """The rows in the format that the ending says; by pyarrow's writers where a person
    would use them.
    """
    if path.suffix == ".parquet":
        import pyarrow as pa

        write_arrow(path, pa.Table.from_pylist([*rows]))
    elif path.suffix == ".jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    else:
        comma = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [comma.join(rows[0])]
        for row in rows:
            cells = map(str, row.values())
            lines.append(comma.join(cells))
        write_lines(path, lines)
    return path


def write_lines(path, lines):
    text = "\n".join(lines)
    path.write_text(f"{text}\n")


def write_arrow(path, table, kind="file", **options):
    """A table of Arrow's, in batches or groups of two rows: Parquet by its name, else
    Arrow's file or stream.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
        return path
    new = getattr(pa.ipc, f"new_{kind}")
    options = {"options": pa.ipc.IpcWriteOptions(**options)}
    with (
        pa.OSFile(str(path), "wb") as sink,
        new(sink, table.schema, **options) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    return path


class Listed(Source):
    """Pairs in memory, as a source of two files.

    A pair's key is its number; None is a pair that cannot be read.
    """

    def __init__(self, pairs, name="listed"):
        self.pairs = tuple(pairs)
        self.name = name
        half = len(self.pairs) // 2
        self.shard_sizes = (half, len(self.pairs) - half)

    def __len__(self):
        return len(self.pairs)

    def fingerprint(self):
        return {"pairs": len(self)}

    def read(self, index):
        from cloob.data.batch import BadSample, RawSample

        if (pair := self.pairs[index]) is None:
            raise BadSample("missing image", str(index))
        return RawSample(str(index), *pair)


def samples(source):
    """All that a source has, in its order."""
    return [source.read(row) for row in range(len(source))]


def sent(source):
    """The source as a worker process receives it."""
    return pickle.loads(pickle.dumps(source))


def outcomes(source):
    """For the key of each pair its caption, or the reason why it cannot be used."""
    from cloob.data.batch import BadSample

    found = {}
    for i in range(len(source)):
        try:
            sample = source.read(i)
            found[sample.key] = sample.caption
        except BadSample as bad:
            found[bad.key] = bad.reason
    return found


def write_pairs(folder, captions, size=(64, 64)):
    """A folder with ``STEM.png`` and ``STEM.txt`` for each stem's colour and
    caption.
    """
    folder.mkdir(parents=True)
    for stem, (colour, caption) in captions.items():
        (folder / f"{stem}.png").write_bytes(picture(colour, size))
        (folder / f"{stem}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_forty(folder):
    """Pairs ``CT.png`` with ``CT.txt`` of the C-th colour and the T-th thing, 40 pixels
    a side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for c, (colour, rgb) in enumerate(COLOURS.items()):
        for t, thing in enumerate(THINGS):
            noisy = np.array(rgb) + rng.integers(-30, 30, (40, 40, 3))
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
            pixels[t * 4 : t * 4 + 4] = 255 - 20 * t
            Image.fromarray(pixels).save(folder / f"{c}{t}.png")
            (folder / f"{c}{t}.txt").write_text(f"a {colour} {thing}")
    return folder


def write_classes(folder, colours, n):
    """A folder with a sub-folder a class, each with ``n`` pictures of its colour, no
    two of one size.
    """
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.png").write_bytes(picture(colour, (20 + i, 20)))
    return folder


# Models


def tiny_model(folder, name="tiny-vit", seed=0, objective="cloob", **options):
    """The folder of a model with fresh weights."""
    from cloob.models.folder import save_model
    from cloob.models.towers import create_model
    from cloob.objective import make_objective

    trained_by = make_objective(objective, **options)
    save_model(folder, create_model(name, seed=seed), trained_by.config())
    return folder


def write_bert(folder, **settings):
    """A tiny BERT with random weights, the words ``WORDS`` and a word's width of 16, as
    a folder of transformers.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    words = folder / "vocab.txt"
    write_lines(words, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    BertTokenizer(str(words)).save_pretrained(folder)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = BertConfig(
        vocab_size=len(WORDS) + 5, max_position_embeddings=16, **sizes, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def loaded(source, transform, tokenizer, batch_size, seed=0, **options):
    """The batches of a source's pictures."""
    pairs = PicturePairs(source, transform, tokenizer, seed)
    return Loader(pairs, batch_size, seed=seed, **options)


def code_points(captions):
    """Four tokens a caption, for a model that has no tokenizer: its length, and the
    first three code points.
    """
    import torch

    rows = []
    for caption in captions:
        first, second, third = caption.ljust(3)[:3]
        rows.append([len(caption), ord(first), ord(second), ord(third)])
    return torch.tensor(rows)


# Servers


@contextmanager
def served(server):
    """The address of a server on loopback, which runs in a thread until the end of the
    block.
    """
    with server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Web:
    """A server on loopback that answers by path: what ``pages`` holds, or what the
    function there writes itself.
    """

    url: str

    def __init__(self):
        self.pages = {}
        self.asked = []  # paths
        self.headers = []  # of the same requests
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                """Silent."""

            def do_GET(self):
                web.asked.append(self.path)
                web.headers.append(dict(self.headers))
                page = web.pages.get(self.path)
                if callable(page):
                    page(self)
                else:
                    self.answer(404 if page is None else 200, page or b"")

            do_HEAD = do_GET

            def answer(self, status, content, length=None, **headers):
                self.send_response(status)
                length = {"Content-Length": str(length or len(content))}
                for name, value in (length | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if self.command == "GET" else b"")
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def redirect(self, path, to):
        self.pages[path] = lambda request: request.answer(302, b"", Location=to)


@contextmanager
def web():
    """A server without pages yet."""
    made = Web()
    with served(made.server) as made.url:
        yield made
