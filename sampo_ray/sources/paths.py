"""Paths into a row's values: `prompt`, `info.post`, `answers.0.text`, `annotations.*.Rating`."""

from collections.abc import Mapping

_NOTHING = object()


def at(values: object, path: str) -> object | None:
    """What `values` has at a path; None where there is nothing. `*` gives a list of what all elements have.

    A column whose own name has dots wins over a path through others.
    """
    found = _at(values, path)
    return None if found is _NOTHING else found


def has(values: object, path: str) -> bool:
    """Whether `values` has something at a path, if only a null."""
    return _at(values, path) is not _NOTHING


def _at(values: object, path: str) -> object:
    if isinstance(values, Mapping):
        if path in values:
            return values[path]
        cut = len(path)
        while (cut := path.rfind(".", 0, cut)) > 0:
            if path[:cut] in values:
                return _at(values[path[:cut]], path[cut + 1 :])
    head, _, rest = path.partition(".")
    if head == "*" and isinstance(values, Mapping | list):
        elements = values.values() if isinstance(values, Mapping) else values
        found = [_at(element, rest) if rest else element for element in elements]
        return [each for each in found if each is not _NOTHING] or _NOTHING
    if isinstance(values, list) and head.isdecimal() and int(head) < len(values):
        return _at(values[int(head)], rest) if rest else values[int(head)]
    return _NOTHING
