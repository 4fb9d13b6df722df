"""`megatron pt|sft|rlhf`: the same runs on megatron-core. `swift`'s commands import nothing of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from swift.config.layout import Layout, choose_layout, model_sizes
from swift.config.megatron_runs import MegatronRlhfRun, MegatronRun, MegatronSftRun
from swift.config.option import ConfigError
from swift.config.option import build as build_config
from swift.config.runs import ExportRun
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.checkpoint import Files
from swift.engines.megatron.dist_checkpoint import load_model
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.implementation import describe_implementation
from swift.engines.megatron.lora import add_adapters, check_places
from swift.engines.megatron.model import build_chunks, draw_head
from swift.engines.megatron.settings import Settings, chosen_settings, model_settings
from swift.engines.megatron.setup import context_ranks, join_model_parallel, seed_model_parallel
from swift.engines.megatron.tables import HEAD
from swift.engines.ranks import Ranks, join_ranks
from swift.models.heads import count_labels, scoring_config, verdict_tokens
from swift.models.load import SLOW_HALF, load_config, pick_device
from swift.models.outline import Outline, outline_adapters
from swift.plugins.registry import load_object
from swift.train.actor_critic import build_engines
from swift.train.building import seed_everything
from swift.train.megatron import as_resumption, settle, with_accumulation
from swift.train.method import rlhf_method, sft_method
from swift.train.preparing import Prepared, locate_model
from swift.train.run import Backend, train
from swift.utils import env
from swift.utils.log import say, warn_once


def run_pt(run: MegatronSftRun) -> int:
    return train(as_resumption(run), "pt", sft_method, MEGATRON)


def run_sft(run: MegatronSftRun) -> int:
    return train(as_resumption(run), "sft", sft_method, MEGATRON)


def run_rlhf(run: MegatronRlhfRun) -> int:
    return train(as_resumption(run), "rlhf", rlhf_method, MEGATRON)


def layout_of(run: MegatronRun, config: PretrainedConfig) -> Layout:
    """How the processes of this job share the model; ConfigError where they cannot."""
    world = int(env.read("WORLD_SIZE", "1") or 1)
    # Grouped products take rows of a multiple of 16 bytes.
    grain = 16 // choose_dtype(run, config, pick_device(run.model.device)).itemsize
    return choose_layout(run.megatron, world=world, sizes=replace(model_sizes(config.to_dict()), grain=grain))


def locate(run: MegatronRun) -> tuple[MegatronRun, Path]:
    """Where config and tokenizer are, and the run with the micro-batches that its layout makes of a step."""
    directory = Path(run.megatron.mcore_model or ".").parent
    if not (run.megatron.mcore_model and (directory / "config.json").is_file()):
        run, directory = locate_model(run)
    layout = layout_of(run, load_config(directory))
    run.megatron.check_layers(layout)
    return with_accumulation(run, layout), directory


def join(ready: Prepared) -> tuple[Ranks, torch.device]:
    """Processes that share a model or its tokens are one data rank."""
    timeout = ready.run.parallel.ddp_timeout
    ranks, device = join_ranks(pick_device(ready.run.model.device), timeout)
    return join_model_parallel(ranks, layout_of(ready.run, ready.model_config), timeout), device


def choose_dtype(run: MegatronRun, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """--torch_dtype, else that of config.json on a GPU and float32 on a CPU."""
    named = run.model.torch_dtype or run.schedule.compute
    on_cpu = device.type == "cpu"
    dtype = getattr(torch, named) if named else torch.float32 if on_cpu else config.dtype or torch.bfloat16
    if on_cpu and dtype != torch.float32 and torch.backends.cpu.get_cpu_capability() in SLOW_HALF:
        name = str(dtype).removeprefix("torch.")
        warn_once(f"this CPU cannot multiply {name} fast: weights and arithmetic are float32")
        return torch.float32
    return dtype


def build(
    ready: Prepared, ranks: Ranks, device: torch.device, total_steps: int, _accumulation: int
) -> MegatronEngine:
    """Seeds everything, builds this rank's part of the model and reads its weights."""
    run, method, resumption = ready.run, ready.method, ready.resumption
    hf, seed = ready.model_config, run.schedule.seed
    seed_everything(seed + ranks.rank)
    seed_model_parallel(seed)
    layout = layout_of(run, hf)
    dtype = choose_dtype(run, hf, device)
    flags = run.megatron
    if run.tuner.train_type == "lora":  # adapters stand beside layers of torch kernels
        flags = replace(flags, transformer_impl="torch")
    verdict = verdict_tokens(ready.tokenizer) if method.answers_yes else None
    is_text = method.learns_text or method.answers_yes
    head = method.num_labels if is_text else method.num_labels or 0
    chosen = chosen_settings(flags, hf, has_adapters=run.tuner.train_type == "lora")
    settings = model_settings(hf, layout, dtype, head=head, **chosen)
    say(describe_implementation(settings.transformer_impl))
    outline = outline_of(ready, settings)
    teacher = teacher_settings(ready, dtype) if method.teaches and method.needs_reference else None
    is_judge = isinstance(run, MegatronRlhfRun) and method.foresees and method.num_labels
    start = ready.model_path if is_judge and run.rewards.reward_model else None
    chunks = load_chunks(ready, settings, start)
    if outline:
        add_adapters(chunks, hf, settings, outline)
    frozen = None
    if teacher:
        frozen = build_chunks(*teacher)
        assert ready.reference_path is not None
        Bridge(*teacher).load(frozen, ready.reference_path)
    elif method.needs_reference and run.tuner.train_type == "full":
        frozen = load_chunks(ready, settings, ready.reference_path)
    engine = MegatronEngine(
        chunks,
        settings,
        run.optim,
        vocabulary=hf.vocab_size,
        learning_rate=run.optim.peak(run.tuner.train_type),
        total_steps=total_steps,
        ranks=ranks,
        context=context_ranks(flags.cp_comm_type),
        wrapping=Wrapping(
            flags.use_distributed_optimizer, flags.overlap_grad_reduce, flags.overlap_param_gather
        ),
        frozen=frozen,
        temperature=run.online.temperature if isinstance(run, MegatronRlhfRun) and method.samples else 1.0,
        verdict=verdict,
        files=Files(
            describe(ready),
            ready.model_path,
            hugging_face=flags.save_safetensors,
            adapter=outline and outline.config,
        ),
    )
    if resumption:
        engine.load(resumption.checkpoint, optimizer=not flags.no_load_optim, random=not flags.no_load_rng)
    return engine


