"""The page, clicked through in a real headless Chromium; axe-core looks for what screen readers would miss."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from PIL import Image
from served_colours import COLOURS, ColourEncoder, build, draw

from cloob.search.index import Index
from cloob.search.update import UpdateOptions
from cloob.serve.app import make_app
from cloob.serve.settings import ServeConfig
from support import picture

pytest.importorskip("selenium", reason="selenium is not installed")
N = 60
HOLD = """
if (!window.held) {
  const [held, ask] = [(window.held = {}), fetch];
  window.fetch = async (address, options) => {
    const found = held[Object.keys(held).find((words) => `${address} ${options?.body}`.includes(words))];
    if (!found) return ask(address, options);
    found.asked = true;
    await new Promise((go, end) => {
      found.free.then(go);
      options?.signal?.addEventListener("abort", () => end(options.signal.reason));
    });
    return found.status ? Response.json({detail: "failed as told"}, {status: found.status}) : ask(address, options);
  };
}
const one = (window.held[arguments[0]] = {status: arguments[1]});
one.free = new Promise((go) => (one.go = go));
"""


def serving(index: Index, token: str | None = None) -> Iterator[str]:
    """The address of a server of an index, which runs in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        app = make_app(index, ServeConfig(token=token))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        yield f"http://localhost:{opened.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def site(index: Index) -> Iterator[str]:
    yield from serving(index)


class Page:
    """What a person does with the page."""

    def __init__(self, driver: Any, site: str) -> None:
        self.driver, self.site = driver, site

    def go(self, address: str = "") -> Page:
        self.driver.get(self.site + address)
        return self

    def run(self, script: str, *words: Any) -> Any:
        return self.driver.execute_script(script, *words)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        self.until(lambda: self.all(selector), selector)
        return self.all(selector)[0]

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def until(self, holds: Callable[[], Any], what: str = "") -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 40, poll_frequency=0.05).until(lambda _: holds(), what)

    def says(self, selector: str, words: str) -> None:
        self.until(lambda: words in self.text(selector), f"{selector} says {words}: {self.text(selector)}")

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hold(self, words: str, status: int = 0) -> None:
        """Requests with these words in their address or body wait until `free`, and fail then if there is a status."""
        self.run(HOLD, words, status)

    def held(self, words: str) -> None:
        self.until(lambda: self.run("return held[arguments[0]].asked", words), f"{words} is asked for")

    def free(self, words: str) -> None:
        self.run("held[arguments[0]].go()", words)

    def tiles(self) -> list[str]:
        script = "return [...document.querySelectorAll('#columns .tile')].map(t => t.getAttribute('aria-label'))"
        return list(self.run(script))

    def shows(self, address: str, colour: str) -> bool:
        """Whether the tile of this address has a picture of this colour."""
        found = self.run(
            "const image = document.querySelector(`.tile.ready img[src^='${arguments[0]}']`);"
            "const context = document.createElement('canvas').getContext('2d');"
            "return image && (context.drawImage(image, 0, 0, 4, 4), [...context.getImageData(2, 2, 1, 1).data])",
            address,
        )
        return bool(found) and all(abs(a - b) < 20 for a, b in zip(found[:3], COLOURS[colour], strict=True))

    def focused(self) -> str:
        return str(self.run("return document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"))


@pytest.fixture
def page(browser: Any, site: str) -> Page:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get_log("browser")
    return Page(browser, site)


def test_the_page_loads_from_this_server_alone_without_a_message(page: Page) -> None:
    page.go().says("#found-note", f"{N} pictures")
    page.until(lambda: page.all(".tile.ready"))
    assert page.driver.get_log("browser") == []
    names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith(page.site) for name in names)


