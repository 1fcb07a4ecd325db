"""``cloob index`` as a user runs it."""

import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from index_fakes import FakeEncoder, Stopping, write_noise

from cloob.errors import InputError
from cloob.search.index import Index
from search_colours import loads
from support import exit_code, fork, refused, run_cloob


def write_model(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seed").write_text(str(seed))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two model folders, ``one`` and ``two``; with a model that costs nothing."""
    loads(
        monkeypatch,
        lambda spec, **_: FakeEncoder(seed=int((Path(spec) / "seed").read_text())),
    )
    for seed, name in enumerate(("one", "two")):
        write_model(tmp_path / "models" / name, seed)
    return tmp_path / "models"


@pytest.fixture
def pictures(tmp_path):
    for seed in range(6):
        write_noise(tmp_path / "pictures" / f"{seed}.png", seed)
    return tmp_path / "pictures"


def test_a_source_without_pictures_is_a_failure(models, pictures, tmp_path, capsys):
    for number, name in enumerate(["svg"] * 5 + ["json"] * 3):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "empty" / f"{number}.{name}").touch()
    words = f"{tmp_path}/empty --model {models}/one --out {tmp_path}/idx"
    for sources, said in (
        (words, "none; 0 embedded in "),
        (f"{pictures} {words}", "6 added; "),
    ):
        run_cloob(f"index {sources}", code=1)  # what else is named is indexed
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        assert f"; {said}" in out
        assert "next:" not in err
        first = tmp_path / "empty" / "0.svg"
        assert f"cloob: left out: 8 × file of another kind: {first}, …\n" in err
        assert "no pictures in it" in err
    run_cloob(f"index --out {tmp_path}/idx")  # the folder was no source


def test_it_says_what_it_did_and_what_comes_next(
    models, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (pictures / "bad\x1b[2J.png").write_bytes(b"nope")
    run_cloob(f"index pictures --model {models}/one --out 'my idx'")
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert out.startswith("my idx: 6 pictures, one; 6 added; 6 embedded in ")
    left, then = err.splitlines()
    assert left.startswith("cloob: left out: 1 × corrupt image: ")
    assert "\x1b" not in err
    assert then == "next: cloob search 'my idx' 'something red'"
    run_cloob("index --out 'my idx' --faults")
    (listed,) = capsys.readouterr().out.splitlines()
    assert "2J.png: corrupt image (4 bytes, not an image file)" in listed
    assert "\x1b" not in listed

    # Neither source nor model need be named again; what is there already is not
    # embedded.
    write_noise(pictures / "new.png", 50)
    run_cloob("index --out 'my idx'")
    assert "; 1 added, 6 as they were; 1 embedded" in capsys.readouterr().out

    # A model of the same weights is only moved; another one is refused.
    shutil.copytree(models / "one", tmp_path / "moved")
    moved = "index pictures --model moved --out 'my idx'"
    run_cloob(moved)
    assert "7 as they were; 0 embedded" in capsys.readouterr().out
    with Index.open("my idx") as index:
        assert index.model().spec == str(tmp_path / "moved")
    second = f"index pictures --model {models}/two --out 'my idx'"
    assert "other weights" in refused(capsys, second)
    lock = Path("my idx/index.sqlite.lock").stat().st_ino
    run_cloob(f"{second} --anew")
    assert "my idx: 7 pictures, two; 7 added" in capsys.readouterr().out
    # the same lock all along: with a new one two could write at once
    assert Path("my idx/index.sqlite.lock").stat().st_ino == lock

    # A source that is gone: nothing is lost, and the exit code says so.
    pictures.rename(tmp_path / "elsewhere")
    run_cloob("index pictures --out 'my idx'", code=1)
    assert "nothing was removed; --remove-all removes them" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    for source, model in (
        ("pictures", "one"),
        ("elsewhere", "bad"),
    ):  # nor where it cannot be made again
        refused(capsys, f"index {source} --model {model} --out 'my idx' --anew")


@pytest.mark.parametrize("held_a_file", [False, True])
def test_a_new_index_that_fails_leaves_the_folder_as_it_was(
    models, pictures, tmp_path, capsys, monkeypatch, held_a_file
):
    """A folder of the user's, and what came into it meanwhile, are not removed."""
    out = tmp_path / "idx"
    words = f"index {pictures} --model {models}/one --out {out}"

    def fail(*_, **__):
        if held_a_file:
            (out / "theirs").touch()
        raise InputError("no such model")

    loads(monkeypatch, fail)
    refused(capsys, words)
    assert out.exists() == held_a_file
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    refused(capsys, words)
    assert [path.name for path in out.iterdir()] == ["theirs"] * held_a_file


@contextmanager
def stopping(folder, words, number, seed=0):
    """A command that stands still after some pictures during the block, and is killed
    at its end.
    """

    def stop():
        (folder / "begun").touch()
        time.sleep(120)

    with pytest.MonkeyPatch.context() as patch:
        loads(patch, lambda *_, **__: Stopping(number, stop, seed=seed))
        process = fork(folder, 1, lambda: exit_code(words))
    try:
        process.until((folder / "begun").exists)
        yield
    finally:
        if not process.poll():
            os.kill(process.pids[0], signal.SIGKILL)
            process.wait()


def test_a_second_index_at_once_is_refused_and_one_that_was_killed_not_waited_for(
    models, pictures, tmp_path, capsys
):
    words = f"index {pictures} --model {models}/one --out {tmp_path}/idx"
    with stopping(tmp_path / "first", words, 0):
        said = (
            f"cloob: another `cloob index` is at work on {tmp_path / 'idx'}; wait until"
            " it is done\n"
        )
        assert refused(capsys, words) == said
        with Index.open(tmp_path / "idx") as index:  # it may be read
            assert len(index) == 0
    run_cloob(words)
    assert "; 6 added; " in capsys.readouterr().out


def test_an_update_that_is_killed_or_meets_a_full_disk_goes_on(
    models, pictures, tmp_path, capsys
):
    place = tmp_path / "idx"
    words = f"index {pictures} --model {models}/one --out {place} --batch-size 2"

    def full():
        size = (place / "index.sqlite").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        return exit_code(words)

    with stopping(tmp_path / "killed", words, 2):
        pass
    disk = fork(tmp_path / "full", 1, full)
    assert disk.wait() == [2]
    assert disk.told().count("\n") == 1
    capsys.readouterr()
    run_cloob(words)
    assert "4 added, 2 as they were; 4 embedded" in capsys.readouterr().out
