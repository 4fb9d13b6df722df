#!/usr/bin/env bash
# Fine-tunes MODEL on conversations with tool calls, on all machines that --ips names, from one of them.
#   --ips A,B,C      addresses of the nodes; the first is node 0
#   --ssh_password   only where there are no keys; SSHPASS=... keeps it out of the shell's history
#   --save DIR       checkpoints, on storage that all nodes mount
#   --dataset FILE   rows with `messages` (and `tools`)
# and, with defaults: --port --micro_bs --global_bs --tensor_model_parallel_size --context_parallel_size
# --max_length --epochs --save_interval. Every other flag goes to `megatron sft`.
# GPUs = tensor x context x data parallel; keep tensor parallel within a node, and raise context parallel
# with --max_length.
set -euo pipefail

: "${MODEL:?is set by the recipe: the weights, a directory or an id}"
port=29500 micro_bs=${MICRO_BS:-8} global_bs=${GLOBAL_BS:-64}
tensor=8 context=4 max_length=64000 epochs=1 save_interval=50
ips='' save='' dataset='' others=()

while (($#)); do
    case $1 in
        --ips) ips=$2 ;;
        --ssh_password) export SSHPASS=$2 ;;
        --save) save=$2 ;;
        --dataset) dataset=$2 ;;
        --port) port=$2 ;;
        --micro_bs) micro_bs=$2 ;;
        --global_bs) global_bs=$2 ;;
        --tensor_model_parallel_size) tensor=$2 ;;
        --context_parallel_size) context=$2 ;;
        --max_length) max_length=$2 ;;
        --epochs) epochs=$2 ;;
        --save_interval) save_interval=$2 ;;
        *)
            others+=("$1")
            shift
            continue
            ;;
    esac
    shift 2
done
for name in ips save dataset; do
    if [[ -z ${!name} ]]; then
        echo "error: --$name is missing" >&2
        exit 2
    fi
done
split=(--sequence_parallel true)
if ((tensor == 1)); then split=(); fi

# exec: the arguments of this shell, with a password among them, are gone from the list of processes.
exec swift launch --ips "$ips" --port "$port" \
    megatron sft \
    --model "$MODEL" \
    --dataset "$dataset" \
    --tensor_model_parallel_size "$tensor" \
    --context_parallel_size "$context" \
    "${split[@]}" \
    --micro_batch_size "$micro_bs" \
    --global_batch_size "$global_bs" \
    --max_length "$max_length" \
    --max_epochs "$epochs" \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --attention_backend flash \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --min_lr 1e-6 \
    --lr_warmup_fraction 0.05 \
    --save "$save" \
    --save_interval "$save_interval" \
    --dataset_num_proc 8 \
    "${others[@]}"
