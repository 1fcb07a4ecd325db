"""An index of small pictures in six colours, for the tests of the server."""

from PIL import Image
from starlette.testclient import TestClient

from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from cloob.serve.app import make_app
from cloob.serve.config import ServeConfig
from search_colours import COLOURS

N = 60
NAMES = ("red", "green", "blue", "yellow", "black", "white")


def draw(folder, numbers):
    """Pictures NUMBER.png, each a little different, with captions beside them, some of
    which look like HTML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = NAMES[number % len(NAMES)]
        shade = tuple(min(255, channel + number % 7) for channel in COLOURS[name])
        image = Image.new("RGB", (24 + number % 5, 24), shade)
        image.putpixel(
            (0, 0), (number % 256, number // 256 % 256, 200)
        )  # none of one colour, no two equal
        image.save(folder / f"{number}.png")
        markup = "" if name == "red" else " <i>here</i>"
        (folder / f"{number}.txt").write_text(
            f"a {name} square{markup}", encoding="utf-8"
        )
    return folder


def web_of(index, **config):
    app = make_app(index, ServeConfig(**config))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def build(place, folder, model):
    """An index of a folder, open for reading, with the model handed in."""
    with Index.create(place) as made:
        made.update([folder], UpdateOptions(model=model))
    index = Index.open(place)
    index.set_encoder(model)
    return index
