from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.evaluation.sets.labelled import open_labelled
from make import noise, write_tar


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Three classes; shard 0 holds labels 2, 0 and shard 1 holds 1, 2, 2."""
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog {big}\nbird\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\n{c}\n")
    for shard, labels in enumerate(((2, 0), (1, 2, 2))):
        files = {}
        for i, label in enumerate(labels):
            files[f"s{i}.cls"] = f"{label}\n".encode()
            files[f"s{i}.{('webp', 'jpg', 'png')[i]}"] = noise(10 * shard + i)
        write_tar(folder / "test" / f"{shard}.tar", files)
    (folder / "test" / "nshards.txt").write_text("2")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for i, name in enumerate(("polar_bear/1.png", "polar_bear/x/2.jpg", "ant/1.png")):
        path = tmp_path / "zoo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(i))
    return tmp_path / "zoo"


def test_clip_benchmark_folder(wds: Path) -> None:
    labelled = open_labelled(wds)
    assert labelled.name == "pets" and len(labelled) == 5
    assert labelled.classnames == ("cat", "dog {big}", "bird") and labelled.templates == ("a {c}.", "{c}")
    assert labelled.labels.dtype == np.int64 and labelled.labels.tolist() == [2, 0, 1, 2, 2]
    assert labelled.read(3) == ("1.tar/s1", noise(11))


def test_image_folder(folders: Path) -> None:
    (folders / ".git").mkdir()
    labelled = open_labelled(folders)
    assert labelled.name == "zoo" and labelled.classnames == ("ant", "polar bear") and labelled.templates == ("{c}",)
    assert labelled.labels.tolist() == [0, 1, 1]
    assert labelled.read(2) == ("polar_bear/x/2.jpg", noise(1))


@pytest.mark.parametrize("names", [True, False])
def test_numbered_folders_are_sorted_by_number(tmp_path: Path, names: bool) -> None:
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
    for i in range(12):
        (tmp_path / "set" / "test" / f"{i}").mkdir(parents=True)
        (tmp_path / "set" / "test" / f"{i}" / "a.png").write_bytes(noise(i))
    if names:
        (tmp_path / "set" / "classnames.txt").write_text("\n".join(words))
    labelled = open_labelled(tmp_path / "set")
    for i, label in enumerate(labelled.labels.tolist()):
        key, _ = labelled.read(i)
        number = int(key.split("/")[-2])
        assert labelled.classnames[label] == (words[number] if names else str(number))


def test_a_truncated_test_set_is_refused(wds: Path) -> None:
    with (wds / "test" / "1.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match=r"1\.tar is truncated"):
        open_labelled(wds)


def test_a_file_that_vanishes_is_one_bad_sample(folders: Path) -> None:
    labelled = open_labelled(folders)
    (folders / "ant" / "1.png").unlink()
    with pytest.raises(BadSample, match=r"ant/1\.png") as caught:
        labelled.read(0)
    assert caught.value.reason == "missing image" and labelled.read(1)[1]
