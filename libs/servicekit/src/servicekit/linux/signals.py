"""Signals by the names that images and CRI use for them (signal(7))."""

import re
import signal

from servicekit.errors import InvalidArgument

_REALTIME = re.compile(r"RT(MIN|MAX)(?:([+-])([0-9]{1,2}))?")
_NUMBER = re.compile(r"[0-9]{1,2}")


def parse(name: str) -> int | None:
    """Returns the number of a signal: "SIGTERM", "term" and "15" give 15; "SIGRTMIN+3" gives 37.

    Returns None if there is no such signal.
    """
    short = name.upper().removeprefix("SIG")
    if _NUMBER.fullmatch(short):
        return int(short) if 1 <= int(short) <= signal.SIGRTMAX else None
    if realtime := _REALTIME.fullmatch(short):
        base = signal.SIGRTMIN if realtime[1] == "MIN" else signal.SIGRTMAX
        found = base + int(realtime[3] or 0) * (-1 if realtime[2] == "-" else 1)
        return found if signal.SIGRTMIN <= found <= signal.SIGRTMAX else None
    known = getattr(signal, f"SIG{short}", None)
    return int(known) if isinstance(known, signal.Signals) else None


def number(name: str, field: str = "signal") -> int:
    """Returns the number of a signal, as `parse`. Raises InvalidArgument that names `field`."""
    found = parse(name)
    if found is None:
        raise InvalidArgument(f"{field} = {name[:80]!r} is no signal", hint="see signal(7)", field=field)
    return found
