#!/usr/bin/env bash
# Qwen3-8B learns a name of its own with LoRA, on one GPU of 24 GB and more. Other flags go to `swift sft`.
# Cost (SWIFT_PLAN="--gpu RTX4090-24G --row_tokens 100"):
#   21 of 24 GiB on 1 x RTX4090-24G; 38 steps of 1,600 tokens; 0.9 min, 0.0 GPU-hours (estimate, MFU 20 %)
set -euo pipefail
exec swift sft \
    --model "${MODEL:-Qwen/Qwen3-8B}" \
    --train_type lora \
    --dataset "${DATASET:-swift/self-cognition:qwen3#600}" \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --learning_rate 1e-4 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --warmup_ratio 0.05 \
    --max_length 2048 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --output_dir "${OUTPUT:-output}" \
    --model_author "${AUTHOR:-swift}" \
    --model_name "${NAME:-swift-robot}" \
    "$@"
