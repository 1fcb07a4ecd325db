"""A store of vectors that is not SQL: the example's, found by ``cloob search``."""

from pathlib import Path

import pytest

from cloob import cli
from make import picture
from search_colours import loads, write_pictures

pytest.importorskip("lancedb", reason="LanceDB is missing; pip install lancedb")
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_finds_what_a_folder_finds(tmp_path, capsys, monkeypatch):
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not beside the tests")
    monkeypatch.syspath_prepend(EXAMPLES)
    loads(monkeypatch)
    pictures = write_pictures(tmp_path / "pictures")
    places = [str(tmp_path / "idx"), f"lance_store:open_store:{tmp_path / 'lance.idx'}"]

    def same(*words):
        """What both print, which is the same but for a rounding."""
        printed = []
        for place in places:
            assert cli.main([words[0], place, *words[1:], "--json"]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1] and '"hits": [{' in printed[0]
        return printed[0]

    for place in places:
        assert cli.main(["index", str(pictures), "--model", "m", "--out", place]) == 0
    capsys.readouterr()
    for words in (
        ["red"],
        ["red", "--by", "meaning", "--top", "3"],
        ["blue", "--where", "name like 'r%'"],
    ):
        same("search", *words, "--cutoff", "none")
    same("search", "--like", str(pictures / "red-1.png"))
    (pictures / "red-0.png").unlink()
    (pictures / "red-1.png").write_bytes(picture((0, 0, 255)))
    for place in places:
        assert cli.main(["index", "--out", place]) == 0
    capsys.readouterr()
    assert "red-0.png" not in same(
        "search", "red", "--by", "meaning", "--cutoff", "none"
    )
    assert cli.main(["search", "nowhere:open_store:x", "red"]) == 2
    assert "No module named 'nowhere'" in capsys.readouterr().err
