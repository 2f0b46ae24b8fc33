"""The size of the source: what a preset leaves to it, and whether the text is long enough.

choose_by_size          the vocabulary of a trained tokenizer, and the validation share
refuse_hopeless_source  ends the command if the text is too short for any tokenizer
refuse_short            ends it if so many tokens are too few
"""

import dataclasses
import math

from config import PrepareConfig, flag_of
from internals.articles import tokenize
from internals.reader import ReadOptions
from internals.screen import listed, plural
from internals.start import UserError
from internals.text_files import Source

TEXT_PER_ENTRY = 200  # bytes of text per entry of the vocabulary, so that each occurs often enough to be learned
SMALLEST_VOCAB, LARGEST_VOCAB = 512, 8192
VAL_BYTES = 400_000  # of validation text to aim for
SMALLEST_SHARE, LARGEST_SHARE = 0.005, 0.1
LONG = 10**12  # tokens: more than any text has
BYTES_PER_TOKEN = 3.5  # of English text, with the largest vocabulary: the text that --max-tokens takes


def vocab_size_for(text_bytes: float) -> int:
    """The largest power of two that the text is long enough for: `vocab_size_for(300_000) -> 1024`."""
    size = LARGEST_VOCAB
    while size > SMALLEST_VOCAB and size * TEXT_PER_ENTRY > text_bytes:
        size //= 2
    return size


def val_fraction_for(text_bytes: float) -> float:
    """The share that gives enough text for a meaningful validation loss: `val_fraction_for(20_000_000) -> 0.02`."""
    return round(max(SMALLEST_SHARE, min(LARGEST_SHARE, VAL_BYTES / max(1, text_bytes))), 3)


def choose_by_size(cfg: PrepareConfig, source: Source) -> PrepareConfig:
    """Set what the preset leaves open to numbers that follow from the size of the source, and print them.

    Flags win. `--max-tokens` limits the size. The numbers follow from the source and the flags alone, so the same
    command gives the same ones.
    """
    text_bytes, chosen = min(source.text_bytes, BYTES_PER_TOKEN * (cfg.max_tokens or math.inf)), {}
    if cfg.by_size and cfg.tokenizer == "train" and cfg.vocab_size is None:
        chosen["usual_vocab_size"] = vocab_size_for(text_bytes)
    if cfg.by_size and cfg.val_fraction is None:
        chosen["val_fraction"] = val_fraction_for(text_bytes)
    if chosen:
        flags = ", ".join(f"{flag_of(name.removeprefix('usual_'))} {chosen[name]:g}" for name in chosen)
        basis = "--max-tokens" if text_bytes < source.text_bytes else "the size of the source"
        print(f"chosen by {basis}: {flags}")
    return dataclasses.replace(cfg, **chosen)


def refuse_hopeless_source(cfg: PrepareConfig, source: Source) -> None:
    """Raise UserError if the text is empty, or too short whatever the tokenizer and the share."""
    tokens, empty = enough_tokens(cfg, source, "bytes")  # no tokenizer makes more tokens
    if tokens < sum(cfg.least_tokens.values()):
        refuse_short(cfg, tokens, empty)


def enough_tokens(cfg: PrepareConfig, source: Source, tokenizer: str) -> tuple[int, int]:
    """The tokens of the text, counted until they are enough, and the articles without text among them.

    It tokenizes about a megabyte, unless --val-fraction is extreme, and first hashes all of a .txt file. A Wikipedia from
    the hub counts as long, so only --max-tokens can make it too short. Where old shards will be deleted, its first file
    must be readable, too.
    """
    most, options = cfg.max_tokens or LONG, ReadOptions.of(cfg, tokenizer)
    if source.counts_as_long:
        if cfg.overwrite:
            next(source.chunks(0, options), None)
        return most, 0
    tokens = empty = 0
    for chunk in (chunk for number in range(len(source.files)) for chunk in source.chunks(number, options)):
        new = tokenize(chunk, tokenizer, val_fraction=0.0)
        tokens, empty = tokens + len(new.tokens), empty + new.empty
        if tokens >= most or (tokens and not shortage(cfg, tokens)):
            break
    return min(tokens, most), empty


def refuse_short(cfg: PrepareConfig, tokens: int, empty: int) -> None:
    """Raise UserError if a text of `tokens` tokens is too short. `empty`: the articles without text, for the message."""
    if tokens == 0:
        found = f" ({plural(empty, 'empty article')})" if empty else ""
        raise UserError(f"--source {listed(cfg.sources)}: holds no text{found}; give another source")
    if text := shortage(cfg, tokens):
        raise UserError(text)


def shortage(cfg: PrepareConfig, tokens: int) -> str:
    """Which split of a text of `tokens` tokens is too short, and what to do; empty if none is."""
    have = {"val": int(tokens * cfg.held_out)}
    have["train"] = tokens - have["val"]
    for (split, need), flag in zip(cfg.least_tokens.items(), ("larger", "smaller"), strict=True):
        if have[split] < need:
            share = math.ceil(1000 * need / tokens) / 1000
            better, more = share if split == "val" else 1 - share, "more text"
            if cfg.max_tokens and tokens >= cfg.max_tokens:
                more = "a larger --max-tokens"
            fits = share < 0.5 and tokens >= sum(cfg.least_tokens.values())
            hint = f"give a {flag} one, such as {better:g}, or {more}" if fits else f"give {more}"
            return (
                f"--val-fraction {cfg.held_out:g}: leaves {have[split]:,} of {tokens:,} tokens for the {split} split, and "
                f"train.py --preset {cfg.preset} needs {need:,}; {hint}"
            )
    return ""
