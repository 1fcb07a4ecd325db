"""Files of pictures: those that are shown, and paths that are printed."""

import pytest

from cloob.errors import InputError
from make import picture
from search_colours import loads, make_index, open_index
from support import run_cloob


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    loads(monkeypatch)
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def test_a_picture_that_has_changed_or_is_gone_is_not_shown(pictures, tmp_path):
    (pictures / "blue.png").write_bytes(picture("blue"))
    with open_index(make_index(tmp_path / "index", pictures)) as index:
        assert index.thumbnail(1, 64).startswith(b"\xff\xd8\xff")
        (pictures / "blue.png").write_bytes(picture("green"))
        for read in (index.picture, index.thumbnail):
            with pytest.raises(InputError, match="has changed since it was indexed"):
                read(1)
        (pictures / "blue.png").unlink()
        with pytest.raises(InputError, match="missing image"):
            index.thumbnail(1)
        with pytest.raises(InputError, match="has no item 9"):
            index.picture(9)


@pytest.mark.parametrize("words", ["--where 'width > 0'", "blue"])
def test_a_line_feed_in_a_name_makes_no_other_path(pictures, tmp_path, capsys, words):
    (pictures / "evil\n").mkdir()
    for name in ("evil\n/victim.png", "good.png"):
        (pictures / name).write_bytes(picture("blue"))
    index = make_index(tmp_path / "index", pictures)
    run_cloob(f"search {index} {words} --paths")
    out, err = capsys.readouterr()
    assert out == f"{pictures / 'good.png'}\n"
    assert "1 path with a line feed left out" in err
