"""The public doors give what they gave when `recorded.json` was written: a rewrite
behind them changes nothing.

``pytest tests/doors --update-golden`` writes the record anew. A commit that does so
says why.
"""

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cloob import cli, load_model, open_source
from doors import COLOURS, THINGS, cloob, jsons
from support import fork, free_port, read_json

OBJECTIVES = (
    "clip",
    "infoloob",
    "infonce-hopfield",
    "cloob",
    "siglip",
)
TEXTS = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS[:2]]


def losses(run, name="metrics.jsonl"):
    lines = (run / name).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_train(world, recorded, tmp_path, objective):
    """Twelve steps from the same weights, with a held-out share and bad rows."""
    run = tmp_path / "run"
    file = tmp_path / "more.toml"
    file.write_text("keep = 3\n")
    words = [
        "--data",
        world.dirty,
        "--val-split",
        0.25,
        "--init",
        world.model,
        "--objective",
        objective,
    ]
    words += [
        "--config",
        file,
        "--lr",
        1e-3,
        "--warmup",
        2,
        "--batch-size",
        8,
        "--steps",
        12,
    ]
    words += [
        "--workers",
        0,
        "--max-bad-fraction",
        0.5,
        "--device",
        "cpu",
        "--out",
        run,
    ]
    cloob("train", *words)
    skipped = Counter(
        json.loads(line)["reason"]
        for line in (run / "skipped.jsonl").read_text().splitlines()
    )
    files = {
        "config.json",
        "metrics.jsonl",
        "epochs.jsonl",
        "skipped.jsonl",
        "checkpoints",
    }
    assert {path.name for path in run.iterdir()} == files
    recorded(f"train {objective}", {"losses": losses(run), "skipped": dict(skipped)})


def test_align(world, recorded, tmp_path):
    run = tmp_path / "run"
    words = [
        "--data",
        world.pairs,
        "--val-split",
        0.25,
        "--batch-size",
        8,
        "--epochs",
        4,
    ]
    cloob(
        "train",
        "align",
        *words,
        "--objective",
        "cloob",
        "--workers",
        0,
        "--device",
        "cpu",
        "--out",
        run,
    )
    found = load_model(str(run)).encode_text(TEXTS).numpy()
    of_epochs = losses(run, "epochs.jsonl")
    recorded("train align", {"losses": of_epochs, "cosines": found @ found[0]})


def test_eval(world, recorded, tmp_path):
    words = ["--zeroshot", world.classes, "--retrieval", world.pairs, "--probe"]
    cloob("eval", world.model, *words, "--device", "cpu", "--out", tmp_path / "eval")
    (row,) = read_json(tmp_path / "eval" / "results.json")["rows"]
    kept = ("objective", "zeroshot", "retrieval", "geometry", "probe")
    recorded("eval", {key: row[key] for key in kept if key in row})
    assert (tmp_path / "eval" / "report.html").is_file()


SEARCHES = [
    ("words", ["a red bar", "--top", 5, "--cutoff", "none"]),
    ("words with the cutoff", ["a green thing", "--top", 5]),
    ("nothing fits", ["tax return document", "--top", 5, "--cutoff", 3]),
    (
        "terms to subtract",
        ["a red bar", "--top", 5, "--cutoff", "none", "--", "a grey bar"],
    ),
    ("a picture", ["{pairs}/25.png", "--top", 3, "--cutoff", "none"]),
    (
        "where",
        [
            "a red bar",
            "--top",
            5,
            "--cutoff",
            "none",
            "--where",
            "caption like '%dot%' and width = 40",
        ],
    ),
    ("like", ["--like", 3, "--top", 3]),
]


@pytest.mark.parametrize(
    ("door", "words"),
    SEARCHES,
)
def test_search(world, recorded, door, words):
    words = [str(word).format(pairs=world.pairs) for word in words]
    place = words.index("--") if "--" in words else len(words)
    found = cloob("search", world.index, *words[:place], "--json", *words[place:])
    recorded(f"search: {door}", jsons(found))


@pytest.mark.parametrize(
    "more", [(), ("--none",), ("--multi",)], ids=["softmax", "none", "multi"]
)
def test_classify(world, recorded, more):
    found = cloob(
        "classify", world.index, "--labels", "red,green,blue", *more, "--json"
    )
    recorded(f"classify {' '.join(more)}".strip(), jsons(found))


def test_embed(world, recorded, tmp_path):
    for ending in ("npz", "parquet"):
        cloob("embed", world.index, "--out", tmp_path / f"rows.{ending}")
        assert (tmp_path / f"rows.{ending}").stat().st_size > 40 * 16 * 4
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    found = {
        name: [list(value.shape), np.atleast_1d(value)[:4]]
        for name, value in arrays.items()
        if name != "date"
    }
    recorded("embed", found)


def test_data(world, recorded, tmp_path):
    recorded("data", jsons(cloob("data", world.dirty, "--json")))
    source = open_source(str(world.dirty))
    recorded("open_source", {"pairs": len(source)})


def rows(place):
    """All pictures of an index by name, as a search lists them."""
    (found,) = jsons(
        cloob("search", place, "red", "--top", 1000, "--cutoff", "none", "--json")
    )
    return {
        Path(hit["path"]).name: [hit["caption"], hit["width"], hit["height"]]
        for hit in found["hits"]
    }


