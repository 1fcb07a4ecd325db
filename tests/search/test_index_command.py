"""``cloob index`` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from index_fakes import write_noise

import cloob
from cloob import cli
from cloob.models.folder import save_model
from cloob.search.index import Index
from support import refused


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, ``one`` and ``two``."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        save_model(folder / name, cloob.create_model("tiny-vit", seed=seed), {})
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for seed in range(6):
        write_noise(tmp_path / "pictures" / f"{seed}.png", seed)
    return tmp_path / "pictures"


def test_a_source_without_pictures_is_a_failure(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder, or one of which all is left out, into a new index or beside pictures."""
    (tmp_path / "empty").mkdir()
    words = ["index", str(tmp_path / "empty"), "--model", str(models / "one"), "--out", str(tmp_path / "idx")]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert out.startswith("pictures: none; 0 embedded in ") and "next:" not in err
    assert err == f"cloob: {tmp_path / 'empty'}: no pictures in it\n"
    for number, name in enumerate(["svg"] * 5 + ["json"] * 3 + ["mov"] * 2 + ["xmp", "aae"]):
        (tmp_path / "empty" / f"{number}.{name}").touch()
    assert cli.main(["index", str(pictures), *words[1:]]) == 1  # the others are indexed
    out, err = capsys.readouterr()
    assert out.startswith("pictures: 6 added; ") and "next:" not in err
    assert "cloob: 12 × file of another kind: 5 .svg, 3 .json, 2 .mov, 2 others\n" in err
    assert cli.main(["index", "--out", words[-1]]) == 0  # the folder was no source


def test_it_says_what_it_did_and_what_comes_next(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (pictures / "bad\x1b[2J.png").write_bytes(b"nope")
    assert cli.main(["index", "pictures", "--model", str(models / "one"), "--out", "my idx"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pictures: 6 added; 6 embedded in ")
    assert out.endswith("my idx: 6 pictures, one\n")
    assert err.endswith("next: cloob search 'my idx' 'something red'\n  or: cloob serve 'my idx' --open\n")
    assert err.startswith("cloob: 1 × corrupt image: ") and "\x1b" not in err

    # Neither source nor model need be named again; what is there already is not embedded.
    write_noise(pictures / "new.png", 50)
    assert cli.main(["index", "--out", "my idx", "--export", "e.parquet"]) == 0
    out, _ = capsys.readouterr()
    assert "e.parquet: 6 rows" in out and "added" not in out
    assert cli.main(["index", "--out", "my idx"]) == 0
    assert "pictures: 1 added, 6 as they were; 1 embedded" in capsys.readouterr().out

    # A second model, and one of the same weights by another name.
    assert cli.main(["index", "pictures", "--model", str(models / "two"), "--out", "my idx"]) == 0
    assert "7 known, with a vector of this model now; 7 embedded" in capsys.readouterr().out
    words = ["index", "pictures", "--model", str(models / "two"), "--out", "my idx", "--name", "three"]
    assert "has vectors of these weights, as 'two'" in refused(capsys, *words)
    assert "has vectors of one, two; --name says of which" in refused(capsys, "index", "--out", "my idx")

    # A changed model asks; nobody answers here.
    words = ["index", "pictures", "--model", str(models / "two"), "--out", "my idx", "--name", "one"]
    assert "as 'two'" in refused(capsys, *words)
    save_model(tmp_path / "one", cloob.create_model("tiny-vit", seed=2), {})
    words = ["index", "pictures", "--model", "one", "--out", "my idx"]
    assert "--replace-model makes its vectors anew" in refused(capsys, *words)
    assert cli.main([*words, "--replace-model"]) == 0
    assert "7 embedded" in capsys.readouterr().out
    with Index.open("my idx") as index:
        assert [model.name for model in index.models] == ["two", "one"] and len(index) == 7
        index.encoder("one")

    # The same where the model is not named and has been trained further.
    save_model(tmp_path / "one", cloob.create_model("tiny-vit", seed=3), {})
    write_noise(pictures / "newer.png", 51)
    words = ["index", "--out", "my idx", "--name", "one"]
    assert "cloob index --model M --out my idx with --replace-model makes" in refused(capsys, *words)
    assert cli.main([*words, "--replace-model"]) == 0
    assert "8 embedded" in capsys.readouterr().out

    # A source that is gone: nothing is lost, and the exit code says so.
    pictures.rename(tmp_path / "elsewhere")
    assert cli.main(["index", "pictures", "--out", "my idx", "--name", "one"]) == 1
    assert "nothing was removed" in capsys.readouterr().err
    assert cli.main(["index", "--out", "other", "--merge", "my idx"]) == 0
    assert "8 pictures added, 15 vectors" in capsys.readouterr().out


INTERRUPTED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from index_fakes import FakeEncoder
from cloob import cli
from cloob.models import fingerprint

class Slow(FakeEncoder):
    def encode_image(self, images):
        if self.seen >= 4:
            signal.raise_signal(signal.SIGINT)
        return super().encode_image(images)

fingerprint.load_model = lambda spec, device: Slow()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.exit(cli.main(["index", *sys.argv[2:], "--batch-size", "2"]))
"""


def test_ctrl_c_keeps_what_is_done(models: Path, pictures: Path, tmp_path: Path) -> None:
    words = [str(pictures), "--out", str(tmp_path / "i"), "--model", str(models / "one")]
    command = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert f"cloob: interrupted; 4 pictures are in {tmp_path / 'i'}, the same command goes on\n" in done.stderr
    assert "Traceback" not in done.stderr
    with Index.open(tmp_path / "i") as index:
        assert len(index) == 4


def test_an_index_remembers_what_is_excluded(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(pictures / "private" / "a.png", 20)
    again = ["index", "--out", str(tmp_path / "idx")]
    for words, said in (
        ([*again, str(pictures), "--model", str(models / "one"), "--exclude", "private", "0.*"], "5 added"),
        (again, "5 as they were"),
        ([*again, "--exclude", "1.*"], "2 added, 1 removed, 4 as they were"),
        ([*again, str(pictures)], "6 as they were"),
        ([*again, "--exclude", ""], "1 added, 6 as they were"),
        (again, "7 as they were"),
    ):
        assert cli.main(words) == 0
        assert capsys.readouterr().out.startswith(f"pictures: {said}; ")


STOPPED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from index_fakes import FakeEncoder
from cloob import cli
from cloob.models import fingerprint

class Slow(FakeEncoder):
    def encode_image(self, images):
        Path(sys.argv[2]).touch()
        time.sleep(120)

fingerprint.load_model = lambda spec, device: Slow()
sys.exit(cli.main(["index", *sys.argv[3:]]))
"""


def test_a_second_index_at_once_is_refused_and_one_that_was_killed_is_not_waited_for(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, begun = [str(pictures), "--model", str(models / "one"), "--out", str(tmp_path / "idx")], tmp_path / "begun"
    first = subprocess.Popen([sys.executable, "-c", STOPPED, str(Path(__file__).parent), str(begun), *words])
    try:
        while not begun.exists():
            assert first.poll() is None
            time.sleep(0.05)
        said = f"cloob: another `cloob index` is at work on {tmp_path / 'idx'}; wait until it is done\n"
        assert refused(capsys, "index", *words) == said
        with Index.open(tmp_path / "idx") as index:  # it may be read
            assert len(index) == 0
    finally:
        first.kill()
        first.wait()
    assert cli.main(["index", *words, "--replace-model"]) == 0
    assert capsys.readouterr().out.startswith("pictures: 6 added; ")
