"""``decisions.json``: what a run decided, and of which pairs and settings.

It is written before the first step, and read by ``open_ledger`` alone: left-over files
of other pairs are never applied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloob.data.source import Fingerprint, differences
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.importing import read_json
from cloob.models.runs import DECISIONS_FILE


@dataclass
class Ledger:
    """The decisions of a run, by their names."""

    file: Path
    of: dict[str, Any]  # fingerprints of the pairs, and the settings
    decisions: dict[str, Any]

    def write(self) -> None:
        """Writes all decisions; the file is whole before this returns."""
        content = {"of": self.of, **self.decisions}
        write_whole(self.file, json.dumps(content, indent=1, default=str) + "\n")


def open_ledger(
    run: Path, fingerprints: Mapping[str, Fingerprint], settings: Mapping[str, Any]
) -> Ledger:
    """The ledger of a run, which goes on if there is one.

    Raises:
        InputError: The ledger there is of other pairs or settings, or cannot be read.
    """
    file = run / DECISIONS_FILE
    of = {"pairs": dict(fingerprints), "settings": dict(settings)}
    if not file.is_file():
        return Ledger(file, of, {})
    decisions = read_json(file)
    before = decisions.pop("of", {})
    changes = []
    for name, fingerprint in fingerprints.items():
        earlier = before.get("pairs", {}).get(name, {})
        changes += [f"{name}: {one}" for one in differences(earlier, fingerprint)]
    for name, value in settings.items():
        earlier = before.get("settings", {}).get(name)
        if earlier != value:
            changes.append(f"{name} is {value!r}, not {earlier!r}")
    if changes:
        raise InputError(
            f"{run}: is a run of other pairs or settings ({'; '.join(changes[:3])});"
            " give --overwrite or another --out"
        )
    return Ledger(file, of, decisions)
