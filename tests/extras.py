"""Installs the wheel with each extra alone and uses it: ``python tests/extras.py WHEEL
FOLDER [EXTRA …]``.

Each extra gets an environment of its own in FOLDER, for each Python of PYTHONS that is
here; it is removed afterwards. What runs there is small but real: a training, an
export, a server that answers.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

UV = (sys.executable, "-m", "uv")
PYTHONS = ("3.11", "3.12", "3.13")
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
USES = {
    "train": [
        [
            "train",
            "vectors",
            "--a",
            "a.npy",
            "--b",
            "b.npy",
            "--epochs",
            "2",
            "--out",
            "run",
        ],
        [
            "train",
            "--data",
            "pairs.csv",
            "--init",
            MODEL,
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--out",
            "towers",
        ],
        ["eval", MODEL, "--retrieval", "pairs.csv", "--out", "results"],
        ["index", ".", "--model", MODEL, "--out", "idx"],
    ],
    "align": [
        [
            "train",
            "align",
            "--data",
            "pairs.csv",
            "--val-split",
            "0.25",
            "--steps",
            "4",
            "--out",
            "run",
        ]
    ],
    "export": [
        ["export", MODEL, "--out", to, "--to", to] for to in ("onnx", "transformers")
    ],
    "ray": ["import ray.data; from cloob.interop.ray import Embed"],
    "serve": [["index", ".", "--model", MODEL, "--out", "idx"], SERVE],
    "sentence-transformers": [SENTENCES],
    "open-clip-train": [OPEN_CLIP],
}

# What `train` alone refuses, in one line with the install of this extra.
REFUSED = {
    "align": ["train", "align", "--data", "pairs.csv"],
    "export": ["export", MODEL, "--out", "exported", "--to", "onnx"],
    "serve": ["serve", "idx"],
}


def run(command, folder):
    """The exit code, and what went to stderr, which is also shown."""
    done = subprocess.run(
        command, cwd=folder, check=False, timeout=600, stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode, done.stderr


def try_out(wheel, version, extra, environment):
    """Makes the environment, uses the extra in an empty folder, and removes the
    environment.
    """
    subprocess.run(
        [*UV, "venv", "--quiet", "--clear", "--python", version, str(environment)],
        check=True,
    )
    python = str(environment / "bin" / "python")
    begin = time.monotonic()
    subprocess.run(
        [*UV, "pip", "install", "--quiet", "--python", python, f"{wheel}[{extra}]"],
        check=True,
    )
    print(
        f"Python {version}, {extra}: installed in {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        if extra != "sentence-transformers":
            subprocess.run([python, "-c", PAIRS], cwd=folder, check=True)
        for use in USES[extra]:
            code, said = run(
                (
                    [python, "-m", "cloob", *use]
                    if isinstance(use, list)
                    else [python, "-c", use]
                ),
                folder,
            )
            assert code == 0 and "nanobind" not in said, (
                use
            )  # triton lists what Python does not collect at its end
        for brings, words in REFUSED.items() if extra == "train" else ():
            code, said = run([python, "-m", "cloob", *words], folder)
            assert (
                code == 2 and f'pip install "cloob[{brings}]"' in said.splitlines()[-1]
            ), words
    shutil.rmtree(environment)
    print(f"Python {version}, {extra}: works alone", flush=True)


def main():
    wheel, folder, *chosen = sys.argv[1:]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(extras) == {*USES, "all"}, "an extra is not tried"
    for version in PYTHONS:
        if subprocess.run(
            [*UV, "python", "find", version], capture_output=True, check=False
        ).returncode:
            print(f"Python {version}: not tried, no interpreter here", flush=True)
            continue
        for extra in chosen or USES:
            try_out(
                Path(wheel).resolve(), version, extra, Path(folder).resolve() / extra
            )


if __name__ == "__main__":
    main()
