"""Atomic writes. A reader sees the old file or the new one, never half of one."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Writes through a temporary file in the same directory, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows and flushes them to the operating system, so that a killed process loses none."""
    with path.open("a", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that we wrote ourselves; a torn last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def file_sha256(path: Path) -> str:
    """Of a file of any size; hashlib.file_digest is newer than Python 3.10."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_files(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each, by its name below `directory`; they are on disk when this returns.

    Everyone may read the files: safetensors makes its own readable for the owner alone.
    """
    described = {}
    for path in files:
        path.chmod(0o644)
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        described[str(path.relative_to(directory))] = {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
    return described


def write_manifest(directory: Path, known: dict[str, Any] | None = None) -> None:
    """Sizes and hashes of every file, written last. `known`: of files that other ranks have described."""
    known = known or {}
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    rest = [path for path in files if str(path.relative_to(directory)) not in known]
    write_json(directory / MANIFEST, {"files": {**known, **describe_files(directory, rest)}})
    sync_directory(directory)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is as it was written."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if file_sha256(path) != expected["sha256"]:
            return f"the contents of {name} have changed"
    return None


def sync_directory(path: Path) -> None:
    """Makes renames and new files in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def format_bytes(count: int) -> str:
    """`1.5 GiB`, `300 KiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
