"""`generate.py --html`: a text as the model read and wrote it, on one page."""

import base64
import copy
import html
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from internals import html_page
from internals.files import write_text
from internals.start import UserError
from internals.surprise import Surprise, surprise, token_columns, token_texts
from internals.tokenizer_json import END_OF_TEXT
from model import GPT

ATTENTION_TOKENS = 96  # the longest text whose attention is shown

BODY = """<header><h1 lang="" translate="no">{title}</h1>
<p class="status">{status}</p></header>
{slider}
<section>{expected}
<p class="note">The probabilities are the model's own, before temperature, top-k and top-p. The first token
has none, since nothing precedes it.</p></section>
{attention}
"""

SLIDER = """<section class="slider"><output id="label" for="slider"></output>
<input id="slider" type="range" min="0" max="{last}" value="0" step="1" aria-label="sample"></section>"""

ATTENTION = """<section><h2>{heading}</h2>
<div class="heads" id="heads"></div>
<p class="figure"><b id="head"></b></p>
<p class="text" id="looks" lang="" translate="no" tabindex="0" role="application"
aria-label="the text; arrow keys choose a token"></p>
<p class="note" id="most" aria-live="polite"></p>
<p class="note">Each picture is a head's attention: a row for each token, a column for each token that it can look at. The colour is
stronger where it looks more. Choose a head, then point at a token of the text, tap it, or go there with the arrow keys: the colour shows where that token looks.</p>
<p class="note">A head mixes what it finds there into the token. What it finds has passed through the layers below, so attention
shows where a head looks, not why.</p></section>"""

LONG = """<section><h2>{heading}</h2><p class="note">Attention is shown for texts of at most {tokens} tokens that fit into
the context. This one has {count}.</p></section>"""


def check_page_path(path: str) -> None:
    """Raise UserError if the page cannot be written there. Only a page of an earlier `--html` is replaced."""
    file = Path(path)
    try:
        if not file.parent.is_dir():
            raise UserError(f"--html {path}: there is no folder {file.parent}; make it first")
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"--html {path}: the folder {file.parent} cannot be written; name another one")
        if file.is_dir():
            raise UserError(f"--html {path}: is a folder; name a file in it")
        if file.is_symlink():
            raise UserError(f"--html {path}: is a link, which the page would replace; name the file itself")
        if file.exists() and not html_page.is_page(file, "text"):
            raise UserError(f"--html {path}: exists and is not marked as a page of this command; name another file")
        temporary = file.with_name(f"{file.name}.tmp")  # empty, or a part of a page, if this command was killed
        if os.path.lexists(temporary) and temporary.stat().st_size and not html_page.is_page(temporary, "text"):
            raise UserError(f"--html {path}: {temporary} is in the way; move it, or name another file")
    except OSError as error:  # no permission, a name that is too long
        raise UserError(f"--html {path}: cannot be read ({error.strerror}); name another file") from error


class TextPage:
    """The page of a prompt and its continuations. It has its own float32 copy of the model, with unpacked weights."""

    def __init__(self, path: str, model: GPT, tokenizer: tiktoken.Encoding, device: torch.device, description: str):
        self.path, self.tokenizer, self.description = Path(path), tokenizer, description
        self.model = copy.deepcopy(model).to(device, torch.float32)

    def write(self, sampling: str, prompt: Sequence[int], samples: Sequence[Sequence[int]]) -> None:
        """Write the page.

        Args:
            sampling: how the continuations were drawn, in words; empty if there are none.
            prompt: the tokens that the model was given, at least one.
            samples: the tokens of each continuation; empty ones for a prompt alone.
        """
        texts = [[*prompt, *sample] for sample in samples]
        known = [surprise(self.model, list(prompt))] if len(prompt) > 1 else []
        data: dict[str, Any] = {
            "scale": round(math.log2(self.model.config.vocab_size), 3),
            "views": [
                {"iter": n, "label": f"sample {n} of {len(texts)}", "passage": self.passage(ids, len(prompt), known)}
                for n, ids in enumerate(texts, start=1)
            ],
        }
        shown = texts[0]
        short = len(shown) <= min(ATTENTION_TOKENS, self.model.config.block_size)
        if short:
            data["attention"] = self.attention(shown)
        title = heading("".join(data["views"][0]["passage"]["text"]))
        heads = "Where the heads look" + (" in sample 1" if len(texts) > 1 else "")
        body = BODY.format(
            title=html.escape(title),
            status=html.escape(" · ".join(filter(None, (self.description, sampling)))),
            slider=SLIDER.format(last=len(texts) - 1) if len(texts) > 1 else "",
            expected=html_page.EXPECTED,
            attention=(ATTENTION if short else LONG).format(
                heading=heads, tokens=ATTENTION_TOKENS, count=f"{len(shown):,}"
            ),
        )
        write_text(self.path, html_page.render("text", title, body, data))

    def passage(self, ids: list[int], prompt_length: int, known: list[Surprise]) -> dict[str, Any]:
        """A text in columns. The tokens after the prompt are measured in the context that they were generated in.

        Args:
            known: the surprise of the prompt; empty for a single token.
        """
        if len(ids) > prompt_length:
            read = ids[:prompt_length][-self.model.config.block_size :]
            rows = surprise(self.model, [*read, *ids[prompt_length:]])
            known = [*known, Surprise(*(column[len(read) - 1 :] for column in rows))]
        return token_columns(self.tokenizer, ids, known)

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


def heading(text: str) -> str:
    """The beginning of a text in one line, without the `<|endoftext|>` that begins a new article."""
    line = " ".join(text.removeprefix(END_OF_TEXT).split())
    return (line if len(line) <= 45 else line[:44] + "…") or "A text"


@torch.inference_mode()
def attention_weights(model: GPT, ids: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) of every head, (n_layer, H, T, T) float32 on the CPU.

    Args:
        ids: T tokens, at most `block_size`.
    """
    with AttentionWeights() as seen:
        model(torch.tensor([list(ids)], device=model.transformer.wte.weight.device))
    return torch.stack(seen.layers)


class AttentionWeights(TorchFunctionMode):
    """Inside, `layers` collects the weights of each attention of one sequence, (H, T, T) on the CPU.

    The kernel of the model never holds all these numbers at once. So each attention is computed a second time, on the
    queries and keys that the model gives it. Its values are one-hot vectors, so the result is the weights themselves.
    """

    def __init__(self):
        super().__init__()
        self.layers: list[Tensor] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            # (1, H, T, D) each, on the CPU: on Apple's GPUs, PyTorch before 2.12 needs values of D dimensions
            q, k, _, *mask = (value.cpu() if torch.is_tensor(value) else value for value in args)
            options = {name: value.cpu() if torch.is_tensor(value) else value for name, value in kwargs.items()}
            values = torch.eye(k.size(2)).expand(*k.shape[:2], -1, -1)
            self.layers.append(function(q, k, values, *mask, **options)[0])
        return function(*args, **kwargs)
