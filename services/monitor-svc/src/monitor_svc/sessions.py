"""Tokens of the streaming server: each stands for one session, can be redeemed once, at any replica, and for a minute."""

import hashlib
import secrets

from crisp_proto.streams import Session, SessionToken
from monitor_svc.store import Store
from servicekit.errors import NotFound, ResourceExhausted

_BYTES = 16
_SECONDS = 60
_LIMIT = 1000


def issue(store: Store, session: Session) -> SessionToken:
    """A new token. Raises ResourceExhausted while too many have been handed out and not redeemed."""
    token = secrets.token_hex(_BYTES)
    if not store.add_session(_digest(token), session, _SECONDS, _LIMIT):
        raise ResourceExhausted(
            f"{_LIMIT} tokens of the streaming server are waiting to be used; each expires after {_SECONDS} s"
        )
    return SessionToken(token=token)


def redeem(store: Store, token: SessionToken) -> Session:
    """What the token stands for. Raises NotFound for one that is unknown, too old, or was redeemed before."""
    session = store.take_session(_digest(token.token))
    if session is None:
        raise NotFound(f"this token is unknown, was used before, or is older than {_SECONDS} s; ask for a new URL")
    return session


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
