"""What one CRI call carries through all services: its request id and its W3C trace context."""

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID_HEADER = "x-request-id"
TRACEPARENT_HEADER = "traceparent"
_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")


@dataclass(frozen=True, slots=True)
class CallContext:
    """One hop of a call. The trace id stays the same over all hops, the span id is this hop's own (W3C Trace Context 1)."""

    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str
    flags: str

    @property
    def traceparent(self) -> str:
        """The header that the next hop gets."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


_current: ContextVar[CallContext | None] = ContextVar("crisp_call", default=None)


def current() -> CallContext | None:
    """The call that this task works for, if it works for one."""
    return _current.get()


def enter(request_id: str | None, traceparent: str | None) -> CallContext:
    """Starts a hop from the headers that came in; what is missing or malformed is made anew."""
    match = _TRACEPARENT.match(traceparent or "")
    trace_id, parent, flags = match.groups() if match else (secrets.token_hex(16), "", "01")
    context = CallContext(
        request_id=request_id
        if request_id and len(request_id) <= 128 and request_id.isprintable()
        else secrets.token_hex(8),
        trace_id=trace_id,
        span_id=secrets.token_hex(8),
        parent_span_id=parent,
        flags=flags,
    )
    _current.set(context)
    return context
