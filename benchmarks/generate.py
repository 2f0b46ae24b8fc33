"""The speed of generating text, compared with transformers, llama.cpp, a loop without a cache, and the memory's limit.

    python benchmarks/generate.py [--rounds 9]

The default model (6 layers, 6 heads, 384 dimensions, context 256, GPT-2's vocabulary) with random weights continues a
prompt of 8 tokens by 200, sampled with generate.py's defaults. All candidates run in this process, in turn, 9 rounds,
with the number of threads that PyTorch takes (OMP_NUM_THREADS sets it). The environment decides how long idle threads
spin; the benchmark does not set it. The commands set GOMP_SPINCOUNT=1500 (benchmarks/busy.py).

The first table shows the median speed, and of the ratio within a round the median and both ends. A machine that slows
down for a while hardly changes these ratios. "Not packed" is the same code without `pack_weights`. The limit is the
speed of reading all weights once per token at the bandwidth measured in the same round.

The second table shows llama.cpp beside ours, in three formats, both at temperature 1 among all tokens. It reads what
`export.py --format gguf --dtype ...` writes of the same model. It is there if llama_cpp (llama-cpp-python) and gguf can
be imported, on a CPU. Ours has a fast float16 on x86 only.

The third table shows the time per token of longer texts, past the end of the context. The fourth shows the time from
the command to its first character. Needs transformers and the GPT-2 vocabulary.
"""

import copy
import ctypes
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common  # puts the root on the path, so it comes first
import torch
import tyro
from common import seconds

from config import GenerateConfig, ModelConfig
from generate import Sampling, generate, sample
from internals import checkpoint, gguf, huggingface
from internals.cpu_kernels import has_float16_products, pack_weights
from internals.device import attention_of_any_length, resolve_device, resolve_dtype
from internals.start import UserError, run
from internals.tokenizer import load_tokenizer
from model import GPT

try:
    import llama_cpp
except ImportError:
    llama_cpp = None
try:
    import transformers
except ImportError:
    transformers = None

NEW, PROMPT = 200, 8
DEFAULTS = GenerateConfig()
SAMPLING = Sampling(DEFAULTS.temperature, DEFAULTS.top_k, DEFAULTS.top_p)


@dataclass(frozen=True)
class Generating:
    rounds: int = 9


def as_transformers(model: GPT) -> torch.nn.Module:
    """The same weights in transformers' GPT-2, without the padded rows of the embedding."""
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_inner=c.n_inner, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    state = {
        name: value.T if name.endswith(huggingface.TRANSPOSED) else value
        for name, value in huggingface.real_weights(model).items()
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    peer = transformers.GPT2LMHeadModel(config).eval()
    peer.load_state_dict(state)
    return peer


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C interface: llama-cpp-python's own loop would add time to each token."""

    def __init__(self, path: Path):
        llama_cpp.llama_log_set(silence, None)
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = ModelConfig.block_size
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for part in (llama_cpp.llama_sampler_init_temp(1.0), llama_cpp.llama_sampler_init_dist(1)):
            llama_cpp.llama_sampler_chain_add(self.sampler, part)

    def generate(self, prompt: list[int], new: int) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens, read = [], prompt
        for _ in range(new):
            array = (llama_cpp.llama_token * len(read))(*read)  # the batch only points to it
            assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(read))) == 0
            tokens.append(llama_cpp.llama_sampler_sample(self.sampler, self.context, -1))
            read = tokens[-1:]
        return tokens


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def silence(level: int, text: bytes, data: None) -> None:
    """In place of llama.cpp's log."""


