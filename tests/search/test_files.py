"""Files of pictures: thumbnails that are kept, and paths that are printed."""

import pytest

from cloob.cli import main
from cloob.errors import InputError
from make import picture
from search_colours import loads, make_index, open_index


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    loads(monkeypatch)
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def test_a_thumbnail_is_kept_while_its_file_is_there(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    for colour in ("blue", "red"):
        (pictures / f"{colour}.png").write_bytes(picture(colour))
    with open_index(make_index(tmp_path / "index", pictures)) as index:
        first = index.thumbnail(1, 64)
        monkeypatch.setattr("cloob.search.files.thumbnail", lambda *_: b"made anew")
        assert index.thumbnail(1, 64) == first
        assert index.thumbnail(1, 128) == index.thumbnail(2, 64) == b"made anew"
        (pictures / "blue.png").write_bytes(picture("green"))
        with pytest.raises(InputError, match="has changed since it was indexed"):
            index.picture(1)
        (pictures / "blue.png").unlink()
        with pytest.raises(InputError, match="missing image"):
            index.thumbnail(1, 64)


@pytest.mark.parametrize("words", [["--where", "width > 0"], ["blue"]])
def test_a_line_feed_in_a_name_makes_no_other_path(pictures, tmp_path, capsys, words):
    (pictures / "evil\n").mkdir()
    for name in ("evil\n/victim.png", "good.png"):
        (pictures / name).write_bytes(picture("blue"))
    index = make_index(tmp_path / "index", pictures)
    assert main(["search", str(index), *words, "--paths"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{pictures / 'good.png'}\n"
    assert "1 path with a line feed left out" in err
