"""The keys file and the command that writes it."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sampo_ray.config.keys import Key, digest, new_key, parse, render
from sampo_ray.console.main import app
from sampo_ray.errors import ConfigError, KeysError
from sampo_ray.loop.validate import check_keys_file

SECRET = "sampo-this-must-not-appear"
ENTRIES = st.lists(
    st.builds(
        Key,
        name=st.from_regex(r"[A-Za-z0-9_.@-]{1,100}", fullmatch=True),
        sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
        scopes=st.sampled_from([["use"], ["admin"], ["use", "admin"]]).map(frozenset),
        created=st.none() | st.dates(),
    ),
    unique_by=(lambda key: key.name, lambda key: key.sha256),
    max_size=5,
).map(tuple)


@given(ENTRIES, st.booleans())
def test_what_is_rendered_parses_to_the_same_keys(keys: tuple[Key, ...], json_file: bool) -> None:
    assert parse(render(keys, json_file), json_file) == keys


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "shop", "sha256": digest("x"), "scopes": ["use"], **changes}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (None, "list of entries"),
        ({"keys": []}, "list of entries"),
        (["a"], "entry 1"),
        ([entry(sha256=SECRET)], "entry 1: sha256 must be 64 hex digits"),
        ([entry(name=f"{SECRET} key")], "entry 1: name"),
        ([entry(name="")], "entry 1: name"),
        ([entry(), entry(name="b", sha256=digest("y"), scopes=[SECRET])], "entry 2: scopes"),
        ([entry(scopes=[])], "entry 1: scopes"),
        ([entry(key=SECRET)], "entry 1: must have"),
        ([{"name": "shop"}], "entry 1: sha256"),
        ([entry(), entry(sha256=digest("y"))], "entry 2: its name"),
        ([entry(), entry(name="b")], "entry 2: its sha256"),
    ],
)
def test_a_mistake_is_named_without_what_the_file_holds(tree: Any, words: str) -> None:
    for json_file in (False, True):
        content = (json.dumps(tree) if json_file else yaml.safe_dump(tree)).encode()
        with pytest.raises(KeysError) as error:
            parse(content, json_file)
        assert words in str(error.value)
        assert SECRET not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"- {" + SECRET.encode(), f"- *{SECRET}".encode(), b"", b"[" * 100_000])
@pytest.mark.parametrize("json_file", [False, True])
def test_other_bytes_are_named_without_what_the_file_holds(content: bytes, json_file: bool) -> None:
    with pytest.raises(KeysError) as error:
        parse(content, json_file)
    assert SECRET not in str(error.value)


def test_a_key_is_long_random_and_not_in_its_entry() -> None:
    made = [new_key("shop", ["use"], datetime.date(2026, 1, 31)) for _ in range(2)]
    (key, stored), (other, _) = made
    assert key != other and len(key) >= 40
    assert key not in repr(stored) and stored.sha256 == digest(key)


def sampo(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["keys", *arguments])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_command_adds_lists_and_revokes_keys(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"keys.{suffix}")
    key = sampo("add", file, "--name", "shop").stdout.strip()
    boss = sampo("add", file, "--name", "boss", "--scope", "admin").stdout.strip()
    content = Path(file).read_text()
    assert key not in content and boss not in content
    assert {(k.name, k.allows("use"), k.allows("admin")) for k in parse(content.encode(), suffix == "json")} == {
        ("shop", True, False),
        ("boss", True, True),
    }
    listed = sampo("list", file)
    assert [line.split("\t")[:2] for line in listed.stdout.splitlines()] == [["shop", "use"], ["boss", "admin"]]
    assert digest(key) not in listed.output
    assert sampo("revoke", file, "--name", "shop").exit_code == 0
    assert "shop" not in Path(file).read_text()
    check_keys_file(file)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    for arguments, words in [
        (["list", file], "No such file"),
        (["revoke", file, "--name", "shop"], "No such file"),
        (["add", file, "--name", "a b"], "letters"),
    ]:
        result = sampo(*arguments)
        assert result.exit_code == 1 and words in result.output
    sampo("add", file, "--name", "shop")
    before = Path(file).read_bytes()
    taken, unknown = sampo("add", file, "--name", "shop"), sampo("revoke", file, "--name", "shopp")
    assert "revoke it first" in taken.output and "sampo-" not in taken.stdout
    assert "the file has: shop" in unknown.output
    assert Path(file).read_bytes() == before
    Path(file).write_text("- {")
    assert "not valid YAML" in sampo("add", file, "--name", "new").output
    assert Path(file).read_text() == "- {"


def test_a_run_with_a_keys_file_that_cannot_be_read_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.keys_file=.*sampo keys add"):
        check_keys_file(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("- 5")
    with pytest.raises(ConfigError, match=r"serve\.keys_file=.*entry 1"):
        check_keys_file(str(tmp_path / "bad.yaml"))
