MEGATRON_LM_PATH='/data/Megatron-LM' CUDA_VISIBLE_DEVICES=0 \
swift export \
--mcore_model /mnt/user/megatron_output/Qwen3-8B-sft \
--to_hf true \
--torch_dtype bfloat16 \
--output_dir /mnt/user/megatron_output/Qwen3-8B-sft/00001024-hf \
--test_convert_precision true
