"""The world of the doors, an index of it, and the record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doors import World, cloob, make_world, same, steady

RECORD = Path(__file__).with_name("recorded.json")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    cloob("index", made.pairs, "--model", made.model, "--out", made.index)
    return made


@pytest.fixture
def recorded(world: World, request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compares what a door gave with the record, or writes it anew with ``--update-golden``."""

    def check(door: str, found: Any) -> None:
        found = json.loads(json.dumps(steady(found, world)))
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if request.config.getoption("--update-golden"):
            record[door] = found
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(record[key])}" for key in sorted(record))
            RECORD.write_text(f"{{\n{lines}\n}}\n")
        else:
            same(found, record[door], door)

    return check
