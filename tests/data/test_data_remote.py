from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image
from torch import Tensor

from cloob.cache import Cache
from cloob.cli import main
from cloob.data.batch import BadSample
from cloob.data.loader import PairLoader
from cloob.data.open import open_source
from cloob.data.shards import fetch as opener
from cloob.data.shards.count import count_samples
from cloob.data.shards.remote import RemoteShardSource
from cloob.data.shards.sizes import read_sizes, remembered, unfinished
from cloob.data.shards.spec import is_remote, shard_name, sibling
from cloob.data.source import Source
from cloob.errors import InputError

MakeImage = Callable[..., bytes]
WriteTar = Callable[..., Path]
SIZES = {"00000.tar": 5, "00001.tar": 4, "00002.tar": 3}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="commands of a POSIX shell")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def stream(shards: Path) -> str:
    """Three shards behind a command that notes down what it was asked for in ``asked``."""
    (shards / "sizes.json").write_text(json.dumps(SIZES))
    return f"pipe:cat {shards}/{{00000..00002}}.tar && echo {{00000..00002}} >> {shards}/asked"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def simple(shards: Path) -> str:
    (shards / "sizes.json").write_text(json.dumps(SIZES))
    return f"pipe:cat {shards}/{{00000..00002}}.tar"


def test_what_is_remote() -> None:
    assert all(map(is_remote, ("pipe:cat x", "s3://a/b.tar", "http://h/x.tar", "https://h", "gs://b/x", "hf://d/x")))
    assert not any(map(is_remote, ("a/b.tar", "/a:b/c.tar", "file:/a/b.tar", "demo:val", r"C:\a\b.tar")))


@pytest.mark.parametrize(
    ("url", "beside"),
    [
        ("s3://b/d/00001.tar", "s3://b/d/sizes.json"),
        ("pipe:aws s3 cp s3://b/d/00001.tar -", "pipe:aws s3 cp s3://b/d/sizes.json -"),
        ("https://h/d/00001.tar?download=true", "https://h/d/sizes.json?download=true"),
        ("pipe:cat '/a b/00001.tar.gz' | pv -q", "pipe:cat '/a b/sizes.json' | pv -q"),
        ("pipe:cat /a/old.tar.d/x.tgz", "pipe:cat /a/old.tar.d/sizes.json"),
    ],
)
def test_the_file_beside_a_shard(url: str, beside: str) -> None:
    assert sibling(url, "sizes.json") == beside
    assert shard_name(url) in {"00001.tar", "00001.tar.gz", "x.tgz"}
    assert sibling("pipe:mycat 17", "sizes.json") is None


def test_streamed_shards_read_like_local_ones(shards: Path, image: MakeImage, cache: Cache) -> None:
    spec = simple(shards)
    source, local = open_source(spec, cache=cache), open_source(shards)
    assert source.streamed and source.name == spec and source.shard_sizes == (5, 4, 3) and len(source) == 12
    assert [source.read(i) for i in range(12)] == [local.read(i) for i in range(12)]
    assert source.read(5).key == "00001.tar/p005" and source.read(5).image == image(5)
    assert pickle.loads(pickle.dumps(source)).read(11) == local.read(11)


def test_a_shard_is_fetched_once_and_kept(stream: str, shards: Path, cache: Cache) -> None:
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar && echo $0 >> {shards}/asked"
    source = open_source(spec, cache=cache)
    assert (shards / "asked").read_text().count("\n") == 2  # sizes.json, and the first shard to see that it works
    for i in (0, 11, 5, 0):
        source.read(i)
    again = open_source(spec, cache=cache)
    assert [again.read(i).caption for i in (0, 11)] == ["pair 0", "pair 11"]
    assert (shards / "asked").read_text().count("\n") == 5


