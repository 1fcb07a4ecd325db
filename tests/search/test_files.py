"""Files of pictures: thumbnails that are kept, and paths that are printed."""

import pytest
from PIL import Image

from cloob.cli import main
from cloob.errors import InputError
from cloob.search.index import Index
from search_colours import loads, make_index


@pytest.fixture(autouse=True)
def colour_model(monkeypatch):
    loads(monkeypatch)


def spotted(size=40, colour="blue"):
    image = Image.new("RGB", (size, size), colour)
    image.paste("black", (0, 0, size // 10, size // 10))
    return image


def test_a_thumbnail_is_kept_while_its_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOOB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for size in (40, 41):
        spotted(size).save(tmp_path / "pictures" / f"{size}.png")
    with Index.open(make_index(tmp_path / "index", tmp_path / "pictures")) as index:
        first = index.thumbnail(1, 64)
        monkeypatch.setattr("cloob.search.files.thumbnail", lambda *_: b"made anew")
        assert (
            index.thumbnail(1, 64) == first
            and index.thumbnail(1, 128) == index.thumbnail(2, 64) == b"made anew"
        )
        (tmp_path / "pictures" / "40.png").unlink()
        with pytest.raises(InputError, match="missing image"):
            index.thumbnail(1, 64)


def test_a_line_feed_in_a_name_makes_no_other_path(tmp_path, capsys):
    (tmp_path / "pictures" / "evil\n").mkdir(parents=True)
    for name in ("evil\n/victim.png", "good.png"):
        spotted().save(tmp_path / "pictures" / name)
    index = make_index(tmp_path / "index", tmp_path / "pictures")
    for words in (["--where", "width > 0"], ["blue", "--cutoff", "none"]):
        assert main(["search", str(index), *words, "--paths"]) == 0
        out, err = capsys.readouterr()
        assert (
            out == f"{tmp_path / 'pictures' / 'good.png'}\n"
            and "1 path with a line feed left out" in err
        )
