"""What the description of the API allows is answered as it says, what it forbids is refused: schemathesis."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from cloob.search.index import Index
from cloob.serve.app import make_app
from cloob.serve.guard import ServeConfig

# A filter, weights that cancel, ids that are not there: well-formed, and refused with these.
CHECKS = {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 413, 415]}}


@pytest.fixture
def schemathesis() -> Any:
    found = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    # It imports this late. While threads of an index run, Python 3.11 may fail to parse it: "AST constructor recursion
    # depth mismatch" (python/cpython#106905).
    pytest.importorskip("schemathesis.specs.openapi.schemas")
    return found


@pytest.fixture
def described(schemathesis: Any, index: Index) -> Any:
    app = make_app(index, ServeConfig(local=False, max_upload_pixels=100_000))
    config = schemathesis.Config.from_dict({"checks": CHECKS})
    return schemathesis.openapi.from_asgi("/api/openapi.json", app, config=config)


@pytest.mark.nightly
def test_the_api_keeps_to_its_description(schemathesis: Any, described: Any) -> None:
    """Asks each operation with well-formed requests and as many malformed ones."""
    operations = [found.ok() for found in described.get_all_operations()]
    modes = schemathesis.GenerationMode
    for operation in operations:
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            wrong = mode is modes.NEGATIVE
            if wrong and (operation.path == "/api/uploads" or not (operation.body or operation.query)):
                continue  # nothing to get wrong; forms that are none: test_uploads.py

            @settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)  # fmt: skip # noqa: E501
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                case.call_and_validate()

            ask()
    assert len(operations) == 17
