"""What a preset leaves to the size of the source: the vocabulary of a trained tokenizer, and the validation share."""

import dataclasses
import math

from config import PrepareConfig
from internals.text_files import Source

TEXT_PER_ENTRY = 200  # bytes of text per entry of the vocabulary, so that each occurs often enough to be learned
SMALLEST_VOCAB, LARGEST_VOCAB = 512, 8192
VAL_BYTES = 400_000  # of validation text to aim for
SMALLEST_SHARE, LARGEST_SHARE = 0.005, 0.1
BYTES_PER_TOKEN = 3.5  # of English text, with the largest vocabulary: the text that --max-tokens takes


def vocab_size_for(text_bytes: float) -> int:
    """The largest power of two that the text is long enough for: `vocab_size_for(300_000) -> 1024`."""
    size = LARGEST_VOCAB
    while size > SMALLEST_VOCAB and size * TEXT_PER_ENTRY > text_bytes:
        size //= 2
    return size


def val_fraction_for(text_bytes: float) -> float:
    """The share that holds enough text for a loss that says something: `val_fraction_for(20_000_000) -> 0.02`."""
    return round(max(SMALLEST_SHARE, min(LARGEST_SHARE, VAL_BYTES / max(1, text_bytes))), 3)


def choose_by_size(cfg: PrepareConfig, source: Source) -> PrepareConfig:
    """Replace each None that the preset leaves open by a number that follows from the size of the source, and print it.

    Flags win. `--max-tokens` limits the size. The numbers follow from the source and the flags alone, so the same
    command gives the same ones.
    """
    text_bytes, chosen = min(source.text_bytes, BYTES_PER_TOKEN * (cfg.max_tokens or math.inf)), {}
    if cfg.by_size and cfg.tokenizer == "train" and cfg.vocab_size is None:
        chosen["vocab_size"] = vocab_size_for(text_bytes)
    if cfg.by_size and cfg.val_fraction is None:
        chosen["val_fraction"] = val_fraction_for(text_bytes)
    if chosen:
        flags = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in chosen.items())
        basis = "--max-tokens" if text_bytes < source.text_bytes else "the size of the source"
        if math.isinf(text_bytes):
            basis += " (a large Wikipedia is assumed)"
        print(f"chosen by {basis}: {flags}")
    return dataclasses.replace(cfg, **chosen)
