"""Signals by the names that images and CRI use for them."""

import re
import signal

from servicekit.errors import InvalidArgument

_REALTIME = re.compile(r"^RT(MIN|MAX)(?:([+-])(\d{1,2}))?$")


def number(name: str) -> int:
    """Returns the number of a signal: "SIGTERM", "term" and "15" give 15; "SIGRTMIN+3" gives 37.

    Raises InvalidArgument.
    """
    short = name.upper().removeprefix("SIG")
    if short.isdecimal() and 1 <= int(short) <= 64:
        return int(short)
    realtime = _REALTIME.match(short)
    if realtime:
        base = signal.SIGRTMIN if realtime[1] == "MIN" else signal.SIGRTMAX
        offset = int(realtime[3] or 0) * (-1 if realtime[2] == "-" else 1)
        if signal.SIGRTMIN <= base + offset <= signal.SIGRTMAX:
            return base + offset
    found = getattr(signal, f"SIG{short}", None)
    if isinstance(found, signal.Signals):
        return int(found)
    raise InvalidArgument(f"signal {name!r} is unknown", hint="see signal(7)", field="signal")
