"""The templates of this folder, filled in; what is not said to be markup is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.errors import require

HERE = Path(__file__).parent


def markup(text: str) -> Any:
    """Text that goes into a page as it is."""
    return require("markupsafe", "train").Markup(text)


def render(template: str, **content: Any) -> str:
    """A template with its content, and the style that the pages share."""
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = markup((HERE / "page.css").read_text(encoding="utf-8"))
    page: str = environment.get_template(template).render(css=css, **content)
    return page
