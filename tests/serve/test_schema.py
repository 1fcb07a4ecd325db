"""Whatever the description of the API allows is answered as it says, and whatever it forbids is refused: schemathesis."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from cloob.search.index import Index
from cloob.serve.app import make_app
from cloob.serve.settings import ServeConfig

schemathesis: Any = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
EXAMPLES = int(os.environ.get("CLOOB_API_EXAMPLES", "8"))
schema = schemathesis.pytest.from_fixture("described")
HEALTH = list(HealthCheck)


@pytest.fixture(scope="session")
def described(index: Index) -> Any:
    app = make_app(index, ServeConfig(local=False, max_upload_pixels=100_000))
    config = schemathesis.Config.from_dict(
        {
            "checks": {
                # A filter, weights that cancel, ids that are not there: well-formed, and refused with these.
                "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 404, 413, 415]},
                "unsupported_method": {"enabled": False},  # 405 without a body of ours; the methods that exist matter
            }
        }
    )
    return schemathesis.openapi.from_asgi("/api/openapi.json", app, config=config)


@schema.parametrize()
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=HEALTH, database=None)
def test_the_api_keeps_to_its_description(case: Any) -> None:
    case.call_and_validate()


@pytest.mark.nightly
@schema.parametrize()
@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=HEALTH, database=None)
def test_the_api_keeps_to_its_description_at_length(case: Any) -> None:
    case.call_and_validate()
