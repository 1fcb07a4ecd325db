"""What tests of several folders share: the command line in a process, small pictures and sets of them, a server."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloob import cli

OPENING = "cloob: opening data …\n"
"""What `cloob train` and `cloob eval` say first."""

Colour = tuple[int, int, int] | str


def run_cloob(
    *words: str, cwd: Path | None = None, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m cloob WORDS`` in a process of its own; ``python`` are options of Python, the rest is environment."""
    return subprocess.run(
        [sys.executable, *python, "-m", "cloob", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command, run here, that must exit with 2, beside the one that says it begins."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    err = err.removeprefix(OPENING)
    assert out == ""
    assert err.startswith("cloob: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def run_script(script: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -c SCRIPT WORDS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


def picture(colour: Colour, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour; ``size`` is width and height."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def noise(i: int = 0, width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
    """An encoded picture of noise that differs for each i; the top left pixel is (i % 256, i // 256, 7)."""
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[0, 0] = (i % 256, i // 256, 7)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_archive(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar, compressed as the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix[1:]
    with tarfile.open(path, f"w:{suffix if suffix in ('gz', 'xz', 'bz2') else ''}") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_pairs(folder: Path, captions: Mapping[str, tuple[Colour, str]], size: tuple[int, int] = (64, 64)) -> Path:
    """A folder with ``STEM.png`` and ``STEM.txt`` for each stem's colour and caption."""
    folder.mkdir(parents=True)
    for stem, (colour, caption) in captions.items():
        (folder / f"{stem}.png").write_bytes(picture(colour, size))
        (folder / f"{stem}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_classes(folder: Path, colours: Mapping[str, Colour], n: int) -> Path:
    """A folder with a sub-folder a class, each with ``n`` pictures of its colour, no two of one size."""
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.png").write_bytes(picture(colour, (20 + i, 20)))
    return folder


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server on loopback, which runs in a thread until the end of the block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def serving(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server on a free port of loopback."""
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)
