"""How fast text is generated, beside transformers, a loop without a cache, and what the memory allows.

    python benchmarks/generate.py

The default model (6 layers, 6 heads, 384 dimensions, context 256, GPT-2's vocabulary) with random weights, 200 new
tokens behind a prompt of 8, sampled as generate.py's defaults do. Everything runs in this one process, in turn, several
times; printed are the median speed and, of the ratio within a round, which a machine that slows down for a while hardly
changes, the median and both ends. The limit is what reading all weights once per token would take at the bandwidth
measured in the same round. The second table is the time per token of longer texts, past the end of the context, the
third the time from the command to its first character. Needs transformers and the GPT-2 vocabulary.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

from config import GenerateConfig, ModelConfig
from generate import generate, sample
from internals import checkpoint
from internals.machine import fastest_dtype, resolve_device
from internals.start import run
from internals.tokenizer import load_tokenizer
from model import GPT

REPO = Path(__file__).resolve().parent.parent
ROUNDS, NEW, PROMPT = 9, 200, 8
DEFAULTS = GenerateConfig()
SAMPLING = {"temperature": DEFAULTS.temperature, "top_k": DEFAULTS.top_k, "top_p": DEFAULTS.top_p}


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def as_transformers(model: GPT) -> transformers.GPT2LMHeadModel:
    """The same weights in transformers' GPT-2, whose vocabulary has no padded rows."""
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.n_inner, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name] = value.t() if transposed else value
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: c.vocab_size]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    peer = transformers.GPT2LMHeadModel(config).eval()
    peer.load_state_dict(state)
    return peer


@torch.inference_mode()
def without_cache(model: GPT, idx: torch.Tensor, max_new_tokens: int) -> None:
    """The plain loop: all that is there goes through the model for every token."""
    for _ in range(max_new_tokens):
        logits = model.forward(idx)[:, -1]
        idx = torch.cat((idx, sample(logits, **SAMPLING, generator=None).unsqueeze(1)), dim=1)
    idx.tolist()  # waits for a GPU


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory, from sums over 256 MiB (more than any cache holds)."""
    numbers = torch.ones(1 << 26, device=device)
    return numbers.nbytes / statistics.median(seconds(lambda: numbers.sum().item()) for _ in range(20))


def first_character(*command: str) -> float:
    """Seconds from the start of a Python command to the first byte on its stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout.read(1), f"{command} wrote nothing"
        taken = time.perf_counter() - begin
        run.stdout.read()
    return taken


def start_up(model: GPT) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "best.pt")
        contents = {"model": model.state_dict(), "config": {"model": dataclasses.asdict(model.config)}}
        contents |= {"format": 1, "tokenizer": "gpt2", "iter": 0, "tokens": 0, "val_loss": 0.0}
        checkpoint.save(path, contents)
        commands = {
            "python generate.py": ("generate.py", "--checkpoint", path, "--max-new-tokens", "5", "--ignore-eot"),
            "python -c 'import torch'": ("-c", "import torch; print()"),
            "python generate.py --help": ("generate.py", "--help"),
        }
        print(f"\n{'command':44s} {'s to the first character':>9s}")
        times = [{name: first_character(*command) for name, command in commands.items()} for _ in range(ROUNDS)]
        for name in commands:
            print(f"{name:44s} {statistics.median(row[name] for row in times):9.2f}")


def main() -> None:
    load_tokenizer("gpt2")  # now, not after minutes: the command that is timed in the end needs it
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = resolve_device("auto")
    model32 = GPT(ModelConfig()).eval()
    peer32 = as_transformers(model32).to(device)
    dtype, why = fastest_dtype(device)
    model = GPT(ModelConfig()).eval()
    model.load_state_dict(model32.state_dict())
    model, model32, peer = model.to(device, dtype), model32.to(device), as_transformers(model32).to(device, dtype)
    idx = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    print(
        f"{torch.__version__}, transformers {transformers.__version__}, {device}, {torch.get_num_threads()} threads, {dtype}: {why}"
    )

    def ours(model: GPT, samples: int, new: int = NEW) -> None:
        for _ in generate(model, idx, new, num_samples=samples, **SAMPLING):
            pass

    def theirs(model: transformers.GPT2LMHeadModel, samples: int) -> None:
        model.generate(
            idx, attention_mask=torch.ones_like(idx), min_new_tokens=NEW, max_new_tokens=NEW, do_sample=True,
            num_return_sequences=samples, pad_token_id=0, **SAMPLING,
        ).tolist()  # fmt: skip

    name = str(dtype).removeprefix("torch.")
    rows: dict[str, tuple[int, Callable[[], object]]] = {  # tokens, run
        f"generate.py, {name}": (NEW, lambda: ours(model, 1)),
        "generate.py, float32": (NEW, lambda: ours(model32, 1)),
        f"generate.py, {name}, 8 samples": (8 * NEW, lambda: ours(model, 8)),
        f"transformers, {name}": (NEW, lambda: theirs(peer, 1)),
        "transformers, float32": (NEW, lambda: theirs(peer32, 1)),
        f"transformers, {name}, 8 samples": (8 * NEW, lambda: theirs(peer, 8)),
        f"no cache, {name}": (NEW, lambda: without_cache(model, idx, NEW)),
    }
    # Each token reads every weight once, but only one row of the position embedding.
    read = (model.num_parameters()["total"] - model.config.block_size * model.config.n_embd) * dtype.itemsize
    limit = f"limit: reading {read / 1e6:.0f} MB a token"
    rates: dict[str, list[float]] = {row: [] for row in (*rows, limit)}  # tokens/s
    for _ in range(ROUNDS):
        rates[limit].append(bandwidth(device) / read)
        for row, (tokens, generating) in rows.items():
            rates[row].append(tokens / seconds(generating))
    first = rates[next(iter(rows))]
    print(f"\n{'':44s} {'tokens/s':>9s} {'generate.py is':>15s} {'from':>7s} {'to':>7s}")
    for row, each in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(first, each, strict=True))
        print(
            f"{row:44s} {statistics.median(each):9.1f} {statistics.median(ratios):14.2f}x {ratios[0]:6.2f}x {ratios[-1]:6.2f}x"
        )

    print(f"\n{'new tokens, one stream':44s} {'ms/token':>9s}")
    lengths: dict[int, list[float]] = {100: [], 1000: [], 5000: []}
    for _ in range(2):
        for new, taken in lengths.items():
            taken.append(seconds(lambda new=new: ours(model, 1, new)) / new)
    for new, taken in lengths.items():
        print(f"{new:<44,d} {1e3 * statistics.median(taken):9.2f}")
    start_up(model32)


if __name__ == "__main__":
    run(main)
