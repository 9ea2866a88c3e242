"""The exported OpenAPI document matches the code."""

from pathlib import Path

from cri_gateway.__main__ import SERVICE
from servicekit.server import openapi


async def test_the_exported_document_matches_the_code() -> None:
    exported = Path(__file__).parents[3] / "proto/openapi/cri-gateway.json"
    assert exported.read_text().strip() == await openapi(SERVICE), "run `make openapi` and commit what it changes"
