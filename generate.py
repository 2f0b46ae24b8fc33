"""Text from a trained model: `python generate.py --prompt "The best thing is"`.

    main              the command: loads a model and continues the prompt
    generate_text     text to text, for other programs
    generate          token ids to token ids, one step at a time
    sample            logits to one token: temperature, top-k, top-p

The text goes to stdout, everything else to stderr.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # before the imports: PyTorch takes seconds, but mistakes and --help are answered at once

    from config import GenerateConfig
    from internals.cli import parse

    CFG = parse(GenerateConfig, "Continue a text with a trained model.")

import contextlib
import copy
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import tiktoken
import torch
from torch import Tensor

from config import GenerateConfig, unescape
from internals.bulk_encoding import pieces
from internals.cli import utf8_argument
from internals.cpu_kernels import pack_weights
from internals.device import attention_of_any_length, device_notice, limit_threads, resolve_device, resolve_dtype
from internals.html_text import TextPage, check_page_path
from internals.memory import enough_memory
from internals.pretrained import open_model
from internals.screen import rounded
from internals.start import UserError
from internals.surprise import NOT_FINITE
from internals.text_stream import ReaderGone, TextStream, print_json, print_text, write
from model import GPT, KeyValueCache

ONE_THREAD = 5e6  # parameters below which one thread generates as fast as two
PAGE_TOO_LARGE = "--html {}: does not fit into memory; try --device cpu, or leave it out"

# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(cfg: GenerateConfig) -> None:
    prepare_streams()
    prompt, stop = read_prompt(cfg), tuple(utf8_argument("--stop", unescape(text)) for text in cfg.stop)
    if cfg.html:
        check_page_path(cfg.html)
    too_large = f"--checkpoint {cfg.checkpoint}: does not fit into memory; close other programs, or use a smaller model"
    with enough_memory(too_large):
        model, tokenizer, description = open_model(cfg.checkpoint)
    device = resolve_device(cfg.device)
    if notice := device_notice(cfg.device, device):
        say(notice)
    dtype, dtype_reason = resolve_dtype(cfg.dtype, device, generating=True)
    parameters = model.num_parameters()["total"]
    say(f"{description}: {rounded(parameters)} parameters")
    say(f"on {device} in {str(dtype).removeprefix('torch.')} ({dtype_reason})")
    # One thread is as fast for a small model, and another busy process does not slow it (benchmarks/busy.py)
    limit_threads(1 if device.type == "cpu" and parameters < ONE_THREAD else None)
    with enough_memory(PAGE_TOO_LARGE.format(cfg.html)):
        page = TextPage(cfg.html, model, tokenizer, device, description) if cfg.html else None
    with enough_memory(too_large):
        model = pack_weights(model.to(device, dtype))
    seed = secrets.randbelow(2**32) if cfg.seed is None else cfg.seed
    if cfg.seed is None and cfg.temperature and cfg.max_new_tokens:
        what = "texts for the same prompts" if cfg.interactive else "text"
        say(f"To get the same {what} again, add --seed {seed}")
    writer = Writer(replace(cfg, stop=stop), model, tokenizer, device, seed, page)
    with attention_of_any_length():
        if cfg.interactive:
            interact(writer)
        else:
            writer.answer(prompt)


def prepare_streams() -> None:
    """Print UTF-8 with the text's own line ends, whatever the environment says: Windows has another encoding for pipes
    and writes `\\r\\n`, PYTHONIOENCODING can set any."""
    start.reconfigure(sys.stdout, encoding="utf-8", newline="\n")
    start.reconfigure(sys.stderr, encoding="utf-8", errors="backslashreplace")  # a path may hold any bytes


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def read_prompt(cfg: GenerateConfig) -> str:
    """The prompt from the command line. `--prompt -` is all of stdin, without its last line break."""
    if cfg.prompt != "-":
        return utf8_argument("--prompt", cfg.prompt)
    with reading_stdin("--prompt -"):
        text = sys.stdin.buffer.read().decode("utf-8-sig")  # without a byte-order mark, as prepare_data.py reads text
    return text.removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def reading_stdin(flag: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: stdin is not UTF-8 text (at byte {error.start:,}); convert it first") from error
    except OSError as error:
        raise UserError(f"{flag}: stdin cannot be read ({error.strerror})") from error


@dataclass
class Writer:
    """A loaded model that continues prompts as the command line says."""

    cfg: GenerateConfig
    model: GPT
    tokenizer: tiktoken.Encoding
    device: torch.device
    seed: int  # of the next answer
    page: TextPage | None = None

    def answer(self, prompt: str) -> None:
        """Continue a prompt and print the samples. Prompt n has the seed `--seed` + n, counted from 0."""
        seed, self.seed = self.seed, (self.seed + 1) % 2**63
        generator = torch.Generator(self.device).manual_seed(seed)
        cfg, ids, context = self.cfg, encode(self.tokenizer, prompt), self.model.config.block_size
        if cfg.max_new_tokens and len(ids) > context:
            say(f"the prompt has {len(ids):,} tokens: the model reads the last {context:,} of them")
        sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.num_samples, generator)
        several = f"--num-samples {cfg.num_samples}: do not fit into memory; use fewer"
        single = "the text does not fit into memory; close other programs, or use a smaller model"
        with enough_memory(several if cfg.num_samples > 1 else single):
            streams = [TextStream(self.tokenizer, cfg.stop, cfg.ignore_eot) for _ in range(cfg.num_samples)]
            steps = continue_text(self.model, ids, cfg.max_new_tokens, sampling, streams)
            try:
                if cfg.json:
                    print_json(prompt, seed, steps)
                else:
                    print_text(prompt, steps if cfg.stream else list(steps)[-1:])
            except ReaderGone:
                if not self.page:
                    raise
                list(steps)  # the page still has a reader: generate the rest of its text
        if self.page:
            if cfg.num_samples > 1:
                say("Measuring the samples for the page ...")  # half a minute for ten after a prompt of 1,000 tokens
            with enough_memory(PAGE_TOO_LARGE.format(cfg.html)):
                self.page.write(self.drawn(seed) if cfg.max_new_tokens else "", ids, [stream.ids for stream in streams])
            say(f"Open this page in a browser: {cfg.html}")

    def drawn(self, seed: int) -> str:
        """How the samples were drawn: `temperature 0.8, top-k 200, seed 7`. Filters that are off are left out."""
        if not self.cfg.temperature:
            return "temperature 0: always the likeliest token"
        top_k = f", top-k {self.cfg.top_k}" if self.cfg.top_k else ""
        top_p = f", top-p {self.cfg.top_p:g}" if self.cfg.top_p < 1 else ""
        return f"temperature {self.cfg.temperature:g}{top_k}{top_p}, seed {seed}"


def interact(writer: Writer) -> None:
    """Ask for prompts and answer them. Ctrl-C stops the text (or empties the line), Ctrl-D quits."""
    with contextlib.suppress(ImportError):  # Windows' Python lacks it, but Windows' terminal keeps a history
        import readline  # noqa: F401  (importing it gives input() a history and line editing)
    # A byte-order mark and the \r of Windows' line ends are not text. A byte that is not UTF-8 becomes U+FFFD.
    start.reconfigure(sys.stdin, encoding="utf-8-sig", errors="replace", newline=None)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say("Enter continues your text, Ctrl-C stops it, Ctrl-D (Windows: Ctrl-Z, Enter) quits.")
    while True:
        try:
            with reading_stdin("--interactive"):
                line = input("> ") + "\n" if terminal else sys.stdin.readline()  # input() would write to a full stdout
            if not line:
                break
            writer.answer(line.removesuffix("\n"))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # prompts from a file or a pipe, which has no Ctrl-D
                raise
            if terminal or not writer.cfg.json:  # among lines of JSON, an empty line is an error
                write("\n")
        except EOFError:  # Ctrl-D at the terminal
            write("\n")
            break


# ----------------------------------------------------------------------------------------------------------------------
# Text


def generate_text(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    ignore_eot: bool = False,
    **sampling,
) -> list[str]:
    """Continue a text: `generate_text(model, tokenizer, "Once", 100, top_k=200) -> [" upon a time"]`.

    Args:
        prompt: taken literally, so `<|endoftext|>` in it is text. An empty one begins a new article.
        stop: texts to end before.
        ignore_eot: keep generating after `<|endoftext|>`.
        sampling: the fields of `Sampling`.

    Returns:
        `num_samples` continuations, without the prompt.
    """
    options = Sampling(**sampling)
    streams = [TextStream(tokenizer, stop, ignore_eot) for _ in range(options.num_samples)]
    with attention_of_any_length():
        list(continue_text(model, encode(tokenizer, prompt), max_new_tokens, options, streams))
    return [stream.text for stream in streams]


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The token ids of a prompt. `<|endoftext|>` in it is text. An empty prompt is one end-of-text: a new article."""
    # In pieces, as prepare_data.py does: a million blanks in one call are more than the tokenizer's stack holds
    ids = [id for piece in pieces(text, tokenizer) for id in tokenizer.encode_ordinary(piece)]
    return ids or [tokenizer.eot_token]


