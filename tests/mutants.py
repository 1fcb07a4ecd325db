"""Mutation testing: small changes of the code that the tests ought to notice.

    python tests/mutants.py [--each 10] [--seed 0] [--rooms heads search export]

Draws changes of a room's files (a comparison, an operation, a number, a condition),
makes each in a copy of the package, and runs the room's tests on it. What no test
notices is printed: a survivor is a test that is missing, or a change that means
nothing. Known ones of the second kind are in ``tests/survivors.txt``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = Path(__file__).with_name("survivors.txt")
ROOMS = {
    "heads": ("tests/heads", "tests/test_closed_form.py"),
    "search": ("tests/search",),
    "export": ("tests/export",),
}
"""Folder of ``src/cloob`` -> its tests."""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutant(path: Path, drawn: random.Random) -> tuple[str, str]:
    """One change of a file: what it is, and the changed source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    places = [i for i, node in enumerate(nodes) if change(node) is not None]
    target = nodes[drawn.choice(places)]
    changed = change(target)
    assert changed is not None
    before = ast.unparse(target).partition("\n")[0]
    for field, value in ast.iter_fields(changed):
        setattr(target, field, value)
    after = ast.unparse(target).partition("\n")[0]
    name = path.relative_to(ROOT / "src" / "cloob")
    return f"{name}: {before} -> {after}", ast.unparse(tree)


def change(node: ast.AST) -> ast.AST | None:
    """A node with one thing changed, None where nothing is."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and type(changed.ops[0]) in SWAPPED:
        changed.ops[0] = SWAPPED[type(changed.ops[0])]()  # type: ignore[assignment]
    elif isinstance(changed, ast.BinOp | ast.BoolOp) and type(changed.op) in SWAPPED:
        changed.op = SWAPPED[type(changed.op)]()  # type: ignore[assignment]
    elif isinstance(changed, ast.If):
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
    elif isinstance(changed, ast.Constant) and type(changed.value) in (int, float):
        changed.value += 1
    else:
        return None
    return ast.fix_missing_locations(changed)


def survives(source: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass with the package at ``source``."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "not nightly", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survivors(room: str, each: int, seed: int) -> Iterator[str]:
    """What the tests of a room do not notice, of some changes drawn from all."""
    folder = ROOT / "src" / "cloob" / room
    drawn = random.Random(seed)
    files = [path for path in sorted(folder.rglob("*.py")) if path.stem != "__init__"]
    known = SURVIVORS.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "cloob"
        shutil.copytree(ROOT / "src" / "cloob", package)
        for _ in range(each):
            path = drawn.choice(files)
            what, text = mutant(path, drawn)
            if what in known:
                continue
            copied = package / path.relative_to(ROOT / "src" / "cloob")
            copied.write_text(text, encoding="utf-8")
            if survives(Path(place), ROOMS[room]):
                yield what
            shutil.copyfile(path, copied)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=10, help="changes a room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    options = parser.parse_args()
    found = 0
    for room in options.rooms:
        for what in survivors(room, options.each, options.seed):
            print(what, flush=True)
            found += 1
    print(f"{found} of {options.each * len(options.rooms)} changes went unnoticed")


if __name__ == "__main__":
    main()
