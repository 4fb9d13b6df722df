"""Answers of the model in training: those of its weights as they are, adapters included."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.data.collate import collate
from swift.engines.transformers.engine import TransformersEngine
from swift.models.load import load_tokenizer
from swift.objectives.sft import Sft
from swift.rollout.local import LocalRollout
from swift.rollout.replica import ReplicaRollout
from swift.rollout.types import Completion, Request, Sampling
from swift.template.tokenize import Encoded

PROMPTS = [[5 + i, 17, 40 + i, 9] * (1 + i) for i in range(3)] + [[7, 8, 9, 10, 11] * 60]
REQUESTS = [Request(prompt, Sampling(10, seed=i), count=2) for i, prompt in enumerate(PROMPTS)]
REQUESTS.append(Request(PROMPTS[-1], Sampling(10, seed=77)))  # the long one again


def build_engine(path, *, lora: bool = False, dtype=torch.float32, **options) -> TransformersEngine:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
        )
    return TransformersEngine(model, OptimConfig(), learning_rate=0.01, total_steps=10, **options)


def rollout_of(engine: TransformersEngine, path, **options) -> LocalRollout:
    settings = {"stop_token_ids": [2], "context": 512, "max_rows": 5} | options
    return LocalRollout(engine, load_tokenizer(path), **settings)


def row(prompt: list[int], answer: list[int]) -> Encoded:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Encoded(ids, np.where(np.arange(len(ids)) < len(prompt), -100, ids), None)


def assert_logps_of_the_trainer(
    engine: TransformersEngine, found: list[list[Completion]], tolerance: float = 1e-5
) -> None:
    """What the sampler says about its tokens is what the engine says when it reads them."""
    for request, answers in zip(REQUESTS, found, strict=True):
        batch = collate([row(request.token_ids, answer.token_ids) for answer in answers])
        [stats] = engine.forward([batch], frozenset({"logps"}))
        trained = stats.logps[batch.labels != -100]
        ours = torch.tensor([logp for answer in answers for logp in answer.logps])
        torch.testing.assert_close(ours, trained, atol=tolerance, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_answers_follow_the_weights_through_training(tiny_qwen3_dir, lora):
    engine = build_engine(tiny_qwen3_dir, lora=lora)
    rollout = rollout_of(engine, tiny_qwen3_dir)
    before = rollout.generate(REQUESTS)
    assert_logps_of_the_trainer(engine, before)
    for _ in range(2):
        engine.forward_backward([collate([row(PROMPTS[3], [9, 9, 9])])], Sft())
        engine.optim_step()
    rollout.update_weights(iter(()), version=2)
    after = rollout.generate(REQUESTS)
    assert_logps_of_the_trainer(engine, after)
    assert [a.version for a in before[0] + after[0]] == [0, 0, 2, 2]
    assert after[3][0].logps != pytest.approx(before[3][0].logps, abs=1e-3)
    # A group is as many requests for one answer.
    alone = [Request(r.token_ids, r.sampling, first=i) for r in REQUESTS[:2] for i in range(2)]
    ids = [answer.token_ids for answers in after[:2] for answer in answers]
    assert [answer.token_ids for [answer] in rollout.generate(alone)] == ids
    assert engine.model.training is False  # every step of training sets its own mode


def test_another_adapter_answers_as_itself(tiny_llama_dir):
    engine = build_engine(tiny_llama_dir, lora=True)
    rollout = rollout_of(engine, tiny_llama_dir)
    first = rollout.generate(REQUESTS)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    second = rollout.generate(REQUESTS)
    assert_logps_of_the_trainer(engine, second)
    assert second[3][0].logps != pytest.approx(first[3][0].logps, abs=1e-3)
    with engine.reference():
        assert_logps_of_the_trainer(engine, rollout.generate(REQUESTS))


def test_arithmetic_is_that_of_training(tiny_llama_dir):
    """float32 weights that run in bfloat16: the keys and values in the slots are bfloat16 as well."""
    engine = build_engine(tiny_llama_dir, compute=torch.bfloat16)
    rollout = rollout_of(engine, tiny_llama_dir)
    assert_logps_of_the_trainer(engine, rollout.generate(REQUESTS), tolerance=0.03)
    with engine.generating() as model:
        assert model.lm_head(torch.ones(1, 64)).dtype == torch.bfloat16


def test_a_kernel_of_transformers_is_put_back(tiny_llama_dir):
    engine = build_engine(tiny_llama_dir, own_attention=False)
    assert_logps_of_the_trainer(engine, rollout_of(engine, tiny_llama_dir).generate(REQUESTS))
    assert engine.model.config._attn_implementation == "sdpa"


def test_a_model_with_its_own_attention_is_refused(tiny_llama_dir):
    engine = build_engine(tiny_llama_dir)
    engine.model.config.layer_types = ["linear_attention", "full_attention"]
    message = "LlamaForCausalLM cannot answer while it is trained, because it has layers of type linear"
    with pytest.raises(ConfigError, match=message):
        rollout_of(engine, tiny_llama_dir).generate([])


def test_a_copy_in_half_precision_keeps_biases_of_experts_wide(tmp_path, make_tiny_model_dir):
    path = make_tiny_model_dir(tmp_path, "deepseek_v3", first_k_dense_replace=1, n_routed_experts=8)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    copy = ReplicaRollout(
        model.config, load_tokenizer(path), dtype=torch.bfloat16, device=torch.device("cpu"),
        stop_token_ids=[2], context=64, max_rows=2,
    )  # fmt: skip
    bias = next(name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    fine = model.state_dict()[bias].fill_(1.0009765625)  # 1 + 2^-10, which bfloat16 has no room for
    copy.wake()
    copy.update_weights([*model.named_parameters(), (bias, fine)], version=1)
    assert torch.equal(copy.model.state_dict()[bias], fine)
    assert copy.model.dtype == torch.bfloat16
