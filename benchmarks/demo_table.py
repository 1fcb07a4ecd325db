"""README's table of the demo, from the results.json that the demo wrote.

``make demo && python benchmarks/demo_table.py runs/demo`` keeps the numbers under ``benchmarks/results/demo/`` and
writes them into README.md between its markers; a test renders the table again and compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "demo" / "results.json"
MARKED = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def render(results: Mapping[str, Any]) -> str:
    """A Markdown table: a row per number, a column per model, 95 % intervals in brackets."""
    rows = results["rows"]
    lines = ["| | " + " | ".join(row["model"] for row in rows) + " |", "|---|" + "---|" * len(rows)]

    def line(what: str, cells: list[str]) -> None:
        lines.append(f"| {what} | " + " | ".join(cells) + " |")

    def percent(section: str, name: str, key: str) -> list[str]:
        numbers = [row[section][name] for row in rows]
        return [
            f"{100 * n[key]:.1f} ({100 * n[key + '_interval'][0]:.1f}–{100 * n[key + '_interval'][1]:.1f})"
            for n in numbers
        ]

    for name in rows[0]["zeroshot"]:
        line(f"zero-shot {name}, top-1 %", percent("zeroshot", name, "acc1"))
        line(f"zero-shot {name}, top-5 %", percent("zeroshot", name, "acc5"))
    for name in rows[0]["retrieval"]:
        for key, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            for k in (1, 5, 10):
                line(f"{arrow}, recall@{k} %, {name}", percent("retrieval", name, f"{key}@{k}"))
        for side in ("image", "text"):
            found = [str(row["geometry"][name][f"effective_eigenvalues_{side}"]) for row in rows]
            line(f"effective eigenvalues, {side}s (of 256)", found)
    line("training, seconds", [f"{row['train_seconds']:.0f}" for row in rows])
    return "\n".join(lines) + "\n"


def main() -> None:
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = MARKED.sub(lambda found: found[1] + render(results) + found[2], readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
