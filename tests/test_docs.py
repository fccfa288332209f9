"""The documents: links lead somewhere, and quoted messages are those of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CODE = [path for room in ("sampo_ray", "actors", "serve", "cluster") for path in ROOT.joinpath(room).rglob("*.py")]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def texts(tree: ast.AST) -> Iterator[str]:
    """String literals of a module; values in an f-string are written `...`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_documents_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    known = "\n".join(text for path in CODE for text in texts(ast.parse(path.read_text())))
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    messages = re.findall(r"``(.+?)``", page)
    assert messages
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" '") in known, message
