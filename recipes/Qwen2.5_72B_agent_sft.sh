#!/usr/bin/env bash
# Qwen2.5-72B-Instruct on conversations with tool calls; the flags are explained in tools/agent_sft.sh.
# For 4 nodes of 8 GPUs of 96 GB and more, tensor 8 x context 4, with micro-batches of 4 rows; with 80 GB take
# --pipeline_model_parallel_size 4 --context_parallel_size 1 --micro_bs 1 instead. ms-swift has trained it at
# 2,884 tokens/s on 32 GPUs (1 row a micro-batch), five days for 20,000 long conversations.
# Cost (SWIFT_PLAN="--gpu H200 --rows 20000 --row_tokens 16000", --ips A,B,C,D):
#   94 of 140 GiB on 32 x H200; 625 steps of 512,000 tokens; 4.3 h, 137.3 GPU-hours (estimate, MFU 32 %)
#
#   bash Qwen2.5_72B_agent_sft.sh --ips 10.0.8.7,10.0.8.8,10.0.8.9,10.0.8.11 --save DIR --dataset FILE.jsonl
set -euo pipefail
export MODEL=${MODEL:-Qwen/Qwen2.5-72B-Instruct} MICRO_BS=${MICRO_BS:-4} GLOBAL_BS=${GLOBAL_BS:-32}
exec bash "$(dirname "${BASH_SOURCE[0]}")/tools/agent_sft.sh" "$@"
