"""The page, clicked through in a real headless Chromium; axe-core looks for what screen
readers would miss.
"""

import json
import os
import re
import socket
import subprocess
import threading
from contextlib import contextmanager
from datetime import datetime
from importlib import resources
from pathlib import Path

import pytest
import uvicorn
from served_colours import N, build, draw

from cloob.serve.app import make_app
from cloob.serve.config import ServeConfig
from make import picture
from search_colours import COLOURS, ColourModel

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


@contextmanager
def serving(index):
    """The address of a server of an index, which runs in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        app = make_app(index, ServeConfig())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [opened]}, daemon=True
        )
        thread.start()
        yield f"http://localhost:{opened.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def site(index):
    with serving(index) as address:
        yield address


class Page:
    """What a person does with the page."""

    def __init__(self, driver, site):
        self.driver = driver
        self.site = site

    def go(self, address=""):
        self.driver.get(self.site + address)
        return self

    def run(self, script, *words):
        return self.driver.execute_script(script, *words)

    def all(self, selector):
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector):
        self.until(lambda: self.all(selector), selector)
        return self.all(selector)[0]

    def text(self, selector):
        return str(
            self.run(
                "return document.querySelector(arguments[0])?.textContent ?? ''",
                selector,
            )
        )

    def until(self, holds, what=""):
        WebDriverWait(self.driver, 40, poll_frequency=0.05).until(
            lambda _: holds(), what
        )

    def says(self, selector, words):
        self.until(
            lambda: words in self.text(selector),
            f"{selector} says {words}: {self.text(selector)}",
        )

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def tiles(self):
        script = (
            "return [...document.querySelectorAll('#found .tile')].map(t =>"
            " t.getAttribute('aria-label'))"
        )
        return list(self.run(script))

    def focused(self):
        return str(
            self.run(
                "return document.activeElement.getAttribute('aria-label') ??"
                " document.activeElement.id"
            )
        )


@pytest.fixture
def page(browser, site):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get_log("browser")
    return Page(browser, site)


def test_words_become_chips_and_the_address_brings_them_back(page):
    page.go().says("#found-note", f"{N} pictures")
    names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith(page.site) for name in names), (
        "the page loads from its server alone"
    )
    page.one("#words").send_keys("red")
    page.says("#found-title", "“red”")  # found while typed
    page.until(
        lambda: (
            page.tiles()
            and all(tile.startswith("a red square, ") for tile in page.tiles()[:6])
        )
    )
    page.one("#words").send_keys(Keys.ENTER)
    page.one("#words").send_keys("-blue", Keys.ENTER)
    page.says("#found-title", "“red” − “blue”")
    assert page.run("return location.search") == "?q=red&q=-1%7Ew%7Eblue"
    page.driver.refresh()
    page.says("#found-title", "“red” − “blue”")
    page.driver.back()
    page.says("#chips", "red")
    page.until(lambda: len(page.all(".chip")) == 1)
    page.one(".chip-body").click()
    page.until(
        lambda: page.run(
            "return document.getElementById('weight').matches(':popover-open')"
        )
    )
    page.driver.back()
    page.until(
        lambda: not page.all("#weight:popover-open"), "the weight goes with its chip"
    )
    page.driver.forward()
    page.says("#found-title", "“red”")
    page.one(".chip-body").click()
    page.until(lambda: page.all("#weight:popover-open"))
    page.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ESCAPE)
    page.says(".chip-weight", "0.8 ×")
    page.until(
        lambda: page.focused().startswith("red, weight 0.8"),
        "the focus comes back to the chip",
    )
    page.one(".chip-body").send_keys(Keys.DELETE)
    page.says("#found-title", "The collection")
    assert page.focused() == "Words to search by"
    page.one("#words").send_keys("-猫", Keys.ENTER)
    page.says("#found-title", "− “猫”")
    page.one(".chip-body").click()
    page.one("#weight .button").click()
    assert (
        page.run("return document.getElementById('words').value") == "-猫"
    )  # as it was typed


def test_a_picture_can_be_chosen_dropped_and_pasted(page, tmp_path):
    (tmp_path / "mine.png").write_bytes(picture(COLOURS["green"]))
    page.go("?cutoff=off").says("#found-note", f"{N} pictures")
    page.one("#file").send_keys(str(tmp_path / "mine.png"))
    page.until(lambda: page.tiles() and "a green square" in page.tiles()[0])
    for kind, sizes in (("drop", [16, 18]), ("paste", [16])):
        page.go("?cutoff=off").says("#found-note", f"{N} pictures")
        page.run(
            "const [kind, colour, sizes] = arguments; const data = new"
            " DataTransfer();Promise.all(sizes.map(size => { const canvas = new"
            " OffscreenCanvas(size, size);const context = canvas.getContext('2d');"
            " context.fillStyle = colour; context.fillRect(0, 0, size, size);return"
            " canvas.convertToBlob(); })).then(blobs => {for (const blob of blobs)"
            " data.items.add(new File([blob], 'x.png', {type:"
            " 'image/png'}));window.dispatchEvent(kind === 'drop' ? new"
            " DragEvent('drop', {dataTransfer: data}) : new ClipboardEvent('paste',"
            " {clipboardData: data})); })",
            kind,
            f"rgb{COLOURS['blue']}",
            sizes,
        )
        page.until(lambda: page.tiles() and "a blue square" in page.tiles()[0], kind)
        page.until(
            lambda sizes=sizes: len(page.all(".chip")) == len(sizes),
            "each picture is part of the query",
        )
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.go().says("#found-note", f"{N} pictures")
    page.one("#file").send_keys(str(tmp_path / "bad.png"))
    page.says("[role=alert]", "corrupt image")


def test_a_picture_opens_and_leads_on(page):
    page.go().until(lambda: page.all(".tile.ready"))
    page.one(".tile").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "square" in page.focused(), "the tile has its name")
    first = page.focused()
    page.keys(Keys.ENTER)
    page.says("#detail-title", "square <i>here</i>")
    assert page.text(".facts").count("pixels") == 1
    before = page.text(".facts")
    page.keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text(".facts") not in ("", before))
    page.keys(Keys.ARROW_LEFT)
    page.until(lambda: page.text(".facts") == before)
    page.keys(Keys.ESCAPE)
    page.until(lambda: page.focused() == first, "the focus comes back")
    page.until(lambda: "picture=" not in page.run("return location.search"))
    page.keys(Keys.ENTER)
    page.until(lambda: page.one("#detail .primary").is_displayed())
    page.one("#detail .primary").click()
    page.says("#found-title", "a picture like this")
    assert "q=1%7Ei%7E" in page.run("return location.search")


def test_sort_by_own_labels(page):
    page.go("?view=sort").one("#labels").send_keys("red\nblue\ngreen")
    page.one("#none").click()
    page.one("#view-sort .primary").click()
    page.says("#sort-note", f"{N} pictures sorted")
    counts = page.run(
        "return [...document.querySelectorAll('.label-head p')].map(p =>"
        " parseInt(p.textContent))"
    )
    assert sum(counts) == N
    assert len(counts) == 3
    page.until(lambda: page.all(".label .tile.ready"))
    assert "label=red&label=blue&label=green" in page.run("return location.search")
    page.driver.back()
    page.says("#sort-note", "its best label")  # nothing is sorted now
    page.one("#labels").send_keys("red\nblue")
    page.one("#none").click()
    page.one("[data-view=find]").click()
    page.one("[data-view=sort]").click()
    form = (
        "return [document.getElementById('labels').value,"
        " document.getElementById('none').checked]"
    )
    assert page.run(form) == ["red\nblue", False], "what was typed stays"


def test_a_stricter_sort_leaves_more_to_none_of_these(page):
    page.go("?view=sort&label=red&label=blue").says("#sort-note", f"{N} pictures")
    heads = (
        "return [...document.querySelectorAll('.label-head')].map(head =>"
        " [head.querySelector('h2').textContent,"
        " parseInt(head.querySelector('p').textContent)])"
    )
    usual = dict(page.run(heads))
    assert usual["red"] == usual["blue"] == 10
    assert usual["none of these"] == N - 20
    page.until(lambda: page.all(".label .tile.ready"))
    page.one(".label .tile").click()
    page.says(".facts", "red, ")
    page.says(".facts", "deviations above unrelated words")
    page.keys(Keys.ESCAPE)
    page.one("#fit").send_keys(Keys.END)
    page.until(lambda: "fit=6" in page.run("return location.search"))
    page.until(lambda: dict(page.run(heads)).get("none of these", 0) > N - 20)


def test_an_opened_picture_has_an_address(page):
    page.go("?q=red&cutoff=off").until(lambda: page.all(".tile.ready"))
    page.one(".tile").click()
    page.says("#detail-title", "a red square")
    page.says(".facts", "Score")
    opened = page.run("return location.href")
    assert "picture=" in opened
    page.driver.back()
    page.until(lambda: not page.all("dialog[open]"), "back closes it")
    assert "picture=" not in page.run("return location.href")
    page.driver.forward()
    page.until(lambda: page.all("dialog[open]"), "forward opens it again")
    page.keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.run("return location.href") != opened)
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog[open]"))
    page.until(lambda: "picture=" not in page.run("return location.href"))
    assert page.run("return location.search") == "?q=red&cutoff=off"
    page.driver.forward()
    page.until(lambda: page.all("dialog[open]"))
    page.run(
        "history.back(); addEventListener('popstate', () => history.forward(),"
        " { once: true })"
    )  # before the close has its event
    page.until(lambda: page.all("dialog[open]"), "back and forward at once")
    page.keys(Keys.ESCAPE)
    page.until(lambda: "picture=" not in page.run("return location.href"))
    assert page.run("return location.search") == "?q=red&cutoff=off"

    page.driver.get("about:blank")
    page.driver.get(opened)
    page.says("#detail-title", "a red square")
    page.says(".facts", "Score")  # it has found its place among the hits
    assert page.run(
        "return document.querySelector('[aria-label=\"Next picture\"]').disabled"
    ) in (False, None)
    page.one("[aria-label=Close]").click()
    page.until(lambda: page.run("return location.search") == "?q=red&cutoff=off")
    page.go("?picture=999999").says("#detail-title", "This picture is gone")


def test_the_listing_has_months_as_headings(page, tmp_path):
    folder = draw(tmp_path / "pictures", range(6))
    months = ["2021-03", "2021-03", "2024-05", "2024-05", "2024-05", "2019-12"]
    for number, month in enumerate(months):
        moment = datetime.fromisoformat(f"{month}-15T12:00:00+00:00").timestamp()
        for kind in ("png", "txt"):
            os.utime(folder / f"{number}.{kind}", (moment, moment))
    with (
        build(tmp_path / "idx", folder, ColourModel()) as index,
        serving(index) as page.site,
    ):
        page.go().says("#found-note", "6 pictures")
        heads = (
            "return [...document.querySelectorAll('.section-head')].map(head =>"
            " head.textContent)"
        )
        assert page.run(heads) == ["May 20243", "March 20212", "December 20191"]
        page.until(lambda: len(page.all(".tile.ready")) == 6)
        page.one(".tile").send_keys(Keys.END)
        page.until(lambda: "15 Dec 2019" in page.focused())
        page.keys(Keys.ARROW_UP)
        page.until(lambda: "15 Mar 2021" in page.focused(), "over the heading")
        page.keys(Keys.ARROW_DOWN)
        page.until(lambda: "15 Dec 2019" in page.focused())


def test_a_finger_that_rests_marks_a_picture(page):
    page.go().until(lambda: page.all(".tile.ready"))
    assert (
        page.run(
            "return getComputedStyle(document.querySelector('.tile-mark')).opacity"
        )
        == "0"
    ), "no tick on a tile that nobody points at"
    touch = (
        "const [kind, id] = arguments; document.querySelectorAll('.tile')[id]"
        ".dispatchEvent(new PointerEvent(kind, {pointerType: 'touch', bubbles: true}))"
    )
    page.run(touch, "pointerdown", 0)
    page.says("#marks", "1 marked")
    page.run(touch, "pointerup", 0)
    page.run("document.querySelector('.tile').click()")  # as the browser does
    assert not page.all("dialog[open]")


def test_the_filter_is_written_by_three_boxes_and_by_hand(page):
    page.go().one("#filter-button").click()
    page.one("#filters [aria-label=Value]").send_keys("red", Keys.ENTER)
    page.says("#found-note", "10 pictures")
    page.one("#where").send_keys(" and width >", Keys.ENTER)
    page.says("[role=alert] .quiet", "filter")
    page.one("#where").send_keys("= 26", Keys.ENTER)
    page.until(
        lambda: (
            page.text("#found-note").startswith(tuple("123456789"))
            and "10 " not in page.text("#found-note")
        )
    )
    page.one("#where").clear()
    page.one("#where").send_keys("width >= 28 or width < 25", Keys.ENTER)
    page.says("#found-note", "24 pictures")
    page.one("#filters [aria-label=Value]").send_keys("red", Keys.ENTER)
    page.until(
        lambda: page.text("#found-note") == "4 pictures in all", "the red ones of these"
    )


def test_pictures_are_marked_by_keys_and_their_paths_taken_away(page, tmp_path):
    folder = draw(tmp_path / "pictures", range(11))
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    with (
        build(tmp_path / "idx", folder, ColourModel()) as index,
        serving(index) as page.site,
    ):
        grant = {
            "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"],
            "origin": page.site.rstrip("/"),
        }
        page.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
        page.driver.execute_cdp_cmd("Page.setDownloadBehavior", downloads)
        page.go().says("#found-note", "11 pictures")
        page.until(lambda: len(page.all(".tile.ready")) == 11)
        page.one(".tile").send_keys(Keys.ARROW_RIGHT)
        page.keys(Keys.SPACE)
        page.says("#marks", "1 marked")
        page.until(lambda: page.focused().endswith(", marked"))
        page.keys(Keys.SPACE)
        assert not page.one("#marks").is_displayed()
        assert not page.all("dialog[open]")
        page.keys(Keys.SPACE)
        page.one("#marks .button").send_keys(Keys.ENTER)
        page.says("#marks", "1 copied")
        copied = page.driver.execute_async_script(
            "navigator.clipboard.readText().then(arguments[0])"
        )
        shown = index.items(index.store.ids(order="newest").tolist())
        assert copied == f"{shown[1].path}\n"
        page.one("#mark-all").send_keys(Keys.ENTER)
        page.until(lambda: len(page.all("#found .marked")) == 11)
        page.all("#marks .button")[1].send_keys(Keys.ENTER)
        page.says("#marks", "11 in the list")
        listed = tmp_path / "cloob-pictures.txt"
        page.until(listed.is_file)
        paths = listed.read_text(encoding="utf-8").splitlines()
        assert sorted(paths) == sorted(map(str, folder.glob("*.png")))
    docs = Path(__file__).parents[2] / "docs" / "serve.md"
    (line,) = re.findall(
        r"^\$ (while .* cp .* cloob-pictures.txt)",
        docs.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    (tmp_path / "beaches").mkdir()
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    assert len(list((tmp_path / "beaches").iterdir())) == 11


VIEWS = [
    "",
    "?q=red&q=-0.5~w~blue",
    "?view=sort&label=red&label=" + "w" * 99,
]
VIEWS += ["?q=fog"]


def test_each_view_fits_a_phone_and_axe_finds_nothing(page):
    axe_package = pytest.importorskip(
        "axe_core_python", reason="axe-core-python is not installed"
    )
    axe = (resources.files(axe_package) / "axe.min.js").read_text(encoding="utf-8")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for address in VIEWS:
        page.go(address).until(lambda: page.all(".tile.ready, .empty-title"))
        assert page.run(
            "return [document.documentElement.scrollWidth, innerWidth]"
        ) == [390, 390], address
        page.run(axe + "; document.querySelector('.tile-mark')?.click()")
        for colours in ("light", "dark"):
            wanted = {
                "prefers-color-scheme": colours,
                "prefers-reduced-motion": "reduce",
            }  # nothing fades meanwhile
            media = {
                "features": [
                    {"name": name, "value": value} for name, value in wanted.items()
                ]
            }
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            found = page.driver.execute_async_script(
                "axe.run({resultTypes: ['violations']}).then(r =>"
                " arguments[0](r.violations.map(v => [v.id, v.nodes.map(n =>"
                " n.html.slice(0, 160) + ' ' + n.failureSummary)])))"
            )
            assert found == [], f"{address}, {colours}: {json.dumps(found, indent=1)}"
