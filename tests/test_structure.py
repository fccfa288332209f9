"""The shape of the code: which room may import which, and how large a file, a function and a signature may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER: tuple[tuple[str, ...], ...] = (
    ("sampo_ray.errors", "sampo_ray.internals"),
    ("sampo_ray.config",),
    ("sampo_ray.training",),
    ("sampo_ray.sources",),
    ("sampo_ray.data",),
    ("sampo_ray.judging", "sampo_ray.rewards"),
    ("sampo_ray.run",),
    ("sampo_ray.evaluation",),
    ("sampo_ray.actors",),
    ("sampo_ray.serve",),
    ("sampo_ray.loop",),
    ("sampo_ray.iterate",),
    ("sampo_ray.cluster",),
    ("sampo_ray.console",),
    ("sampo_ray.__main__",),
)
"""Rooms from the bottom up: what is in one imports from it and from those above it in this list."""
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 40, 7


def modules() -> dict[str, Path]:
    """The package's modules by their names."""
    found = {}
    for path in sorted(_files()):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names = parts if parts[0] == "sampo_ray" else ("sampo_ray", *parts)
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def _files() -> Iterator[Path]:
    for folder in ("sampo_ray", "actors", "serve", "cluster"):
        yield from (path for path in (ROOT / folder).rglob("*.py") if not path.is_symlink())


def imports_of(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, at its top, inside functions or for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sampo_ray":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in known else node.module), node.lineno


def level_of(module: str) -> int:
    levels = [n for n, rooms in enumerate(ORDER) if any(module == r or module.startswith(f"{r}.") for r in rooms)]
    return levels[0] if levels else -1


def test_imports_never_run_back_up():
    known = modules()
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}"
        for module, path in known.items()
        for imported, line in imports_of(path, known)
        if level_of(imported) > level_of(module)
    ]
    assert not upward, "\n".join(upward)


def test_every_module_is_in_a_room():
    assert [module for module in modules() if module != "sampo_ray" and level_of(module) < 0] == []


def test_no_import_closes_a_circle():
    known = modules()
    graph = {module: {imported for imported, _ in imports_of(path, known)} - {module} for module, path in known.items()}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for imported in sorted(graph[module]):
                walk(imported, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_files_functions_and_signatures_are_small():
    large = []
    for path in modules().values():
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            large.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or 0) - node.lineno + 1
            a = node.args
            parameters = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
            if lines > MAX_FUNCTION_LINES:
                large.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
            if len(parameters) > MAX_PARAMETERS:
                large.append(f"{name}:{node.lineno}: {node.name} has {len(parameters)} parameters")
    assert not large, "\n".join(large)


def test_calls_of_ray_and_of_serve_have_a_time_limit():
    """Serve's own calls have none, so they go through `internals/serve.py`."""
    unlimited = {"status", "delete", "run", "run_many", "start", "shutdown", "get_app_handle", "get_deployment_handle"}
    bad = []
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, name = node.func.value, node.func.attr
            if not isinstance(owner, ast.Name):
                continue
            asks = (
                owner.id == "ray" and name in ("get", "wait") and "timeout" not in {each.arg for each in node.keywords}
            )
            if asks or (owner.id == "serve" and name in unlimited):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {owner.id}.{name}")
    assert not bad, "\n".join(bad)
