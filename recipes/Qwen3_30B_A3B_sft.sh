#!/usr/bin/env bash
# All weights of the mixture of experts Qwen3-30B-A3B on two machines of 8 GPUs with 80 GB: tensor 2, experts
# over 8, so that an expert's tokens stay within a machine. IPS="A,B" starts both from here; without it this
# node joins the job that its environment describes (Slurm, Kubernetes, DLC). Other flags go to `megatron sft`.
# Cost (SWIFT_PLAN="--gpu H100-80G"):
#   52 of 79 GiB on 16 x H100-80G; 2,000 steps of 131,072 tokens; 56.5 min, 15.1 GPU-hours (estimate, MFU 14 %)
set -euo pipefail
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
nodes=()
if [[ -n ${IPS:-} ]]; then nodes=(--ips "$IPS"); fi
exec swift launch "${nodes[@]}" \
    megatron sft \
    --model "${MODEL:-Qwen/Qwen3-30B-A3B-Base}" \
    --dataset "${DATASET:-liucong/Chinese-DeepSeek-R1-Distill-data-110k-SFT}" \
    --split_dataset_ratio 0.01 \
    --tensor_model_parallel_size "${TENSOR:-2}" \
    --sequence_parallel true \
    --expert_model_parallel_size "${EXPERT:-8}" \
    --moe_grouped_gemm true \
    --moe_aux_loss_coeff 0.01 \
    --micro_batch_size 1 \
    --global_batch_size 16 \
    --packing true \
    --max_length 8192 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 1 \
    --train_iters 2000 \
    --eval_iters 50 \
    --eval_interval 200 \
    --lr 1e-5 \
    --min_lr 1e-6 \
    --lr_warmup_fraction 0.05 \
    --save "${OUTPUT:-megatron_output/Qwen3-30B-A3B-Base}" \
    --save_interval 200 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 8 \
    "$@"
