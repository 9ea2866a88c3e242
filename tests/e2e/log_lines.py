"""Parses log files in CRI's format."""


def entries(log: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Returns stream, tag and text of each complete line of a log file."""
    return [(stream, tag, text) for _, stream, tag, text in (line.split(b" ", 3) for line in log.split(b"\n")[:-1])]


def written(lines: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """Returns what the container wrote; the pieces of a line (tag P) are joined."""
    return b"".join(text + (b"\n" if tag == b"F" else b"") for _, tag, text in lines)
