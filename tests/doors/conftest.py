"""The world of the doors, an index of it, and the record."""

import json
from pathlib import Path

import pytest

from doors import cloob, make_world, same, steady
from support import read_json

RECORD = Path(__file__).with_name("recorded.json")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("world"))
    cloob("index", made.pairs, "--model", made.model, "--out", made.index)
    return made


@pytest.fixture
def recorded(world, request):
    """Compares what a door gave with the record, or writes it anew with
    ``--update-golden``.
    """

    def check(door, found):
        found = json.loads(json.dumps(steady(found, world)))
        record = read_json(RECORD) if RECORD.exists() else {}
        if request.config.getoption("--update-golden"):
            record[door] = found
            lines = ",\n".join(
                f"{json.dumps(key)}: {json.dumps(record[key])}"
                for key in sorted(record)
            )
            RECORD.write_text(f"{{\n{lines}\n}}\n")
        else:
            same(found, record[door], door)

    return check
