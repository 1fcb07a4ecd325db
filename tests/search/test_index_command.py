"""``cloob index`` as a user runs it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from index_fakes import write_noise
from PIL import Image

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


def test_an_index_that_stays_empty_is_a_failure(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bad.png").write_bytes(b"nope")
    words = ["index", str(tmp_path / "pictures"), "--model", str(models / "one"), "--out", str(tmp_path / "idx")]
    for _ in range(2):  # the second call does not open the picture again
        assert cli.main(words) == 1
        assert capsys.readouterr().err == f"cloob: 1 × corrupt image: {tmp_path / 'pictures' / 'bad.png'}\n"


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


def test_heic_without_its_decoder(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phone").mkdir()
    for i in range(5):
        (tmp_path / "phone" / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    words = ["index", "phone", "--model", str(models / "one"), "--out", "idx"]
    for _ in range(2):
        assert cli.main(words) == 1
        out, err = capsys.readouterr()
        first, rest = err.splitlines()
        assert first.startswith(f"cloob: 5 × no decoder (HEIC: pip install pillow-heif): {tmp_path}/phone/IMG_0.HEIC, ")
        assert first.endswith("IMG_2.HEIC, …") and rest == "cloob: all of them: cloob index --out idx --faults"
        assert out.startswith("pictures: none; ")
    assert cli.main(["index", "--out", "idx", "--faults"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[4] == f"{tmp_path}/phone/IMG_4.HEIC: no decoder (HEIC: pip install pillow-heif)"


def test_a_jpeg_without_its_end_is_taken_and_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for name, kept in (("nearly", -30), ("half", 20_000)):
        stream = io.BytesIO()
        Image.effect_noise((300, 300), 90).save(stream, "JPEG", quality=90)
        (tmp_path / "pictures" / f"{name}.jpg").write_bytes(stream.getvalue()[:kept])
    words = ["index", str(tmp_path / "pictures"), "--model", str(models / "one"), "--out", str(tmp_path / "idx")]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pictures: 1 added; 1 embedded")
    assert f"cloob: 1 × corrupt image: {tmp_path / 'pictures' / 'half.jpg'}\n" in err
    assert f"cloob: 1 × truncated JPEG, taken: {tmp_path / 'pictures' / 'nearly.jpg'}\n" in err


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


def test_a_run_that_embeds_nothing_adds_no_model(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", "--out", str(tmp_path / "idx")]
    assert cli.main([*words, str(pictures), "--model", str(models / "one")]) == 0
    assert cli.main([*words, "--model", str(models / "two"), "--exclude", "*"]) == 1
    assert capsys.readouterr().out.endswith(": 6 pictures, one\n")
    assert cli.main([*words, "--exclude", ""]) == 0
    assert cli.main(["search", str(tmp_path / "idx"), "red", "--model", "two"]) == 2
    assert "has no vectors of a model 'two'" in capsys.readouterr().err


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


@pytest.mark.parametrize("what", ["folder", "file"])
def test_an_index_that_may_only_be_read_is_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    root = os.geteuid() == 0  # root may write all, and nobody else may enter the folder of a test
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        idx = Path(name) / "idx"
        write_noise(Path(name) / "pictures" / "a.png", 1)
        words = ["index", str(Path(name) / "pictures"), "--out", str(idx)]
        assert cli.main([*words, "--model", str(models / "one")]) == 0
        for path in (*idx.iterdir(), idx):
            path.chmod(0o777 if path == idx and what == "file" else 0o555)
        try:
            if root:
                os.seteuid(65534)
            code = cli.main([*words, "--exclude", "b.png"])
        finally:
            if root:
                os.seteuid(0)
            idx.chmod(0o755)
    said = f"cloob: {idx}: this index may not be written; check the permissions of the folder and its files\n"
    assert (code, capsys.readouterr().err.splitlines(True)[-1]) == (2, said)
