#!/usr/bin/env bash
# A megatron-core checkpoint MCORE_MODEL, or the last one of a run directory, becomes HuggingFace weights in
# OUTPUT, and both are compared. Other flags go to `swift export`.
set -euo pipefail
MCORE_MODEL=${MCORE_MODEL:?names the checkpoint or run directory}
exec swift export \
    --mcore_model "$MCORE_MODEL" \
    --to_hf true \
    --torch_dtype "${TORCH_DTYPE:-bfloat16}" \
    --output_dir "${OUTPUT:-${MCORE_MODEL%/}-hf}" \
    --test_convert_precision true \
    "$@"
