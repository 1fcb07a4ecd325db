"""Errors without the folders of the machine that they happened on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloob.evaluate.places import places_of, without_places


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/data/my sets/two/a b.png: gone", "two/a b.png: gone"),
        (
            "/data/my sets/one/x.tar is cut ('/data/my sets/one/x.tar')",
            "my sets/one/x.tar is cut ('my sets/one/x.tar')",
        ),
        ("not under /data/my sets; put it there", "not under my sets; put it there"),
        ("/data/my sets/twofold/x", "my sets/twofold/x"),  # another folder, which begins alike
        ("local-dir:/runs/m/model/c.json: no", "local-dir:run m/model/c.json: no"),
        ("no '/home/anna/.cache/hub/models--a/config.json' there", "no 'config.json' there"),
        (r"no C:\Users\me\c.json there", "no c.json there"),
        ("see https://host/a/b; 3/4, and/or, a/b/c.png, ~/x/y", "see https://host/a/b; 3/4, and/or, a/b/c.png, ~/x/y"),
        ("put val/<wnid>/*.JPEG, test/<i>/{c}/a/b.png there", "put val/<wnid>/*.JPEG, test/<i>/{c}/a/b.png there"),
    ],
)
def test_paths_are_cut_to_what_results_call_them(text: str, told: str) -> None:
    places = {"/data/my sets": "my sets", "/data/my sets/two": "two", "local-dir:/runs/m": "run m"}
    assert without_places(text, places) == told


def test_relative_places_and_links_are_known_by_their_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert without_places(f"{tmp_path}/here/x y: no", {"here": "set"}) == "set/x y: no"
    assert without_places(f"{tmp_path}/here/x y: no", {"link": "set"}) == "set/x y: no"


def test_the_last_part_of_a_place_and_the_folder_of_pairs() -> None:
    assert places_of(["/a/b/", Path("c"), "/", "."], pairs=["/d e/t.csv"]) == {
        "/a/b/": "b",
        "c": "c",
        "/d e/t.csv": "t.csv",
        "/d e": "d e",
    }
