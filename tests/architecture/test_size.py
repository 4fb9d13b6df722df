"""The size ratchet: small files, short functions, a bounded whole. Lists of exceptions may only shrink."""

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src" / "swift"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TOTAL_LINES = 36_700
LONG_FILES: frozenset[str] = frozenset()  # "folder/file.py"
LONG_FUNCTIONS: frozenset[str] = frozenset()  # "folder/file.py:function"


def find_long_files(source: Path) -> set[str]:
    return {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    }


def find_long_functions(source: Path) -> set[str]:
    """Functions and methods whose `def` line to last line is over the limit; decorators do not count."""
    found = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                    found.add(f"{path.relative_to(source)}:{node.name}")
    return found


def count_lines(source: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in source.rglob("*.py"))


def test_files_stay_small() -> None:
    assert find_long_files(SOURCE) == LONG_FILES


def test_functions_stay_short() -> None:
    assert find_long_functions(SOURCE) == LONG_FUNCTIONS


def test_the_whole_stays_readable() -> None:
    assert 500 < count_lines(SOURCE) < MAX_TOTAL_LINES


def test_the_limits_bite(tmp_path: Path) -> None:
    """A file of 401 lines and a function of 81 are found; one line less of each is not."""
    line = "    x = 1\n"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "long_file.py").write_text("x = 1\n" * 401)
    (tmp_path / "file.py").write_text("x = 1\n" * 400)
    (tmp_path / "functions.py").write_text("def f():\n" + line * 80 + "def g():\n" + line * 79)
    (tmp_path / "method.py").write_text("class A:\n    def f(self):\n" + ("    " + line) * 80)
    assert find_long_files(tmp_path) == {"inner/long_file.py"}
    assert find_long_functions(tmp_path) == {"functions.py:f", "method.py:f"}
    assert count_lines(tmp_path) == 401 + 400 + 161 + 82
