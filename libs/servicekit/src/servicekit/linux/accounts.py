"""Users and groups in images, requests and settings: a name, or the digits of an id.

What consists of ASCII digits is an id and never a name, even if passwd(5) or group(5) has such a
name. Otherwise an image whose passwd has a line `1000` with uid 0 would run as root, although its
USER 1000 looks like an ordinary user to kubelet, which checks runAsNonRoot by the number.
"""

MAX_ID = 2**32 - 2
"""The highest uid and gid. The one above means "no change" to chown(2) and setresuid(2)."""
_DIGITS = len(str(MAX_ID))


def split_user(text: str) -> tuple[str, str]:
    """Returns the user and the group of `user:group`; "" for the part that is absent."""
    user, _, group = text.partition(":")
    return user, group


def is_number(text: str) -> bool:
    """Tells whether a text stands for an id: it has ASCII digits and nothing else."""
    return text.isascii() and text.isdigit()


def parse_id(text: str) -> int | None:
    """Returns the id that the digits stand for.

    Returns None for a text that is no id: a name, a number above MAX_ID, or one with leading zeros,
    which some programs read as octal.
    """
    if not is_number(text) or len(text) > _DIGITS or (text[0] == "0" and text != "0"):
        return None
    number = int(text)
    return number if number <= MAX_ID else None
