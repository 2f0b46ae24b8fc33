"""internals/memory.py: what counts as a lack of memory, when smaller micro-steps help, and when they cannot."""

import os

import pytest
import torch
import torch.distributed as dist
from runs import assert_same_end, little_memory, metrics, stop_at, tiny

import train
from config import ModelConfig
from internals import checkpoint, memory
from internals.machine import Machine
from internals.memory import MicroBatch, is_out_of_memory
from internals.start import UserError
from model import GPT

pytestmark = pytest.mark.usefixtures("quick")

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
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Invalid buffer size: 9.75 GB"), True),
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


def test_smaller_micro_steps_divide_the_ones_before():
    """Otherwise an iteration would also read a part of the next one's text."""
    sizes = []

    def compute(size: int) -> None:
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    MicroBatch(10, GPT(TINY), CPU).retry_smaller(compute)
    assert sizes == [10, 5, 1]


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


@pytest.mark.parametrize("training_only", [True, False])
def test_out_of_memory_takes_smaller_micro_steps_and_ends_in_the_same_weights(
    data_dir, tmp_path, monkeypatch, capsys, training_only
):
    run = dict(dropout=0.0, optimizer="adamw")  # Muon amplifies rounding errors
    train.train(tiny(data_dir, tmp_path / "enough", **run))
    little_memory(monkeypatch, 1, training_only)
    capsys.readouterr()
    train.train(tiny(data_dir, tmp_path / "little", **run))
    out = capsys.readouterr().out
    assert out.count("Out of memory") == 2 and "micro-steps now have 1 sequence, not 2" in out
    enough, little = (checkpoint.load(tmp_path / name / "last.pt") for name in ("enough", "little"))
    # The biases of keys cancel in the softmax: their gradient is only rounding, which Adam blows up to 1e-5 or so.
    torch.testing.assert_close(little["model"], enough["model"], rtol=1e-4, atol=1e-4)
    for a, b in zip(metrics(tmp_path / "enough")[1:], metrics(tmp_path / "little")[1:], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5) and a["tokens"] == b["tokens"]


def test_out_of_memory_in_a_resumed_run_changes_nothing(data_dir, tmp_path, monkeypatch):
    little_memory(monkeypatch, 2)
    train.train(tiny(data_dir, tmp_path / "straight"))
    stop_at(monkeypatch, data_dir, tmp_path / "stopped", 9)
    train.train(tiny(data_dir, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")


def test_out_of_memory_at_one_sequence_gives_up_with_advice(data_dir, tmp_path, monkeypatch):
    little_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="at --batch-size 1; only a run with a smaller --block-size"):
        train.train(tiny(data_dir, tmp_path))


def test_the_random_state_of_a_card_is_kept(monkeypatch):
    """Dropout draws its masks there. Without it, a resumed run would not be the same."""
    taken, card = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: taken.append(state.tolist()))
    state = memory.random_state(card)
    memory.set_random_state(state, card)
    assert taken == [[7]] and torch.equal(state["cpu"], torch.get_rng_state())


@pytest.mark.skipif(os.name != "posix", reason="Windows does not tell")
def test_the_peak_memory_on_a_cpu_is_in_bytes():
    used = memory.peak_memory(CPU)
    assert 2**26 < used.peak < used.total  # PyTorch alone takes 100 MB or more


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a bug")])
def test_memory_that_runs_out_outside_the_loop_is_one_line(data_dir, tmp_path, monkeypatch, capsys, error):
    def fail(cfg):
        raise error

    monkeypatch.setattr(train, "train", fail)
    bug = str(error) == "a bug"
    words = "^a bug$" if bug else r"^out of memory; take a smaller --batch-size, --block-size or model$"
    with pytest.raises(RuntimeError if bug else UserError, match=words):
        train.main(tiny(data_dir, tmp_path))
