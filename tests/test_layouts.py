"""Layouts of public data: each is read right or refused, and none is read wrong."""

from collections import Counter

from tests.layouts.layouts import LAYOUTS


def test_each_layout_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(each.name for each in LAYOUTS).items() if count > 1] == []
