"""Every environment variable that the project reads, with what it means. Nobody else touches os.environ."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLES = {
    "SWIFT_CACHE": "root of our own cache (built-in models); default ~/.cache/swift",
    "XDG_CACHE_HOME": "parent of the cache where SWIFT_CACHE is not set",
    "SWIFT_OFFLINE": "1 = never download; a missing model is an error at once",
    "HF_HUB_OFFLINE": "1 = as SWIFT_OFFLINE, for HuggingFace ids",
    "USE_HF": "1 = hub ids mean HuggingFace, as --use_hf true",
    "MODELSCOPE_CACHE": "root of ModelScope's downloads",
    "NPROC_PER_NODE": "processes on this node; set = run under torchrun",
    "NNODES": "nodes of the job; set = run under torchrun",
    "NODE_RANK": "index of this node",
    "MASTER_ADDR": "address of node 0",
    "MASTER_PORT": "port of node 0",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used; training takes all of them unless NPROC_PER_NODE is set",
    "RANK": "global rank, set by torchrun",
    "WORLD_SIZE": "number of processes, set by torchrun",
    "LOCAL_RANK": "rank on this node, set by torchrun",
    "TORCHELASTIC_RUN_ID": "name of the job, set by torchrun",
    "LOCAL_WORLD_SIZE": "number of processes on this node, set by torchrun",
    "MEGATRON_LM_PATH": "no effect: megatron-core is an installed package, not a checkout",
    "SLURM_JOB_NODELIST": "nodes of a Slurm job, for swift launch",
    "SLURM_STEP_NODELIST": "nodes of a Slurm job step",
    "SLURM_NNODES": "how many there are",
    "SLURM_STEP_NUM_NODES": "how many there are in the step",
    "SLURM_STEP_NUM_TASKS": "tasks of the step; swift launch wants one on each node",
    "SLURM_STEP_ID": "set where srun started this process",
    "SLURM_NODEID": "index of this node",
    "PET_NNODES": "nodes, from operators that start torchrun on Kubernetes",
    "PET_NODE_RANK": "index of this node, from them",
    "PET_NPROC_PER_NODE": "processes on this node, from them",
    "SWIFT_BEATS": "directory for signs of life, set by swift launch",
    "GENERATIVE_RERANKER_POSITIVE_TOKEN": "what a generative reranker says of a fitting document: yes",
    "GENERATIVE_RERANKER_NEGATIVE_TOKEN": "what it says of one that does not fit: no",
    "SSHPASS": "password that swift launch gives to ssh",
    "SWIFT_PLAN": "flags of swift plan: training commands are planned instead of run",
    "SWIFT_LOG_LEVEL": "least important lines that are shown: info, warning or error",
    "SWIFT_DEBUG": "1 = show the traceback behind an error line",
    "OMP_NUM_THREADS": "CPU threads of torch",
    "OMP_WAIT_POLICY": "how idle CPU threads wait; PASSIVE unless set",
}
# Settings that swift launch takes along to other nodes; others go with --env.
PREFIXES = (
    "CUDA_", "FLASH_", "GENERATIVE_", "GLOO_", "HF_", "HUGGINGFACE_", "MLFLOW_", "MODELSCOPE_", "NCCL_",
    "NVTE_", "OMP_", "PYTORCH_", "SWANLAB_", "SWIFT_", "TOKENIZERS_", "TORCH_", "TRANSFORMERS_", "TRITON_",
    "UCX_", "VLLM_", "WANDB_",
)  # fmt: skip
TRAVEL = ("PYTHONPATH", "XDG_CACHE_HOME", "USE_HF", "http_proxy", "https_proxy", "no_proxy")

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read(name: str, default: str | None = None) -> str | None:
    """The value of a declared variable; an empty one counts as unset."""
    assert name in VARIABLES, f"{name} is not declared in swift/utils/env.py"
    return os.environ.get(name) or default


def is_on(name: str) -> bool:
    """True for 1, true, yes and on."""
    return (read(name) or "").lower() in ("1", "true", "yes", "on")


def set_defaults(variables: Mapping[str, str]) -> None:
    """Sets what is not set yet: the ENV block of a config file, any names."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def put(variables: Mapping[str, str | None]) -> None:
    """Sets variables, or takes them away with None."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def inherited() -> dict[str, str]:
    """A copy of everything that is set, for a process to be started."""
    return dict(os.environ)


def travelling() -> dict[str, str]:
    """What is set here and means something to training on another node."""
    return {name: value for name, value in os.environ.items() if name in TRAVEL or name.startswith(PREFIXES)}


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """GPUs that may be used, without importing torch: those of CUDA_VISIBLE_DEVICES, else of /dev."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        found = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia*")]
        return sorted((name for name in found if name.isdecimal()), key=int)
    names = [name.strip() for name in listed.split(",")]
    return names[: names.index("-1")] if "-1" in names else [name for name in names if name]


def count_gpus(devices: Path = Path("/dev")) -> int:
    return len(visible_gpus(devices))


def with_gpus(gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a process that has these GPUs and is no rank of this job."""
    own = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    return own | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def cache_root() -> Path:
    """Directory of our own cache; not made here."""
    own = read("SWIFT_CACHE")
    return Path(own) if own else Path(read("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift"
