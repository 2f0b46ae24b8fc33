"""What a preset leaves to the size of the source: the vocabulary of a trained tokenizer, and the validation share."""

import dataclasses

from config import PrepareConfig
from internals.text_files import Source

BYTES_PER_TOKEN = 200  # of text for a token of the vocabulary, at least: so that each occurs often enough to be learned
SMALLEST_VOCAB, LARGEST_VOCAB = 512, 8192
VAL_BYTES = 400_000  # held out, where that is a share between these
SMALLEST_SHARE, LARGEST_SHARE = 0.005, 0.1


def vocab_size_for(text_bytes: float) -> int:
    """The largest power of two that the text is long enough for: `vocab_size_for(300_000) -> 1024`."""
    size = LARGEST_VOCAB
    while size > SMALLEST_VOCAB and size * BYTES_PER_TOKEN > text_bytes:
        size //= 2
    return size


def val_fraction_for(text_bytes: float) -> float:
    """The share that holds enough text for a loss that says something: `val_fraction_for(20_000_000) -> 0.02`."""
    return round(max(SMALLEST_SHARE, min(LARGEST_SHARE, VAL_BYTES / max(1, text_bytes))), 3)


def choose_by_size(cfg: PrepareConfig, source: Source) -> PrepareConfig:
    """The configuration with numbers for what is left to the size of the source; they are printed. Flags win.

    From here on they are like numbers that were given by flag. They follow from the source's files and the flags alone.
    The size of compressed and parquet files is estimated (`text_bytes`).
    """
    chosen = {}
    if cfg.by_size and cfg.tokenizer == "train" and cfg.vocab_size is None:
        chosen["vocab_size"] = vocab_size_for(source.text_bytes)
    if cfg.by_size and cfg.val_fraction is None:
        chosen["val_fraction"] = val_fraction_for(source.text_bytes)
    if chosen:
        flags = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in chosen.items())
        print(f"chosen by the size of the source: {flags}")
    return dataclasses.replace(cfg, **chosen)
