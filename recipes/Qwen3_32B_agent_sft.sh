#!/usr/bin/env bash
# Qwen3-32B on conversations with tool calls; the flags are explained in tools/agent_sft.sh.
# For 4 nodes of 8 GPUs: tensor 8 x context 4. On 8 nodes --context_parallel_size 8, on 12 nodes 4 again with
# three copies of the model. ms-swift has trained it at 2,828 tokens/s on 16 GPUs (4 rows a micro-batch, tensor
# 8, context 2), which is five days for 20,000 long conversations.
# Cost (SWIFT_PLAN="--gpu H100-80G --rows 20000 --row_tokens 16000", --ips A,B,C,D):
#   59 of 79 GiB on 32 x H100-80G; 313 steps of 1,024,000 tokens; 2.1 h, 67.8 GPU-hours (estimate, MFU 32 %)
#
#   bash Qwen3_32B_agent_sft.sh --ips 10.0.8.7,10.0.8.8,10.0.8.9,10.0.8.11 --save DIR --dataset FILE.jsonl
set -euo pipefail
export MODEL=${MODEL:-Qwen/Qwen3-32B}
exec bash "$(dirname "${BASH_SOURCE[0]}")/tools/agent_sft.sh" "$@"
