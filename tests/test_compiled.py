"""What mypyc compiles (setup.py) exists, is what the sources say, and uses nothing that mypyc takes in another way."""

import ast
import runpy
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
COMPILED = [ROOT / name for name in SETUP["sources"]()]


def test_the_code_of_all_is_no_older_than_their_sources() -> None:
    newest_s = max(source.stat().st_mtime for source in COMPILED)
    stale = [code.name for code in ROOT.glob("src/loadstone__mypyc.*.so") if code.stat().st_mtime < newest_s]
    assert stale == [], "make test compiles anew"


@pytest.mark.parametrize("source", COMPILED, ids=lambda path: path.stem)
def test_options_of_msgspec_classes_would_be_dropped(source: Path) -> None:
    tree = ast.parse(source.read_text("utf-8"))
    optioned = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.keywords]
    assert optioned == []


def test_without_a_compiler_the_package_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    can_compile = SETUP["can_compile"]
    monkeypatch.delenv("LOADSTONE_PURE", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not can_compile()


def test_it_can_be_had_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_PURE", "1")
    assert not SETUP["can_compile"]()


def test_a_compiler_that_does_not_work_leaves_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "false")
    (tmp_path / "some.c").write_text("int some;")
    built = Distribution({"ext_modules": [Extension("some", [str(tmp_path / "some.c")])]})
    command = SETUP["CompileOrGoWithout"](built)
    command.build_lib = command.build_temp = str(tmp_path)
    command.ensure_finalized()
    command.run()
    assert built.ext_modules == []
    assert "it will run as Python: Command '['false'" in capsys.readouterr().err
