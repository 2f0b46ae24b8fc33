"""The compiled loss, a compiled micro-step and Muon's step on a GPU: launches, bytes and memory on a card that computes nothing.

`FAKE_GPU_DIR` has a module `counts`, which reports what the card was asked to do. Inductor itself counts the bytes.
"""

import json
import os
import sys
from pathlib import Path

from conftest import REPO, needs_fake_gpu, run_on_fake_gpu

ROWS, C, VOCAB, PADDED = 16_384, 384, 50_257, 50_304  # a micro-step of the default run

LOSS = f"""
import json, sys
sys.path.insert(0, sys.argv[1])
import counts
import torch
from torch._inductor import metrics
from torch.nn import functional as F
import model

def plain(x, weight, targets, vocab_size):
    return F.cross_entropy(F.linear(x, weight)[:, :vocab_size].float(), targets)

torch._logging.set_logs(inductor_metrics=True)  # without it Inductor does not count bytes
figures = {{}}
for function in (plain, model.linear_cross_entropy):
    metrics.reset()
    x = torch.zeros({ROWS}, {C}, device="cuda", requires_grad=True)
    weight = torch.zeros({PADDED}, {C}, device="cuda", requires_grad=True)
    targets = torch.zeros({ROWS}, dtype=torch.int64, device="cuda")
    compiled = torch.compile(lambda *args, function=function: function(*args, {VOCAB}), dynamic=False, fullgraph=True)

    def micro_step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(x, weight, targets)
        loss.backward()

    micro_step()
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    counts.reset()
    micro_step()
    asked = counts.counts()
    figures[function.__name__] = {{
        "kernels": sum(count for count, _ in asked["kernel"].values()),
        "products": sum(count for count, _ in asked["gemm"].values()),
        "waits": sum(count for count, _ in asked["sync"].values()),
        "bytes": metrics.num_bytes_accessed,
        "peak": torch.cuda.max_memory_allocated() - before,
    }}
print(json.dumps(figures))
"""


MUON = """
import json, sys
sys.path.insert(0, sys.argv[1])
import counts
import torch
from config import ModelConfig, TrainConfig
from internals.optimizer import make_optimizer
from model import GPT

model = GPT(ModelConfig()).to("cuda")
_, muon = make_optimizer(model, TrainConfig(), torch.device("cuda"), torch.bfloat16).optimizers
original = torch.optim.Muon(muon.param_groups, adjust_lr_fn="match_rms_adamw")
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
figures = {}
for name, optimizer in {"ours": muon, "original": original}.items():
    optimizer.step()
    counts.reset()
    optimizer.step()
    asked = counts.counts()
    figures[name] = {
        "launches": sum(count for kind in ("kernel", "gemm", "memcpy", "memset") for count, _ in asked[kind].values()),
        "flop": sum(flop for _, flop in asked["gemm"].values()),
        "waits": sum(count for count, _ in asked["sync"].values()),
    }
print(json.dumps(figures))
"""


MICRO_STEPS = """
import importlib.util, json, os, sys
sys.path.insert(0, sys.argv[1])
import counts
import numpy as np
import torch
from torch._inductor import metrics
from config import TrainConfig
from internals.machine import make_machine
from model import GPT

cfg = TrainConfig()
machine = make_machine(cfg)
windows = np.zeros((cfg.batch_size, cfg.model.block_size + 1), dtype=np.int64)
torch._logging.set_logs(inductor_metrics=True)  # without it Inductor does not count bytes

def nanogpt():
    spec = importlib.util.spec_from_file_location("nanogpt", os.environ["NANOGPT_DIR"] + "/model.py")
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(cfg.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
    return module.GPT(module.GPTConfig(vocab_size=50_304, bias=True, **shape))

figures = {}
for name, options in {
    "default": {},
    "pointwise": {"combo_kernels": True, "combo_kernels_pointwise_only": True},
    "all": {"combo_kernels": True},
    **({"nanoGPT": {}} if "NANOGPT_DIR" in os.environ else {}),
}.items():
    torch.compiler.reset()
    metrics.reset()
    model = (nanogpt() if name == "nanoGPT" else GPT(cfg.model)).to(machine.device)
    compiled = torch.compile(model, dynamic=False, options=options)

    def micro_step():
        inputs, targets = machine.to_device(windows)
        targets = targets.contiguous()  # nanoGPT needs it
        counts.reset()
        with machine.autocast():
            loss = compiled(inputs, targets)
        (loss[1] if name == "nanoGPT" else loss).backward()
        return sum(count for kind in ("kernel", "gemm", "memcpy", "memset") for count, _ in counts.counts()[kind].values())

    micro_step()
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    figures[name] = {"first": micro_step(), "second": micro_step()}  # the second adds to the gradients of the first
    figures[name]["bytes"] = metrics.num_bytes_accessed  # without what autograd adds up outside of the graph
    figures[name]["peak"] = round(torch.cuda.max_memory_allocated() / 2**20)
    figures[name]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    del model, compiled
print(json.dumps(figures))
"""


def on_fake_gpu(program: str, tmp_path: Path, **variables) -> dict:
    """The last line of a program's output, as JSON. Inductor's caches are off: a cached kernel is not counted."""
    file = tmp_path / "program.py"
    file.write_text(program)
    variables = {"PYTHONPATH": REPO, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": 1, **variables}
    result = run_on_fake_gpu("python", file, os.environ["FAKE_GPU_DIR"], **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@needs_fake_gpu
def test_the_compiled_loss_is_one_kernel_a_chunk_and_moves_less_than_plain_cross_entropy(tmp_path):
    figures = on_fake_gpu(LOSS, tmp_path)
    ours, plain = figures["linear_cross_entropy"], figures["plain"]
    print(figures, file=sys.stderr)
    chunks = 4  # of 4,096 rows
    assert ours["products"] == 3 * chunks
    # A chunk has two kernels: casting its rows of x, and all work between the products. The rest are casts and sums.
    assert ours["kernels"] <= 2 * chunks + 8
    assert ours["waits"] == 0
    assert ours["bytes"] <= 11.5 * ROWS * PADDED < plain["bytes"]
    assert ours["peak"] < 0.6 * plain["peak"]


@needs_fake_gpu
def test_muon_takes_a_fifth_of_the_launches(tmp_path):
    figures = on_fake_gpu(MUON, tmp_path)
    print(figures, file=sys.stderr)
    assert figures["ours"]["launches"] <= 120 < 588 <= figures["original"]["launches"]
    # For queries, keys and values apart 18 C^3 instead of 14 C^3 in each of 5 Newton-Schulz steps and 6 layers
    assert figures["ours"]["flop"] == figures["original"]["flop"] + 5 * 6 * 4 * C**3 > 1e11
    assert figures["ours"]["waits"] == 0


@needs_fake_gpu
def test_the_launches_of_a_compiled_micro_step(tmp_path):
    """Of the default model, and how many Inductor's combo_kernels would save. NANOGPT_DIR adds nanoGPT's figures."""
    figures = on_fake_gpu(MICRO_STEPS, tmp_path, timeout=900)
    print(figures, file=sys.stderr)
    assert [one["graphs"] for one in figures.values()] == [*range(1, 1 + len(figures))]  # each is compiled once
    default, pointwise = figures["default"], figures["pointwise"]
    assert default["bytes"] <= 20e9
    assert default["first"] <= 355 and default["second"] <= default["first"] + 76  # gradients to add to
    assert pointwise["first"] <= default["first"] - 40
    assert pointwise["peak"] <= 1.01 * default["peak"]