def teacher_settings(ready: Prepared, dtype: torch.dtype) -> tuple[PretrainedConfig, Settings]:
    """The teacher's config and settings, on the layout of the model. ConfigError where it does not fit."""
    run = ready.run
    assert isinstance(run, MegatronRlhfRun) and ready.reference_path is not None
    hf, own = load_config(ready.reference_path), ready.model_config
    about = f"--teacher_model {run.rlhf.teacher_model}"
    tensor = run.megatron.tensor_model_parallel_size
    if tensor > 1 and hf.vocab_size != own.vocab_size:
        raise ConfigError(
            f"{about} has {hf.vocab_size} tokens, the model {own.vocab_size}: cut over "
            f"--tensor_model_parallel_size {tensor} they do not lie side by side",
            hint="--tensor_model_parallel_size 1, or use swift rlhf",
        )
    flags = run.megatron
    if not model_sizes(hf.to_dict()).experts:
        flags = replace(flags, expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    try:
        layout = layout_of(replace(run, megatron=flags), hf)
        return hf, model_settings(hf, layout, dtype, **chosen_settings(flags, hf))
    except ConfigError as error:
        raise ConfigError(f"{about}: {error.message}", hint=error.hint) from error


def outline_of(ready: Prepared, settings: Settings) -> Outline | None:
    """The adapters that the flags ask for; ConfigError for those that cannot be."""
    run, resumption = ready.run, ready.resumption
    if run.tuner.train_type == "full":
        return None
    outline = outline_adapters(
        ready.model_config, run.tuner, dtype=settings.params_dtype, base=ready.model_path,
        seed=run.schedule.seed, resumed=resumption.checkpoint if resumption else None,
        num_labels=settings.head or None,
    )  # fmt: skip
    check_places(ready.model_config, outline)
    return outline


def load_chunks(ready: Prepared, settings: Settings, other: Path | None) -> list[nn.Module]:
    """This rank's chunks with the weights of --mcore_model, of --model, or of another HF directory."""
    run = ready.run
    chunks, source = build_chunks(ready.model_config, settings), other or ready.model_path
    new_head = bool(settings.head) and count_labels(source) is None
    if new_head:
        draw_head(chunks, ready.model_config, run.schedule.seed)
    if run.megatron.mcore_model and other is None:
        load_model(chunks, Path(run.megatron.mcore_model), new_head=new_head)
    else:
        Bridge(ready.model_config, settings).load(chunks, source, may_lack={HEAD} if new_head else ())
    return chunks


def describe(ready: Prepared) -> PretrainedConfig:
    """config.json of what is trained."""
    run, method = ready.run, ready.method
    if method.num_labels is None:
        return ready.model_config
    problem = run.task.problem_type if isinstance(run, MegatronSftRun) else None
    return scoring_config(ready.model_config, ready.tokenizer, num_labels=method.num_labels, problem=problem)


def merge(run: MegatronRun, checkpoint: Path) -> None:
    """--merge_lora: `swift export --merge_lora true` of the last checkpoint. Called by one process."""
    if run.tuner.merge_lora:
        plan = {"adapters": (str(checkpoint),), "merge_lora": True, "exist_ok": True}
        load_object("swift.export.run:run_export")(build_config(ExportRun, plan))


MEGATRON = Backend(
    settle, locate, join, partial(build_engines, build_one=build), iterations=True, finish=merge
)
