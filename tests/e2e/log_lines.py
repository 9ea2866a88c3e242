"""Log files in CRI's format, taken apart."""


def entries(log: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Stream, tag and text of each whole line of a log file."""
    return [(stream, tag, text) for _, stream, tag, text in (line.split(b" ", 3) for line in log.split(b"\n")[:-1])]


def written(lines: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """What the container wrote: pieces (P) put together."""
    return b"".join(text + (b"\n" if tag == b"F" else b"") for _, tag, text in lines)
