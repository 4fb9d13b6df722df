"""What users type: the commands in cli/user_commands, split by a real shell."""

import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "cli/user_commands"
FILES = sorted(FOLDER.glob("*.sh"))
RECORDER = """#!/bin/sh
{ printf '%s' "${0##*/}"; for word in "$@"; do printf '\\0%s' "$word"; done; printf '\\036'; } >> "$RECORDS"
"""
BASH = shutil.which("bash") or "/bin/bash"


def record_calls(script: str, directory: Path) -> list[list[str]]:
    """argv of every swift and megatron call that bash makes of `script`; other programs do nothing."""
    shims, records = directory / "shims", directory / "records"
    shims.mkdir()
    records.touch()
    for name in ("swift", "megatron"):
        (shims / name).write_text(RECORDER)
    for name in ("bash", "tensorboard"):
        (shims / name).write_text("#!/bin/sh\n")
    (shims / "nohup").write_text('#!/bin/sh\nexec "$@"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    environment = {"PATH": str(shims), "HOME": str(directory), "RECORDS": str(records), "LC_ALL": "C.UTF-8"}
    subprocess.run(
        [BASH, "-c", f"{script}\nwait"], cwd=directory, env=environment, capture_output=True, check=False
    )
    calls = records.read_text(encoding="utf-8").split("\x1e")[:-1]
    return [call.split("\0") for call in calls]
