"""Shards that lie elsewhere: fetched by a command or from a server, counted, kept in
the cache.

Nothing that a list of counts or a server names is run, and nothing hangs.
"""

import asyncio
import json
import logging
import os
import pickle
import shutil
import sys
import tarfile
import time
from contextlib import nullcontext
from types import SimpleNamespace

import fsspec
import pytest

import make
from cloob import open_source
from cloob.cache import Cache
from cloob.cli import main
from cloob.data.batch import BadSample
from cloob.data.loader import PairLoader
from cloob.data.shards import remote as opener
from cloob.data.shards.remote import fetch
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError
from make import code_points, noise, write_tar
from support import raises

SIZES = {"00000.tar": 5, "00001.tar": 4, "00002.tar": 3}
pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="commands of a POSIX shell"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the cache. No attempt waits for the one before."""
    monkeypatch.setattr(opener, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def spec(shards):
    """Three shards behind a command, with their list."""
    (shards / "sizes.json").write_text(json.dumps(SIZES))
    return f"pipe:cat {shards}/{{00000..00002}}.tar"


@pytest.fixture
def web():
    with make.web() as server:
        yield server


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_streamed_shards_read_like_local_ones_and_are_fetched_once(spec, shards):
    spec, asked = f"{spec} && echo $0 >> {shards}/asked", shards / "asked"
    source = open_source(spec)
    local = open_source(shards)
    assert source.streamed
    assert source.name == spec
    assert source.shard_sizes == (5, 4, 3)
    assert len(source) == 12
    assert (
        asked.read_text().count("\n") == 2
    )  # sizes.json, and the first shard to see that it works
    expected = [local.read(i) for i in range(12)]
    assert [source.read(i) for i in range(12)] == expected
    assert open_source(spec).read(0) == expected[0]
    assert pickle.loads(pickle.dumps(source)).read(11) == expected[11]
    assert asked.read_text().count("\n") == 5


def test_http_and_what_else_fsspec_opens(spec, shards, web):
    web.pages = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    source = open_source(f"{web.url}/{{00000..00002}}.tar")
    assert [source.read(i).caption for i in (0, 11)] == ["pair 0", "pair 11"]
    raises(
        InputError,
        r"absent/sizes\.json: no such file",
        open_source,
        f"{web.url}/absent/0.tar",
    )
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/pairs/{path.name}", path.read_bytes())
    try:
        assert (
            open_source("memory://pairs/{00000..00002}.tar").read(11).caption
            == "pair 11"
        )
    finally:
        memory.rm("/pairs", recursive=True)


def test_a_failed_fetch_names_shard_status_and_attempts(spec, shards, cache):
    source = open_source(spec)
    (shards / "00001.tar").unlink()
    said = (
        r"^pipe:cat \S*00001\.tar: its command ended with exit status 1 \(3 attempts\)$"
    )
    raises(InputError, said, source.read, 5)
    pairs = PairLoader(source, TrainTransform(4), code_points, 5, workers=1)
    with pytest.raises(InputError, match=said):  # in a worker too
        list(pairs.epoch(0))
    pairs.close()
    assert source.read(0).caption == "pair 0"
    wait_until(lambda: not list(cache.rglob(".tmp-*")))  # a thread may still try
    raises(
        InputError,
        "command not found",
        open_source,
        "pipe:no-such-command-here x/0.tar 2> /dev/null",
    )


def test_a_flaky_command_is_tried_again(spec, shards):
    once = shards / "once"
    shard = shards / "00000.tar"
    flaky = (
        f"pipe:if test -e {once} || echo {shard} | grep -q json; then cat {shard}; else"
        f" touch {once}; exit 3; fi"
    )
    assert open_source(flaky).read(4).caption == "pair 4"
    assert once.exists()
    with pytest.raises(
        InputError, match="exit status 141"
    ):  # a broken pipe within the command is no complete shard
        open_source(f"pipe:head -c 10 {shards}/00000.tar; exit 141")


def test_a_shard_with_fewer_or_more_samples_than_listed(spec, shards, caplog):
    (shards / "sizes.json").write_text(
        json.dumps({**SIZES, "00000.tar": 7, "00001.tar": 2})
    )
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
        assert [source.read(i).caption for i in (7, 8, 9, 7)] == [
            "pair 5",
            "pair 6",
            "pair 9",
            "pair 5",
        ]
    assert (
        caplog.text.count(
            "00001.tar: holds 4 samples, sizes.json has 2: the others are left out"
        )
        == 1
    )


def test_what_is_left_out_of_streamed_shards_is_said(shards, caplog):
    """A key with a dot: both where the shards are counted and where they are read."""
    write_tar(
        shards / "00001.tar",
        {"0.jpg": noise(), "0.txt": b"c", "photo.0.png": noise(), "photo.0.txt": b"c"},
    )
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    said = "2 files that a tar holds twice, or whose key has a dot"
    assert main(["data", spec, "--count"]) == 0
    assert f"00001.tar: not counted: {said}" in caplog.text
    caplog.clear()
    assert open_source(spec).read(5).caption == "c"
    assert f"00001.tar: not read: {said}" in caplog.text


def test_damaged_streamed_shards(spec, shards, cache):
    with tarfile.open(shards / "00001.tar") as tar:
        cut = tar.getmember("p007.png").offset_data + 10
    os.truncate(shards / "00001.tar", cut)
    source = open_source(spec)
    assert [source.read(i).caption for i in (5, 6, 9)] == ["pair 5", "pair 6", "pair 9"]
    for row in (7, 8):
        raises(
            BadSample,
            r"holds 2 samples, sizes\.json has 4: cut after",
            source.read,
            row,
        )
    shutil.rmtree(cache)
    (shards / "00000.tar").write_bytes(b"<html>no" * 200)
    raises(
        InputError,
        r"00000\.tar: gave no readable shard \(is not a tar archive",
        open_source,
        spec,
    )
    assert not list(cache.rglob("*.tar"))  # it is not kept


def test_counting(shards, capsys):
    (shards / "sizes.json").write_text(
        '{"00000.tar": 99}'
    )  # a stale one is no obstacle
    assert main(["data", str(shards), "--count"]) == 0
    assert json.loads((shards / "sizes.json").read_text()) == SIZES
    assert "3 shards, 12 samples" in capsys.readouterr().out
    (shards / "sizes.json").unlink()
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    written = shards.parent / "sizes.json"
    raises(
        InputError,
        r"number of samples .* must be known; .*cloob data FOLDER --count",
        open_source,
        spec,
    )
    assert main(["data", spec, "--count", "--out", str(written)]) == 0
    assert json.loads(written.read_text()) == SIZES  # to be put beside the shards
    source = open_source(spec)  # by what was counted on this host
    assert source.streamed
    assert source.shard_sizes == (5, 4, 3)
    assert source.read(11).caption == "pair 11"
    os.truncate(shards / "00000.tar", 2000)
    capsys.readouterr()
    assert main(["data", f"{shards}/*.tar", "--count"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["data", str(shards), "--count"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{shards}/00000.tar: cut after 2,000 bytes" in line


def test_a_count_goes_on_where_it_stopped(shards, capsys):
    asked = shards / "asked"
    last = shards / "00002.tar"
    spec = f"pipe:echo x >> {asked}; cat {shards}/{{00000..00002}}.tar"
    content = last.read_bytes()
    last.unlink()
    assert (
        main(["data", spec, "--count"]) == 2
    )  # the last one cannot be fetched, which ends it
    last.write_bytes(content)
    for fetched in (1, 3):  # a count that has ended is begun anew
        asked.write_text("")
        assert main(["data", spec, "--count"]) == 0
        assert asked.read_text().count("x") == fetched


def test_a_shard_that_had_to_make_room_is_still_read(spec, shards, tmp_path, caplog):
    together = sum((shards / name).stat().st_size for name in SIZES)
    source = open_source(spec, cache=Cache(tmp_path / "small", max_bytes=together - 1))
    with caplog.at_level(logging.WARNING):
        source.read(0), source.read(5), source.read(11)
    kept = sorted(
        path.name[-9:] for path in (tmp_path / "small" / "shards").glob("*.tar")
    )
    assert "00000.tar" not in kept
    assert "00002.tar" in kept
    assert (
        "raise $CLOOB_CACHE_BYTES" in caplog.text
    )  # all three were in use within seconds
    assert source.read(1).caption == "pair 1"  # still open, though its name is gone
    assert (
        pickle.loads(pickle.dumps(source)).read(1).caption == "pair 1"
    )  # fetched again


def test_shards_are_fetched_before_they_are_needed(spec, cache):
    next(PairLoader(open_source(spec), TrainTransform(4), code_points, 5).epoch(0))
    wait_until(lambda: len(list((cache / "shards").glob("*.tar"))) == 3)


def test_a_list_of_counts_runs_no_command(shards, tmp_path, web):
    marker = tmp_path / "executed"
    content = json.dumps(
        {f"pipe:touch {marker}; cat x.tar": 5, "../x.tar": 1, "/etc/x.tar": 1}
    ).encode()
    (shards / "sizes.json").write_bytes(content)
    assert len(open_source(shards)) == 12
    web.pages["/sizes.json"] = content
    raises(
        InputError,
        r"sizes\.json: has no count for 0\.tar",
        open_source,
        f"{web.url}/0.tar",
    )
    raises(InputError, "expected a folder, a table", open_source, shards / "sizes.json")
    assert not marker.exists()


def test_redirects(web, tmp_path):
    target = tmp_path / "got"
    web.pages["/there"] = b"here"
    web.redirect("/moved", "/there")
    fetch(f"{web.url}/moved", target)
    assert target.read_bytes() == b"here"
    for to in ("file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:id"):
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
