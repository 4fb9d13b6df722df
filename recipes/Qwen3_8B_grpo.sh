#!/usr/bin/env bash
# Qwen3-8B learns mathematics from rewards for right answers (GRPO), on 8 GPUs of 80 GB that train and answer
# in turn. Other flags go to `swift rlhf`.
# Cost (SWIFT_PLAN="--gpu H100-80G --row_tokens 200"):
#   71 of 79 GiB on 8 x H100-80G; 625 steps of 549,888 tokens; 15.0 h, 120.1 GPU-hours (estimate, MFU 21 %)
set -euo pipefail
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
exec swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen3-8B}" \
    --train_type full \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR#5000}" \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-6 \
    --warmup_ratio 0.05 \
    --max_length 4096 \
    --max_completion_length 4096 \
    --reward_funcs accuracy \
    --num_generations 16 \
    --temperature 1.0 \
    --top_p 0.85 \
    --use_vllm "${USE_VLLM:-true}" \
    --deepspeed zero3 \
    --log_completions true \
    --overlong_filter true \
    --save_total_limit 2 \
    --logging_steps 5 \
    --output_dir "${OUTPUT:-output}" \
    "$@"
