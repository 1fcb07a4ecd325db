"""Shards that lie elsewhere: fetched from a server, counted, kept in the cache.

Nothing that a list of counts or a server names is run, and nothing hangs.
"""

import asyncio
import json
import logging
import os
import pickle
import tarfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

import fsspec
import pytest

import make
from cloob import open_source
from cloob.data.batch import BadSample
from cloob.data.shards import remote as opener
from cloob.data.shards.remote import fetch
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError
from make import code_points, loaded, noise, write_tar
from support import raises

SIZES = {"00000.tar": 5, "00001.tar": 4, "00002.tar": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache. No attempt waits for the one before."""
    monkeypatch.setattr(opener, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web():
    with make.web() as server:
        yield server


@pytest.fixture
def spec(shards, web):
    """Three shards on a server, with their list."""
    (shards / "sizes.json").write_text(json.dumps(SIZES))
    serve(web, shards)
    return f"{web.url}/{{00000..00002}}.tar"


def serve(web, shards):
    """Puts the files as they are now on the server."""
    web.pages = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}


def fetched(web):
    """The names that a client got since the last call, each request once."""
    names = [path.lstrip("/") for path in web.asked]
    web.asked.clear()
    return sorted(set(names))


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_streamed_shards_read_like_local_ones_and_are_fetched_once(spec, shards, web):
    source = open_source(spec)
    local = open_source(shards)
    assert source.streamed
    assert source.name == spec
    assert source.shard_sizes == (5, 4, 3)
    assert fetched(web) == ["00000.tar", "sizes.json"]  # one to see that it works
    expected = [local.read(i) for i in range(12)]
    assert [source.read(i) for i in range(12)] == expected
    assert fetched(web) == ["00001.tar", "00002.tar"]
    assert open_source(spec).read(0) == expected[0]
    assert pickle.loads(pickle.dumps(source)).read(11) == expected[11]
    assert fetched(web) == ["sizes.json"]


def test_what_else_fsspec_opens(spec, shards):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/pairs/{path.name}", path.read_bytes())
    pattern = "memory://pairs/{00000..00002}.tar"
    try:
        assert open_source(pattern).read(11).caption == "pair 11"
    finally:
        memory.rm("/pairs", recursive=True)
    raises(InputError, "nothing here opens gopher://", open_source, "gopher://a/b.tar")


def test_a_failed_fetch_names_shard_status_and_attempts(spec, web, cache):
    source = open_source(spec)
    web.pages["/00001.tar"] = lambda request: request.answer(503, b"")
    message = r"^http\S*00001\.tar: .*503.* \(3 attempts\)$"
    raises(InputError, message, source.read, 5)
    pairs = loaded(source, TrainTransform(4), code_points, 5, workers=1)
    with pytest.raises(InputError, match=message):  # in a worker too
        list(pairs.epoch(0))
    pairs.close()
    assert source.read(0).caption == "pair 0"
    wait_until(lambda: not list(cache.rglob(".tmp-*")))  # a thread may still try
    del web.pages["/00001.tar"]
    raises(InputError, r"00001\.tar: no such file", source.read, 5)


def test_a_shard_with_fewer_or_more_samples_than_listed(spec, shards, web, caplog):
    sizes = {**SIZES, "00000.tar": 7, "00001.tar": 2}
    web.pages["/sizes.json"] = json.dumps(sizes).encode()
    source = open_source(spec)
    assert source.shard_sizes == (7, 2, 3)
    for row in (5, 6):
        with pytest.raises(
            BadSample, match=r"00000\.tar holds 5 samples, sizes\.json has 7"
        ) as caught:
            source.read(row)
        assert caught.value.reason == "truncated shard"
        assert caught.value.key == f"00000.tar/{row}"
    with caplog.at_level(logging.WARNING):
        captions = [source.read(i).caption for i in (7, 8, 9, 7)]
    assert captions == ["pair 5", "pair 6", "pair 9", "pair 5"]
    warning = "00001.tar: holds 4 samples, sizes.json has 2: the others are left out"
    assert caplog.text.count(warning) == 1


def test_what_is_left_out_of_streamed_shards_is_said(spec, shards, web, caplog):
    files = {"0.jpg": noise(), "0.txt": b"c", "a.0.png": noise(), "a.0.txt": b"c"}
    web.pages["/00001.tar"] = write_tar(shards / "00001.tar", files).read_bytes()
    assert open_source(spec).read(5).caption == "c"
    warning = "2 files that a tar holds twice, or whose key has a dot"
    assert f"00001.tar: not read: {warning}" in caplog.text


def test_damaged_streamed_shards(spec, shards, web, cache):
    with tarfile.open(shards / "00001.tar") as tar:
        cut = tar.getmember("p007.png").offset_data + 10
    os.truncate(shards / "00001.tar", cut)
    serve(web, shards)
    source = open_source(spec)
    found = [source.read(i).caption for i in (5, 6, 9)]
    assert found == ["pair 5", "pair 6", "pair 9"]
    raises(BadSample, "truncated shard .*cut after", source.read, 7)
    raises(BadSample, r"truncated shard .*sizes\.json has 4", source.read, 8)
    web.pages["/bad.tar"] = b"<html>no" * 200
    web.pages["/sizes.json"] = b'{"bad.tar": 3}'
    message = r"bad\.tar: gave no readable shard \(is not a tar archive"
    raises(InputError, message, open_source, f"{web.url}/bad.tar")
    assert not list(cache.rglob("*bad.tar"))  # it is not kept


def test_shards_that_no_list_counts_are_refused(spec, web):
    web.pages["/sizes.json"] = b'{"00000.tar": 5, "00001.tar": 4}'
    raises(InputError, r"json: does not count .* 00002\.tar", open_source, spec)
    web.pages["/sizes.json"] = lambda request: request.answer(500, b"")
    raises(InputError, r"sizes\.json: .*500", open_source, spec)
    del web.pages["/sizes.json"]
    message = r"sizes\.json: no such file.*; next to streamed shards has to lie"
    raises(InputError, message, open_source, spec)


def test_a_shard_that_had_to_make_room_is_still_read(spec, shards, cache, monkeypatch):
    together = sum((shards / name).stat().st_size for name in SIZES)
    monkeypatch.setenv("CLOOB_CACHE_BYTES", str(together - 1))
    source = open_source(spec)
    source.read(0), source.read(5), source.read(11)
    kept = sorted(path.name[-9:] for path in (cache / "shards").glob("*.tar"))
    assert "00000.tar" not in kept
    assert "00002.tar" in kept
    assert source.read(1).caption == "pair 1"  # still open, though its name is gone
    assert (
        pickle.loads(pickle.dumps(source)).read(1).caption == "pair 1"
    )  # fetched again


def test_shards_are_fetched_before_they_are_needed(spec, cache):
    next(loaded(open_source(spec), TrainTransform(4), code_points, 5).epoch(0))
    wait_until(lambda: len(list((cache / "shards").glob("*.tar"))) == 3)


@pytest.mark.parametrize("content", [b"[1]", b'{"0.tar": -1}', b'{"0.tar": "1"}'])
def test_a_list_of_counts_is_data(web, content):
    web.pages["/sizes.json"] = content
    raises(InputError, r"sizes\.json: is not", open_source, f"{web.url}/0.tar")


def test_redirects(web, tmp_path):
    target = tmp_path / "got"
    web.pages["/there"] = b"here"
    web.redirect("/moved", "/there")
    fetch(f"{web.url}/moved", target)
    assert target.read_bytes() == b"here"
    for to in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        web.redirect("/away", to)
        raises(InputError, "/away", fetch, f"{web.url}/away", target)
    with make.web() as other:
        other.pages["/there"] = b"here"
        web.redirect("/moved", f"{other.url}/there")
        web.headers.clear()
        fetch(f"{web.url.replace('//', '//me:secret@')}/moved", target)
    assert "Authorization" in web.headers[0]
    assert "Authorization" not in other.headers[0]


def test_no_redirect_leaves_encryption():
    (traces,) = opener._web("https://a.example/x").client_kwargs["trace_configs"]
    for to, refused in (
        ("http://a.example/x", True),
        ("https://b.example/x", False),
        ("/x", False),
    ):
        answer = SimpleNamespace(headers={"Location": to})
        asked = SimpleNamespace(url=SimpleNamespace(scheme="https"), response=answer)
        with pytest.raises(InputError, match="refused") if refused else nullcontext():
            asyncio.run(traces.on_request_redirect[0](None, None, asked))


def test_a_body_that_ends_early_and_a_server_that_says_nothing(
    web, tmp_path, monkeypatch
):
    monkeypatch.setattr(opener, "_SILENT_SECONDS", 0.2)
    target = tmp_path / "got"
    cut = lambda request: request.answer(200, b"x" * 10, length=1000)  # noqa: E731
    web.pages["/cut"] = cut
    web.pages["/once"] = lambda request: (
        web.pages.update({"/once": b"whole"}),
        cut(request),
    )
    web.pages["/silent"] = lambda request: request.rfile.read(
        1
    )  # until the client goes
    for page in ("/cut", "/silent"):
        raises(InputError, rf"{page}: .*\(3 attempts\)", fetch, web.url + page, target)
    fetch(f"{web.url}/once", target)
    assert target.read_bytes() == b"whole"
