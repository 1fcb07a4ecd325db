"""Installs the wheel with each extra alone and uses it: ``python tests/extras.py WHEEL FOLDER [EXTRA …]``.

Each extra gets an environment of its own in FOLDER, which is removed afterwards. What runs there is small but
real: a training, an export, a server that answers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

INSTALL = (sys.executable, "-m", "uv", "pip", "install", "--quiet")
ROOT = Path(__file__).parents[1]
PAIRS = """
import csv, numpy as np
from PIL import Image
names = ["red", "green", "blue", "white", "black", "gray", "orange", "purple"]
with open("pairs.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["filepath", "title"])
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), name).save(f"{i}.png")
        rows.writerow([f"{i}.png", f"all of it is {name}"])
np.save("a.npy", np.random.default_rng(0).normal(size=(64, 16)).astype("float32"))
np.save("b.npy", np.random.default_rng(1).normal(size=(64, 12)).astype("float32"))
"""
SERVE = """
import subprocess, sys, time, urllib.request
server = subprocess.Popen([sys.executable, "-m", "cloob", "serve", "idx", "--port", "8917"])
try:
    for _ in range(120):
        try:
            page = urllib.request.urlopen("http://127.0.0.1:8917/", timeout=5).read()
            break
        except OSError:
            time.sleep(0.5)
    assert b"<html" in page
finally:
    server.terminate()
    assert server.wait(30) == 0
"""
SENTENCES = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from cloob.interop.sentence_transformers import CLOOBLoss
tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "red": 2, "car": 3, "tree": 4}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)])
texts = [model.tokenize(["a red car", "a tree"]), model.tokenize(["red car", "tree"])]
CLOOBLoss(model)(texts, None).backward()
"""
MODEL = str(ROOT / "tests" / "doors" / "model")
OPEN_CLIP = f"""
from cloob.interop.open_clip import run
words = "--dataset-type synthetic --train-data none --train-num-samples 8 --batch-size 4 --epochs 1 --warmup 1"
run(["--cloob-objective", "infoloob", "--", "--model", "local-dir:{MODEL}", *words.split(), "--workers", "0"])
"""
# What runs in each environment: words after `cloob`, or a program.
USES: dict[str, list[list[str] | str]] = {
    "train": [
        ["train", "vectors", "--a", "a.npy", "--b", "b.npy", "--epochs", "2", "--out", "run"],
        ["train", "--data", "pairs.csv", "--init", MODEL, "--steps", "2", "--batch-size", "4", "--out", "towers"],
        ["eval", MODEL, "--retrieval", "pairs.csv", "--out", "results"],
    ],
    "align": [["train", "align", "--data", "pairs.csv", "--val-split", "0.25", "--steps", "4", "--out", "run"]],
    "export": [["export", MODEL, to, "--to", to] for to in ("onnx", "transformers")],
    "postgres": ["import psycopg, pgvector; from cloob import Index"],
    "serve": [["index", ".", "--model", MODEL, "--out", "idx"], SERVE],
    "sentence-transformers": [SENTENCES],
    "open-clip-train": [OPEN_CLIP],
}


def try_out(wheel: Path, extra: str, environment: Path) -> None:
    """Makes the environment, uses the extra in an empty folder, and removes the environment."""
    venv.create(environment, clear=True)
    python = str(environment / "bin" / "python")
    begin = time.monotonic()
    subprocess.run([*INSTALL, "--python", python, f"{wheel}[{extra}]"], check=True)
    print(f"{extra}: installed in {time.monotonic() - begin:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if extra not in ("sentence-transformers", "postgres"):
            subprocess.run([python, "-c", PAIRS], cwd=folder, check=True)
        for use in USES[extra]:
            words = ["-m", "cloob", *use] if isinstance(use, list) else ["-c", use]
            subprocess.run([python, *words], cwd=folder, check=True, timeout=600)
    shutil.rmtree(environment)
    print(f"{extra}: works alone", flush=True)


def main() -> None:
    wheel, folder, *chosen = sys.argv[1:]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == {*USES, "all"}, "an extra is not tried"
    for extra in chosen or USES:
        try_out(Path(wheel).resolve(), extra, Path(folder).resolve() / extra)


if __name__ == "__main__":
    main()