def test_words_become_chips_and_the_address_brings_them_back(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go().one("#words").send_keys("red")
    page.says("#found-title", "“red”")  # found while typed
    page.until(lambda: page.tiles() and all("a red square" in tile for tile in page.tiles()[:6]))
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
    page.until(lambda: page.run("return document.getElementById('weight').matches(':popover-open')"))
    page.driver.back()
    page.until(lambda: not page.all("#weight:popover-open"), "the weight goes with its chip")
    page.driver.forward()
    page.says("#found-title", "“red”")
    page.one(".chip-body").click()
    page.until(lambda: page.all("#weight:popover-open"))
    page.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ESCAPE)
    page.says(".chip-weight", "0.8 ×")
    page.until(lambda: page.focused().startswith("red, weight 0.8"), "the focus comes back to the chip")
    page.one(".chip-body").send_keys(Keys.DELETE)
    page.says("#found-title", "The collection")
    assert page.focused() == "Words to search by"
    page.one("#words").send_keys("-猫", Keys.ENTER)
    page.says("#found-title", "− “猫”")
    page.one(".chip-body").click()
    page.one("#weight .button").click()
    assert page.run("return document.getElementById('words').value") == "-猫"  # as it was typed


def test_a_picture_can_be_chosen_dropped_and_pasted(page: Page, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(picture(COLOURS["green"]))
    page.go("?cutoff=off").says("#found-note", f"{N} pictures")
    page.one("#file").send_keys(str(tmp_path / "mine.png"))
    page.until(lambda: page.tiles() and "a green square" in page.tiles()[0])
    for kind, sizes in (("drop", [16, 18]), ("paste", [16])):
        page.go("?cutoff=off").says("#found-note", f"{N} pictures")
        page.run(
            "const [kind, colour, sizes] = arguments; const data = new DataTransfer();"
            "Promise.all(sizes.map(size => { const canvas = new OffscreenCanvas(size, size);"
            "const context = canvas.getContext('2d'); context.fillStyle = colour; context.fillRect(0, 0, size, size);"
            "return canvas.convertToBlob(); })).then(blobs => {"
            "for (const blob of blobs) data.items.add(new File([blob], 'x.png', {type: 'image/png'}));"
            "window.dispatchEvent(kind === 'drop' ? new DragEvent('drop', {dataTransfer: data})"
            " : new ClipboardEvent('paste', {clipboardData: data})); })",
            kind,
            f"rgb{COLOURS['blue']}",
            sizes,
        )
        page.until(lambda: page.tiles() and "a blue square" in page.tiles()[0], kind)
        page.until(lambda sizes=sizes: len(page.all(".chip")) == len(sizes), "each picture is part of the query")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.go().says("#found-note", f"{N} pictures")
    page.one("#file").send_keys(str(tmp_path / "bad.png"))
    page.says("[role=alert]", "no picture that can be read")


def test_nothing_fits_is_an_answer(page: Page) -> None:
    page.go("?q=fog").says(".empty-title", "Nothing fits")
    page.one(".empty .button").click()
    page.until(lambda: len(page.tiles()) > 10)
    assert "cutoff=off" in page.run("return location.search")


def test_a_name_with_a_comma_is_one_model(page: Page) -> None:
    page.go()
    script = (
        "import('/page/state.js').then(m => { const s = m.read(arguments[0]); arguments[1]([s.models, m.write(s)]); })"
    )
    address = "?model=a%2Cb&model=c"
    assert page.driver.execute_async_script(script, address) == [["a,b", "c"], address]


def test_a_link_to_a_model_that_is_gone_shows_another(page: Page) -> None:
    page.go("?q=red&model=old&model=colours").says("[role=alert]", "no model “old”; colours answers")
    page.says("#found-title", "“red”")
    page.until(lambda: page.tiles() and "a red square" in page.tiles()[0])
    assert page.run("return location.search") == "?q=red&model=colours"


def test_a_token_that_ran_out_is_asked_for_and_the_search_stays(page: Page, index: Index) -> None:
    from selenium.webdriver.common.keys import Keys

    served = serving(index, token="secret")
    page.site = next(served)
    page.go("?q=blue&token=secret").says("#found-title", "“blue”")
    page.driver.delete_all_cookies()
    page.one("#words").send_keys("red", Keys.ENTER)
    page.one("#token").send_keys("nearly", Keys.ENTER)
    page.says(".wrong", "not right")
    page.one("#token").send_keys("secret", Keys.ENTER)
    page.says("#found-title", "“blue” + “red”")
    page.driver.delete_all_cookies()
    next(served, None)


def test_a_picture_opens_and_leads_on(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go().until(lambda: page.all(".tile.ready"))
    page.one(".tile").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "square" in page.focused(), "the tile has its name")
    first = page.focused()
    page.keys(Keys.ENTER)
    page.says("#detail-title", "square")
    assert page.text(".facts").count("pixels") == 1
    before = page.text(".facts")
    page.keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text(".facts") not in ("", before))
    page.keys(Keys.ARROW_LEFT)
    page.until(lambda: page.text(".facts") == before)
    page.keys(Keys.ESCAPE)
    page.until(lambda: page.focused() == first, "the focus comes back")
    page.keys(Keys.ENTER)
    page.until(lambda: page.one("#detail .primary").is_displayed())
    page.one("#detail .primary").click()
    page.says("#found-title", "a picture like this")
    assert "q=1%7Ei%7E" in page.run("return location.search")


