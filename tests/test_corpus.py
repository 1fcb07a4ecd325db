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
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from cloob import Index, cli, load_model, open_source
from cloob.data.batch import BadSample
from cloob.errors import InputError, message
from cloob.serve.app import make_app
from cloob.serve.config import ServeConfig
from support import OPENING, fork

resource = pytest.importorskip("resource", reason="no limits of memory here")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="a limit of memory needs Linux"
)

CORPUS = Path(__file__).parent / "corpus"
HOSTILE, BASE = CORPUS / "hostile", CORPUS / "hostile" / "base"
MODEL = (
    CORPUS / "weights" / "crowsonkb" / "full_vocab" / "slim.pkl"
)  # its tokenizer is open_clip's
ASKED_THE_NETWORK = 99


def cases(*folders):
    """A parameter for each entry of the folders' ``expect.json``: its path in the
    corpus, and what is expected.
    """
    return [
        pytest.param(CORPUS / folder / name, wanted, id=f"{folder}/{name}")
        for folder in folders
        for name, wanted in json.loads(
            (CORPUS / folder / "expect.json").read_text()
        ).items()
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
        self.folder, self.empty, self.given = folder, folder / "empty", folder / "given"
        self.empty.mkdir()

    def run(self, work):
        """The exit code and the output; InputErrors end as the command line's do."""

        def limited():
            os.chdir(self.empty)
            used = (
                int(Path("/proc/self/statm").read_text().split()[0])
                * resource.getpagesize()
            )
            resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (20, 25))
            socket.socket.connect = socket.getaddrinfo = no_network  # type: ignore[method-assign, assignment]
            try:
                return int(work() or 0)  # type: ignore[call-overload, no-any-return]
            except (InputError, MemoryError) as error:
                print(f"cloob: {message(error)}")
                return 2

        before = self._files()
        ranks = fork(self.folder / "said", 1, limited)
        code, said = ranks.wait()[0], ranks.told().replace(OPENING, "")
        assert code != ASKED_THE_NETWORK, "it asked the network"
        assert "Traceback" not in said, said
        assert not markers(), "its code ran"
        assert self._files() == before, "it wrote files"
        return code, said

    def check(self, work, wanted):
        """What the work said; its end and its line are as expected."""
        code, said = self.run(work)
        assert code in {"ok": (0,), "refused": (2,)}.get(
            next(iter(wanted), ""), (0, 2)
        ), (code, said)
        if code:
            *before, line = said.splitlines()
            assert line.startswith("cloob: ") and not any(
                other.startswith("cloob: ") for other in before
            ), said
            words = wanted.get("refused") or [str(self.given)]
            assert len(line) < 1200 and all(word in line for word in words), said
        return said

    def _files(self):
        """But for what SQLite keeps beside a database."""
        paths = (
            path for place in (self.empty, self.given) for path in place.rglob("*")
        )
        return sorted(
            str(path)
            for path in paths
            if not re.search(r"-(shm|wal)$|vectors-", path.name)
        )


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
    for name in ("good.png", "cmyk.jpg", "alpha.webp"):
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copy(CORPUS / "pictures" / name, folder / "pictures")
        (folder / "pictures" / name).with_suffix(".txt").write_text(f"a cat {name}")
    models = (
        BASE / "mljku_micro.pt",
        BASE / "crowsonkb_micro.pkl",
        CORPUS / "weights/open_clip/vit_quickgelu",
    )
    for i, path in enumerate(models):
        assert (
            cli.main(
                [
                    "export",
                    str(on_base(path, folder / f"{i}")),
                    "--to=cloob",
                    f"--out={folder / f'model-{i}'}",
                ]
            )
            == 0
        )
    assert (
        cli.main(
            [
                "index",
                str(folder / "pictures"),
                "--model",
                str(MODEL),
                "--out",
                str(folder / "index"),
            ]
        )
        == 0
    )
    assert cli.main(["search", str(folder / "index"), "a cat"]) == 0
    for name in (
        "tables/good.csv",
        "tables/good.arrow",
        "tables/good.parquet",
        "tars/good.tar",
    ):
        assert (
            cli.main(["data", str(CORPUS / name), "--image-column", column(name)]) == 0
        )
    return folder


def column(name):
    return (
        "image"
        if name.endswith(("arrow", "parquet")) and not name.endswith("paths.parquet")
        else "filepath"
    )


def on_base(path, home):
    """A copy of a file where only its own fault stands between it and a model; what
    ``load_model`` is given.
    """
    shutil.copytree(BASE, home)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        if path.suffix != ".safetensors" and not path.name.endswith("open_clip.json"):
            (home / name).unlink()
    (home / "crowsonkb_micro.json").rename(home / "config.json")
    if path.is_dir():
        shutil.rmtree(home)
        shutil.copytree(path, home)
        if path.name.startswith("hf_") and not (home / "config.json").exists():
            shutil.copy(
                CORPUS / "weights" / "hf_clip" / "vit_gelu" / "config.json", home
            )
        return home
    if path.suffix == ".safetensors" or path.name.endswith("open_clip.json"):
        (home / "config.json").unlink()
        shutil.copy(
            path,
            home
            / f"open_clip_{'model.safetensors' if path.suffix != '.json' else 'config.json'}",
        )
        return home
    if path.suffix == ".json":
        shutil.copy(path, home / "config.json")
        return home / "crowsonkb_micro.pkl"
    return Path(shutil.copy(path, home))


