"""`generate.py --html`: a text as the model read and wrote it, on one page."""

import base64
import copy
import html
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from internals import html_page
from internals.files import write_text
from internals.html_page import BITS_PER_BYTE, LEGEND, SURPRISE
from internals.start import UserError
from internals.surprise import Surprise, describe, surprise, token_texts
from model import GPT, CausalSelfAttention

ATTENTION_TOKENS = 96  # the longest text whose attention is shown

BODY = """<header><h1>{title}</h1>
<p class="status">{status}</p></header>
{slider}
<section><h2>What the model expects</h2><p class="figure"><b id="bits"></b> bits per byte</p>
<p class="text" id="passage"></p>{legend}{surprise}{bits_per_byte}
<p class="note">The probabilities are the model's own, before temperature, top-k and top-p. The first token
has none, since nothing precedes it.</p></section>
{attention}
"""

SLIDER = """<section class="slider"><output id="label" for="slider"></output>
<input id="slider" type="range" min="0" max="{last}" value="0" step="1" aria-label="sample"></section>"""

ATTENTION = """<section><h2>Where the heads look</h2>
<div class="heads" id="heads"></div>
<p class="figure"><b id="head"></b></p>
<p class="text" id="looks"></p>
<p class="note">Each picture is a head's attention: a row for each token, a column for each token that it can look at, darker where
it looks more. Choose a head, then point at a token of the text, or tap it: the colour shows where that token looks.</p>
<p class="note">A head mixes what it finds there into the token. What it finds has passed through the layers below, so attention
shows where a head looks, not why.</p></section>"""

LONG = """<section><h2>Where the heads look</h2><p class="note">Attention is shown for texts of at most {tokens} tokens that fit into
the context. This one has {count}.</p></section>"""


class TextPage:
    """The page of a prompt and its continuations. It has its own float32 copy of the model, with unpacked weights."""

    def __init__(self, path: str, model: GPT, tokenizer: tiktoken.Encoding, device: torch.device, description: str):
        self.path, self.tokenizer, self.description = Path(path), tokenizer, description
        self.model = copy.deepcopy(model).to(device, torch.float32)
        if not self.path.parent.is_dir():
            raise UserError(f"--html {path}: there is no folder {self.path.parent}; make it first")
        if self.path.is_dir():
            raise UserError(f"--html {path}: is a folder; name a file in it")
        try:
            free = not self.path.exists() or html_page.is_page(self.path)
        except OSError as error:
            raise UserError(f"--html {path}: cannot be read ({error.strerror}); name another file") from error
        if not free:
            raise UserError(f"--html {path}: exists and was not written by this command; name another file")

    def write(self, sampling: str, prompt: Sequence[int], samples: Sequence[Sequence[int]]) -> None:
        """Write the page.

        Args:
            sampling: how the continuations were drawn, in words; empty if there are none.
            prompt: the tokens that the model was given, at least one.
            samples: the tokens of each continuation; empty ones for a prompt alone.
        """
        texts = [[*prompt, *sample] for sample in samples]
        data: dict[str, Any] = {
            "running": False,
            "scale": round(math.log2(self.model.config.vocab_size), 3),
            "views": [
                {"iter": n, "label": f"sample {n} of {len(texts)}", "passage": self.passage(ids, len(prompt))}
                for n, ids in enumerate(texts, start=1)
            ],
        }
        shown = texts[0]
        short = len(shown) <= min(ATTENTION_TOKENS, self.model.config.block_size)
        if short:
            data["attention"] = self.attention(shown)
        title = textwrap.shorten("".join(data["views"][0]["passage"]["text"]), 45, placeholder=" …") or "A text"
        body = BODY.format(
            title=html.escape(title),
            status=html.escape(" · ".join(filter(None, (self.description, sampling)))),
            slider=SLIDER.format(last=len(texts) - 1) if len(texts) > 1 else "",
            legend=LEGEND,
            surprise=SURPRISE,
            bits_per_byte=BITS_PER_BYTE,
            attention=ATTENTION if short else LONG.format(tokens=ATTENTION_TOKENS, count=f"{len(shown):,}"),
        )
        write_text(self.path, html_page.render(title, body, data))

    def passage(self, ids: list[int], prompt_length: int) -> dict[str, Any]:
        """A text in columns. The tokens after the prompt have the probabilities that they were drawn from."""
        prompt, known = ids[:prompt_length], []
        if len(prompt) > 1:
            known.append(surprise(self.model, prompt))
        if len(ids) > prompt_length:
            read = prompt[-self.model.config.block_size :]
            rows = surprise(self.model, [*read, *ids[prompt_length:]])
            known.append(Surprise(*(column[len(read) - 1 :] for column in rows)))
        return describe(self.tokenizer, ids, known)

    def attention(self, ids: list[int]) -> dict[str, Any]:
        """The attention of each head of each layer, in the form that heads.js reads."""
        layers = attention_weights(self.model, ids)
        rows, columns = torch.tril_indices(len(ids), len(ids))
        packed = (layers[:, :, rows, columns] * 255).round().to(torch.uint8)
        return {
            "text": [text or "·" for text in token_texts(self.tokenizer, ids)],
            "heads": layers.size(1),
            "weights": [[base64.b64encode(bytes(head.tolist())).decode() for head in layer] for layer in packed],
        }


@torch.inference_mode()
def attention_weights(model: GPT, ids: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) of every head, (n_layer, H, T, T) float32 on the CPU.

    The model's kernel never holds all these numbers at once. So they are computed again, from each layer's input and
    weights.

    Args:
        ids: T tokens, at most `block_size`.
    """
    weights: list[Tensor] = []

    def look(attn: CausalSelfAttention, args: tuple[Tensor, ...], output: Tensor) -> None:
        (x, *_), heads = args, attn.n_head
        _, T, C = x.shape
        q, k, _ = attn.c_attn(x).view(T, 3, heads, C // heads).permute(1, 2, 0, 3)  # (H, T, D) each
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(C // heads)).masked_fill(future, -math.inf)
        weights.append(scores.softmax(-1).cpu())

    hooks = [block.attn.register_forward_hook(look) for block in model.transformer.h]
    try:
        model.forward(torch.tensor([list(ids)], device=model.transformer.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)