@contextlib.contextmanager
def served(folder: Path, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A web server over a folder, on loopback; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    class Patient(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # a client that does not trust us breaks off
            pass

    with Patient(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        if context is not None:
            httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        port = httpd.server_address[1]
        try:
            yield f"http://127.0.0.1:{port}" if context is None else f"https://localhost:{port}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    with served(shards) as url:
        yield url


def test_http(server: str, shards: Path, cache: Cache) -> None:
    simple(shards)
    source = open_source(f"{server}/{{00000..00002}}.tar", cache=cache)
    assert [source.read(i).caption for i in (0, 11)] == ["pair 0", "pair 11"]
    named = open_source(f"{server}/sizes.json", cache=cache)  # the same shards by their list
    assert named.shard_sizes == (5, 4, 3) and named.read(11) == source.read(11)
    with pytest.raises(InputError, match=r"absent/sizes\.json: no such file"):
        open_source(f"{server}/absent/0.tar", cache=cache)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_store_whose_package_is_missing_is_named(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed.*{extra}\]"):
        open_source(f"{scheme}://bucket/0.tar", cache=cache)


def test_https(shards: Path, tmp_path: Path) -> None:
    """A server with a certificate that the system is told to trust; without that it is refused."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    simple(shards)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    script = (
        "import sys\nfrom cloob.data.shards import fetch as opener\nopener._PAUSES = (0, 0)\n"
        "from cloob.data.open import open_source\nprint(open_source(sys.argv[1]).read(11).caption)"
    )
    with served(shards, context) as url:
        for trusted in (False, True):
            environment = {**os.environ, **({"SSL_CERT_FILE": str(certificate)} if trusted else {})}
            done = subprocess.run(
                [sys.executable, "-c", script, f"{url}/sizes.json"], env=environment, capture_output=True, text=True
            )
            assert (done.stdout == "pair 11\n") is trusted, done.stderr
            assert ("CERTIFICATE_VERIFY_FAILED" in done.stderr) is not trusted


def test_what_else_fsspec_opens_is_read(shards: Path, cache: Cache) -> None:
    simple(shards)
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/pairs/{path.name}", path.read_bytes())
    try:
        assert open_source("memory://pairs/{00000..00002}.tar", cache=cache).read(11).caption == "pair 11"
    finally:
        memory.rm("/pairs", recursive=True)


def test_equal_names_in_several_folders_are_counted_and_not_listed(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        shutil.copy(shards / f"0000{number}.tar", tmp_path / name / "00.tar")
    paths = [str(tmp_path / name / "00.tar") for name in "ab"]
    assert count_samples(f"{tmp_path}/[ab]/00.tar") == dict(zip(paths, (5, 4), strict=True))
    out = tmp_path / "counts.json"
    for spec, (first, second) in (
        (f"{tmp_path}/[ab]/00.tar", paths),
        (f"pipe:cat {tmp_path}/{{a,b}}/00.tar", [f"pipe:cat {path}" for path in paths]),
    ):
        assert main(["data", spec, "--count", "--out", str(out)]) == 2 and not out.exists()
        said = f"--out: {first} and {second} have the same name; count each folder by itself"
        assert said in capsys.readouterr().err
    assert main(["data", f"pipe:cat {tmp_path}/{{a,b}}/00.tar", "--count"]) == 0
    assert "2 shards, 9 samples" in capsys.readouterr().out


def test_a_failed_fetch_names_shard_status_and_attempts(shards: Path, cache: Cache) -> None:
    simple(shards)
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    source = open_source(spec, cache=cache)
    (shards / "00001.tar").unlink()
    with pytest.raises(InputError, match=r"00001\.tar: its command ended with exit status 1 \(3 attempts\)") as caught:
        source.read(5)
    assert "\n" not in str(caught.value)
    assert source.read(0).caption == "pair 0"
    assert not list((cache.folder or Path()).rglob(".tmp-*"))
    with pytest.raises(InputError, match="command not found"):
        opener.fetch("pipe:no-such-command-here 2> /dev/null", shards / "x")
    with pytest.raises(InputError, match=r"nothing here opens ftpx://.*pipe:COMMAND"):
        open_source("ftpx://a/0.tar", cache=cache)


def test_a_flaky_command_is_tried_again(shards: Path, tmp_path: Path) -> None:
    once = f"pipe:if test -e {tmp_path}/once; then cat {shards}/00000.tar; else touch {tmp_path}/once; exit 3; fi"
    opener.fetch(once, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (shards / "00000.tar").read_bytes()
    # A broken pipe within the command is not a whole shard.
    with pytest.raises(InputError, match="exit status 141"):
        opener.fetch(f"pipe:head -c 10 {shards}/00000.tar; exit 141", tmp_path / "cut")


def test_an_error_in_a_worker_stays_one_line(
    shards: Path, cache: Cache, tokenizer: Callable[[list[str]], Tensor]
) -> None:
    source = open_source(simple(shards), cache=cache)
    (shards / "00001.tar").unlink()
    pairs = loader(source, tokenizer, workers=1)
    with pytest.raises(InputError, match=r"^pipe:cat \S*00001\.tar: its command ended with exit status 1") as caught:
        list(pairs.epoch(0))
    assert "\n" not in str(caught.value)
    pairs.close()


def test_a_shard_with_fewer_or_more_samples_than_told(
    shards: Path, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    spec = simple(shards)
    (shards / "sizes.json").write_text(json.dumps({**SIZES, "00000.tar": 7, "00001.tar": 2}))
    source = open_source(spec, cache=cache)
    assert source.shard_sizes == (7, 2, 3)
    for row in (5, 6):
        with pytest.raises(BadSample, match=r"00000\.tar holds 5 samples, sizes\.json says 7") as caught:
            source.read(row)
        assert caught.value.reason == "truncated shard" and caught.value.key == f"00000.tar/{row}"
    with caplog.at_level(logging.WARNING):
        assert [source.read(i).caption for i in (7, 8, 9)] == ["pair 5", "pair 6", "pair 9"]
        source.read(7)
    assert [r.getMessage() for r in caplog.records if "the others are left out" in r.getMessage()] == [
        f"pipe:cat {shards}/00001.tar holds 4 samples, sizes.json says 2: the others are left out (said once)"
    ]


def test_what_is_left_out_of_streamed_shards_is_said(
    shards: Path, image: MakeImage, cache: Cache, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    """A key with a dot: both where the shards are counted and where they are read."""
    good = {f"{i}.{ext}": data for i in range(2) for ext, data in (("jpg", image(i)), ("txt", b"c"))}
    write_tar(shards / "00001.tar", good | {"photo.0.png": image(), "photo.0.txt": b"c"})
    spec, said = f"pipe:cat {shards}/{{00000..00002}}.tar", "2 files whose key has a dot"
    assert main(["data", spec, "--count"]) == 0
    assert f"00001.tar: not counted: {said}" in caplog.text and "(of 1 shard that hold such)" in caplog.text
    caplog.clear()
    source = open_source(spec, cache=cache)
    assert source.read(6).caption == "c"
    assert f"00001.tar: not read: {said}" in caplog.text


def test_a_truncated_streamed_shard_loses_its_last_rows(shards: Path, cache: Cache) -> None:
    spec = simple(shards)
    with tarfile.open(shards / "00001.tar") as tar:
        cut = tar.getmember("p007.png").offset_data + 10
    os.truncate(shards / "00001.tar", cut)
    source = open_source(spec, cache=cache)
    assert [source.read(i).caption for i in (5, 6, 9)] == ["pair 5", "pair 6", "pair 9"]
    for row in (7, 8):
        with pytest.raises(BadSample, match=r"holds 2 samples, sizes\.json says 4: cut after"):
            source.read(row)


def test_what_is_no_tar_is_not_kept(shards: Path, cache: Cache) -> None:
    spec = simple(shards)
    (shards / "00000.tar").write_bytes(b"<html>no" * 200)
    with pytest.raises(InputError, match=r"00000\.tar: gave no readable shard \(is not a tar archive"):
        open_source(spec, cache=cache)
    assert not list((cache.folder or Path()).rglob("*.tar"))


def test_without_counts_it_says_how_to_make_them(shards: Path, cache: Cache) -> None:
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    with pytest.raises(InputError, match=r"number of samples .* must be known; .*cloob data FOLDER --count") as caught:
        open_source(spec, cache=cache)
    assert "\n" not in str(caught.value)
    (shards / "sizes.json").write_text('{"00000.tar": 5}')
    with pytest.raises(InputError, match=r"sizes\.json: has no count for 00001\.tar"):
        open_source(spec, cache=cache)
    (shards / "sizes.json").write_text('{"00000.tar": "five"}')
    with pytest.raises(InputError, match=r"'00000\.tar' has 'five', no number"):
        open_source(spec, cache=cache)
    (shards / "sizes.json").write_text("[]")
    with pytest.raises(InputError, match=r"found a list; .*{\"shard.tar\": count, …}"):
        open_source(spec, cache=cache)


def test_sizes_are_counted_for_local_and_for_streamed_shards(
    shards: Path, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "sizes.json").write_text('{"00000.tar": 99}')  # a stale one is no obstacle
    assert main(["data", str(shards), "--count"]) == 0
    assert json.loads((shards / "sizes.json").read_text()) == SIZES
    assert "3 shards, 12 samples" in capsys.readouterr().out
    assert open_source(shards / "sizes.json").shard_sizes == (5, 4, 3)  # local shards by their list
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    written = shards.parent / "sizes.json"
    assert main(["data", spec, "--count", "--out", str(written)]) == 0
    assert json.loads(written.read_text()) == SIZES  # to be put beside the shards
    (shards / "sizes.json").unlink()
    source = open_source(spec, cache=cache)  # by what was counted on this host
    assert source.streamed and source.shard_sizes == (5, 4, 3) and source.read(11).caption == "pair 11"
    os.truncate(shards / "00001.tar", 2000)
    assert main(["data", str(shards), "--count"]) == 2 and main(["data", f"{shards}/*.tar", "--count"]) == 2
    told = capsys.readouterr().err
    assert "00001.tar: cut after 2,000 bytes" in told and "--out is missing" in told


def test_counts_go_on_where_they_stopped_and_all_cut_shards_are_named(
    shards: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = {number: (shards / f"0000{number}.tar").read_bytes() for number in (0, 2)}
    for number in whole:
        os.truncate(shards / f"0000{number}.tar", 2000)
    assert main(["data", str(shards), "--count"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{shards}/00000.tar: cut after 2,000 bytes" in line and line.endswith(f"; also cut: {shards}/00002.tar")

    asked = shards / "asked"
    spec = f"pipe:echo x >> {asked}; cat {shards}/{{00000..00002}}.tar"
    assert main(["data", spec, "--count"]) == 2
    assert capsys.readouterr().err.count("00002.tar") == 1 and asked.read_text().count("x") == 3
    assert not remembered(spec)  # which holds all shards or none
    (shards / "00000.tar").write_bytes(whole[0])
    (shards / "00002.tar").unlink()
    assert main(["data", spec, "--count"]) == 2  # the last one cannot be fetched, which ends it
    assert asked.read_text().count("x") == 3 + 1 + 3
    (shards / "00002.tar").write_bytes(whole[2])
    assert main(["data", spec, "--count"]) == 0
    assert asked.read_text().count("x") == 3 + 1 + 3 + 1
    assert "goes on behind 2 shards that were counted before" in caplog.text
    counts = [f"pipe:echo x >> {asked}; cat {shards}/{name}" for name in SIZES]
    assert remembered(spec) == dict(zip(counts, SIZES.values(), strict=True))
    assert main(["data", spec, "--count"]) == 0  # a count that has ended is begun anew
    assert asked.read_text().count("x") == 3 + 1 + 3 + 1 + 3


def test_counts_are_kept_now_and_then(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what ends a process at once; what only breaks it off leaves time to keep them all."""
    spec = f"pipe:cat {shards}/{{00000..00002}}.tar"
    monkeypatch.setattr("cloob.data.shards.count._KEEP_EVERY", 2)
    seen: list[int] = []

    def look(url: str, target: Path) -> None:
        seen.append(len(read_sizes(unfinished(spec))))
        opener.fetch(url, target)

    monkeypatch.setattr("cloob.data.shards.remote.fetch", look)
    count_samples(spec)
    assert seen == [0, 0, 2]


def test_the_cache_is_bounded_and_the_least_used_goes(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    together = sum((shards / name).stat().st_size for name in SIZES)
    cache, folder = Cache(tmp_path / "cache", max_bytes=together - 1), tmp_path / "cache" / "shards"
    (folder / "folder").mkdir(parents=True)
    (folder / "precious.bin").write_bytes(bytes(together))  # of somebody else: neither counted nor removed
    os.utime(folder / "precious.bin", (0, 0))
    source = open_source(simple(shards), cache=cache)
    with caplog.at_level(logging.WARNING):
        source.read(0), source.read(5), source.read(11)
    kept = sorted(path.name[-9:] for path in folder.glob("*.tar"))
    assert kept == ["00001.tar", "00002.tar"]
    assert not list(folder.glob("*00000.tar.index"))
    assert (folder / "precious.bin").is_file()
    assert "raise --cache-gb" in caplog.text  # all three were in use within seconds
    assert source.read(1).caption == "pair 1"  # still open, though its name is gone
    assert pickle.loads(pickle.dumps(source)).read(1).caption == "pair 1"  # fetched again


def test_a_cache_that_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x: cannot keep shards \(Not a directory\); choose another --cache-dir"):
        open_source(simple(shards), cache=Cache(tmp_path / "file" / "x"))


def test_the_default_cache_follows_the_environment(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOOB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_source(simple(shards))
    assert len(list((tmp_path / "xdg" / "cloob" / "shards").glob("*.tar"))) == 1
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "own"))
    open_source(simple(shards))
    assert len(list((tmp_path / "own" / "shards").glob("*.tar"))) == 1


def pixel(image: Image.Image) -> Tensor:
    return torch.zeros((3, 2, 2), dtype=torch.uint8)


def loader(
    source: Source, tokenizer: Callable[[list[str]], Tensor], shuffle_buffer: int = 4, **share: int
) -> PairLoader:
    return PairLoader(source, pixel, tokenizer, 5, seed=1, drop_last=False, shuffle_buffer=shuffle_buffer, **share)


def run_rank(
    spec: str, cache: Cache, tokenizer: Callable[[list[str]], Tensor], rank: int, world: int, end: Connection
) -> None:
    """One process of several: three epochs; sends the keys of each batch."""
    source = open_source(spec, cache=cache)
    pairs = loader(source, tokenizer, rank=rank, world_size=world, workers=2)
    end.send([[list(batch.keys) for batch in pairs.epoch(epoch)] for epoch in range(3)])
    pairs.close()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ranks_and_workers_share_shards_and_visit_each_pair_once(
    shards: Path,
    tmp_path: Path,
    image: MakeImage,
    write_tar: WriteTar,
    tokenizer: Callable[[list[str]], Tensor],
    world: int,
) -> None:
    counts = {f"{number:05d}.tar": 4 + number % 4 for number in range(8)}
    for name, count in counts.items():
        files = {f"{name[:5]}-{i}.{ext}": data for i in range(count) for ext, data in (("png", image()), ("txt", b"x"))}
        write_tar(shards / name, files)
    (shards / "sizes.json").write_text(json.dumps(counts))
    # Slow enough for all to want the same shard at once; what was asked for is written down.
    spec = f"pipe:sleep 0.05; echo $$ >> {shards}/asked; cat {shards}/{{00000..00007}}.tar"
    cache = Cache(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=run_rank, args=(spec, cache, tokenizer, rank, world, end))
        for rank, (_, end) in enumerate(ends)
    ]
    for process, (_, end) in zip(ranks, ends, strict=True):
        process.start()
        end.close()  # else the death of a rank would not end the wait
    told = [end.recv() for end, _ in ends]
    for process, (end, _) in zip(ranks, ends, strict=True):
        process.join()
        assert process.exitcode == 0
        end.close()
    total = sum(counts.values())
    for epoch in range(3):
        every = Counter(key for rank in told for batch in rank[epoch] for key in batch)
        assert len(every) == total and set(every.values()) == {1}
    # One process without workers gives the same batches, if it keeps the number of lanes.
    alone = loader(open_source(spec, cache=cache), tokenizer)
    for step, batch in enumerate(alone.epoch(1, lanes=world)):
        assert sorted(batch.keys) == sorted(key for rank in told for key in rank[1][step])
    later = [sorted(batch.keys) for batch in alone.epoch(1, start_step=3, lanes=world)]
    assert later == [sorted(key for rank in told for key in rank[1][step]) for step in range(3, alone.steps_per_epoch)]
    # sizes.json once for each rank and for the reader above, each shard once for all.
    assert (shards / "asked").read_text().count("\n") == 8 + world + 1


def test_shards_are_fetched_before_they_are_needed(
    shards: Path, cache: Cache, tokenizer: Callable[[list[str]], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    fetched: list[int] = []
    fetch = RemoteShardSource.fetch_shard

    def noted(source: RemoteShardSource, shard: int) -> Path:
        path = fetch(source, shard)
        if threading.current_thread().name == "cloob-prefetch":
            fetched.append(shard)
            if len(fetched) == 3:
                done.set()
        return path

    monkeypatch.setattr(RemoteShardSource, "fetch_shard", noted)
    batches = loader(open_source(simple(shards), cache=cache), tokenizer, shuffle_buffer=100).epoch(0)
    next(batches)
    assert done.wait(20) and sorted(fetched) == [0, 1, 2]
