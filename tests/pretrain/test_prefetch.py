"""Crops to the device beside the step: on a processor nothing happens; on a GPU, their values, and what stays."""

from dataclasses import replace

import pytest
import torch

from benchmarks.train_step import fixed_batch
from pretrain.config import TrainConfig
from pretrain.data.prefetch import transferred


def test_on_a_processor_it_is_the_iterator_itself() -> None:
    batches = iter([])
    assert transferred(batches, torch.device("cpu")) is batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_crops_arrive_and_the_rest_stays() -> None:
    host = fixed_batch(TrainConfig(global_batch_size=2))
    batches = [replace(host, global_crops=host.global_crops + i).pin_memory() for i in range(5)]
    for i, batch in enumerate(transferred(iter(batches), torch.device("cuda", 0))):
        assert batch.global_crops.is_cuda
        assert batch.local_crops.is_cuda
        assert batch.masks is not None
        assert not batch.masks.is_cuda
        torch.testing.assert_close(batch.global_crops.cpu(), host.global_crops + i, rtol=0, atol=0)
