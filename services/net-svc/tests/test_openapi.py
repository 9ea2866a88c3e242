"""The exported OpenAPI document is up to date."""

from pathlib import Path

from net_svc.__main__ import SERVICE
from servicekit.server import openapi


async def test_the_exported_document_is_what_the_code_generates() -> None:
    exported = Path(__file__).parents[3] / "proto/openapi/net-svc.json"
    assert exported.read_text().strip() == await openapi(SERVICE), "run `make openapi` and commit the result"
