"""Pictures, filters, and what each of these finds; the same in both databases."""

from __future__ import annotations

from cloob.search.records import Item

ITEMS = [
    Item(1, "a", "a/dog.jpg", "", 10, 0, 640, 480, "2024-05-01T12:00:00", "A dog", {"camera": "X", "iso": 100}),
    Item(2, "a", "a/b.tar::c/Katze.png", "", 20, 0, 64, 48, "2023-12-31T23:59:59", "50% off_",
         {"iso": 100.5, "ok": True}),
    Item(3, "b", "top.gif", "", 30, None, 10, 10, None, None, {"iso": "100", "ok": False, "camera": None}),
    Item(4, "b", "b/'; drop table cloob_items; --.jpg", "", 2**40, 5, 1, 1, "2024", "it's Ä\\x",
         {'my "col"': 1, "$.iso": 7, "tweet": 1799999999999999999}),
    Item(5, "b", "b/::", "", 0, 5, 1, 1, "2025-01-01", "", {"iso": 10**30, "ok": 1, "camera": ""}),
]  # fmt: skip
COLUMNS = ("camera", "tweet", "iso", "ok", 'my "col"', "$.iso", "nowhere")
CASES = {
    "date >= 2024 and caption like '%dog%'": [1],
    "date >= 2024": [1, 4, 5],
    "date > 2024": [5],
    "date = 2024-05": [1],
    "date <= '2023-12-31 23:59'": [2],
    "date in (2024, 2025)": [1, 4, 5],
    "not date = 2024": [2, 3, 5],
    "date != 2024": [2, 5],
    "date like '2024-05%'": [1],
    "caption is null or caption = ''": [3, 5],
    "caption LIKE '50\\% off\\_'": [2],
    "name = 'Katze.png'": [2],
    "name like 'KATZE.%'": [2],
    "caption = 'it''s Ä\\x'": [4],
    "caption like '%\\\\x'": [4],
    "caption like '%ä\\\\x'": [4],
    "tweet = 1799999999999999999 and not tweet = 1799999999999999998": [4],
    "caption < 'B'": [1, 2, 5],
    "iso = 100": [1],
    "iso = '100'": [3],
    "iso > 100": [2, 5],
    "iso != 100": [2, 3, 5],
    "iso in (100, '100', 100.5)": [1, 2, 3],
    "iso not in (100, '100')": [2, 5],
    "iso like '1%'": [3],
    "ok = true": [2],
    "ok != true": [3, 5],
    "ok in (1, false)": [3, 5],
    "camera is null": [2, 3, 4],
    "camera is not null and not camera = 'X'": [5],
    "nowhere = 1 or not not nowhere is not null": [],
    '"my ""col""" = 1': [4],
    '"$.iso" >= 7': [4],
    "bytes > 1e6 or (width = 640 and not height < 480)": [1, 4],
    "id = 1 or id = 2 and bytes < 0": [1],
    "not id = 1 and id < 4": [2, 3],
    "source not in ('a') and path not like 'b/%'": [3],
}
