"""The base of all REST models: immutable, and without fields that are not in the contract."""

from pydantic import BaseModel, ConfigDict


class Contract(BaseModel):
    """A message between the gateway and a service."""

    model_config = ConfigDict(frozen=True, extra="forbid")
