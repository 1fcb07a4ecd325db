"""Copies and moves by label: nothing is overwritten, torn apart, renamed without need,
or lost to a fault.
"""

import json
import os
import shutil
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from cloob.cli import main
from cloob.commands import copies
from make import picture
from search_colours import loads, make_index, write_pictures
from support import fork


@pytest.fixture(autouse=True)
def colour_model(monkeypatch):
    loads(monkeypatch)


def run(capsys, *words, code=0):
    assert main(words) == code
    return capsys.readouterr().err


def put_back(target):
    """The undo of docs/find.md."""
    for line in reversed((target / "moved.jsonl").read_text().splitlines()):
        moved = json.loads(line)
        if Path(moved["new"]).exists():
            shutil.move(moved["new"], moved["old"])


def test_copies_lie_by_label_once_and_overwrite_nothing(tmp_path, capsys):
    pictures, target = write_pictures(tmp_path / "pictures", n=1), tmp_path / "sorted"
    (target / "red").mkdir(parents=True)
    (target / "red" / "red-0.png").write_bytes(b"mine")
    os.utime(pictures / "red-0.png", (10**9, 10**9))
    (tmp_path / "labels.txt").write_text("red\nblue/../green\n\n", encoding="utf-8-sig")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(pictures / "green-0.png", "sub/green.png")
    for source, count in (pictures, 8), (tmp_path / "x.tar", 1):
        words = [
            "classify",
            str(source),
            "--labels",
            str(tmp_path / "labels.txt"),
            "--model",
            "colours",
        ]
        words += ["--copy-to", str(target)]
        assert run(capsys, *words).endswith(f"cloob: {count} copied to {target}\n")
        assert run(capsys, *words).endswith(
            f"cloob: 0 copied to {target}, {count} were there\n"
        )
    assert {path.name for path in target.iterdir()} == {"red", "blue_.._green"}
    assert (target / "red" / "red-0.png").read_bytes() == b"mine" and len(
        list(pictures.iterdir())
    ) == 16
    assert (target / "red" / "red-0-2.png").stat().st_mtime == 10**9
    (member,) = target.rglob("green.png")
    assert member.read_bytes() == (pictures / "green-0.png").read_bytes()


def test_what_belongs_to_a_picture_moves_along_and_can_be_put_back(tmp_path, capsys):
    pictures, target = (
        write_pictures(tmp_path / "pictures", n=1),
        tmp_path / "pictures" / "sorted",
    )
    names = (
        "red-0.MOV",
        "red-0.mp3",
        "red-0.xmp",
        "red-0.png.xmp",
        "red-0.edit.txt",
        "red-0.png.supplemental-me.json",
    )
    for name in (*names, "red-0.ARW"):
        (pictures / name).write_text(name)
    shutil.copy(pictures / "white-0.png", pictures / "blue-0.webp")  # of one shot
    (target / "red").mkdir(parents=True)
    (target / "red" / "red-0.MOV").write_text("of another picture")
    before = {path: path.read_bytes() for path in pictures.iterdir() if path.is_file()}
    words = (
        "--labels",
        "red,blue",
        "--none",
        "--cutoff",
        "3",
        "--model",
        "colours",
        "--move-to",
        str(target),
    )
    err = run(
        capsys, "classify", str(pictures), *words, code=1
    )  # that RAW cannot be read
    assert err.endswith(f"cloob: 3 moved to {target}\n")
    assert {path.name for path in (target / "red").iterdir()} == {
        "red-0.MOV",
        *(
            f"red-0-2.{ending}"
            for ending in (
                "png",
                "txt",
                "MOV",
                "xmp",
                "png.xmp",
                "ARW",
                "png.supplemental-me.json",
            )
        ),
    }
    assert (target / "red" / "red-0.MOV").read_text() == "of another picture" and (
        pictures / "red-0.mp3"
    ).is_file()
    assert (target / "red" / "red-0-2.png.xmp").read_text() == "red-0.png.xmp"
    assert (pictures / "red-0.edit.txt").is_file()
    assert {path.name for path in (target / "blue").iterdir()} == {
        "blue-0.png",
        "blue-0.webp",
        "blue-0.txt",
    }
    there = sorted(target.rglob("*"))
    err = run(capsys, "classify", str(pictures), *words, code=1)
    assert err.endswith(f"cloob: 0 moved to {target}, 3 were there\n")
    assert sorted(target.rglob("*")) == there
    put_back(target)
    assert {
        path: path.read_bytes() for path in pictures.iterdir() if path.is_file()
    } == before


