"""Who may import whom, read from the sources: the rules of docs/design.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "loadstone"

PARTS = ("measure", "hold", "serve", "sim", "plan", "report", "deploy")
ALLOWED = {
    "core": {"core"},
    "wire": {"core", "wire"},
    **{part: {"core", "wire", part} for part in PARTS},
    "cli": {"core", "wire", "cli", *PARTS},
}
HEAVY = (
    *("matplotlib", "numpy", "torch", "torchao", "transformers", "sentence_transformers", "xllamacpp", "gguf"),
    *("tokenizers", "pynvml", "vllm", "ray", "PIL", "httpcore2", "starlette", "uvicorn", "redis"),
)
"""Imported inside the one module that needs them, never by starting the command line."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(("loadstone", *path.relative_to(SOURCE).with_suffix("").parts))
        yield name.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))


def imported(tree: ast.Module, *, lazy: bool) -> set[str]:
    """Names of our own modules that a module imports; ``lazy``: also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide where a name comes from"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "loadstone"}


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not guarded and not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield from ast.walk(node)


def part_of(name: str) -> str:
    return [*name.split("."), ""][1]


def test_parts_import_only_what_they_may() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules()
        if part_of(name) in ALLOWED
        for other in imported(tree, lazy=True)
        if part_of(other) in ALLOWED and part_of(other) not in ALLOWED[part_of(name)]
    ]
    assert wrong == []


def test_every_module_belongs_to_a_part() -> None:
    strangers = [name for name, _ in modules() if part_of(name) not in {*ALLOWED, "", "__main__", "asgi"}]
    assert strangers == []


def test_imports_form_no_cycle() -> None:
    known = dict(modules())
    graph = {name: {other for other in imported(tree, lazy=False) if other in known} for name, tree in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_core_knows_no_sockets_clocks_or_event_loops() -> None:
    banned = {"socket", "ssl", "asyncio", "selectors", "time", "threading", "subprocess"}
    wrong = [
        f"{name} imports {alias}"
        for name, tree in modules()
        if part_of(name) == "core"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if alias.split(".")[0] in banned
    ]
    assert wrong == []


def test_starting_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from loadstone.cli.main import build_app; build_app(None)('--help', result_action='return_value');"
    )
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
