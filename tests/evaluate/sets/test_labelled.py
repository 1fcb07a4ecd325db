from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.evaluate.sets.labelled import open_labelled

MakeImage = Callable[..., bytes]
WriteTar = Callable[..., Path]


@pytest.fixture
def wds(tmp_path: Path, image: MakeImage, write_tar: WriteTar) -> Path:
    """Three classes; shard 0 holds labels 2, 0 and shard 1 holds 1, 2, 2."""
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog {big}\nbird\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n{c}\n")
    for shard, labels in enumerate(((2, 0), (1, 2, 2))):
        files = {}
        for i, label in enumerate(labels):
            files[f"s{i}.cls"] = f"{label}\n".encode()
            files[f"s{i}.{('webp', 'jpg', 'png')[i]}"] = image(10 * shard + i)
        write_tar(folder / "test" / f"{shard}.tar", files)
    (folder / "test" / "nshards.txt").write_text("2")
    return folder


@pytest.fixture
def folders(tmp_path: Path, image: MakeImage) -> Path:
    for i, name in enumerate(("polar_bear/1.png", "polar_bear/x/2.jpg", "ant/1.png")):
        path = tmp_path / "zoo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    return tmp_path / "zoo"


def test_clip_benchmark_folder(wds: Path, image: MakeImage) -> None:
    labelled = open_labelled(wds)
    assert labelled.name == "pets" and len(labelled) == 5
    assert labelled.classnames == ("cat", "dog {big}", "bird") and labelled.templates == ("a {c}.", "{c}")
    assert labelled.labels.dtype == np.int64 and labelled.labels.tolist() == [2, 0, 1, 2, 2]
    assert labelled.read(3) == ("1.tar/s1", image(11))
    assert pickle.loads(pickle.dumps(labelled)).read(4) == labelled.read(4)


def test_image_folder(folders: Path, image: MakeImage) -> None:
    (folders / ".git").mkdir()
    labelled = open_labelled(folders)
    assert labelled.name == "zoo" and labelled.classnames == ("ant", "polar bear") and labelled.templates == ("{c}",)
    assert labelled.labels.tolist() == [0, 1, 1]
    assert labelled.read(2) == ("polar_bear/x/2.jpg", image(1))


def test_image_folder_with_names_templates_and_splits(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folders.rename(tmp_path / "set" / "val")
    (tmp_path / "set" / "classnames.txt").write_text("Ameise\nEisbär\n", encoding="utf-8")
    (tmp_path / "set" / "templates.txt").write_text("ein Bild: {c}\n")
    labelled = open_labelled(tmp_path / "set", split="val")
    assert labelled.name == "set" and labelled.classnames == ("Ameise", "Eisbär")
    assert labelled.templates == ("ein Bild: {c}",) and len(labelled) == 3


@pytest.mark.parametrize("names", [True, False])
def test_numbered_folders_are_sorted_by_number(tmp_path: Path, image: MakeImage, names: bool) -> None:
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
    for i in range(12):
        (tmp_path / "set" / "test" / f"{i}").mkdir(parents=True)
        (tmp_path / "set" / "test" / f"{i}" / "a.png").write_bytes(image(i))
    if names:
        (tmp_path / "set" / "classnames.txt").write_text("\n".join(words))
    labelled = open_labelled(tmp_path / "set")
    for i, label in enumerate(labelled.labels.tolist()):
        key, _ = labelled.read(i)
        number = int(key.split("/")[-2])
        assert labelled.classnames[label] == (words[number] if names else str(number))


def test_the_real_sets(shared_data: Path) -> None:
    noto = open_labelled(shared_data / "zeroshot" / "noto-emoji")
    assert len(noto) == 1540 and sorted(noto.labels.tolist()) == list(range(1540)) and len(noto.templates) == 6
    assert noto.read(0)[1][:4] == b"RIFF"
    assert len(open_labelled(shared_data / "zeroshot" / "digits", split="train")) == 1000


def rewrite(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": b"x"}, r"1\.tar: sample 'a' has no \.cls label"),
        ({"a.cls": b"1"}, r"1\.tar: sample 'a' has no image"),
        ({"a.cls": b"cat", "a.png": b"x"}, r"sample 'a' has the label 'cat', expected a number from 0 to 2"),
        ({"a.cls": b"-1", "a.png": b"x"}, r"sample 'a' has the label '-1'"),
        ({"a.cls": b"1" * 5000, "a.png": b"x"}, r"sample 'a' has the label '1{40}', expected a number from 0 to 2"),
    ],
)
def test_wrong_samples(wds: Path, write_tar: WriteTar, files: dict[str, bytes], said: str) -> None:
    write_tar(wds / "test" / "1.tar", files)
    with pytest.raises(InputError, match=said):
        open_labelled(wds)


def test_shards_are_looked_for_while_they_are_counted(wds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of ten million costs as many looks as there are files, and one more."""
    looks: list[str] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looks.append(path.name) or is_file(path))
    named: list[object] = []
    monkeypatch.setattr(Path, "__truediv__", lambda path, name: named.append(name) or path.joinpath(name))
    rewrite(wds / "test" / "nshards.txt", "9999999")
    with pytest.raises(InputError, match="no such file"):
        open_labelled(wds)
    assert [name for name in looks if name.endswith(".tar")] == ["0.tar", "1.tar", "2.tar"]
    assert len([name for name in named if str(name).endswith(".tar")]) == 3


def test_a_truncated_test_set_is_refused(wds: Path) -> None:
    with (wds / "test" / "1.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match=r"1\.tar is truncated"):
        open_labelled(wds)


def test_splits_are_no_classes(tmp_path: Path, image: MakeImage) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(image(1))
    with pytest.raises(InputError, match=r"holds splits \(train, val\), not classes; give .*val"):
        open_labelled(tmp_path)
    assert open_labelled(tmp_path / "val").classnames == ("cat", "dog")


def test_a_file_that_vanishes_is_one_bad_sample(folders: Path) -> None:
    labelled = open_labelled(folders)
    (folders / "ant" / "1.png").unlink()
    with pytest.raises(BadSample, match=r"ant/1\.png") as caught:
        labelled.read(0)
    assert caught.value.reason == "missing image" and labelled.read(1)[1]
