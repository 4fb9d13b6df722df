MEGATRON_LM_PATH='/data/Megatron-LM'  PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
CUDA_VISIBLE_DEVICES=0,1 \
NNODES=2 \
NODE_RANK=1 \
MASTER_ADDR=10.208.24.97 \
MASTER_PORT=29500 \
NPROC_PER_NODE=2 \
nohup  megatron sft \
    --load Qwen3-8B-mcore \
    --dataset '/mnt/user/dataset/multi_round_output.jsonl' '/mnt/user/dataset/output_messages.jsonl' \
    --split_dataset_ratio 0.01 \
    --tensor_model_parallel_size 2 \
    --sequence_parallel \
    --micro_batch_size 2 \
    --global_batch_size 16 \
    --recompute_granularity full \
    --recompute_method uniform \
    --recompute_num_layers 3 \
    --finetune \
    --cross_entropy_loss_fusion \
    --lr 1e-5 \
    --lr_warmup_fraction 0.05 \
    --min_lr 1e-6 \
    --max_epochs 3 \
    --save /mnt/user/megatron_output/Qwen3-8B-sft \
    --save_interval 50 \
    --max_length 2048 \
    --add_version false \
    --system 'You are a helpful assistant.' \
    --num_workers 4 \
    --dataset_num_proc 4 \
    --model_author swift \
    --model_name swift-robot >run.log 2>&1 &
