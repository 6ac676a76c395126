"""What the machine, or what was asked, did to a run: one sentence for each, and nothing for a mistake of ours."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.messages import os_sentence, sentence
from pretrain.checkpoint import NotWritten
from pretrain.data.loader import quiet_hook, worker_failure
from pretrain.distributed import collectives

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
"""how torch says it on a processor, in a plain RuntimeError"""


def failure(error: BaseException) -> str:
    """One sentence for the user; empty where only a traceback helps, for the mistake is ours."""
    if isinstance(error, OSError):
        return os_sentence(error)
    if isinstance(error, OUT_OF_MEMORY) or any(text in str(error) for text in _NO_MEMORY):
        return (
            "memory has run out: raise execution.accumulation_steps, set execution.activation_checkpointing=true, or "
            f"lower global_batch_size. ({str(error).splitlines()[0] if str(error) else 'no more is known'})"
        )
    if isinstance(error, NotWritten | ValueError):
        return sentence(error)
    if isinstance(error, RuntimeError):
        return worker_failure(error) or collectives.lost_rank(error)
    return ""


@contextmanager
def quiet_threads() -> Iterator[None]:
    """`quiet_hook` for this process: TensorBoard's writer is such a thread, too."""
    former, threading.excepthook = threading.excepthook, quiet_hook
    try:
        yield
    finally:
        threading.excepthook = former
