"""Ids of pods and containers as every route checks them: 64 hexadecimal digits in lower case.

Services build paths from ids, so nothing else may stand in for one.
"""

from typing import Annotated

from pydantic import StringConstraints

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
OptionalId = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
"""An id, or "" for none."""
