"""Signals by their names."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.errors import InvalidArgument
from servicekit.linux import signals


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("64", 64),
        ("SIGRTMIN+3", signal.SIGRTMIN + 3),
        ("RTMAX-2", signal.SIGRTMAX - 2),
        ("SIGRTMIN", signal.SIGRTMIN),
        ("SIGSTKFLT", 16),
        ("SIGIOT", 6),
        ("SIGCLD", 17),
    ],
)
def test_a_signal_is_found_by_each_of_its_names(name: str, number: int) -> None:
    assert signals.number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        "",
        "SIG",
        "SIGNOTHING",
        "0",
        "65",
        "-1",
        "9" * 5000,
        "٩",
        "SIGRTMIN+99",
        "RTMAX+1",
        "SIG_DFL",
        "TERM\n",
        "\0",
        "FOO" * 999,
    ],
)
def test_an_unknown_signal_is_refused(name: str) -> None:
    assert signals.parse(name) is None
    with pytest.raises(InvalidArgument, match="stop_signal = .* is no signal") as refused:
        signals.number(name, "stop_signal")
    assert (refused.value.field, len(refused.value.message) < 200) == ("stop_signal", True)


@given(st.text())
def test_no_text_makes_it_fail(name: str) -> None:
    found = signals.parse(name)
    assert found is None or 1 <= found <= 64
