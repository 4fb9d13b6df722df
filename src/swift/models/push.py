"""Uploads of a directory to HuggingFace or ModelScope.

Owns: which files go, who uploads, and that no secret of a run goes with them.
Not here: when (export/run.py, train/publishing.py), ModelScope's library (modelscope_hub.py).
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.publish import PublishOptions
from swift.models.adapters import RUN_ARGS, load_run_args
from swift.models.hub import HUB_ID, check_reachable, explained, load_modelscope, offline_switch
from swift.models.prompts import TOKENIZER_CONFIG, carry_template
from swift.utils import env
from swift.utils.files import format_bytes, write_json
from swift.utils.log import say

SENT = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py")
# How names of files begin that a run needs to go on, and nobody else.
KEPT = ("trainer_state", "manifest", "training_args", "optimizer", "scheduler", "rng_state")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to upload, and as whom; `name` is OWNER/NAME once it is checked."""

    name: str
    use_hf: bool
    token: str | None
    private: bool
    message: str = "update files"

    @property
    def hub(self) -> str:
        return "HuggingFace" if self.use_hf else "ModelScope"

    @property
    def flag(self) -> str:
        return f"--hub_model_id {self.name}"


def check_destination(asked: PublishOptions, model: ModelConfig) -> Destination:
    """Asks the hub who we are, before anything slow; the owner is put before a name without one."""
    use_hf = model.use_hf or env.is_on("USE_HF")
    where = Destination(asked.hub_model_id or "", use_hf, model.hub_token, asked.hub_private_repo)
    if not HUB_ID.fullmatch(where.name):
        raise ConfigError(f"{where.flag} has not the form OWNER/NAME")
    offline = offline_switch(use_hf=where.use_hf)
    if offline:
        raise ConfigError(f"--push_to_hub needs {where.hub}, and {offline} is on")
    with explained(where.flag, "pushed to", use_hf=where.use_hf):
        if where.use_hf:
            check_reachable(constants.ENDPOINT)
            user = HfApi(token=where.token).whoami()["name"]
        else:
            user = load_modelscope("--push_to_hub true:").find_user(where.token)
    say(f"pushing to {where.hub} as {user}")
    return where if "/" in where.name else replace(where, name=f"{user}/{where.name}")


def push(directory: Path, where: Destination, run_args: dict[str, Any]) -> None:
    """Uploads weights, configs and tokenizer files of a directory, not what a run needs to go on.

    The chat template says what `run_args`, those of its training, make of prompts.
    """
    with tempfile.TemporaryDirectory(prefix="swift-push-") as temporary:
        staging = Path(temporary)
        for file in directory.iterdir():
            if file.is_file() and file.suffix in SENT and not file.name.startswith(KEPT):
                (staging / file.name).symlink_to(file.resolve())
        if (staging / RUN_ARGS).exists():  # another program may have written a token into it
            write_json(staging / RUN_ARGS, load_run_args(directory))
        if (staging / TOKENIZER_CONFIG).exists():
            whole = carry_template(staging, run_args)
            if whole != run_args:
                write_json(staging / RUN_ARGS, whole)
        size = sum(file.stat().st_size for file in staging.iterdir())
        say(f"uploading {len(list(staging.iterdir()))} files, {format_bytes(size)}")
        with explained(where.flag, "pushed to", use_hf=where.use_hf):
            send = upload_to_huggingface if where.use_hf else load_modelscope("--push_to_hub true:").upload
            address = send(staging, where)
    say(f"pushed {directory} to {address}")


def upload_to_huggingface(directory: Path, where: Destination) -> str:
    api = HfApi(token=where.token)
    api.create_repo(where.name, private=where.private or None, exist_ok=True)
    api.upload_folder(repo_id=where.name, folder_path=directory, commit_message=where.message)
    return f"{constants.ENDPOINT}/{where.name}"
