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
# What runs in each environment: commands and programs.
INDEX = f"cloob index . --model {MODEL} --out idx"
USES = {
    "train": [
        "cloob train vectors --a a.npy --b b.npy --epochs 2 --out run",
        f"cloob train --data pairs.csv --init {MODEL} --steps 2 --batch-size 4 --out towers",
        f"cloob eval {MODEL} --retrieval pairs.csv --out results",
        INDEX,
    ],
    "align": [
        "cloob train align --data pairs.csv --val-split 0.25 --steps 4 --out run"
    ],
    "export": [
        f"cloob export {MODEL} --out onnx --to onnx",
        f"cloob export {MODEL} --out transformers --to transformers",
    ],
    "ray": ["import ray.data; from cloob.interop.ray import Embed"],
    "serve": [INDEX, SERVE],
    "sentence-transformers": [SENTENCES],
    "open-clip-train": [OPEN_CLIP],
}

# What `train` alone refuses, in one line with the install of this extra.
REFUSED = {
    "align": "cloob train align --data pairs.csv",
    "export": f"cloob export {MODEL} --out exported --to onnx",
    "serve": "cloob serve idx",
}


def run(python, use, folder):
    """The exit code of a command or a program, and what went to stderr, which is also
    shown.
    """
    words = ["-m", *use.split()] if use.startswith("cloob ") else ["-c", use]
    done = subprocess.run(
        [python, *words], cwd=folder, timeout=600, stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode, done.stderr


def uv(*words):
    subprocess.run([sys.executable, "-m", "uv", *words], check=True)


def try_out(wheel, version, extra, environment):
    """Makes the environment, uses the extra in an empty folder, and removes the
    environment.
    """
    python = str(environment / "bin" / "python")
    begin = time.monotonic()
    uv("venv", "--quiet", "--clear", "--python", version, str(environment))
    uv("pip", "install", "--quiet", "--python", python, f"{wheel}[{extra}]")
    seconds = time.monotonic() - begin
    print(f"Python {version}, {extra}: installed in {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if extra != "sentence-transformers":
            subprocess.run([python, "-c", PAIRS], cwd=folder, check=True)
        for use in USES[extra]:
            code, said = run(python, use, folder)
            # triton lists what Python does not collect at its end
            assert code == 0 and "nanobind" not in said, use
        for brings, use in REFUSED.items() if extra == "train" else ():
            code, said = run(python, use, folder)
            assert code == 2 and f'pip install "cloob[{brings}]"' in said, use
    shutil.rmtree(environment)
    print(f"Python {version}, {extra}: works alone", flush=True)


def main():
    wheel, folder, *chosen = sys.argv[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {*USES, "all"}
    for version in PYTHONS:
        find = [sys.executable, "-m", "uv", "python", "find", version]
        if subprocess.run(find, capture_output=True).returncode:
            print(f"Python {version}: not tried, no interpreter here", flush=True)
            continue
        for extra in chosen or USES:
            environment = Path(folder).resolve() / extra
            try_out(Path(wheel).resolve(), version, extra, environment)


if __name__ == "__main__":
    main()
