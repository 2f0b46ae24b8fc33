"""A model trained here is a GPT-2, at home everywhere.

    python export.py --out-dir my-model                  a checkpoint -> a Hugging Face GPT-2 folder
    python export.py --out-dir my-model --format gguf    a checkpoint -> my-model/model.gguf, for llama.cpp
    import_gpt2(...)                                     and back: GPT-2's own weights, or any of its kin, to train on

Both tokenizers are byte-level BPE as GPT-2 has it (Radford et al., 2019), `bytes` being the one without merges, so what
is written here is the same for both.
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # mistakes and --help are answered at once: PyTorch takes seconds to import

    from config import ExportConfig
    from internals.cli import parse

    CFG = parse(ExportConfig, "Write a trained model as a Hugging Face GPT-2 folder, or as GGUF for llama.cpp.")

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from config import ExportConfig
from internals.checkpoint import load_model
from internals.files import sync_folder
from internals.gguf import write_gguf
from internals.huggingface import write_huggingface
from internals.start import UserError
from model import GPT

# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, in GPT-2's notation


# ----------------------------------------------------------------------------------------------------------------------
# Out: a Hugging Face folder, or GGUF


# ----------------------------------------------------------------------------------------------------------------------
# The model card


def model_card(name: str, saved: dict[str, Any], model: GPT, usage: str) -> str:
    """README.md of the exported model: what it is and what it was made of, as far as the checkpoint says so.

    A checkpoint may carry `data`, what meta.json says of the text (source, train_tokens, train_bytes, val_tokens,
    val_bytes). Without it the card says that the text is not known, instead of guessing.
    """
    c, data, count = model.config, saved.get("data"), model.num_parameters()
    rows = {
        "architecture": f"GPT-2: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} dimensions ({c.n_inner:,} "
        f"feed-forward), context of {c.block_size:,} tokens",
        "parameters": f"{count['total']:,} ({count['blocks']:,} in the blocks, {count['embedding']:,} in the embeddings)",
        "tokenizer": f"`{saved['tokenizer']}`, {c.vocab_size:,} tokens",
        "started from": f"`{saved['config']['init_from']}`" if saved["config"].get("init_from") else "random weights",
        "training text": "not recorded in the checkpoint",
        "iterations": f"{saved['iter']:,}",
        "tokens seen in training": f"{saved['tokens']:,}",
        "validation loss": f"{saved['val_loss']:.4f} nats per token, at the latest evaluation",
        "perplexity": f"{math.exp(saved['val_loss']):.2f} per token",
    }
    header, licence = {"library_name": "transformers", "pipeline_tag": "text-generation"}, LICENCE_UNKNOWN
    if data:
        source = data["source"]
        rows["training text"] = f"{data['train_tokens']:,} tokens, {data['train_bytes']:,} bytes; source: " + ", ".join(
            f"{key} `{value}`" for key, value in source.items()
        )
        bits = saved["val_loss"] / math.log(2) * data["val_tokens"] / data["val_bytes"]
        rows["bits per byte"] = f"{bits:.4f} of validation text"
        licence = LICENCES.get(source["kind"], LICENCE_UNKNOWN)
        if source["kind"] == "hub":
            header |= {"datasets": source["repository"], "language": source["config"].rpartition(".")[2]}
    return CARD.format(
        header="\n".join(f"{key}: {value}" for key, value in header.items()),
        name=name,
        usage=usage,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        licence=licence,
    )


LICENCES = {
    "hub": "The training text is Wikipedia's, by its many authors, under CC BY-SA 4.0 (edits until mid-2023: "
    "CC BY-SA 3.0 and GFDL). Whether that reaches the weights of a model is not settled, so this card names no licence "
    "for them: choose one, and credit Wikipedia, before publishing them.",
    "sample": "The training text was written for the Wikipedia Transformer (it is no Wikipedia text) and is under the "
    "MIT licence.",
}
LICENCE_UNKNOWN = (
    "The licence of the training text is not recorded in the checkpoint. Write it here before publishing the weights."
)
CARD = """---
{header}
---

# {name}

A language model that continues text, trained with the Wikipedia Transformer. It has learned which words follow which:
it follows no instructions, and states falsehoods as fluently as facts.

## How to load it

{usage}

## How it was made

| | |
| --- | --- |
{rows}

The loss, and what follows from it, is a mean over held-out text.

## Licence of the training text

{licence}
"""
USAGE = {
    "hf": """```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("The best thing is", max_new_tokens=100)[0]["generated_text"])
```

`transformers` takes `<|endoftext|>` in a text for the end of an article; with `split_special_tokens=True` its tokenizer
takes it literally, as in training.""",
    "gguf": """With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```sh
llama-server -m {name}/model.gguf
curl http://127.0.0.1:8080/v1/completions -d '{{"prompt": "The best thing is", "max_tokens": 100}}'
```""",
}


# ----------------------------------------------------------------------------------------------------------------------
# python export.py


def export(config: ExportConfig) -> None:
    """Write the checkpoint's model to the folder `out_dir`, which is made whole or not at all.

    Raises:
        UserError: something is at `out_dir` already, the checkpoint cannot be used, or the disk refuses.
    """
    out_dir = Path(config.out_dir)
    if os.path.lexists(out_dir):
        raise UserError(f"--out-dir {out_dir}: is there already; name a new folder (or delete that one)")
    model, tokenizer, saved = load_model(config.checkpoint)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
            folder = Path(temporary, "incomplete")
            folder.mkdir()
            if config.format == "hf":
                write_huggingface(folder, model, tokenizer)
            else:
                write_gguf(folder, model, tokenizer, out_dir.name)
            usage = USAGE[config.format].format(name=out_dir.name)
            (folder / "README.md").write_bytes(model_card(out_dir.name, saved, model, usage).encode())
            for path in folder.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            files = ", ".join(sorted(path.name for path in folder.iterdir()))
            os.rename(folder, out_dir)
            sync_folder(out_dir.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--out-dir {out_dir}: could not be written ({reason}); nothing was left there") from error
    print(f"{out_dir}: {model.num_parameters()['total'] / 1e6:.1f} million parameters in {files}")


# ----------------------------------------------------------------------------------------------------------------------
# Back: a Hugging Face GPT-2 as a model to train


if __name__ == "__main__":
    start.run(lambda: export(CFG))
