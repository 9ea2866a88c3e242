"""Tokens of the streaming server."""

import time
from pathlib import Path

import pytest

from crisp_proto.streams import Session, SessionKind
from monitor_svc import sessions
from monitor_svc.store import Store
from servicekit.errors import NotFound, ResourceExhausted


def test_a_token_is_redeemed_once_by_any_replica_and_is_not_stored(tmp_path: Path) -> None:
    session = Session(kind=SessionKind.EXEC, id="c" * 64, command=["true"], stdout=True)
    one, other = Store(tmp_path / "db", keep_events=10), Store(tmp_path / "db", keep_events=10)
    token = sessions.issue(one, session)
    assert len(token.token) == 32
    assert token.token.encode() not in (tmp_path / "db").read_bytes() + (tmp_path / "db-wal").read_bytes()
    assert sessions.redeem(other, token) == session
    with pytest.raises(NotFound, match="used before"):
        sessions.redeem(one, token)


def test_tokens_expire_and_their_number_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, session = Store(tmp_path / "db", keep_events=10), Session(kind=SessionKind.EXEC, id="c" * 64)
    old = sessions.issue(store, session)
    for _ in range(999):
        sessions.issue(store, session)
    with pytest.raises(ResourceExhausted, match="1000 tokens"):
        sessions.issue(store, session)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(NotFound, match="older than 60 s"):
        sessions.redeem(store, old)
    sessions.issue(store, session)
