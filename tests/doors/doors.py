"""A small world for the doors, and the comparison with what they gave when
`recorded.json` was written.

The world is made of fixed numbers: 40 pictures in four colours with captions, four
classes, and a table with each kind of bad row. `model/` holds towers that were trained
on these pairs (InfoLOOB, 160 steps). Rows of unused tokens are 0."""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cloob import cli
from make import COLOURS, THINGS, write_forty

MODEL = Path(__file__).with_name("model")


def make_world(root):
    """The folders that the doors are asked about."""
    names = {
        "pairs": "pairs",
        "classes": "classes",
        "dirty": "dirty.csv",
        "index": "pairs.idx",
        "model": "model",
    }
    world = SimpleNamespace(
        root=root, **{key: root / name for key, name in names.items()}
    )
    write_forty(world.pairs)
    for c, colour in enumerate(COLOURS):
        for t in range(len(THINGS)):
            place = world.classes / ("train" if t < 5 else "test") / colour
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(world.pairs / f"{c}{t}.png", place)
    (world.classes / "classnames.txt").write_text("\n".join(sorted(COLOURS)) + "\n")
    (world.classes / "templates.txt").write_text("a {c}\na {c} thing\n")
    shutil.copytree(MODEL, world.model)
    # A table with every kind of bad row among thirty good ones.
    rows = [
        f"pairs/{c}{t}.png,a {colour} {THINGS[t]}"
        for c, colour in enumerate(COLOURS)
        for t in range(8)
    ]
    (root / "half.png").write_bytes((world.pairs / "00.png").read_bytes()[:500])
    (root / "text.png").write_text("this is no picture")
    (root / "empty.png").write_bytes(b"")
    rows[3:3] = [
        "half.png,cut in the middle",
        "text.png,no picture",
        "empty.png,nothing in it",
    ]
    rows[9:9] = [
        "pairs/missing.png,not there",
        "pairs/09.png,",
        "pairs/19.png,   ",
        ",no path",
    ]
    rows += ["pairs/00.png,a red disc"]
    world.dirty.write_text("filepath,title\n" + "\n".join(rows) + "\n")
    return world


def cloob(*words, code=0):
    """What a command prints on stdout; fails where it ends with another exit code."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = cli.main([str(word) for word in words])
    assert found == code, (
        f"{words}: exit code {found}\n{out.getvalue()}{err.getvalue()}"
    )
    return out.getvalue()


def jsons(text):
    """One JSON value a line."""
    return [json.loads(line) for line in text.splitlines()]


def steady(value, world):
    """A value as JSON has it, without what differs from one machine, day or release to
    the next.
    """
    gone = (
        "fingerprint",
        "train_seconds",
        "version",
        "revision",
        "date",
        "bytes",
        "detail",
    )
    if isinstance(value, Mapping):
        return {
            str(key): steady(entry, world)
            for key, entry in value.items()
            if key not in gone
        }
    if isinstance(value, (list, tuple)):
        return [steady(entry, world) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return steady(value.tolist(), world)
    if isinstance(value, bytes):
        return steady(value.decode(), world)
    if isinstance(value, (str, Path)):
        return str(value).replace(str(world.root), "WORLD")
    return (
        value
        if value is None or isinstance(value, (bool, int))
        else float(f"{value:.6g}")
    )


def same(found, expected, at=""):
    """A row of numbers is as near as 0.2 % of its length, a number as 0.2 % of itself;
    all else is equal.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        assert sorted(found) == sorted(expected), at
        for key in expected:
            same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(found) == len(expected), at
        if expected and all(isinstance(value, float) for value in (*expected, *found)):
            assert math.dist(found, expected) <= 2e-3 * math.hypot(*expected), at
            return
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{at}/{i}")
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), at
    else:
        assert found == expected, at