@pytest.mark.parametrize(("path", "wanted"), cases("hostile"))
def test_weights(child, path, wanted):
    made = child.folder / "made"
    source = on_base(path, child.given)
    said = child.check(command("export", source, "--to=cloob", "--out", made), wanted)
    assert made.exists() == (
        "cloob: " not in said
    )  # Python 3.11 prints a line before it of a bytearray of 1 TB


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
    if kind == "text":
        encoders = [
            "--image-encoder",
            CORPUS / "weights/open_clip/vit_quickgelu",
            "--text-encoder",
            child.given,
        ]
        data = [
            "--data",
            warm / "pictures",
            "--out",
            child.folder / "run",
            "--workers",
            0,
            "--device",
            "cpu",
        ]
        child.check(
            command("train", "align", *encoders, *data, "--batch-size", 2), wanted
        )
        assert not (child.folder / "run").exists()
    else:

        def use():
            model = load_model(child.given, device="cpu")
            if (
                kind == "onnx"
            ):  # graphs are opened by the first row that is asked of them
                model.encode_image(
                    torch.zeros(
                        1, 3, model.image_size, model.image_size, dtype=torch.uint8
                    )
                )
                model.encode_text(
                    torch.zeros(1, model.context_length, dtype=torch.int64)
                )

        child.check(use, wanted)


@pytest.mark.parametrize(("path", "wanted"), cases("tables", "tars"))
def test_data(child, path, wanted):
    given = shutil.copytree(path.parent, child.given) / path.name

    def read():
        source, bad, usable = open_source(given, image_column=column(path.name)), [], 0
        for i in range(len(source)):
            try:
                usable += bool(source.read(i).caption)
            except BadSample as sample:
                bad.append(sample.reason)
        print(json.dumps({"usable": usable, "bad": bad}))

    said = child.check(read, wanted)
    assert (
        json.loads(said.splitlines()[-1]) == {"bad": []} | wanted["ok"]
        if "ok" in wanted
        else True
    )


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
        with Index.open(child.given) as index:
            index.search("a cat")
            index.store.columns()
            index.similar(index.store.ids().tolist()[-1])
            for item in index.items(index.store.ids().tolist()):
                index.picture(item.id)
            with TestClient(
                make_app(index, ServeConfig()), base_url="http://localhost"
            ) as web:
                for address in ("ids", "columns", "health"):
                    assert web.get(f"/api/{address}").is_success, address
                found = web.post(
                    "/api/search", json={"parts": [{"words": "a cat"}], "cutoff": False}
                ).json()
                assert len(found["hits"]) == len(index)

    child.check(use, wanted)


PICTURES = {
    path.name: wanted for path, wanted in (each.values for each in cases("pictures"))
}
GOOD, BAD = (
    [name for name, wanted in PICTURES.items() if kind in wanted]
    for kind in ("ok", "refused")
)


@pytest.fixture
def pairs(child):
    """All pictures of the corpus, each with a caption."""
    child.given.mkdir()
    for name in PICTURES:
        shutil.copy(CORPUS / "pictures" / name, child.given)
        (child.given / f"{Path(name).stem}.txt").write_text(f"a cat {name}")
    return child.given


def test_pictures_of_a_training_set(child, pairs):
    found = json.loads(
        child.check(command("data", pairs, "--json"), {"ok": {}}).splitlines()[-1]
    )
    bad = {reason: case["count"] for reason, case in found["bad"].items()}
    assert found["usable"] == len(GOOD) and sum(bad.values()) == len(BAD), bad


def test_pictures_of_an_index(child, pairs, warm):
    index = shutil.copytree(warm / "index", child.folder / "index")
    child.check(command("index", pairs, "--out", index, "--workers", 1), {"ok": {}})
    with Index.open(index) as opened:
        here = {
            Path(state.path).name: state.fault
            for state in opened.store.states(str(pairs))
        }
    assert sorted(here) == sorted(PICTURES)
    assert sorted(name for name, fault in here.items() if fault) == sorted(BAD)


def test_pictures_of_a_test_set(child, pairs):
    out = child.folder / "results"
    words = ["--retrieval", pairs, "--out", out, "--workers", 0, "--device", "cpu"]
    child.check(command("eval", MODEL, *words), {"ok": {}})
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["retrieval"]["given"]["n"] == len(
        PICTURES
    )  # those that cannot be read are misses


def test_uploads(child, warm):
    def send():
        index = Index.open(warm / "index")
        with (
            index,
            TestClient(
                make_app(index, ServeConfig()), base_url="http://localhost"
            ) as web,
        ):
            for name in PICTURES:
                data = (CORPUS / "pictures" / name).read_bytes()
                answer = web.post(
                    "/api/uploads", files={"file": (f"../../{name}", data, "image/png")}
                )
                print(
                    json.dumps(
                        [name, answer.status_code, answer.json().get("detail", "")]
                    )
                )

    for line in child.check(send, {"ok": {}}).splitlines():
        name, status, detail = json.loads(line)
        assert (status == 200) == (name in GOOD) and status in (200, 413, 415), line
        assert "\n" not in detail and "/" not in detail, line


def mutate(content, source):
    """One to three changes: other bytes, a cut, or a piece that is there twice."""
    changed = bytearray(content)
    for _ in range(source.randint(1, 3)):
        at, size = (
            source.choice((source.randrange(len(changed)), source.randrange(200))),
            source.randint(1, 8),
        )
        changed[at : at + size] = source.choice(
            (source.randbytes(size), b"", 2 * bytes(changed[at : at + size]))
        )
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