def load_llama_cpp(model: GPT) -> dict[str, LlamaCpp]:
    """The model in llama.cpp, by format."""
    loaded = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with tempfile.TemporaryDirectory() as folder:  # mapped into memory, the file need not stay
            gguf.write_gguf(Path(folder), gguf.round_matrices(copy.deepcopy(model), dtype), load_tokenizer("gpt2"), "")
            loaded[dtype_name(dtype)] = LlamaCpp(Path(folder, "model.gguf"))
    return loaded


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def without_cache(model: GPT, idx: torch.Tensor, max_new_tokens: int) -> None:
    """The plain loop: the whole text goes through the model for every token."""
    with attention_of_any_length():
        for _ in range(max_new_tokens):
            logits = model.forward(idx)[:, -1]
            idx = torch.cat((idx, sample(logits, SAMPLING).unsqueeze(1)), dim=1)
    idx.tolist()  # waits for a GPU


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory, from sums over 256 MiB, which no cache holds."""
    numbers = torch.ones(1 << 26, device=device)
    # Ten sums before each wait: a fast card sums up in less than 0.1 ms, and starting and waiting take a share of that
    return 10 * numbers.nbytes / statistics.median(seconds(lambda: ten_sums(numbers)) for _ in range(5))


def ten_sums(numbers: torch.Tensor) -> None:
    for _ in range(10):
        total = numbers.sum()
    total.item()  # waits for a GPU


def first_character(*command: str) -> float:
    """Seconds from the start of a Python command to the first byte on its stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=common.REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as run:
        assert run.stdout.read(1), f"{command} wrote nothing"
        taken = time.perf_counter() - begin
        run.stdout.read()
    return taken


def beside_llama_cpp(model: GPT, idx: torch.Tensor, rounds: int) -> None:
    """Tokens/s of ours and of llama.cpp, in turn."""
    engines, prompt = load_llama_cpp(model), idx.tolist()
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if has_float16_products() else [])]
    packed = {dtype_name(dtype): pack_weights(copy.deepcopy(model).to(dtype)) for dtype in dtypes}
    print(f"\n{'temperature 1':16s} {'ours':>9s} {'llama.cpp':>10s} {'ours is':>9s} {'from':>7s} {'to':>7s}")
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in packed}
    for _ in range(rounds):
        for name, ours in packed.items():
            our_rate = NEW / seconds(lambda ours=ours: list(generate(ours, idx, NEW, Sampling())))
            engine = engines[name]
            pairs[name].append((our_rate, NEW / seconds(lambda engine=engine: engine.generate(prompt, NEW))))
    for name, rates in pairs.items():
        ours, theirs = (statistics.median(rate) for rate in zip(*rates, strict=True))
        ratios = sorted(ours / theirs for ours, theirs in rates)
        print(
            f"{name:16s} {ours:9.1f} {theirs:10.1f} {statistics.median(ratios):8.2f}x {ratios[0]:6.2f}x {ratios[-1]:6.2f}x"
        )


def start_up(model: GPT, rounds: int) -> None:
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
        times = [{name: first_character(*command) for name, command in commands.items()} for _ in range(rounds)]
        for name in commands:
            print(f"{name:44s} {statistics.median(row[name] for row in times):9.2f}")


def print_rates(rates: dict[str, list[float]]) -> None:
    """Print the tokens/s of each candidate, and how many times as fast the first one is."""
    first = next(iter(rates.values()))
    print(f"\n{'':44s} {'tokens/s':>9s} {'generate.py is':>15s} {'from':>7s} {'to':>7s}")
    for row, each in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(first, each, strict=True))
        print(
            f"{row:44s} {statistics.median(each):9.1f} {statistics.median(ratios):14.2f}x {ratios[0]:6.2f}x {ratios[-1]:6.2f}x"
        )


def long_texts(generating: Callable[[int], None]) -> None:
    """Time per token of longer texts, past the end of the context."""
    print(f"\n{'new tokens, one stream':44s} {'ms/token':>9s}")
    lengths: dict[int, list[float]] = {100: [], 1000: [], 5000: []}
    for _ in range(2):
        for new, taken in lengths.items():
            taken.append(seconds(lambda new=new: generating(new)) / new)
    for new, taken in lengths.items():
        print(f"{new:<44,d} {1e3 * statistics.median(taken):9.2f}")


