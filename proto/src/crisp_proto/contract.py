"""The base of every REST model: what is not part of the contract is refused, and nothing changes once it is made."""

from pydantic import BaseModel, ConfigDict


class Contract(BaseModel):
    """A message between the gateway and a service."""

    model_config = ConfigDict(frozen=True, extra="forbid")
