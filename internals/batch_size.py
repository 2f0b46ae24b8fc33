"""`--batch-size auto`: the sequences in a micro-step, calculated from the memory of the device."""

import dataclasses

import torch

from config import TrainConfig
from internals.machine import Machine
from model import GPT, LOGITS_AT_ONCE, LOGITS_AT_ONCE_COMPILED, rows_within

USABLE = 0.9  # of a GPU's free memory; the rest is lost between blocks of the allocator, or to cuBLAS and cuDNN
CPU_TOKENS = 4096  # in a micro-step on other devices: the size at which benchmarks/train.py measures a CPU


def resolve_batch_size(cfg: TrainConfig, machine: Machine) -> TrainConfig:
    """`cfg` with a number for `--batch-size auto`: the largest that fits and divides `tokens_per_iter`.

    On a GPU it is what fits into the free memory of every process; otherwise a size at which a CPU is fast. A run
    stores the number. A resumed run keeps it unless it is given `--resume --batch-size auto`.
    """
    if cfg.batch_size != "auto":
        return cfg
    fitting = max(1, CPU_TOKENS // cfg.model.block_size)
    if machine.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(machine.device)
        constant, sequence = training_bytes(cfg, machine.dtype)
        fitting = int((USABLE * free - constant) / sequence)
    fitting = int(machine.gather(torch.tensor([fitting])).min())
    sequences = cfg.tokens_per_iter // (cfg.model.block_size * machine.processes)
    size = next((n for n in range(min(fitting, sequences), 1, -1) if sequences % n == 0), 1)
    return dataclasses.replace(cfg, batch_size=size)


def training_bytes(cfg: TrainConfig, dtype: torch.dtype) -> tuple[int, int]:
    """GPU memory of training, in bytes: for a batch of any size, and for each sequence in it.

    tests/test_batch_size.py checks it on a simulated card. On an H200, 256 sequences took 10,000 MiB compiled (5 % less than
    calculated), and 4,096 sequences without torch.compile took 6 % more.
    """
    c = cfg.model
    with torch.device("meta"):
        model = GPT(c)
    head = c.padded_vocab_size * c.n_embd
    # Weights, gradients and AdamW's two moments in float32; the head in `dtype`, and its gradient in float32
    constant = 16 * sum(p.numel() for p in model.parameters()) + head * (dtype.itemsize + 4)
    # What the backward pass of a block needs, for each token. In float32: the residual stream before both norms. In
    # `dtype`: both normalised streams, queries, keys and values, attention's output and its copy with the heads side by
    # side, and the MLP's hidden layer before and after GELU. With dropout, two masks of a byte and their results.
    block = 8 * c.n_embd + dtype.itemsize * (8 * c.n_embd + 2 * c.n_inner)
    block += (2 + 2 * dtype.itemsize) * c.n_embd if c.dropout else 0
    token = c.n_layer * block
    if cfg.compile == "off":  # a chunk of the logits in `dtype`, its probabilities and its one-hot in float32
        logits = min(LOGITS_AT_ONCE, cfg.tokens_per_iter * c.padded_vocab_size)
        constant += logits * (dtype.itemsize + 8) + head * dtype.itemsize
    else:  # Inductor moves some of the loss's products to its end: half of all logits, all chunks' gradients of the head
        constant += LOGITS_AT_ONCE_COMPILED * dtype.itemsize
        rows = rows_within(LOGITS_AT_ONCE_COMPILED, model.transformer.wte.weight)
        token += dtype.itemsize * (c.padded_vocab_size // 2 + head // rows)
    return constant, c.block_size * token
