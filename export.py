"""A trained model in the formats of other tools. It is a GPT-2, so they can read it.

python export.py --out-dir my-model                  a Hugging Face GPT-2 folder
python export.py --out-dir my-model --format gguf    my-model/model.gguf, for llama.cpp
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # before the imports: PyTorch takes seconds, but mistakes and --help are answered at once

    from config import ExportConfig
    from internals.cli import parse

    CFG = parse(ExportConfig, "Write a trained model as a Hugging Face GPT-2 folder, or as GGUF for llama.cpp.")

import math
import os
import string
import tempfile
from pathlib import Path
from typing import Any

from config import ExportConfig
from internals import files, gguf, huggingface
from internals.checkpoint import load_model
from internals.start import UserError
from model import GPT

TEMPLATE = Path(__file__).parent / "internals" / "model_card.md"
USAGE = {"hf": huggingface.USAGE, "gguf": gguf.USAGE}
LICENCES = {
    "hub": "The training text is Wikipedia's, by its many authors, under CC BY-SA 4.0 (edits until mid-2023: "
    "CC BY-SA 3.0 and GFDL). Whether that licence extends to the weights of a model is not settled. This card names none "
    "for them: choose one, and credit Wikipedia, before publishing them.",
    "sample": "The training text was written for the Wikipedia Transformer (it is not from Wikipedia) and is under the "
    "MIT licence.",
}
LICENCE_UNKNOWN = (
    "The licence of the training text is not recorded in the checkpoint. Write it here before publishing the weights."
)


def export(cfg: ExportConfig) -> None:
    """Write the model of a checkpoint to the folder `out_dir`, which appears whole or not at all."""
    out_dir = Path(cfg.out_dir)
    if os.path.lexists(out_dir):
        raise UserError(f"--out-dir {out_dir}: exists already; name a new folder (or delete that one)")
    model, tokenizer, saved = load_model(cfg.checkpoint)
    with files.writing(f"--out-dir {out_dir}", advice="nothing was left there"):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as temporary:
            folder = Path(temporary, "incomplete")
            folder.mkdir()
            if cfg.format == "hf":
                huggingface.write_huggingface(folder, model, tokenizer)
            else:
                gguf.write_gguf(folder, model, tokenizer, out_dir.name)
            usage = USAGE[cfg.format].replace("NAME", out_dir.name)
            (folder / "README.md").write_bytes(model_card(out_dir.name, saved, model, usage).encode())
            for path in folder.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            names = ", ".join(sorted(path.name for path in folder.iterdir()))
            os.rename(folder, out_dir)
            files.sync_folder(out_dir.parent)
    print(f"{out_dir}: {model.num_parameters()['total'] / 1e6:.1f} million parameters in {names}")


def model_card(name: str, saved: dict[str, Any], model: GPT, usage: str) -> str:
    """README.md of the exported model: what it is and how it was made, as far as the checkpoint says.

    Args:
        saved: the checkpoint. Its `data`, which it may lack, describes the training text: source, train_tokens,
            train_bytes, val_tokens, val_bytes.
        usage: how to load the model, in Markdown.
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
        described = ", ".join(f"{key} `{value}`" for key, value in source.items())
        rows["training text"] = f"{data['train_tokens']:,} tokens, {data['train_bytes']:,} bytes; source: {described}"
        bits = saved["val_loss"] / math.log(2) * data["val_tokens"] / data["val_bytes"]
        rows["bits per byte"] = f"{bits:.4f} of validation text"
        licence = LICENCES.get(source["kind"], LICENCE_UNKNOWN)
        if source["kind"] == "hub":
            header |= {"datasets": source["repository"], "language": source["config"].rpartition(".")[2]}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        header="\n".join(f"{key}: {value}" for key, value in header.items()),
        name=name,
        usage=usage,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        licence=licence,
    )


if __name__ == "__main__":
    start.run(lambda: export(CFG))
