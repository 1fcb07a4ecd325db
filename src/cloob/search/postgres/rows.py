"""Items as rows of PostgreSQL's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cloob.search.records import Item, Value, as_text

FIELDS = "source, path, content, bytes, mtime_ns, width, height, date, caption, columns"
ITEM = f"id, {FIELDS}"
PLACE = "md5(source) = md5(%s) AND md5(path) = md5(%s)"
"""Of one row: long paths do not fit into an index as they are."""

UPDATE = f"UPDATE cloob_items SET ({FIELDS}) = ROW(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) WHERE id = %s"


def values_of(item: Item) -> tuple[Any, ...]:
    """An item's ``FIELDS``."""
    return (
        *place_of(item),
        *(item.content, item.bytes, item.mtime_ns, item.width, item.height),
        *(None if text is None else as_text(text) for text in (item.date, item.caption)),
        _json(item.columns),
    )


def place_of(item: Item) -> tuple[str, str]:
    """An item's source and path, of which no two rows have the same."""
    return as_text(item.source), as_text(item.path)


def _json(columns: Mapping[str, Value]) -> str:
    """Columns as JSON, which has neither NaN nor infinity, and PostgreSQL's no character 0."""
    kept = {
        as_text(name): as_text(value) if isinstance(value, str) else value
        for name, value in columns.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    return json.dumps(kept, ensure_ascii=False)
