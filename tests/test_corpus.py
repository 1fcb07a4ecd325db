"""Each file of ``tests/corpus`` at the doors that take it: it is read, or refused in
one line.

Nothing in it runs, nothing is fetched, and nothing is written. Each file is read in a
forked process of limited memory and time. ``corpus/README.md`` says how to add a file.
"""

import json
import os
import random
import re
import shutil
import socket
import sqlite3
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from cloob import Index, cli, load_model, open_source
from cloob.data.batch import BadSample
from cloob.errors import InputError, message
from cloob.serve.app import make_app
from cloob.serve.config import ServeConfig
from support import OPENING, fork, read_json

resource = pytest.importorskip("resource", reason="no limits of memory here")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="a limit of memory needs Linux"
)

CORPUS = Path(__file__).parent / "corpus"
HOSTILE = CORPUS / "hostile"
BASE = CORPUS / "hostile" / "base"
MODEL = (
    CORPUS / "weights" / "crowsonkb" / "full_vocab" / "slim.pkl"
)  # its tokenizer is open_clip's
OPEN_CLIP = CORPUS / "weights/open_clip/vit_quickgelu"
ON_CPU = ["--workers", 0, "--device", "cpu"]
ASKED_THE_NETWORK = 99


def cases(*folders):
    """A parameter for each entry of the folders' ``expect.json``: its path in the
    corpus, and what is expected.
    """
    return [
        pytest.param(CORPUS / folder / name, wanted, id=f"{folder}/{name}")
        for folder in folders
        for name, wanted in read_json(CORPUS / folder / "expect.json").items()
    ]


def markers():
    """What code of the files has left behind; taken away, as the next file is not to
    blame.
    """
    found = list(Path("/tmp").glob("cloob-was-here-*"))
    for path in found:
        path.unlink(
            missing_ok=True
        )  # another suite on this machine may look at the same time
    return found


def no_network(*_, **__):
    os._exit(ASKED_THE_NETWORK)


class Child:
    """Runs work in a forked process and an empty folder, and looks at what it left
    behind.
    """

    def __init__(self, folder):
        self.folder = folder
        self.empty = folder / "empty"
        self.given = folder / "given"
        self.empty.mkdir()

    def run(self, work):
        """The exit code and the output; InputErrors end as the command line's do."""

        def limited():
            os.chdir(self.empty)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 3 * 2**29
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (20, 25))
            socket.socket.connect = socket.getaddrinfo = no_network
            try:
                return int(work() or 0)
            except (InputError, MemoryError) as error:
                print(f"cloob: {message(error)}")
                return 2

        before = self._files()
        ranks = fork(self.folder / "said", 1, limited)
        code = ranks.wait()[0]
        said = ranks.told().replace(OPENING, "")
        assert code != ASKED_THE_NETWORK, "it asked the network"
        assert "Traceback" not in said, said
        assert not markers(), "its code ran"
        assert self._files() == before, "it wrote files"
        return code, said

    def check(self, work, wanted):
        """What the work said; its end and its line are as expected."""
        code, said = self.run(work)
        assert code in (0, 2) and not (code and "ok" in wanted), (code, said)
        assert code or "refused" not in wanted, said
        if code:
            *before, line = said.splitlines()
            assert line.startswith("cloob: ")
            assert "\ncloob: " not in "\n".join(before)
            words = wanted.get("refused") or [str(self.given)]
            assert len(line) < 1200 and all(word in line for word in words), said
        return said

    def _files(self):
        """But for what SQLite keeps beside a database."""
        paths = [*self.empty.rglob("*"), *self.given.rglob("*")]
        of_sqlite = re.compile(r"-(shm|wal)$|vectors-")
        return sorted(path for path in paths if not of_sqlite.search(path.name))


def command(*words):
    return lambda: cli.main([str(word) for word in words])


