"""How surprised a model is by each token of a text: the data behind the coloured texts of run.html and `--html`."""

import codecs
import contextlib
import math
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from internals.start import UserError
from model import GPT

ALTERNATIVES = 3  # shown for each token
NOT_FINITE = "logits are infinite or NaN: training failed, or --dtype is too narrow (try float32)"


class Surprise(NamedTuple):
    """What a model expected for each of N tokens, having read the tokens before it."""

    bits: Tensor  # (N,) float32: minus the binary logarithm of the token's probability
    ids: Tensor  # (N, ALTERNATIVES) int64: the likeliest other tokens, likeliest first
    p: Tensor  # (N, ALTERNATIVES) float32: their probabilities


@torch.inference_mode()
def surprise(model: GPT, ids: list[int]) -> Surprise:
    """The surprise of all tokens but the first, in float32 and without dropout. Draws no random number. (In train.py on a
    GPU, the products of float32 matrices are TF32.)

    A text may be longer than the context. The model then reads it as `generate.Context` does: once the context is full,
    its newest half is kept and computed again from position 0.

    Args:
        ids: T tokens, at least 2.

    Returns:
        N = T - 1 rows.

    Raises:
        UserError: logits are infinite or NaN.
    """
    block_size, training = model.config.block_size, model.training
    keep = max(1, block_size // 2)
    idx = torch.tensor(ids, device=model.transformer.wte.weight.device)
    parts, begin, known = [], 0, 0  # the window's first token; tokens of it whose successor was predicted before
    model.eval()
    try:
        while begin + known < len(ids) - 1:
            window = idx[begin : begin + block_size + 1]
            logits = model(window[None, :-1])[0, known:].float()  # (n, V)
            parts.append(read_off(logits, window[known + 1 :]))
            begin, known = begin + block_size + 1 - keep, keep - 1
    finally:
        model.train(training)
    result = Surprise(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
    if not result.bits.isfinite().all():
        raise UserError(NOT_FINITE)
    return result


def read_off(logits: Tensor, targets: Tensor) -> Surprise:
    """The surprise of `targets` (n,) under `logits` (n, V)."""
    log_p = logits.log_softmax(-1)
    target_log_p = log_p.gather(1, targets[:, None])
    others = log_p.scatter_(1, targets[:, None], -math.inf)
    best, ids = others.topk(min(ALTERNATIVES, others.size(1)), dim=1)
    return Surprise(-target_log_p[:, 0] / math.log(2), ids, best.exp())


def token_texts(tokenizer: tiktoken.Encoding, ids: list[int]) -> list[str]:
    """The text that each token completes: whole characters, empty for a token that ends inside its first one.

    With bytes as tokens, `"é!"` gives `["", "é", "!"]`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.decode_single_token_bytes(token)) for token in ids]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def token_columns(tokenizer: tiktoken.Encoding, ids: list[int], known: list[Surprise]) -> dict[str, Any]:
    """The tokens of a text for a page and for samples.jsonl, in columns of one entry per token.

    Args:
        ids: T tokens.
        known: the surprise of all tokens but the first, in one part or several.

    Returns:
        `text`: from `token_texts`. `bits`: None for the first token, which nothing precedes. `alternatives`: for each
        token up to three `[text, probability]`. `bits_per_byte`: of all tokens but the first, or None without any.
    """
    raw = [tokenizer.decode_single_token_bytes(token) for token in ids]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw[0])
    alternatives: list[list[list[Any]]] = [[]]
    rows = [row for part in known for row in zip(*(column.tolist() for column in part), strict=True)]
    for token, (_, others, p) in zip(raw[1:], rows, strict=True):
        begun = decoder.getstate()[0]  # bytes of a character that the tokens so far leave unfinished
        texts = [readable(begun, tokenizer.decode_single_token_bytes(other)) for other in others]
        alternatives.append([[text, round(share, 5)] for text, share in zip(texts, p, strict=True)])
        decoder.decode(token)
    size = sum(len(token) for token, id in zip(raw[1:], ids[1:], strict=True) if id != tokenizer.eot_token)
    return {
        "text": token_texts(tokenizer, ids),
        "bits": [None, *(round(bits, 3) for bits, *_ in rows)],
        "alternatives": alternatives,
        "bits_per_byte": round(sum(bits for bits, *_ in rows) / size, 4) if size else None,
    }


def readable(begun: bytes, token: bytes) -> str:
    """A token in readable form: the characters that it completes, or its own, or its bytes.

    `readable(b"\\xc3", b"\\xa9") -> "é"`, `readable(b"\\xc3", b"a") -> "a"`, `readable(b"", b"\\xc3") -> "<C3>"`.
    """
    for raw in (begun + token, token):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode("utf-8")
    return f"<{token.hex(' ').upper()}>"
