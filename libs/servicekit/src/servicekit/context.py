"""The context of a CRI call in all services: its request id and its W3C trace context."""

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID_HEADER = "x-request-id"
TRACEPARENT_HEADER = "traceparent"
_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")
_REQUEST_ID_LIMIT = 128


@dataclass(frozen=True, slots=True)
class CallContext:
    """One hop of a call (W3C Trace Context 1).

    All hops share the trace id; each has a span id of its own. `parent_span_id` is the previous
    hop's, None for the first hop.
    """

    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    flags: str

    @property
    def traceparent(self) -> str:
        """The traceparent header for the next hop."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


_current: ContextVar[CallContext | None] = ContextVar("crisp_call", default=None)


def current() -> CallContext | None:
    """Returns the call that this task works for; None for background tasks."""
    return _current.get()


def enter(request_id: str | None, traceparent: str | None) -> CallContext:
    """Starts a hop from the incoming headers; replaces those that are missing or malformed."""
    match = _TRACEPARENT.match(traceparent or "")
    trace_id, parent, flags = match.groups() if match else (secrets.token_hex(16), None, "01")
    context = CallContext(
        request_id=request_id if request_id and _is_request_id(request_id) else secrets.token_hex(8),
        trace_id=trace_id,
        span_id=secrets.token_hex(8),
        parent_span_id=parent,
        flags=flags,
    )
    _current.set(context)
    return context


def _is_request_id(text: str) -> bool:
    return len(text) <= _REQUEST_ID_LIMIT and text.isprintable()
