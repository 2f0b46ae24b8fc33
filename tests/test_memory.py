"""internals/memory.py: what counts as a lack of memory, and when a smaller micro-step cannot help."""

import pytest
import torch
import torch.distributed as dist

from config import ModelConfig
from internals import memory
from internals.machine import Machine
from internals.memory import MicroBatch, is_out_of_memory
from internals.start import UserError
from model import GPT

TINY = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_inner=8, block_size=8, vocab_size=64)
CPU = Machine(torch.device("cpu"), torch.float32, "as requested", rank=0, processes=1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA: any words"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_each_device_has_its_own_words_for_it(error, expected):
    assert is_out_of_memory(error) == expected


def failing(error: Exception):
    def compute(size: int) -> None:
        raise error

    return compute


def test_an_exchange_without_memory_is_not_tried_again():
    """It has failed in this process alone, and the others would wait for ever."""
    micro_batch = MicroBatch(4, GPT(TINY), CPU)
    with pytest.raises(dist.DistBackendError):
        micro_batch.retry_smaller(failing(dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'")))
    assert micro_batch.size == 4


def test_a_card_that_others_fill_needs_no_smaller_micro_steps(monkeypatch):
    """At one sequence, half a card of others is the reason; before that, nearly all of it."""
    asked = []
    monkeypatch.setattr(memory, "held_by_others", lambda share: asked.append(share) or "others hold 23 of 24 GiB")
    for size in (4, 1):
        micro_batch = MicroBatch(size, GPT(TINY), CPU)
        with pytest.raises(UserError, match=r"^out of memory: others hold 23 of 24 GiB$"):
            micro_batch.retry_smaller(failing(torch.OutOfMemoryError("CUDA out of memory.")))
        assert micro_batch.size == size
    assert asked == [0.9, 0.5]