def test_where_another_list_comes_the_picture_closes_and_the_list_begins_at_its_top(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    small = {"width": 800, "height": 500, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", small)
    page.go("?cutoff=off").until(lambda: page.all(".tile.ready"))
    opened = "return document.getElementById('detail').open"

    def choose(n: int) -> None:
        page.run("scrollTo(0, 1e6)")
        last = f"#columns [aria-posinset='{n}'] .tile"
        page.until(lambda: page.all(last), last)
        page.run("document.querySelector(arguments[0]).click()", last)
        page.until(lambda: page.run(opened))

    choose(N)
    before = page.text(".facts")
    page.run(
        "const key = new KeyboardEvent('keydown', {key: 'ArrowLeft', altKey: true});"
        " document.getElementById('detail').dispatchEvent(key)"
    )
    page.one("#detail .primary").click()
    page.says("#found-note", f"the nearest {N - 1} of")
    assert page.text(".facts") == before  # Alt and an arrow are the browser's
    page.until(lambda: page.run("return scrollY") == 0, "the most alike are seen")
    choose(N - 1)
    page.driver.back()
    page.until(lambda: not page.run(opened), "the picture went with its list")
    page.says("#found-title", "The collection")
    page.run("scrollTo(0, 1e6)")
    page.one("#words").send_keys("red")
    page.says("#found-title", "“red”")
    page.until(lambda: page.run("return scrollY") == 0, "the best are seen")
    page.run("scrollTo(0, 1e6)")
    page.one("#words").send_keys(Keys.ENTER)
    page.says("#chips", "red")
    assert page.run("return scrollY") == 0


def test_a_picture_that_comes_late_does_not_open_again_what_was_closed(page: Page) -> None:
    page.go().until(lambda: page.all(".tile.ready"))
    page.one(".tile").click()
    page.says("#detail-title", "square")
    opened = page.driver.execute_async_script(
        "const [done] = arguments; const dialog = document.getElementById('detail');"
        "import('/page/api.js').then(async api => { api.forget();"
        " dialog.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'})); dialog.close();"
        " await api.item(1); await api.item(2); setTimeout(() => done(dialog.open)); })"
    )
    assert opened is False


def test_a_long_caption_leaves_room_for_its_picture_and_a_silent_server_is_no_gone_picture(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go().until(lambda: page.tiles() and "square" in page.tiles()[0], "what comes would say its own words again")
    page.driver.execute_async_script(
        "const [done] = arguments; import('/page/api.js').then(async api => {"
        " api.remember([{...(await api.item(1)), caption: 'a word '.repeat(999) + '\\nline two'}]); done(); })"
    )
    page.one("[aria-posinset='1'] .tile").click()
    page.says("#detail-title", "a word")
    assert "line two" in page.text("#detail .facts") and "line two" not in page.text("#detail-title")
    reached = (
        "const one = document.querySelector('#detail .primary'); one.scrollIntoView({block: 'end'});"
        " const box = one.getBoundingClientRect(); return one.contains(document.elementFromPoint(box.x + 9, box.y + 9))"
    )
    assert page.run(reached)
    page.keys(Keys.ESCAPE)
    page.hold("items?", 500)
    page.free("items?")
    page.driver.execute_async_script("const [done] = arguments; import('/page/api.js').then(api => done(api.forget()))")
    page.one(".tile").click()
    page.says("#detail-title", "That did not work")


def test_sort_by_own_labels(page: Page) -> None:
    page.go("?view=sort").one("#labels").send_keys("red\nblue\ngreen")
    page.one("#view-sort .primary").click()
    page.says("#sort-note", f"{N} pictures sorted")
    counts = page.run("return [...document.querySelectorAll('.label-head p')].map(p => parseInt(p.textContent))")
    assert sum(counts) == N and len(counts) == 3
    page.until(lambda: page.all(".label .tile.ready"))
    assert "label=red&label=blue&label=green" in page.run("return location.search")
    page.driver.back()
    page.says("#sort-note", "its best label")  # nothing is sorted now
    page.one("#labels").send_keys("red\nblue")
    page.one("#none").click()
    page.one("[data-view=find]").click()
    page.one("[data-view=sort]").click()
    form = "return [document.getElementById('labels').value, document.getElementById('none').checked]"
    assert page.run(form) == ["red\nblue", True], "what was typed stays"
    page.hold("classify")
    page.one("#view-sort .primary").click()
    page.says("#sort-note", "Sorting")
    page.driver.back()
    page.says("#sort-note", "its best label")
    page.hold("classify", 500)
    page.one("#labels").send_keys("red\nblue")
    page.one("#view-sort .primary").click()
    page.says("#sort-note", "Sorting")
    page.free("classify")
    page.says("#view-sort .wrong", "failed as told")
    page.says("#sort-note", "its best label")


def test_the_map_is_drawn_and_can_be_walked(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    drawn = (
        "const c = document.querySelector('canvas'); let n = 0;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n"
    )
    page.go("?view=map&q=red").says("#map-note", "lit up")
    page.until(lambda: page.run(drawn) > 500)
    before = page.run(drawn)
    page.one('[aria-label="Nearer"]').click()
    page.until(lambda: page.run(drawn) != before)
    page.one("canvas").send_keys(Keys.ARROW_LEFT, "+", "-", "0")
    page.says("#live", "in view")
    page.one("canvas").send_keys(Keys.ENTER)
    page.says("#detail-title", "square")
    taken = page.run(
        "return ['canvas', '.chip-body'].filter(where => { const key = new KeyboardEvent('keydown',"
        " {key: 'ArrowRight', altKey: true, cancelable: true}); document.querySelector(where).dispatchEvent(key);"
        " return key.defaultPrevented; })"
    )
    assert taken == [] and "red" in page.text("#chips")  # Alt and an arrow are the browser's
    page.keys(Keys.ESCAPE)
    messages = [entry["message"] for entry in page.driver.get_log("browser")]
    assert [message for message in messages if "getImageData" not in message] == []  # that is this test's own


def test_the_map_tells_what_became_of_the_query(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go().says("#found-note", f"{N} pictures")
    page.hold("search")
    page.one("#words").send_keys("red", Keys.ENTER)
    page.held("search")
    page.one("[data-view=map]").click()
    page.says("#map-note", f"{N} pictures; neighbours")
    page.free("search")
    page.says("#map-note", "10 of the 10 found are on the map")  # asked for by another view, and shown in this one
    page.one(".chip-close").click()
    page.one("#words").send_keys("fog", Keys.ENTER)
    page.says("#map-note", "Nothing fits")
    page.hold("search", 500)
    page.free("search")
    page.one("#words").send_keys("blue", Keys.ENTER)
    page.says("#map-note", "failed as told")
    page.one("#filter-button").click()
    page.one("#where").send_keys("id = 1", Keys.ENTER)
    page.says("#map-note", "1 picture;")
    page.one("#where").send_keys(" and width > 999", Keys.ENTER)
    page.says(".map-status", "No picture passes the filter")
    assert page.text("#map-note") == "Neighbours look alike to the model."


def test_the_map_says_what_is_in_the_middle_now_and_shows_it_where_it_is(page: Page) -> None:
    page.go("?view=map").says("#map-note", f"{N} pictures; neighbours")
    page.hold("items?")
    said = page.driver.execute_async_script(
        "const [done] = arguments; const map = document.querySelector('canvas'); const live = () => live_.textContent;"
        " const live_ = document.getElementById('live'), card = document.querySelector('.map-card');"
        " const press = key => map.dispatchEvent(new KeyboardEvent('keydown', {key}));"
        " import('/page/api.js').then(async api => { press('+');"  # its picture comes after the next one's
        " api.remember(Array.from({length: 60}, (_, i) => ({id: i + 1, caption: 'known'}))); press('0');"
        " await Promise.resolve(); await Promise.resolve(); const before = live(); api.forget();"
        " const {left, top, width, height} = map.getBoundingClientRect(); let x = 0, y = 0;"
        " for (; card.hidden && y < height; y += 9) for (x = 0; card.hidden && x < width; x += 9)"
        "  map.dispatchEvent(new PointerEvent('pointermove',"
        "   {pointerType: 'mouse', clientX: left + x, clientY: top + y}));"
        " const beside = card.style.transform; held['items?'].go(); await api.item(1);"
        " done([before, live(), card.hidden, beside]); })"
    )
    assert said[0] == said[1] == f"{N} pictures in view; in the middle: known" and said[2] is False
    assert said[3].startswith("translate("), "the card is beside the point before its words are there"


def test_explain_shows_memories_and_beta_moves_them(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go("?q=red").until(lambda: page.one("#explain-button").is_enabled())
    page.one("#explain-button").click()
    page.until(lambda: len(page.all(".memories li")) == 12)
    before = page.text("#beta-help")
    page.one("#beta").send_keys(*[Keys.ARROW_RIGHT] * 12)
    page.until(lambda: page.text("#beta-help") != before)
    assert "beta=" in page.run("return location.search")
    page.hold("api/explain", 500)
    page.free("api/explain")
    page.one("#words").send_keys("blue", Keys.ENTER)
    page.says("#beta-help", "failed as told")
    assert not page.all(".memories li")  # they were another query's


def test_two_models_stand_side_by_side(page: Page) -> None:
    page.go("?q=red").until(lambda: len(page.all("#model option")) == 3)
    page.run(
        "const s = document.getElementById('model'); s.value = s.options[2].value; s.dispatchEvent(new Event('change'))"
    )
    page.until(lambda: len(page.all(".column .tile")) > 4 and len(page.all(".column")) == 2)
    assert [head.text for head in page.all(".column-head h2")] == ["colours", "others"]
    left, right = (column.rect for column in page.all(".column"))
    assert page.run("return location.search") == "?q=red&model=colours&model=others"
    page.go("?q=red&model=colours,others").until(lambda: len(page.all(".column")) == 2, "an old link")
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] <= right["x"]


def test_of_two_models_each_says_when_it_has_answered(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    notes = "return [...document.querySelectorAll('.column-head p')].map(note => note.textContent)"
    page.go("?model=colours&model=others").until(lambda: len(page.all(".column .tile.ready")) > 1)
    page.hold('"others"')
    page.one("#words").send_keys("red", Keys.ENTER)
    page.until(lambda: page.run(notes) == ["10 of 60 pictures fit", "Searching …"])
    page.free('"others"')
    page.until(lambda: page.run(notes) == ["10 of 60 pictures fit"] * 2)
    page.hold('"colours"')
    page.hold('"others"', 500)
    page.free('"others"')
    page.one("#words").send_keys("blue", Keys.ENTER)
    page.says("[role=alert]", "failed as told")
    page.free('"colours"')
    page.driver.execute_async_script("fetch('/api/search?\"colours\"').then(() => setTimeout(arguments[0], 50))")
    assert "failed as told" in page.text("#columns")


def test_the_filter_is_written_by_three_boxes_and_by_hand(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go().one("#filter-button").click()
    page.one("#filters [aria-label=Value]").send_keys("red", Keys.ENTER)
    page.says("#found-note", "10 pictures")
    page.one("#where").send_keys(" and width >", Keys.ENTER)
    page.says("[role=alert] .quiet", "filter")
    page.one("#where").send_keys("= 26", Keys.ENTER)
    page.until(
        lambda: page.text("#found-note").startswith(tuple("123456789")) and "10 " not in page.text("#found-note")
    )
    page.one("#where").clear()
    page.one("#where").send_keys("width >= 28 or width < 25", Keys.ENTER)
    page.says("#found-note", "24 pictures")
    page.one("#filters [aria-label=Value]").send_keys("red", Keys.ENTER)
    page.until(lambda: page.text("#found-note") == "4 pictures in all", "the red ones of these")


@pytest.mark.parametrize(
    ("kind", "value", "written"),
    [
        ("number", "12345678901234567", "x = 12345678901234567"),
        ("number", "1e3", "x = 1000"),
        ("boolean", "True", "x = true"),
        ("text", "it's", "x = 'it''s'"),
        ("text", "dog", "\"Like\" = 'dog'"),
    ],
)
def test_the_boxes_write_what_was_typed(page: Page, kind: str, value: str, written: str) -> None:
    page.go()
    name = written.split(" =")[0].strip('"')
    script = "const [...a] = arguments; import('/page/filters.js').then(m => a[3](m.comparison(a[0], a[1], '=', a[2])))"
    assert page.driver.execute_async_script(script, name, kind, value) == written


def test_a_hundred_thousand_pictures_are_a_few_elements(page: Page) -> None:
    page.go().until(lambda: page.all(".tile.ready"))
    page.driver.execute_async_script(
        "const done = arguments[0]; import('/page/grid.js').then(({Grid}) => { const grid = window.grid ="
        " new Grid({label: 'many', open: () => {}}); document.getElementById('columns').replaceChildren(grid.element);"
        " grid.set(Array.from({length: 100000}, (_, i) => i % 60 + 1)); done(); })"
    )
    tiles = "return document.querySelectorAll('#columns .tile').length"
    most = page.run(tiles)
    assert 10 < most < 150
    requests = "return performance.getEntriesByType('resource').filter(e => e.name.includes('thumbnail')).length"
    before = page.run(requests)
    seen = page.driver.execute_async_script(
        "const done = arguments[0]; let step = 0, most = 0; const go = () => {"
        " scrollTo(0, document.body.scrollHeight * ++step / 120);"
        " most = Math.max(most, document.querySelectorAll('#columns .tile').length);"
        " step < 120 ? requestAnimationFrame(go) : done(most); }; go();"
    )
    assert seen < 200
    page.until(lambda: page.run("return Math.max(...[...window.grid.tiles.keys()])") == 99_999)
    page.until(lambda: page.all(".tile.ready"))
    assert page.run(requests) - before < 1000  # what flies by is not fetched
    page.run("window.grid.focusAt(50000)")
    assert page.run("return document.activeElement.closest('li').getAttribute('aria-posinset')") == "50001"
    page.run("window.grid.close()")


PHONE = [
    "",
    "?q=red&explain=on",
    "?view=map",
    "?view=sort&label=red&label=blue",
    "?q=red&model=colours&model=others",
    "?view=sort&label=red&label=" + "w" * 99,
]


@pytest.mark.parametrize("address", PHONE)
def test_each_view_fits_a_phone_and_nothing_jumps(page: Page, address: str) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.go(address).until(lambda: page.all(".tile.ready, canvas"))
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    shift = page.driver.execute_async_script(
        "const done = arguments[0]; const seen = [];"
        " const what = s => `${s.node?.outerHTML}`.slice(0, 60) + ` ${s.previousRect.y} → ${s.currentRect.y}`;"
        " new PerformanceObserver(list => { for (const e of list.getEntries())"
        " seen.push([e.value, ...e.sources.map(what)]); }).observe({type: 'layout-shift', buffered: true});"
        " requestAnimationFrame(() => requestAnimationFrame(() => done(seen)))"
    )
    assert sum(value for value, *_ in shift) < 0.1, shift


FULL = "?q=red&q=-0.5~w~blue&explain=on&where=" + quote("width >= 1")
VIEWS = ["", FULL, "?view=map&q=red", "?view=sort&label=red&label=blue", "?q=fog"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scheme: str) -> None:
    axe_package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    axe = (resources.files(axe_package) / "axe.min.js").read_text(encoding="utf-8")
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    rules = (
        "" if scheme == "light" else "runOnly: ['color-contrast', 'link-in-text-block'], "
    )  # the others see no colour
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    for address in (*VIEWS, "dialog"):
        page.go("" if address == "dialog" else address)
        page.until(lambda: page.all(".tile.ready, canvas, .empty-title"))
        if address == "dialog":
            page.one(".tile").click()
            page.says("#detail-title", "square")
        page.run(axe)
        found = page.driver.execute_async_script(
            f"axe.run({{{rules}resultTypes: ['violations']}}).then(r => arguments[0](r.violations.map(v =>"
            " [v.id, v.nodes.map(n => n.html.slice(0, 160) + ' ' + n.failureSummary)])))"
        )
        assert found == [], f"{scheme} {address}: {json.dumps(found, indent=1)}"


def test_a_collection_that_changes_is_offered(browser: Any, tmp_path: Path) -> None:
    encoder = ColourEncoder()
    folder = draw(tmp_path / "pictures", range(8))
    with build(tmp_path / "idx", folder, encoder) as opened:
        site = serving(opened)
        page = Page(browser, next(site))
        page.go().says("#found-note", "8 pictures")
        page.until(lambda: len(page.all(".tile.ready")) == 8)
        assert page.shows("/api/items/1/", "red")
        page.one("[data-view=map]").click()
        page.says("#map-note", "8 pictures")
        page.one("[data-view=sort]").click()
        draw(folder, range(8, 11))
        Image.new("RGB", (24, 25), COLOURS["blue"]).save(folder / "0.png")
        look = "dispatchEvent(new Event('visibilitychange')); return document.getElementById('changed').hidden"
        page.until(
            lambda: page.run("return performance.getEntriesByType('resource').some(e => e.name.endsWith('health'))")
        )
        with Index.open(tmp_path / "idx", writable=True) as other:
            other.update([folder], UpdateOptions(model=encoder, name=encoder.name))
        page.until(lambda: not page.run(look))
        page.says("#changed", "11 pictures now")
        page.one("#changed .button").click()
        page.one("[data-view=map]").click()  # the other views show it too
        page.says("#map-note", "11 pictures")
        drawn = (
            "return performance.getEntriesByType('resource').some(e => e.name.includes('/1/thumbnail?size=128&round'))"
        )
        page.until(lambda: page.run(drawn), "the new picture on the map")
        page.one("[data-view=find]").click()
        page.says("#found-note", "11 pictures")
        page.until(lambda: page.shows("/api/items/1/", "blue"), "the new picture")
        next(site, None)
        page.one("#words").send_keys("red")  # and now the server is gone
        page.says("[role=alert]", "does not answer")
