"""What is an id, and what is a name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.linux.accounts import MAX_ID, is_number, parse_id, split_user


@pytest.mark.parametrize(
    ("text", "number", "id"),
    [
        ("0", True, 0),
        ("1000", True, 1000),
        (str(MAX_ID), True, MAX_ID),
        (str(MAX_ID + 1), True, None),
        ("9" * 5000, True, None),
        ("00", True, None),
        ("01000", True, None),
        ("", False, None),
        ("web", False, None),
        ("-5", False, None),
        ("--5", False, None),
        ("+5", False, None),
        (" 5", False, None),
        ("5\n", False, None),
        ("1_000", False, None),
        ("0x10", False, None),
        ("１０", False, None),  # full-width digits, which int() would take
        ("١٠", False, None),
        ("²", False, None),
    ],
)
def test_ascii_digits_are_an_id_and_nothing_else_is(text: str, number: bool, id: int | None) -> None:
    assert (is_number(text), parse_id(text)) == (number, id)


@given(st.integers(0, MAX_ID))
def test_every_id_is_read_as_it_is_written(id: int) -> None:
    assert parse_id(str(id)) == id


@given(st.text())
def test_no_text_makes_it_fail(text: str) -> None:
    user, group = split_user(text)
    for part in (user, group):
        assert parse_id(part) is None or is_number(part)


def test_a_user_field_is_split_at_its_first_colon() -> None:
    assert [split_user(text) for text in ("web", "web:www", ":www", "1:2:3", "")] == [
        ("web", ""),
        ("web", "www"),
        ("", "www"),
        ("1", "2:3"),
        ("", ""),
    ]
