"""Text from a trained model: `python generate.py --prompt "The best thing is"`.

    sample            one token from logits: temperature, top-k, top-p
    generate          token ids in, token ids out, one step at a time
    TextStream        token ids to text that can be printed, up to a stop
    generate_text     text in, text out
    main              the command line

The text goes to stdout, everything else to stderr.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered at once: PyTorch takes seconds to import

    from config import GenerateConfig
    from internals.cli import parse

    CFG = parse(GenerateConfig, "Continue a text with a trained model.")

import contextlib
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import tiktoken
import torch
from torch import Tensor

from config import GenerateConfig
from internals.checkpoint import load_model
from internals.cpu_kernels import few_rows
from internals.machine import is_out_of_memory, resolve_device, resolve_dtype
from internals.start import UserError
from internals.text_stream import TextStream, print_json, print_text, say, write
from model import GPT, KeyValueCache

# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The distribution to draw the next token from.

    Top-k keeps exactly k tokens: among equals at its border, those that `torch.topk` happens to choose. Top-p (nucleus
    sampling, Holtzman et al., 2019) then keeps the likeliest of these until they hold `top_p` of their probability, the
    one that crosses that line included.

    Args:
        logits: (B, V).
        temperature: above 0.
        top_k: at least 1, may exceed V; None keeps all.
        top_p: above 0, at most 1, which keeps all.

    Returns:
        Probabilities (B, K) float32, up to a factor, and the token ids (B, K) that they belong to; None for the ids
        where they are simply 0 to V - 1.
    """
    ids = None
    k = min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(k)  # the likeliest first; from here on all work is on k tokens, not on V
    logits = logits.float()
    # The largest becomes 0 before the division, so that no temperature, however small, makes an infinity minus another.
    p = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1:
        p = p.where(p.cumsum(-1) - p < top_p, 0)
    return p, ids


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """The next token of each row, (B,) int64, from logits (B, V), on their device. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = probabilities(logits, temperature, top_k, top_p)
    choice = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: Callable[[int, int], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Continue token sequences, one token of each at a time.

    While everything fits into the model's context, each new token sees all that came before it. When the context is
    full, its newest half (`block_size // 2` tokens) stays, is computed again from position 0, and generation goes on;
    so text may be of any length, at a nearly constant cost per token. Of a longer prompt the last `block_size` tokens
    are read.

    The model's mode (train or eval), its weights and PyTorch's global random state are as they were when the iterator
    ends or is closed.

    Args:
        model: on any device, in any dtype. It is in eval mode meanwhile.
        idx: (B, T) int64 token ids on the model's device, T at least 1.
        max_new_tokens: how many tokens each row gets at most.
        num_samples: how often each row of `idx` is continued. There are R = B * num_samples rows: first all samples of
            `idx[0]`, then those of `idx[1]`, ...
        temperature, top_k, top_p: as in `sample`.
        generator: the source of randomness, on the model's device; None is PyTorch's global one.
        stop: asked for every new token, as (row, token); True makes it the row's last one. A row that has ended costs
            nothing any more.

    Yields:
        For each step a list of R token ids, below the vocabulary's size; None for a row that has ended. The iterator
        ends when all rows have ended or have got `max_new_tokens`.

    Raises:
        UserError: the logits are infinite or NaN.
    """
    if idx.dim() != 2 or idx.size(1) < 1:
        raise ValueError(f"idx has shape {tuple(idx.shape)}: must be (B, T), with at least one token")
    block_size = model.config.block_size
    window = idx[:, -block_size:]  # (R, T) what the model sees
    rows = list(range(idx.size(0) * num_samples))  # which sample each row of the batch is
    count = len(rows)
    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.enter_context(few_rows(model))
        cache, new = KeyValueCache(model.config), window
        for step in range(max_new_tokens):
            # Not model(...): after model.compile() that would compile once more for every length of the cache.
            logits = model.forward(new, cache=cache)[:, -1]  # (R, V)
            if step == 0 and not logits.isfinite().all():
                raise UserError(
                    "the model computes no finite numbers: its training failed, or --dtype is too narrow (try float32)"
                )
            if step == 0 and num_samples > 1:  # the prompt is computed once for all of its samples
                fork = torch.arange(idx.size(0), device=idx.device).repeat_interleave(num_samples)
                cache.select(fork)
                logits, window = logits[fork], window[fork]
            token = sample(logits, temperature, top_k, top_p, generator)  # (R,)
            new = token.unsqueeze(1)
            window = torch.cat((window, new), dim=1)

            tokens = token.tolist()
            yielded: list[int | None] = [None] * count
            for row, value in zip(rows, tokens, strict=True):
                yielded[row] = value
            ended = [stop is not None and stop(row, value) for row, value in zip(rows, tokens, strict=True)]
            yield yielded

            if any(ended):
                running = [i for i, end in enumerate(ended) if not end]
                if not running:
                    return
                rows = [rows[i] for i in running]
                keep = torch.tensor(running, device=idx.device)
                cache.select(keep)
                window, new = window[keep], new[keep]
            if window.size(1) > block_size:
                window = window[:, -max(1, block_size // 2) :]
                cache, new = KeyValueCache(model.config), window


# ----------------------------------------------------------------------------------------------------------------------
# Text


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """A prompt's token ids, literally: `<|endoftext|>` in it is text. An empty one is a new article: end-of-text."""
    return tokenizer.encode_ordinary(text) or [tokenizer.eot_token]


def continue_text(
    model: GPT,
    tokenizer: tiktoken.Encoding,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    ignore_eot: bool = False,
    **sampling,
) -> Iterator[list[TextStream]]:
    """Continuations of a prompt, given as token ids, while they are being written.

    Yields, before the first token and after each step, the same `num_samples` streams: their `text` grows (look at it
    only between two steps), and `ended` says which are complete; in the end all are. `sampling` are `generate`'s
    temperature, top_k, top_p and generator.
    """
    streams = [TextStream(tokenizer, stop, ignore_eot) for _ in range(num_samples)]
    yield streams
    idx = torch.tensor([prompt], device=model.transformer.wte.weight.device)
    steps = generate(
        model, idx, max_new_tokens, num_samples=num_samples, stop=lambda row, id: streams[row].push(id), **sampling
    )
    for step, _ in enumerate(steps, start=1):
        if step == max_new_tokens:
            break
        yield streams
    for stream in streams:
        stream.end()
    yield streams


def generate_text(model: GPT, tokenizer: tiktoken.Encoding, prompt: str, max_new_tokens: int, **options) -> list[str]:
    """Continuations of a text: one, or `num_samples`. `options` are those of `continue_text`.

    The prompt is taken literally (`<|endoftext|>` in it is text); an empty one begins a new article.
    """
    *_, streams = continue_text(model, tokenizer, encode(tokenizer, prompt), max_new_tokens, **options)
    return [stream.text for stream in streams]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def read_prompt(config: GenerateConfig) -> str:
    """The prompt of the command line, or with `--prompt -` all of stdin (without its last line break)."""
    if config.prompt == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompt -: stdin is no UTF-8 text (at byte {error.start:,}); convert it first"
            ) from error
    try:
        config.prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # Python hands bytes that it could not decode on as lone surrogates
        raise UserError("--prompt: is no UTF-8 text; convert it first") from error
    return config.prompt


def main(config: GenerateConfig) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")  # Windows' pipes have another one
    prompt = read_prompt(config)
    model, tokenizer, saved = load_model(config.checkpoint)
    device = resolve_device(config.device)
    dtype, reason = resolve_dtype(config.dtype, device, generating=True)
    model.to(device, dtype)
    size, name = model.num_parameters()["total"] / 1e6, str(dtype).removeprefix("torch.")
    say(
        f"{config.checkpoint}: {size:.1f} million parameters, iteration {saved['iter']:,}; on {device} in {name} ({reason})"
    )
    seed = secrets.randbelow(2**32) if config.seed is None else config.seed
    if config.seed is None:
        say(f"--seed {seed} makes the same text again")
    generator = torch.Generator(device).manual_seed(seed)

    def answer(prompt: str) -> None:
        ids = encode(tokenizer, prompt)
        if len(ids) > model.config.block_size:
            say(f"the prompt has {len(ids):,} tokens: the model reads the last {model.config.block_size:,} of them")
        steps = continue_text(
            model, tokenizer, ids, config.max_new_tokens,
            num_samples=config.num_samples, stop=config.stop, ignore_eot=config.ignore_eot,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, generator=generator,
        )  # fmt: skip
        try:
            if config.json:
                print_json(prompt, seed, steps)
            else:
                print_text(prompt, steps if config.stream else deque(steps, maxlen=1))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError(f"--num-samples {config.num_samples}: too many for the memory; take fewer") from error
            raise

    if config.interactive:
        interact(answer)
    else:
        answer(prompt)


def interact(answer: Callable[[str], None]) -> None:
    """Ask for prompts and answer them. Ctrl-C stops the text (or empties the line), Ctrl-D leaves."""
    with contextlib.suppress(ImportError):  # Windows' Python has none; its terminal keeps a history by itself
        import readline  # noqa: F401  (imported, it gives input() a history and line editing)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # a byte that is no UTF-8 becomes U+FFFD
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say("Enter continues your text, Ctrl-C stops it, Ctrl-D leaves.")
    while True:
        try:
            answer(input("> " if terminal else ""))
        except KeyboardInterrupt:
            write("\n")
        except EOFError:
            break
    if terminal:
        write("\n")


if __name__ == "__main__":
    start.run(lambda: main(CFG))
