"""Two ranks with a real process group make the index that one process makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from index_fakes import FakeEncoder, content, faults, options, write_noise

from cloob.search.index import Index

WORKER = """
import json, os, shutil, sys
from pathlib import Path
from typing import Any
from index_fakes import FakeEncoder, options, write_noise
from cloob.search.index import Index

pictures, encoder = Path(sys.argv[2]), FakeEncoder()

def update():
    with Index.open(sys.argv[1], writable=True) as index:
        done = index.update([pictures], options(encoder))
    return [done.added, done.moved, done.removed, done.unchanged, done.embedded, done.faults]

told = [*update(), encoder.seen]
if os.environ["RANK"] == "0":  # the other one waits for this one in its second group
    (pictures / "00.png").unlink()
    (pictures / "01.png").rename(pictures / "moved.png")
    shutil.copy(pictures / "moved.png", pictures / "copy.png")  # of two heirs only one gets the item
    for seed in range(30, 36):
        write_noise(pictures / f"{seed}.png", seed)
print(json.dumps([told, update()]))
"""


def run_ranks(index: Path, pictures: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": places}
    command = [sys.executable, "-c", WORKER, str(index), str(pictures)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**os.environ, **group, "RANK": rank}, **pipes) for rank in "01"]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return [json.loads(out) for out, _ in outputs]


def test_two_ranks_make_one_index(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for seed in range(23):
        write_noise(pictures / f"{seed:02}.png", seed)
    (pictures / "bad.png").write_bytes(b"nope")
    Index.create(tmp_path / "index").close()
    (first, first_again), (second, second_again) = run_ranks(tmp_path / "index", pictures)
    assert first[:6] == second[:6] == [23, 0, 0, 0, 23, {"corrupt image": 1}]
    assert first[6] + second[6] == 23 and first[6] and second[6]
    assert first_again == second_again == [7, 1, 1, 21, 6, {"corrupt image": 1}]
    with Index.open(tmp_path / "index") as made, Index.create(tmp_path / "alone") as alone:
        alone.update([pictures], options(FakeEncoder()))
        assert content(made) == content(alone) and faults(made) == faults(alone)
        assert made.store.nearest("fake", alone.store.vectors("fake", [1]), 1).searched == 29
