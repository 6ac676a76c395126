"""How exact products in float32 are, and whether equal runs on a GPU give equal bits."""

import os

import torch


def settle_numerics(deterministic: bool) -> None:
    """What this process computes with from now on; before the first product on a GPU.

    Float32 is float32: losses, KoLeo, Gram and position tables ask for it, and the blur of crops runs in cuDNN, which
    would round to 10 bits by itself. Products in bfloat16 do not know of this.

    Args:
        deterministic: leave no order of additions to chance. Attention's backward then adds up in a fixed order (only
            `sdpa` is known to), and an operation that has no such order is an error.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it where streams may share memory
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what it has not written