def test_names_stay_and_a_second_move_says_so_in_one_line(tmp_path, capsys):
    pictures, target = tmp_path / "pictures", tmp_path / "sorted"
    pictures.mkdir()
    for name in (
        "a::b.png",
        "back\\slash.png",
        " lead.png",
        "tab\t.png",
        "x" * 230 + ".png",
    ):
        (pictures / name).write_bytes(picture("red"))
    before = {path.name for path in pictures.iterdir()}
    index = str(make_index(tmp_path / "index", pictures))
    words = ("classify", index, "--labels", "red,blue", "--move-to", str(target))
    err = run(capsys, *words)
    assert f"next: cloob index {pictures} {target} --out {index}" in err.replace(
        "'", ""
    )
    assert {path.name for path in (target / "red").iterdir()} == before and not any(
        pictures.iterdir()
    )
    assert f"red 5\ncloob: 0 moved to {target}, 5 were moved before" in run(
        capsys, *words
    )


def test_a_kill_in_the_middle_of_a_move_leaves_no_file_that_no_list_names(
    tmp_path, capsys
):
    pictures, target = write_pictures(tmp_path / "pictures", n=2), tmp_path / "sorted"
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    index, places = str(make_index(tmp_path / "index", pictures)), list[Path]()
    words = ("classify", index, "--labels", "red,blue", "--move-to", str(target))

    def child():
        place = copies._place

        def dies(source, new, *, move):
            place(source, new, move=move)
            places.append(new)
            if len(places) == 9:  # the text of the fifth picture, without the picture
                os.kill(os.getpid(), signal.SIGKILL)

        copies._place = dies
        return main(words)

    assert fork(tmp_path / "out", 1, child).wait() == [-signal.SIGKILL]
    listed = {
        json.loads(line)["new"]
        for line in (target / "moved.jsonl").read_text().splitlines()
    }
    there = {str(path) for path in target.rglob("*-*")}
    assert len(there) == 9 and there < listed
    run(capsys, *words)
    assert len(list(target.rglob("*-*"))) == len(before) and not any(pictures.iterdir())
    put_back(target)
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk_ends_a_move_and_leaves_no_half_file(tmp_path, capsys):
    pictures, target = tmp_path / "pictures", tmp_path / "sorted"
    pictures.mkdir(), target.mkdir()
    for i in range(6):
        (pictures / f"red-{i}.png").write_bytes(
            picture("red", (20 + i, 20)) + bytes(100_000)
        )
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    index = str(make_index(tmp_path / "index", pictures))
    words = ("classify", index, "--labels", "red,blue", "--move-to", str(target))
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=360k", "tmpfs", target], check=False
    ).returncode:
        pytest.skip("no mounts here")
    try:
        err = run(capsys, *words, code=1)
        assert (
            "No space left" in err
            and "the disk is full" in err
            and err.count("is not moved") == 1
        )
        there = {path.name: path.read_bytes() for path in (target / "red").iterdir()}
        assert len(there) == 3 and there.items() < before.items()
        assert {
            path.name for path in pictures.iterdir()
        } == before.keys() - there.keys()
        subprocess.run(["mount", "-o", "remount,size=2m", target], check=True)
        assert "3 moved" in run(capsys, *words)
        assert {
            path.name: path.read_bytes() for path in (target / "red").iterdir()
        } == before
    finally:
        subprocess.run(["umount", target], check=True)