def continue_text(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, sampling: "Sampling", streams: list[TextStream]
) -> Iterator[list[TextStream]]:
    """Continue a prompt of token ids, and feed each sample to its own stream.

    Yields `streams` before the first token, after each step, and when all have ended.
    """
    yield streams
    idx = torch.tensor(prompt, device=model.transformer.wte.weight.device)
    for _ in generate(model, idx, max_new_tokens, sampling, stop=lambda row, token: streams[row].push(token)):
        yield streams
    for stream in streams:
        stream.end()
    yield streams


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, and how many times to continue the prompt."""

    temperature: float = 1.0  # below 1 favours likely tokens, above 1 unlikely ones; 0: always the likeliest token
    top_k: int | None = None  # choose among the k likeliest tokens, k at least 1; None: among all
    top_p: float = 1.0  # of these, choose among the likeliest that together have this probability, above 0; 1: all
    num_samples: int = 1  # continuations of the prompt
    generator: torch.Generator | None = None  # random numbers, on the model's device; None: PyTorch's global state


@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Callable[[int, int], bool] = lambda sample, token: False,
) -> Iterator[list[int | None]]:
    """Continue a token sequence, one token of each sample at a time. The text may be of any length.

    Args:
        model: on any device, in any dtype. It is not changed, and threads may share it.
        idx: (T,) int64 token ids on the model's device, T at least 1. The last `block_size` of them are read.
        max_new_tokens: the most tokens per sample.
        stop: called with (sample, token) for every new token. True ends that sample, which then costs nothing.

    Yields:
        At each step a list of `num_samples` token ids, None for samples that have ended. Stops when all have ended.

    Raises:
        UserError: the logits are infinite or NaN.
    """
    if model.training:  # then use a copy in eval mode that shares the weights: another thread may be training it
        model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    context = Context(model, idx)
    samples = list(range(sampling.num_samples))  # those that have not ended, R of them
    for step in range(max_new_tokens):
        logits = context.logits()  # (1, V) at first, then (R, V)
        if step == 0:
            if not logits.isfinite().all():
                raise UserError(NOT_FINITE)
            logits = logits.expand(len(samples), -1)
            context.select([0] * len(samples))
        next_ids = sample(logits, sampling)  # (R,)
        context.append(next_ids)
        tokens = dict(zip(samples, next_ids.tolist(), strict=True))
        running = [row for row, number in enumerate(samples) if not stop(number, tokens[number])]
        yield [tokens.get(number) for number in range(sampling.num_samples)]
        if not running:
            return
        if len(running) < len(samples):
            samples = [samples[row] for row in running]
            context.select(running)


class Context:
    """The part of R growing sequences that the model sees.

    While there is room, each new token sees all earlier ones. When the context is full, its newest half (`block_size //
    2` tokens) is kept and computed again from position 0. So the cost per token stays nearly constant.
    """

    def __init__(self, model: GPT, idx: Tensor):
        self.model, self.block_size = model, model.config.block_size
        self.ids = idx[None, -self.block_size :]  # (R, T), with R = 1 until `select` repeats the prompt
        self.restart()

    def restart(self) -> None:
        """Compute all tokens again, from position 0."""
        self.cache, self.new = KeyValueCache(self.model.config), self.ids  # new: the tokens that the cache lacks

    def logits(self) -> Tensor:
        """The logits of the next token, (R, V)."""
        return self.model(self.new, cache=self.cache)[:, -1]

    def append(self, next_ids: Tensor) -> None:
        """Add a token to each sequence, (R,)."""
        self.new = next_ids[:, None]
        self.ids = torch.cat((self.ids, self.new), dim=1)
        if self.ids.size(1) > self.block_size:
            self.ids = self.ids[:, -max(1, self.block_size // 2) :]
            self.restart()

    def select(self, rows: list[int]) -> None:
        """Keep these sequences, in this order. A repeated one forks."""
        keep = torch.tensor(rows, device=self.ids.device)
        self.cache.select(keep)
        self.ids, self.new = self.ids[keep], self.new[keep]


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: logits (B, V) to ids (B,) int64."""
    if sampling.temperature == 0:
        likeliest, ids = logits.max(-1)  # NaN is above all numbers
        if not likeliest.isfinite().all():
            raise UserError(NOT_FINITE)
        return ids
    p, ids = probabilities(logits, sampling)
    choice = draw(p, sampling.generator)  # (B, 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one index from each row with a probability proportional to its value: (B, K) to (B, 1) int64.

    One random number per row is looked up in the row's cumulative sum. `torch.multinomial` draws K random numbers
    instead, which took a fifth of a token's time or more on a CPU (docs/experiments.md, benchmarks/generate.py).
    """
    # In float32 the sum would lose the tokens below 1e-7. Apple's GPUs have nothing wider.
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    cumulative = p.cumsum(-1, dtype=dtype)
    total = cumulative[:, -1:]
    if not (total.isfinite() & (total > 0)).all():  # it is 0 where top-p compared NaN
        raise UserError(NOT_FINITE)
    # In (0, total], so that some sum reaches it, and the first to do so never belongs to a token with probability 0
    threshold = (1 - torch.rand(len(p), 1, dtype=dtype, device=p.device, generator=generator)) * total
    return torch.searchsorted(cumulative, threshold)


def probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The distribution to draw the next token from.

    Top-k keeps exactly k tokens; `torch.topk` breaks ties for the last place. Top-p (nucleus sampling, Holtzman et al.,
    2019) then keeps the likeliest of these until they hold `top_p` of their probability. The token that crosses this
    threshold is included.

    Args:
        logits: (B, V).

    Returns:
        Probabilities (B, K) float32, up to a factor, and their token ids (B, K). The ids are None if they are 0 to V - 1.
    """
    ids = None
    k = min(sampling.top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or sampling.top_p < 1:
        logits, ids = logits.topk(k)  # the likeliest first; from here on all work is on k tokens, not on V
    # Divided by less than 1e-20 a logit might become infinite. At 1e-20 the likeliest token already takes all.
    p = (logits.float() / max(sampling.temperature, 1e-20)).softmax(-1)
    if sampling.top_p < 1:
        # Below 1e-45 float32 would round top_p to 0. At 1e-20 only the likeliest token is left already.
        p = p.where(p.cumsum(-1) - p < max(sampling.top_p, 1e-20), 0)
    return p, ids


if __name__ == "__main__":
    start.run(lambda: main(CFG), stdout_is_output=True)
