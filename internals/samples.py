"""An evaluation's sample text: how it is drawn, and its row of samples.jsonl, with the surprise at a passage."""

from typing import Any

import tiktoken

from internals.run import Run, TrainState
from internals.start import UserError
from internals.surprise import surprise, token_columns
from internals.tokenizer import cut_tokens, load_tokenizer

SAMPLE = {"temperature": 0.8, "top_k": 200}  # how the text is drawn
PASSAGE_TOKENS = 257  # of the validation split, from its beginning; all but the first are predicted


def load_sample_tokenizer(run: Run) -> tiktoken.Encoding | None:
    """The data's tokenizer, in process 0. None if it is not available: training then shows no sample text."""
    if not run.machine.is_main:
        return None
    try:
        return load_tokenizer(run.tokenizer)
    except UserError as error:
        run.machine.print(f"No sample text: {error}")
        return None


def sample_row(run: Run, state: TrainState, tokenizer: tiktoken.Encoding, sample: str) -> dict[str, Any]:
    """A row of samples.jsonl. `sample` is the text that the model wrote, with its prompt."""
    passage = read_passage(run, tokenizer)
    return {
        "iter": state.iter,
        "prompt": run.cfg.sample_prompt,
        "sample": sample,
        "passage": token_columns(tokenizer, passage, [surprise(state.model, passage)]),
    }


def read_passage(run: Run, tokenizer: tiktoken.Encoding) -> list[int]:
    """The first tokens of the validation split, the same at every evaluation. They end with a whole character."""
    stream = run.val_windows.stream
    length = min(PASSAGE_TOKENS, len(stream) - 1)
    return cut_tokens(tokenizer, stream.read(0, length + 1), length).tolist()
