"""Conversations as trees, where people wrote and ranked several replies to one message: OpenAssistant's exports."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sampo_ray.config.columns import Columns
from sampo_ray.sources.messages import Message
from sampo_ray.sources.records import Record

Node = Mapping[str, Any]
"""A message: `role` (prompter or assistant), `text`, `rank` (0 is the best) and `replies`."""


def holds_trees(rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether rows are trees of messages."""
    return any(isinstance(row.get("prompt"), dict) and "replies" in row["prompt"] for row in rows)  # type: ignore[operator]


def holds_messages(rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether rows are the messages of trees."""
    return any({"message_id", "parent_id", "text", "role"} <= row.keys() for row in rows)


def of_tree(values: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """A tree as one row for each message of a user, with the ranked answers to it."""
    others = {name: value for name, value in values.items() if name != "prompt"}
    root = values.get("prompt")
    found = [others | turns for _, turns in _questions(root)] if isinstance(root, dict) else []
    yield from found or [others | _NOTHING]


def of_messages(records: Iterable[Record], columns: Columns) -> Iterator[Record]:
    """The messages of trees, as rows of `of_tree`. Messages of one tree are neighbours; one tree is in memory."""
    for _, group in itertools.groupby(records, key=lambda record: record.values.get("message_tree_id")):
        of_group = list(group)
        nodes: list[dict[str, Any]] = [{**record.values, "replies": []} for record in of_group]
        owners = {id(node): record for node, record in zip(nodes, of_group, strict=True)}
        for root in _linked(nodes):
            kept = {name: root.get(name) for name in ("message_tree_id", "lang")}
            is_whole = root.get("parent_id") is None
            for asked, turns in (_questions(root) if is_whole else []) or [(root, _NOTHING)]:
                yield replace(owners[id(asked)], values=kept | turns)


def _linked(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts messages below those that they answer; the ones that answer none of these, or each other in a circle."""
    by_id = {str(node.get("message_id")): node for node in nodes}
    roots, above = [], dict[int, dict[str, Any]]()
    for node in nodes:
        parent = by_id.get(str(node["parent_id"])) if node.get("parent_id") is not None else None
        up = parent
        while up is not None and up is not node:
            up = above.get(id(up))
        if parent is None or up is node:
            roots.append(node)
        else:
            above[id(node)] = parent
            parent["replies"].append(node)
    return roots


_NOTHING: dict[str, object] = {"prompt": None, "answers": [], "rank": []}
"""Of a tree without a message that can be used, which is counted."""


def _questions(root: Node) -> list[tuple[Node, dict[str, object]]]:
    """Each message of a user, with the turns up to it and the answers to it."""
    found: list[tuple[Node, dict[str, object]]] = []
    open_: list[tuple[Node, tuple[Message, ...]]] = [(root, ())] if _is_usable(root) else []
    while open_:
        node, above = open_.pop()
        is_user = node.get("role") != "assistant"
        path = (*above, {"role": "user" if is_user else "assistant", "content": node["text"]})
        below = node.get("replies")
        replies = [reply for reply in below if _is_usable(reply)] if isinstance(below, list) else []
        if is_user:
            answers = {"answers": [r["text"] for r in replies], "rank": [r.get("rank") for r in replies]}
            found.append((node, {"prompt": list(path), **answers}))
        open_ += [(reply, path) for reply in reversed(replies)]
    return found


def _is_usable(node: object) -> bool:
    """Whether something is a message that moderators kept."""
    if not isinstance(node, dict):
        return False
    kept = not node.get("deleted") and node.get("review_result") is not False
    return kept and isinstance(node.get("text"), str)
