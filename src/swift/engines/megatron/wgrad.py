"""Weight gradients added up in float32 inside the matrix product, by cuBLAS alone.

megatron-core takes this from apex, which has to be compiled: the module `fused_weight_gradient_mlp_cuda`.
Here cublasGemmEx of the cuBLAS that torch has loaded is called through ctypes, with bfloat16 factors and a
float32 sum. Not here: experts, whose grouped product and its addition
take 3.0 ms on an H100 for 128 of them, where a call for each would take 4.2.
"""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

MODULE = "fused_weight_gradient_mlp_cuda"
# Values of cudaDataType_t, cublasComputeType_t, cublasOperation_t and cublasGemmAlgo_t in CUDA's headers.
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
COMPUTE_FLOAT32, NOT_TRANSPOSED, TRANSPOSED, DEFAULT_ALGORITHM = 68, 0, 1, -1


def install() -> bool:
    """Puts the module where megatron-core looks for it when it is imported; whether there is one then."""
    if MODULE in sys.modules or find_spec(MODULE):
        return True
    try:
        library = ctypes.CDLL(find_cublas())
    except OSError:
        return False
    product = library.cublasGemmEx
    product.restype = ctypes.c_int
    module = ModuleType(MODULE)

    def accumulate(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
        """total [out, in] float32 += gradients [T, out] ^T @ inputs [T, in], without waiting for the GPU."""
        inputs, gradients = (x.reshape(-1, x.shape[-1]).contiguous() for x in (inputs, gradients))
        tokens, width = inputs.shape
        height = gradients.shape[1]
        assert total.is_contiguous() and total.dtype == torch.float32, (total.shape, total.dtype)
        one, pointer, number = ctypes.c_float(1.0), ctypes.c_void_p, ctypes.c_int
        # To cuBLAS, which counts by columns, row-major matrices are their own transposes: total^T is wanted.
        status = product(
            pointer(torch.cuda.current_blas_handle()),
            *map(number, (NOT_TRANSPOSED, TRANSPOSED, width, height, tokens)),
            ctypes.byref(one),
            *(pointer(inputs.data_ptr()), number(TYPES[inputs.dtype]), number(width)),
            *(pointer(gradients.data_ptr()), number(TYPES[gradients.dtype]), number(height)),
            ctypes.byref(one),
            *(pointer(total.data_ptr()), number(TYPES[total.dtype]), number(width)),
            *map(number, (COMPUTE_FLOAT32, DEFAULT_ALGORITHM)),
        )
        if status:
            raise RuntimeError(f"cublasGemmEx failed with status {status} for {tokens} x {width} x {height}")

    def accumulate_in_kind(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
        """The same where sums are as narrow as gradients."""
        total.addmm_(gradients.reshape(-1, gradients.shape[-1]).t(), inputs.reshape(-1, inputs.shape[-1]))

    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate_in_kind  # type: ignore[attr-defined]
    sys.modules[MODULE] = module
    return True


def find_cublas() -> str:
    """The library that torch runs on: the one that this process has loaded.

    Raises OSError where there is none.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith("libcublas.so"):
            return path
    raise OSError("no cuBLAS in this process")
