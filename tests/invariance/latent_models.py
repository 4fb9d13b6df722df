"""Tiny models with attention over latents, as DeepSeek's: no two sizes are the same, one dense layer."""

from typing import Any

LATENT: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 20, "q_lora_rank": 24,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "rms_norm_eps": 1e-5,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
V2 = LATENT | {
    "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
}  # fmt: skip
V3 = LATENT | {"n_group": 4, "topk_group": 2, "rope_parameters": YARN}
MOONLIGHT = LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}
