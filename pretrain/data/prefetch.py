"""Crops on their way to the device while it computes."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.data.collate import Batch


def transferred(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, their crops on the device; on a processor the iterator itself.

    On a GPU crops are copied from page-locked memory on a stream of their own, so that the copy runs beside the step
    before, whose kernels the host has only queued. The stream that computes waits for it. Nothing is fetched ahead of
    the batch that is asked for. Masks and parameters stay on the host, where they are looked at.
    """
    return batches if device.type != "cuda" else _copied_beside(batches, device)


def _copied_beside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device)

    def copied(crops: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            return crops.to(device, non_blocking=True)

    for batch in batches:
        crops = [batch.global_crops, batch.local_crops, batch.gram_crops]
        moved = [None if x is None else copied(x) for x in crops]
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for x in moved:
            if x is not None:
                x.record_stream(computing)  # its memory is not given to a later copy while the step reads it
        global_crops, local_crops, gram_crops = moved
        assert global_crops is not None
        assert local_crops is not None
        yield replace(batch, global_crops=global_crops, local_crops=local_crops, gram_crops=gram_crops)
