"""Pictures, filters, and what each of these finds; the same in both databases."""

import json
from pathlib import Path

from cloob.search.records import Item

TABLE = json.loads(Path(__file__).with_name("where.json").read_text(encoding="utf-8"))
ITEMS = [Item(*row) for row in TABLE["items"]]
COLUMNS, CASES = tuple(TABLE["columns"]), TABLE["cases"]