def candidates(saved: GPT, idx: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> the tokens of a run, and the run."""
    plain, plain32 = copy.deepcopy(saved).to(idx.device, dtype), copy.deepcopy(saved).to(idx.device)
    model, model32 = pack_weights(copy.deepcopy(plain)), pack_weights(copy.deepcopy(plain32))
    peer, peer32 = as_transformers(saved).to(idx.device, dtype), as_transformers(saved).to(idx.device)

    def theirs(model: transformers.GPT2LMHeadModel, samples: int) -> None:
        model.generate(
            idx[None], attention_mask=torch.ones_like(idx[None]), min_new_tokens=NEW, max_new_tokens=NEW, do_sample=True,
            num_return_sequences=samples, pad_token_id=0, temperature=SAMPLING.temperature, top_k=SAMPLING.top_k,
            top_p=SAMPLING.top_p,
        ).tolist()  # fmt: skip

    name = dtype_name(dtype)
    return {
        f"generate.py, {name}": (NEW, lambda: ours(model, idx)),
        "generate.py, float32": (NEW, lambda: ours(model32, idx)),
        f"generate.py, {name}, 8 samples": (8 * NEW, lambda: ours(model, idx, samples=8)),
        f"not packed, {name}": (NEW, lambda: ours(plain, idx)),
        "not packed, float32": (NEW, lambda: ours(plain32, idx)),
        f"not packed, {name}, 8 samples": (8 * NEW, lambda: ours(plain, idx, samples=8)),
        f"transformers, {name}": (NEW, lambda: theirs(peer, 1)),
        "transformers, float32": (NEW, lambda: theirs(peer32, 1)),
        f"transformers, {name}, 8 samples": (8 * NEW, lambda: theirs(peer, 8)),
        f"no cache, {name}": (NEW, lambda: without_cache(plain, idx[None], NEW)),
    }


def ours(model: GPT, idx: torch.Tensor, new: int = NEW, samples: int = 1) -> None:
    with attention_of_any_length():  # as the command does
        for _ in generate(model, idx, new, dataclasses.replace(SAMPLING, num_samples=samples)):
            pass


def main() -> None:
    rounds = tyro.cli(Generating, description=__doc__).rounds
    if transformers is None:
        raise UserError("needs transformers: pip install -r requirements-dev.txt")
    load_tokenizer("gpt2")  # to fail now rather than after minutes: the command that is timed at the end needs it
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device = resolve_device("auto")
    dtype, dtype_reason = resolve_dtype("auto", device, generating=True)
    saved = GPT(ModelConfig()).eval()
    idx = torch.randint(saved.config.vocab_size, (PROMPT,), device=device)
    rows = candidates(saved, idx, dtype)
    print(
        f"{torch.__version__}, transformers {transformers.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{dtype}: {dtype_reason}"
    )
    # Each token reads every weight once, but only one row of the position embedding.
    read = (saved.num_parameters()["total"] - saved.config.block_size * saved.config.n_embd) * dtype.itemsize
    limit = f"limit: reading {read / 1e6:.0f} MB a token"
    rates: dict[str, list[float]] = {row: [] for row in (*rows, limit)}  # tokens/s
    for _ in range(rounds):
        rates[limit].append(bandwidth(device) / read)
        for row, (tokens, generating) in rows.items():
            rates[row].append(tokens / seconds(generating))
    print_rates(rates)
    if llama_cpp is None or device.type != "cpu":
        print("\nllama.cpp: not measured (needs llama-cpp-python, and a CPU)")
    else:
        beside_llama_cpp(saved, idx, rounds)
    packed = pack_weights(copy.deepcopy(saved).to(device, dtype))
    long_texts(lambda new: ours(packed, idx, new))
    start_up(saved, rounds)


if __name__ == "__main__":
    run(main)
