"""The site's pages: each can be reached, each public name has its API page, and links lead somewhere.

That the site builds without a warning is checked by ``make docs``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cloob

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md"))


def entries(page: str) -> list[str]:
    """What the toctrees of a page list."""
    trees = re.findall(
        r"^```\{toctree\}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]


def test_each_page_is_in_the_contents_once() -> None:
    assert sorted(entries("index.md")) == [page for page in PAGES if page != "index" and not page.startswith("api/")]


def test_no_page_has_the_name_of_one_that_sphinx_writes() -> None:
    assert not {"search", "genindex", "py-modindex"} & set(PAGES)


def test_each_public_name_is_in_the_api() -> None:
    """In docs/api.md, with the module that it is defined in; that module has a page."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| \{py:\w+\}`(\w+) <([\w.]+)>`", text, flags=re.MULTILINE))
    assert set(shown) == {name for name in cloob.__all__ if not name.startswith("__")}
    modules = {entry.removeprefix("api/").removesuffix("/index").replace("/", ".") for entry in entries("api.md")}
    for name, place in shown.items():
        module = place if place in modules else place.rpartition(".")[0]
        assert module in modules, f"{name}: {place} has no page"
        assert module == place or place == f"{cloob._HOMES.get(name, module)}.{name}", f"{name} is not {place}"
    for module in modules:
        path = DOCS.parent.joinpath("src", *module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+?)(?:#[^)]*)?\)", text):
        if not re.match(r"https?://|mailto:|#", target):
            assert (DOCS / page).parent.joinpath(target).exists(), target
