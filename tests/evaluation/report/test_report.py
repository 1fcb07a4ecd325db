"""The report of one evaluation: what stands on its page, its verdict, escaping, and the
page in a headless Chromium.
"""

import base64
import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cloob import evaluate
from cloob.evaluation.report.page import ExampleQuery, ShownPicture, write_report
from evaluate_fakes import COLOURS, ColourModel, Labels, Pairs
from make import picture

EVIL = "<script>alert(1)</script>\"'&"
GOLDEN = Path(__file__).parent / "golden.txt"


@functools.cache
def results(evil=""):
    """Three models, one of which cannot be loaded, on two labelled sets and one of
    pairs, of which some is broken.
    """
    confused = [("red", "blue"), ("cyan", "yellow")]
    models = {
        f"clip{evil}": ColourModel("clip", confused),
        f"cloob{evil}": ColourModel("cloob"),
        f"gone{evil}": f"no-such-model{evil}",
    }
    colours = (*COLOURS, "red")
    solid = Labels(tuple(COLOURS) * 5, broken=(3,), name=f"solid{evil}")
    few = Labels(("red", "blue", "green"), name="few")
    captions = [f"a {colour}" for colour in colours]
    pairs = Pairs(colours, captions, broken=(2,), missing=(4,), name=f"pairs{evil}")
    found = evaluate(models, [solid, few], [pairs])
    error = f"ucf101{evil}: put there frames/"
    found["failures"].append({"model": None, "set": f"ucf101{evil}", "error": error})
    return found


def whole(evil=""):
    """The results with the checkpoints of a model, and a query."""
    points = []
    for step in (2, 6):
        sides = dict.fromkeys(("image", "text"), step)
        numbers = {f"effective_eigenvalues_{side}": n for side, n in sides.items()}
        points.append({"step": step, "epoch": step / 2, **numbers})
    names = (f"clip{evil}", f"cloob{evil}")
    checkpoints = {"set": "pairs", "models": {names[1]: points}}
    image = picture("red") + b"SECRET trailer"
    found = [
        ShownPicture(image, f"a cat{evil}", i == 0, 0.5 - i / 10) for i in range(4)
    ]
    found.append(ShownPicture(b"<svg onload=x>", f"lost{evil}", False, 0.1))
    query = ExampleQuery(f"a drawing {evil}", dict.fromkeys(names, found))
    return results(evil) | {"checkpoints": checkpoints}, query


def written(path, found, query=None, **words):
    queries = [] if query is None else [query]
    write_report(path / "report.html", found, queries=queries, **words)
    return (path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The text of a page, what it would fetch, and whether its elements nest; drawings
    are their legends.
    """

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.addresses = []
        self.scripts = 0
        self.lines = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href")
        ]
        self.lines += [
            f"[{value}]" for name, value in attrs if tag == "img" and name == "alt"
        ]
        if dict(attrs).get("class") in ("number best", "right"):
            self.lines.append("*")
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Parts of drawings."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and not {"style", "script", "svg"} & set(self.open):
            self.lines.append(" ".join(data.split()))


def test_the_page_of_an_evaluation(request, tmp_path):
    """``--update-golden`` writes it anew; the numbers in it follow from the colours."""
    page = written(tmp_path, *whole(), title="A title", notes=["A note."])
    found = "\n".join(Page(page).lines) + "\n"
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert found == GOLDEN.read_text(encoding="utf-8")


def test_user_text_is_escaped_and_nothing_is_external(tmp_path):
    page = written(tmp_path, *whole(EVIL), title=EVIL, notes=[EVIL])
    read = Page(page)
    assert read.scripts == 1
    assert page.count("alert(1)") > 20
    assert "<script>alert" not in page
    addresses = [address for address in read.addresses if not address.startswith("#")]
    assert addresses
    for address in addresses:
        start, _, data = address.partition(",")
        assert start.startswith("data:")
        assert b"SECRET" not in base64.b64decode(data)
    assert not re.search(r"url\((?!#)|@import|https?://", page)


def verdict(path, best, gaps, sets=1):
    """The headline where ``a`` leads; ``best`` is its interval, ``gaps`` those of its
    lead over the others.
    """
    names = [f"s{i}" for i in range(sets)]
    empty = {"objective": None, "retrieval": {}, "geometry": {}}

    def row(model, value, interval):
        numbers = {"acc1": value, "acc1_interval": [*interval], "n_classes": 20}
        zeroshot = dict.fromkeys(names, numbers | {"n": 100})
        return empty | {"model": model, "zeroshot": zeroshot}

    rows = [row("a", 0.4, best)]
    entries = []
    for name, (low, high) in gaps.items():
        middle = (low + high) / 2
        rows.append(row(name, 0.4 - middle, (0.2, 0.4)))
        entry = {"metric": "acc1", "model": name, "baseline": "a"}
        entry |= {"difference": -middle, "low": -high, "high": -low}
        entries += [entry | {"set": of} for of in (*names, None)]
    page = written(path, {"rows": rows, "differences": entries, "level": 0.95})
    found = re.search(r'<h1 id="verdict">(.*?)</h1>', page)
    return found[1].replace("\u00a0", " ")


VERDICTS = [
    (1, (0.3, 0.5), {}, "a: 40.0 % zero-shot top-1"),
    (
        1,
        (0.05, 0.5),
        {},
        "a: 40.0 % zero-shot top-1, no clear difference from guessing",
    ),
    (1, (0.05, 0.5), {"b": (0.01, 0.05)}, "No clear difference from guessing"),
    (1, (0.3, 0.5), {"b": (0.01, 0.05)}, "a is ahead of b"),
    (1, (0.3, 0.5), {"b": (-0.01, 0.05)}, "No clear difference between a and b"),
    (1, (0.3, 0.5), {"b": (0.01, 0.05), "c": (0.02, 0.08)}, "a is ahead of b"),
    # Guessing gives 5 %: what four sets cannot tell from it one by one their mean
    # can, if they are near enough.
    (4, (-0.4, 0.6), {"b": (0.01, 0.05)}, "No clear difference from guessing"),
    (4, (-0.2, 0.6), {"b": (0.01, 0.05)}, "a is ahead of b"),
]


@pytest.mark.parametrize(
    ("sets", "best", "gaps", "title"),
    VERDICTS,
)
def test_the_verdict(tmp_path, sets, best, gaps, title):
    assert verdict(tmp_path, best, gaps, sets) == title


def test_the_page_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    written(tmp_path, *whole(), title="A & B", notes=[EVIL])
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get_log("browser")
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.title == "A & B"
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth > 0, i.alt])"
    )
    assert len(images) == 8
    assert all(map(all, images))

    heads = browser.find_elements("css selector", "#table-zeroshot thead th")
    script = (
        "return [...document.querySelectorAll('#table-zeroshot tbody tr')].map(r =>"
        " r.cells[arguments[0]].dataset.v)"
    )

    def sort(column, *keys):
        button = heads[column].find_element("css selector", "button")
        button.send_keys(*keys) if keys else button.click()
        return browser.execute_script(script, column)

    for keys, order in (((), "descending"), ((Keys.ENTER,), "ascending")):
        values = [float(value) for value in sort(2, *keys)]
        assert heads[2].get_attribute("aria-sort") == order
        assert values == sorted(values, reverse=order == "descending")
    models = sort(1, Keys.SPACE)
    assert models == sorted(models)
    assert browser.get_log("browser") == []

    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.refresh()
    width, inner = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert width <= inner == 390
