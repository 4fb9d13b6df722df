#!/usr/bin/env bash
# All weights of Qwen3-8B on rows of your own, packed to 8,192 tokens, on 4 GPUs of 80 GB. Other flags go to
# `swift sft`; several machines: swift launch --ips A,B in front of it.
# Cost (SWIFT_PLAN="--gpu H100-80G --rows 100000 --row_tokens 800"):
#   35 of 79 GiB on 4 x H100-80G; 1,833 steps of 131,072 tokens; 2.5 h, 10.1 GPU-hours (estimate, MFU 31 %)
set -euo pipefail
export NPROC_PER_NODE=${NPROC_PER_NODE:-4}
exec swift sft \
    --model "${MODEL:-Qwen/Qwen3-8B}" \
    --train_type full \
    --dataset "${DATASET:?names your rows}" \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --learning_rate 1e-5 \
    --warmup_ratio 0.05 \
    --packing true \
    --max_length 8192 \
    --fsdp fsdp2 \
    --gradient_checkpointing true \
    --eval_steps 100 \
    --save_steps 100 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --dataset_num_proc 8 \
    --output_dir "${OUTPUT:-output}" \
    "$@"