def test_index(world, recorded, tmp_path):
    """Add, change, rename and remove pictures: the index follows, and each step ends as
    one made anew would.
    """
    pictures = tmp_path / "pictures"
    place = tmp_path / "idx"
    pictures.mkdir()

    def copy(*names):
        for name in names:
            shutil.copy(world.pairs / name, pictures / name)

    def updated():
        cloob("index", pictures, "--model", world.model, "--out", place)
        return rows(place)

    copy("00.png", "00.txt", "10.png", "10.txt", "20.png")
    found = {"first": updated()}
    copy("30.png", "30.txt")
    (pictures / "20.txt").write_text("a caption that came later")
    found["added, described"] = updated()
    (pictures / "00.png").rename(pictures / "red.png")
    (pictures / "00.txt").rename(pictures / "red.txt")
    found["renamed"] = updated()
    shutil.copy(world.pairs / "33.png", pictures / "10.png")
    os.utime(pictures / "10.png", (1, 1))
    found["changed"] = updated()
    (pictures / "20.png").unlink()
    found["removed"] = updated()
    recorded("index", found)
    anew = tmp_path / "anew.idx"
    cloob("index", pictures, "--model", world.model, "--out", anew)
    assert rows(anew) == found["removed"]


def ask(port, method, path, body=None, headers=None, raw=None):
    """Status, content type and what a rewrite must not change of the body."""
    data = (
        raw if raw is not None else None if body is None else json.dumps(body).encode()
    )
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, method=method
    )
    for name, value in ({"content-type": "application/json"} | (headers or {})).items():
        asked.add_header(name, value)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            code = answer.status
            kind = answer.headers.get_content_type()
            content = answer.read()
    except urllib.error.HTTPError as error:
        code = error.code
        kind = error.headers.get_content_type()
        content = error.read()
    return (
        code,
        kind,
        json.loads(content) if kind == "application/json" else len(content) > 0,
    )


def multipart(name, content):
    head = (
        '--frontier\r\ncontent-disposition: form-data; name="file";'
        f' filename="{name}"\r\n\r\n'.encode()
    )
    kind = {"content-type": "multipart/form-data; boundary=frontier"}
    return {"raw": head + content + b"\r\n--frontier--\r\n", "headers": kind}


@pytest.fixture(scope="module")
def browser(world, tmp_path_factory):
    yield from serve(world, tmp_path_factory.mktemp("serve"), "--no-token")


def serve(world, folder, *more):
    port = free_port()
    words = ["serve", str(world.index), "--port", str(port), *more]
    ranks = fork(folder, 1, lambda: cli.main(words))
    browser = partial(ask, port)
    end = time.monotonic() + 120
    while True:
        try:
            browser("GET", "/api/health")
            break
        except OSError:
            assert not ranks.poll() and time.monotonic() < end, ranks.told()
            time.sleep(0.05)
    yield browser
    os.kill(ranks.pids[0], signal.SIGTERM)
    ranks.wait()


REQUESTS = json.loads(
    Path(__file__).with_name("requests.json").read_text().replace("LONG", "x" * 300_000)
)


def test_serve(recorded, browser, world):
    found = {
        f"{method} {path}": browser(method, path, body)
        for method, path, body in REQUESTS["answered"]
    }
    found["GET /api/health"][2].pop("ready")  # whether it is loaded by now
    upload = browser(
        "POST",
        "/api/uploads",
        **multipart("red.png", (world.pairs / "05.png").read_bytes()),
    )
    key = upload[2].pop("upload")
    found["POST /api/uploads"] = upload
    body = {"parts": [{"upload": key}], "top": 2, "cutoff": False}
    found["POST /api/search, an upload"] = browser("POST", "/api/search", body)
    recorded("serve", found)


def test_serve_refuses(recorded, browser, world):
    """The status is recorded; one short line about it is asserted."""
    found = {}
    for method, path, body, headers in REQUESTS["refused"]:
        code, _, answer = browser(method, path, body, headers)
        found[f"{method} {path} {json.dumps(body)[:90]} {headers or ''}".strip()] = code
        assert isinstance(answer, bool) or 5 < len(json.dumps(answer)) < 1000, (
            path,
            answer,
        )
        assert str(world.root) not in json.dumps(answer)
    found["an upload that is no picture"] = browser(
        "POST", "/api/uploads", **multipart("x.png", b"no picture")
    )[0]
    found["a JSON that is cut"] = browser("POST", "/api/search", raw=b'{"parts": [')[0]
    recorded("serve: refusals", found)


def test_serve_wants_its_token(recorded, world, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_TOKEN", "a-long-secret-token")
    for browser in serve(world, tmp_path):
        answers = [
            browser("GET", path)[0]
            for path in ("/", "/api/health", "/api/items/3", "/page/base.css")
        ]
        for token in ("a-long-secret-token", "another"):
            headers = {"authorization": f"Bearer {token}"}
            answers += [browser("GET", "/api/health", headers=headers)[0]]
    recorded("serve: token", answers)


def features(model, world):
    opened = load_model(str(model))
    pictures = [world.pairs / f"{c}0.png" for c in range(4)]
    return {
        "image": opened.encode_image(pictures).numpy(),
        "text": opened.encode_text(TEXTS[:4]).numpy(),
    }


def test_load_and_export(world, recorded, tmp_path):
    """The same features from the model, its copy and its export; of ONNX:
    ``models/onnx``.
    """
    found = features(world.model, world)
    recorded("load_model", found)
    for name in ("cloob", "transformers"):
        cloob("export", world.model, "--out", tmp_path / name, "--to", name)
        again = features(tmp_path / name, world)
        for key, value in found.items():
            assert again[key] == pytest.approx(value, abs=2e-5), name
