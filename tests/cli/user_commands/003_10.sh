MEGATRON_LM_PATH='/data/Megatron-LM' CUDA_VISIBLE_DEVICES=0 \
swift export \
    --model Qwen3-8B \
    --to_mcore true \
    --torch_dtype bfloat16 \
    --output_dir Qwen3-8B-mcore --test_convert_precision true
