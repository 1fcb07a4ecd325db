"""``decisions.json``: what a run decided, and of which pairs and settings.

It is written before the first step, and read by ``open_decisions`` alone: left-over
files of other pairs are never applied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.data.source import Fingerprint, differences
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.importing import read_json
from cloob.models.runs import DECISIONS_FILE

Decisions = dict[str, Any]
"""What a run decided, by name; ``of`` has its pairs' fingerprints and its settings."""


def open_decisions(
    run: Path, fingerprints: Mapping[str, Fingerprint], settings: Mapping[str, object]
) -> Decisions:
    """The decisions of a run, which goes on if there are any.

    Raises:
        InputError: Those there are of other pairs or settings, or cannot be read.
    """
    file = run / DECISIONS_FILE
    now = {"pairs": dict(fingerprints), "settings": dict(settings)}
    if not file.is_file():
        return {"of": now}
    decisions: Decisions = read_json(file)
    before = decisions.get("of", {"pairs": {}, "settings": {}})
    changes = []
    for name, fingerprint in fingerprints.items():
        earlier = before["pairs"].get(name, {})
        changes += [f"{name}: {change}" for change in differences(earlier, fingerprint)]
    for name, value in settings.items():
        earlier_value = before["settings"].get(name)
        if earlier_value != value:
            changes.append(f"{name} is {value!r}, not {earlier_value!r}")
    if changes:
        raise InputError(
            f"{run}: is a run of other pairs or settings ({'; '.join(changes[:3])});"
            " give --overwrite or another --out"
        )
    return {**decisions, "of": now}


def write_decisions(run: Path, decisions: Decisions) -> None:
    """Writes all decisions; the file is whole before this returns."""
    content = json.dumps(decisions, indent=1, default=str) + "\n"
    write_whole(run / DECISIONS_FILE, content)
