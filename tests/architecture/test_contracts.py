"""The rules of CONTRIBUTING.md that a machine can check. Every rule is also shown a file that breaks it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "swift"
CHECKED_FOLDERS = ("src", "tests", "examples", "benchmarks")

# Things that belong to one person's machine or to the way the work is organised, not to the project.
# Written with one-letter classes so that this file does not contain what it looks for.
FORBIDDEN_WORDS = re.compile(
    r"/[w]ork/|/[r]oot/|/[h]ome/[a-z]|/[t]mp/(?:venv|w|scaffold)\b|/[o]pt/(?:pypi|wheels)"
    r"|[p]ythonhosted|\b[p]ypi\.org|registry\.[n]pmjs|[d]ownload\.pytorch"
    r"|(?i:\bissue\s+#\d|\b[h]elper agent|\b[s]ub-?agent|\bfiled by a [s]ession|\bthe other [w]orkers?\b)"
)


def python_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def own_files() -> list[Path]:
    """What git tracks or would track; in a copy of the repository without .git, everything but caches."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        made = {".git", ".venv", "__pycache__", "output", "build", ".pytest_cache", ".ruff_cache"}
        names = [p for p in ROOT.rglob("*") if not made & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in names if p.is_file())


def run_tool(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a console script of the interpreter that runs the tests."""
    tool = Path(sys.executable).with_name(command[0])
    return subprocess.run(
        [str(tool), *command[1:]],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def find_environment_reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            yield f"line {node.lineno}: os.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (
                f"line {node.lineno}: {n.name}" for n in node.names if n.name in ("environ", "getenv")
            )


def find_inner_imports(tree: ast.AST) -> Iterator[str]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom))
            yield from (f"line {node.lineno}: import in {function.name}()" for node in inner)


def find_missing_module_docstring(tree: ast.Module) -> Iterator[str]:
    if tree.body and not ast.get_docstring(tree):
        yield "no module docstring"


def find_undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions and classes at module level without a docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"line {node.lineno}: {node.name} has no docstring"


def find_forbidden_words(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"line {number}: {match.group()}" for match in FORBIDDEN_WORDS.finditer(line))


def violations(rule, files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} {found}"
        for path in files
        for found in rule(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_environment_is_read_in_one_place() -> None:
    assert (
        violations(find_environment_reads, [p for p in python_files() if p != SOURCE / "utils/env.py"]) == []
    )


def test_imports_are_at_module_top() -> None:
    assert violations(find_inner_imports, [p for p in python_files() if p != SOURCE / "cli/main.py"]) == []


def test_every_module_says_what_it_owns() -> None:
    assert violations(find_missing_module_docstring, python_files()) == []


def test_objectives_and_engines_are_documented() -> None:
    files = [p for folder in ("objectives", "engines") for p in sorted((SOURCE / folder).rglob("*.py"))]
    assert violations(find_undocumented, files) == []


def test_init_files_are_empty() -> None:
    """But for those that plugins import from, and the one that megatron-core has to find done."""
    filled = {p.parent for p in python_files() if p.name == "__init__.py" and p.stat().st_size}
    assert filled == {SOURCE, SOURCE / "dataset", SOURCE / "rewards", SOURCE / "engines" / "megatron"}


def test_files_name_no_machine_and_no_organisation_of_work() -> None:
    files = own_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8")
            found += [f"{path.relative_to(ROOT)} {hit}" for hit in find_forbidden_words(text)]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (find_environment_reads, "import os\nos.environ['A']", "import os\nos.fsync(1)"),
        (find_environment_reads, "from os import getenv", "from os import fsync"),
        (
            find_inner_imports,
            "def f():\n    if 1:\n        import json",
            "import json\ndef f(): json.dumps(1)",
        ),
        (find_missing_module_docstring, "import json", '"""Owns nothing."""\nimport json'),
        (find_undocumented, "class A:\n    x = 1", "def _a(): ..."),
    ],
)
def test_each_rule_finds_a_breach(rule, bad: str, good: str) -> None:
    assert len(list(rule(ast.parse(bad)))) == 1
    assert list(rule(ast.parse(good))) == []


@pytest.mark.parametrize(
    "bad", ["see /" + "work/main/a.py", "as in Issue " + "#12", "the helper " + "agent says"]
)
def test_forbidden_words_are_found(bad: str) -> None:
    assert len(list(find_forbidden_words(bad))) == 1
    assert list(find_forbidden_words("a piece of work / a new session / an issue with tokens")) == []


def test_linter_and_formatter_are_content() -> None:
    folders = [name for name in CHECKED_FOLDERS if (ROOT / name).is_dir()]
    for command in (("ruff", "check"), ("ruff", "format", "--check")):
        result = run_tool(*command, *folders)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def test_imports_point_downwards() -> None:
    result = run_tool("lint-imports")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("batch.py", "import swift.train\n", "layers"),
        ("objectives/zz_new.py", "import peft\n", "objectives know torch"),
        ("utils/zz_new.py", "def f():\n    import torch\n", "start fast"),
    ],
)
def test_contracts_catch_an_upward_import(tmp_path: Path, module: str, line: str, broken: str) -> None:
    """Breaks a copy of the package on purpose: one line, one contract."""
    shutil.copytree(SOURCE, tmp_path / "swift", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "swift" / module).open("a", encoding="utf-8") as handle:
        handle.write(line)
    result = run_tool("lint-imports", "--no-cache", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"{broken}.* BROKEN", result.stdout)
