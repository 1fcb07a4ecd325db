"""What the pages show, and a reader's folder in which it runs."""

import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cloob import cli
from cloob.models import load
from make import (
    COLOURS,
    picture,
    tiny_model,
    write_classes,
    write_forty,
    write_table,
    write_tar,
)
from search_colours import write_pictures

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
SHOWN = [README, *sorted(DOCS.rglob("*.md"))]
MINE = """
import torch
from torch import nn

class Pairs(torch.utils.data.Dataset):
    def __init__(self, split): self.first = 300 * (split == "val")
    def __len__(self): return 300
    def __getitem__(self, i):
        rows = torch.Generator().manual_seed(self.first + i)
        row = torch.randn(5, generator=rows)
        return row, row.square()

class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)
    def forward(self, a, b): return self.a(a), self.b(b)

class Loss(nn.Module):
    def forward(self, x, y): return -(x * y).sum(1).mean()
"""


class Snippet(NamedTuple):
    """A block of a page; ``note`` says why it is not run, or which file runs it."""

    kind: str
    text: str
    note: str


def snippets(page):
    """The blocks of a page, in order; a comment before one is its note."""
    found = re.findall(
        r"^(?:<!-- (not run: .*|run by \S*) -->\n)?```(\S+)\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Snippet(kind, text, note) for note, kind, text in found]


def blocks(page, *kinds):
    return [snippet.text for snippet in snippets(page) if snippet.kind in kinds]


def as_words(command):
    return shlex.split(command.rstrip("& ").replace(" …", ""), comments=True)


def command_lines(text):
    """The lines of a block behind the prompt; a line may go on after a backslash."""
    return re.findall(r"^\$ (.*)", text.replace("\\\n", " "), re.MULTILINE)


def commands(page):
    """The words of each ``cloob`` command of a page, those behind torchrun too; ``…``
    stands for more.
    """
    text = "\n".join(blocks(page, "console", "sh", "yaml")).replace("\\\n", " ")
    text = re.sub(r"(?<=\S)\n {12,}(?=\S)", " ", text)  # a folded line of YAML
    found = re.findall(
        r"^(?:\$ (?:\.venv/bin/)?|.*torchrun .*-m )cloob (.*)", text, re.MULTILINE
    )
    return list(map(as_words, found))


def pages_of(title):
    """The pages in a part of the contents."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    (listed,) = re.findall(
        rf":caption: {title}\n:hidden:\n\n(.*?)```", index, re.DOTALL
    )
    return [DOCS / f"{name}.md" for name in listed.split()]


def run_page(page):
    """Runs what a page shows without a note, from top to bottom; the names that its
    Python leaves.
    """
    names = {}
    for kind, text, note in snippets(page):
        if note:
            continue
        if kind == "python":
            exec(compile(text, page.name, "exec"), names)
        elif kind == "toml":
            Path("more.toml").write_text(text, encoding="utf-8")
        elif kind == "console":
            for line in command_lines(text):
                assert line.startswith("cloob "), f"{page.name}: what runs {line!r}?"
                assert cli.main(as_words(line)[1:]) == 0, line
    return names


def write_reader_folder(patch):
    """Fills the current folder with what pages name; a public model is a tiny one."""
    patch.syspath_prepend(str(Path.cwd()))
    Path("mine.py").write_text(MINE)
    for folder in ("pictures", "photos", "holiday"):
        write_pictures(Path(folder), n=3)
    shutil.copy("pictures/red-0.png", "pictures/red.png")
    for name in ("photo.jpg", "cat.jpg"):
        Path(name).write_bytes(picture("red", kind="JPEG"))
    for name in ("labels.txt", "captions.txt"):
        Path(name).write_text("red\nblue\n")
    write_forty(Path("forty"))
    texts = sorted(Path("forty").glob("*.txt"))
    rows = [
        {"filepath": str(path.with_suffix(".png")), "title": path.read_text()}
        for path in texts
    ]
    for table in ("pairs.csv", "val.csv"):
        write_table(Path(table), rows)
    for part in ("train", "test"):
        write_classes(Path("sets/cifar10") / part, COLOURS, 3)
    Path("cc3m").mkdir()
    write_tar(Path("cc3m/00000.tar"), {"a.jpg": picture("red"), "a.txt": b"red"})
    write_vectors(np.random.default_rng(0))
    for name in ("mine", "finetune"):
        tiny_model(Path("runs") / name)
    write_public_models(patch)


def write_vectors(rng):
    """Rows that belong together, and their ids."""
    cause = rng.normal(size=(300, 6))
    for names in (("cells", "mols"), ("spectra", "molecules"), ("a", "b")):
        for name in names:
            np.save(f"{name}.npy", cause @ rng.normal(size=(6, 20)))
    scaffolds = [f"ring #{i % 60}\n" for i in range(300)]  # as SMILES have # and more
    Path("scaffolds.txt").write_text("".join(scaffolds))
    for name in ("keys", "spectra", "molecules"):
        Path(f"{name}.txt").write_text("".join(f"m{i}\n" for i in range(300)))
    lists = [f'["m{i}", "m{(i + 1) % 300}"]\n' for i in range(300)]
    Path("lists.jsonl").write_text("".join(lists))


def write_public_models(patch):
    """What is no file is a tiny model."""
    loaded = load.load_model

    @functools.wraps(loaded)
    def load_model(source, *args, **settings):
        there = Path(str(source).removesuffix(":last")).exists()
        return loaded(source if there else "runs/mine", *args, **settings)

    patch.setattr("cloob.commands.index.check_source", lambda _: None)
    patch.setattr("cloob.models.load.load_model", load_model)
    patch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )


def write_runs():
    """Two short runs with checkpoints."""
    for objective in ("clip", "cloob"):
        words = f"--objective {objective} --epochs 1 --out runs/{objective}"
        data = "--data pairs.csv --val-data val.csv --model tiny-vit --workers 0"
        assert cli.main(["train", *words.split(), *data.split()]) == 0