@pytest.fixture
def child(tmp_path, warm):
    return Child(tmp_path)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Has this process import what the doors need, once; an index of three pictures,
    and a set of pairs.
    """
    markers()
    folder = tmp_path_factory.mktemp("warm")
    pictures = folder / "pictures"
    index = folder / "index"
    copy_pictures(("good.png", "cmyk.jpg", "alpha.webp"), pictures)
    commands = [
        ("index", pictures, "--model", MODEL, "--out", index),
        ("search", index, "a cat"),
    ]
    for path in (BASE / "mljku_micro.pt", BASE / "crowsonkb_micro.pkl", OPEN_CLIP):
        source = on_base(path, folder / path.stem)
        out = folder / f"{path.stem}-exported"
        commands.append(("export", source, "--to=cloob", "--out", out))
    for name in ("good.csv", "good.arrow", "good.parquet"):
        path = CORPUS / "tables" / name
        commands.append(("data", path, "--image-column", column(name)))
    commands.append(("data", CORPUS / "tars" / "good.tar"))
    for words in commands:
        assert command(*words)() == 0, words
    return folder


def column(name):
    holds_pictures = name.endswith(("arrow", "parquet")) and name != "paths.parquet"
    return "image" if holds_pictures else "filepath"


def copy_pictures(names, folder):
    """Pictures of the corpus, each with a caption."""
    folder.mkdir()
    for name in names:
        shutil.copy(CORPUS / "pictures" / name, folder)
        (folder / f"{Path(name).stem}.txt").write_text(f"a cat {name}")


def on_base(path, home):
    """A copy of a file where only its own fault stands between it and a model; what
    ``load_model`` is given.
    """
    if path.is_dir():
        shutil.copytree(path, home)
        if path.name.startswith("hf_") and not (home / "config.json").exists():
            shutil.copy(CORPUS / "weights/hf_clip/vit_gelu/config.json", home)
        return home
    shutil.copytree(BASE, home)
    is_config = path.name.endswith("open_clip.json")
    if is_config or path.suffix == ".safetensors":
        name = "open_clip_config.json" if is_config else "open_clip_model.safetensors"
        shutil.copy(path, home / name)
        return home
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (home / name).unlink()
    (home / "crowsonkb_micro.json").rename(home / "config.json")
    if path.suffix == ".json":
        shutil.copy(path, home / "config.json")
        return home / "crowsonkb_micro.pkl"
    return Path(shutil.copy(path, home))


@pytest.mark.parametrize(("path", "wanted"), cases("hostile"))
def test_weights(child, path, wanted):
    made = child.folder / "made"
    source = on_base(path, child.given)
    said = child.check(command("export", source, "--to=cloob", "--out", made), wanted)
    # Python 3.11 prints a line before it of a bytearray of 1 TB
    assert made.exists() == ("cloob: " not in said)


@pytest.mark.parametrize(("path", "wanted"), cases("models"))
def test_model_folders(child, warm, path, wanted):
    kind = path.parent.name
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        shutil.copytree(path.parent / "good", child.given)
    elif kind == "open_clip":
        child.given.mkdir()
        for name in ("open_clip_config.json", "open_clip_model.safetensors"):
            shutil.copy(BASE / name, child.given)
    shutil.copytree(path, child.given, dirs_exist_ok=True)
    (child.folder / "secret").write_bytes(bytes(64))

    def use():
        model = load_model(child.given, device="cpu")
        if kind == "onnx":  # graphs are opened by the first row that is asked of them
            size = (1, 3, model.image_size, model.image_size)
            model.encode_image(torch.zeros(size, dtype=torch.uint8))
            tokens = torch.zeros(1, model.context_length, dtype=torch.int64)
            model.encode_text(tokens)

    if kind == "text":
        out = child.folder / "run"
        encoders = ["--image-encoder", OPEN_CLIP, "--text-encoder", child.given]
        data = ["--data", warm / "pictures", "--batch-size", 2, *ON_CPU]
        use = command("train", "align", *encoders, *data, "--out", out)
    child.check(use, wanted)
    assert not (child.folder / "run").exists()


@pytest.mark.parametrize(("path", "wanted"), cases("tables", "tars"))
def test_data(child, path, wanted):
    given = shutil.copytree(path.parent, child.given) / path.name

    def read():
        source = open_source(given, image_column=column(path.name))
        found = outcomes(source)
        print(json.dumps(found))

    said = child.check(read, wanted)
    if "ok" in wanted:
        found = json.loads(said.splitlines()[-1])
        assert found == {"bad": []} | wanted["ok"]


def outcomes(source):
    """How many pairs can be used, and why the others cannot."""
    bad = []
    usable = 0
    for i in range(len(source)):
        try:
            usable += bool(source.read(i).caption)
        except BadSample as sample:
            bad.append(sample.reason)
    return {"usable": usable, "bad": bad}


@pytest.mark.parametrize(("path", "wanted"), cases("indices"))
def test_indices(child, warm, path, wanted, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    database = shutil.copytree(warm / "index", child.given) / "index.sqlite"
    if path.suffix == ".sql":
        connection = sqlite3.connect(database, isolation_level=None)
        connection.executescript(path.read_text())
        connection.close()
    else:
        shutil.copy(path, database)

    def use():
        with served(child.given) as (index, web):
            ids = index.store.ids().tolist()
            index.search("a cat")
            index.similar(ids[-1])
            for item in index.items(ids):
                index.picture(item.id)
            for address in ("ids", "columns", "health"):
                assert web.get(f"/api/{address}").is_success, address
            everything = {"parts": [{"words": "a cat"}], "cutoff": False}
            found = web.post("/api/search", json=everything).json()
            assert len(found["hits"]) == len(index)

    child.check(use, wanted)


PICTURES = {
    path.name: wanted for path, wanted in (each.values for each in cases("pictures"))
}
GOOD, BAD = (
    [name for name, wanted in PICTURES.items() if kind in wanted]
    for kind in ("ok", "refused")
)


@contextmanager
def served(folder):
    """An index, and a client of its API."""
    with Index.open(folder) as index:
        app = make_app(index, ServeConfig())
        with TestClient(app, base_url="http://localhost") as web:
            yield index, web


def test_pictures_at_each_door(child, warm):
    """In a training set, an index, and a test set, where one that cannot be read is a
    miss.
    """
    pairs = child.given
    out = child.folder / "results"
    copy_pictures(PICTURES, pairs)
    said = child.check(command("data", pairs, "--json"), {"ok": {}})
    found = json.loads(said.splitlines()[-1])
    bad = sum(case["count"] for case in found["bad"].values())
    assert found["usable"] == len(GOOD)
    assert bad == len(BAD)

    index = shutil.copytree(warm / "index", child.folder / "index")
    child.check(command("index", pairs, "--out", index, "--workers", 1), {"ok": {}})
    with Index.open(index) as opened:
        states = list(opened.store.states(str(pairs)))
    faults = {Path(state.path).name: state.fault for state in states}
    assert sorted(faults) == sorted(PICTURES)
    assert sorted(name for name, fault in faults.items() if fault) == sorted(BAD)

    words = ["--retrieval", pairs, "--out", out, *ON_CPU]
    child.check(command("eval", MODEL, *words), {"ok": {}})
    (row,) = read_json(out / "results.json")["rows"]
    assert row["retrieval"]["given"]["n"] == len(PICTURES)


def test_uploads(child, warm):
    def send():
        with served(warm / "index") as (_, web):
            for name in PICTURES:
                data = (CORPUS / "pictures" / name).read_bytes()
                files = {"file": (f"../../{name}", data, "image/png")}
                answer = web.post("/api/uploads", files=files)
                detail = answer.json().get("detail", "")
                print(json.dumps([name, answer.status_code, detail]))

    for line in child.check(send, {"ok": {}}).splitlines():
        name, status, detail = json.loads(line)
        assert status in ([200] if name in GOOD else [413, 415]), line
        assert "\n" not in detail and "/" not in detail, line


def mutate(content, source):
    """One to three changes: other bytes, a cut, or a piece that is there twice."""
    changed = bytearray(content)
    for _ in range(source.randint(1, 3)):
        at = source.choice((source.randrange(len(changed)), source.randrange(200)))
        end = at + source.randint(1, 8)
        twice = 2 * bytes(changed[at:end])
        changed[at:end] = source.choice((source.randbytes(end - at), b"", twice))
    return bytes(changed)


@pytest.mark.parametrize(
    "name", ["mljku_micro.pt", "crowsonkb_micro.pkl", "open_clip_model.safetensors"]
)
def test_mutated_weights(child, name):
    source = on_base(BASE / name, child.given)
    target = source / name if source.is_dir() else source
    content = target.read_bytes()

    def load():
        refused = 0
        for seed in range(40):
            target.write_bytes(mutate(content, random.Random(seed)))
            try:
                load_model(source, device="cpu")
            except InputError as error:
                refused += "\n" not in str(error)
        print(refused)

    assert int(child.check(load, {"ok": {}})) >= 10
