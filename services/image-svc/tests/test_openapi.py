"""The exported OpenAPI document is up to date."""

from pathlib import Path

from image_svc.__main__ import SERVICE
from servicekit.server import openapi


async def test_the_exported_document_is_that_of_the_code() -> None:
    exported = Path(__file__).parents[3] / "proto/openapi/image-svc.json"
    assert exported.read_text().strip() == await openapi(SERVICE), "run `make openapi` and commit what it changes"
