"""Tokens of the streaming server.

A token stands for one session. It is valid for a minute and can be redeemed once, at any replica.
"""

import hashlib
import secrets

from crisp_proto.streams import Session, SessionToken
from monitor_svc.store import Store
from servicekit.errors import NotFound, ResourceExhausted

_TOKEN_BYTES = 16
_VALID_SECONDS = 60
_LIMIT = 1000


def issue(store: Store, session: Session) -> SessionToken:
    """Returns a new token. Raises ResourceExhausted while too many are waiting to be redeemed."""
    token = secrets.token_hex(_TOKEN_BYTES)
    if not store.add_session(_digest(token), session, _VALID_SECONDS, _LIMIT):
        raise ResourceExhausted(
            f"{_LIMIT} tokens of the streaming server are waiting to be used",
            hint=f"each expires after {_VALID_SECONDS} s",
        )
    return SessionToken(token=token)


def redeem(store: Store, token: SessionToken) -> Session:
    """Returns the session of a token, and invalidates the token.

    Raises NotFound if the token is unknown, has expired, or was redeemed before.
    """
    session = store.take_session(_digest(token.token))
    if session is None:
        raise NotFound(
            f"this token is unknown, was used before, or is older than {_VALID_SECONDS} s", hint="ask for a new URL"
        )
    return session


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
