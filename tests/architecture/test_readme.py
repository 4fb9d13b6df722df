"""What README.md and docs/ tell a reader to type works when typed.

Every ```bash block runs, in the order of the page, in one empty directory per page, with `swift` on PATH and
no hub. The built-in model is replaced by a tiny one, so a run takes seconds; nothing else is changed. A line
that starts with `make` is only checked for its target, since `make test` would run these tests again. A chat
reads CHAT from stdin. Blocks with another tag (text, json, yaml) are for reading and do not run.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BUILT_IN_MODEL = "smollm2-135m"
CHAT = "Who are you?\nexit\n"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE_LINE = re.compile(r"^make\b[^\n]*$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """One ```bash block: the line of its fence and its text."""

    line: int
    text: str


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, m.start()) + 1, m.group(1)) for m in BLOCK.finditer(text)]


def make_targets(block: Block) -> list[str]:
    """Targets that the block's `make` lines ask for; `make` alone is `make help`."""
    lines = (line.split("#")[0].split()[1:] for line in MAKE_LINE.findall(block.text))
    return [target for words in lines for target in [w for w in words if "=" not in w] or ["help"]]


def run_block(
    block: Block, directory: Path, model: Path, programs: Path | None
) -> subprocess.CompletedProcess[str]:
    """Runs a block as a reader's shell would, stopping at the first command that fails."""
    script = directory / ".block.sh"
    script.write_text(MAKE_LINE.sub("", block.text).replace(BUILT_IN_MODEL, str(model)), encoding="utf-8")
    first = [str(programs)] if programs else []
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SWIFT_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-x", str(script)],
        cwd=directory,
        env=environment,
        input=CHAT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_page(page: Path, directory: Path, model: Path, programs: Path | None = None) -> None:
    """Runs all blocks of a page; a failure names page, line, commands and what they printed."""
    for block in read_blocks(page):
        result = run_block(block, directory, model, programs)
        assert result.returncode == 0, (
            f"{page.name}, block at line {block.line}: exit code {result.returncode}\n{block.text}\n"
            f"--- output\n{result.stdout[-3000:]}\n--- errors\n{result.stderr[-3000:]}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if read_blocks(p)], ids=lambda p: p.name)
def test_commands_of_the_page_run(page: Path, tmp_path: Path, tiny_llama_dir: Path, programs: Path) -> None:
    run_page(page, tmp_path, tiny_llama_dir, programs)


def test_swift_is_installed_beside_python() -> None:
    assert shutil.which("swift", path=str(Path(sys.executable).parent)) is not None


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    asked = {target for page in PAGES for block in read_blocks(page) for target in make_targets(block)}
    assert {"demo", "test", "check"} <= asked <= known


def test_readme_shows_the_main_job() -> None:
    text = "".join(block.text for block in read_blocks(ROOT / "README.md"))
    for command in (
        "make demo",
        "make test",
        "swift sft",
        "swift infer",
        "swift export",
        "--merge_lora true",
    ):
        assert command in text


def test_links_between_pages_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_a_failing_command_is_reported(tmp_path: Path) -> None:
    """The check can fail: the second of three commands does not exist, `make` and other blocks do not run."""
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nmake nonsense\necho smollm2-135m > name.txt\n```\n\n```text\nexit 7\n```\n\n"
        "```bash\ntest -s name.txt\nno-such-command | cat\ntouch never.txt\n```\n",
        encoding="utf-8",
    )
    assert [block.line for block in read_blocks(page)] == [1, 10]
    assert make_targets(read_blocks(page)[0]) == ["nonsense"]
    with pytest.raises(
        AssertionError, match=r"page\.md, block at line 10: exit code 127[\s\S]*no-such-command"
    ):
        run_page(page, tmp_path, Path("/models/tiny"))
    assert (tmp_path / "name.txt").read_text() == "/models/tiny\n"
    assert not (tmp_path / "never.txt").exists()
