#!/usr/bin/env bash
# Qwen2.5-72B-Instruct on conversations with tool calls; the flags are explained in tools/agent_sft.sh.
# For 4 nodes of 8 GPUs, tensor 8 x context 4, with micro-batches of 4 rows. What is known of its cost:
# ms-swift trained 2,884 tokens/s on 32 GPUs (1 row a micro-batch), five days for 20,000 long conversations.
#
#   bash Qwen2.5_72B_agent_sft.sh --ips 10.0.8.7,10.0.8.8,10.0.8.9,10.0.8.11 --save DIR --dataset FILE.jsonl
set -euo pipefail
export MODEL=${MODEL:-Qwen/Qwen2.5-72B-Instruct} MICRO_BS=${MICRO_BS:-4} GLOBAL_BS=${GLOBAL_BS:-32}
exec bash "$(dirname "${BASH_SOURCE[0]}")/tools/agent_sft.sh" "$@"
