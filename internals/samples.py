"""The row of samples.jsonl for an evaluation: a text that the model writes, and its surprise at a passage."""

from typing import Any

import tiktoken

from internals.run import Run, TrainState
from internals.surprise import describe, surprise
from internals.tokenizer import cut_tokens

PASSAGE_TOKENS = 257  # of the validation split, from its beginning; all but the first are predicted


def sample_row(run: Run, state: TrainState, tokenizer: tiktoken.Encoding, sample: str) -> dict[str, Any]:
    """A row of samples.jsonl. `sample` is the text that the model wrote, with its prompt."""
    passage = read_passage(run, tokenizer)
    return {
        "iter": state.iter,
        "prompt": run.cfg.sample_prompt,
        "sample": sample,
        "passage": describe(tokenizer, passage, [surprise(state.model, passage)]),
    }


def read_passage(run: Run, tokenizer: tiktoken.Encoding) -> list[int]:
    """The first tokens of the validation split, the same at every evaluation. They end with a whole character."""
    stream = run.val_windows.stream
    length = min(PASSAGE_TOKENS, len(stream) - 1)
    return cut_tokens(tokenizer, stream.read(0, length + 1), length).tolist()


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
