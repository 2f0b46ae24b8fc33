"""A trained model in the formats of other tools. It is a GPT-2, so they can read it.

python export.py --out-dir my-model                     a Hugging Face GPT-2 folder
python export.py --out-dir my-model --format gguf       my-model/model.gguf, for llama.cpp
python export.py --out-dir my-model --dtype bfloat16    half the size: the weights are rounded
"""

from internals import start

if __name__ == "__main__":
    start.begin()  # before the imports: PyTorch takes seconds, but mistakes and --help are answered at once

    import sys

    from config import ExportConfig
    from internals.cli import parse

    start.reconfigure(sys.stdout, errors="backslashreplace")  # a path that the output cannot encode
    CFG = parse(ExportConfig, "Write a trained model as a Hugging Face GPT-2 folder, or as GGUF for llama.cpp.")

import functools
import json
import math
import os
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from config import ExportConfig
from internals import files, gguf, gpt2_reference, huggingface
from internals.memory import enough_memory
from internals.pretrained import open_checkpoint
from internals.screen import plural, rounded, wrap
from internals.shell import shell_join
from internals.start import UserError
from internals.stopping import end_like_ctrl_c
from internals.tokenizer import tokenizer_name
from model import GPT

PROMPTS = ("The best thing is", "The best", "The", "T")  # for the example: the first that leaves room for an answer
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
STARTED_ELSEWHERE = " The model that it started from has a text and a licence of its own. Add them before publishing."


def export(cfg: ExportConfig) -> None:
    """Write the model of a checkpoint to the folder `out_dir`, which appears whole or not at all."""
    out_dir = Path(cfg.out_dir)
    name = as_text(out_dir.name)
    if os.path.lexists(out_dir) or name == "..":
        raise UserError(f"--out-dir {out_dir}: exists already; name a new folder (or delete that one)")
    above = next(path for path in out_dir.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"--out-dir {out_dir}: {above} is not a folder; name another one")
    full_path = str(out_dir.absolute())
    if cfg.format == "hf" and full_path != as_text(full_path):
        raise UserError(f"--out-dir {out_dir}: is not UTF-8, so safetensors cannot open it; name another folder")
    model, tokenizer, saved = open_checkpoint(cfg.checkpoint)
    dtype = getattr(torch, cfg.dtype)
    gpt2_reference.check_tensors(set(model.state_dict()), model.config.n_layer)
    too_large = f"--checkpoint {cfg.checkpoint}: too little memory to export it; use a machine with more memory"
    with enough_memory(too_large), files.writing(f"--out-dir {out_dir}", advice="nothing was left there"):
        refuse_overflow(model.parameters() if cfg.format == "hf" else gguf.matrices(model), dtype)
        parent = files.nearest_folder(out_dir.parent)
        with files.temporary_folder(parent, prefix=f".{out_dir.name}-") as folder:
            if cfg.format == "hf":
                model = model.to(dtype)
                huggingface.write_huggingface(folder, model, tokenizer)
                written = gpt2_reference.read_huggingface(folder)
            else:
                model = gguf.round_matrices(model, dtype)
                gguf.write_gguf(folder, model, tokenizer, name)
                written = gpt2_reference.read_gguf(folder)
            gpt2_reference.check(model, written)  # both are rounded, so the files hold exactly the model's weights
            usage = how_to_load(USAGE[cfg.format], name, tokenizer, model.config.block_size)
            card = as_text(model_card(name, saved, model, cfg.format, usage))  # it may name the path of --init-from
            (folder / "README.md").write_bytes(card.encode())
            for path in folder.iterdir():
                with open(path, "rb+") as file:
                    files.sync_file(file)
            names = ", ".join(sorted(path.name for path in folder.iterdir()))
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            files.rename(folder, out_dir)
            files.sync_folder(out_dir.parent)
    print(wrap(f"{out_dir}: {rounded(model.num_parameters()['total'])} parameters in {names}"))
    needs = " (pip install transformers)" if cfg.format == "hf" else ""
    print(f"Load it{needs}: {loading_command(cfg, tokenizer, model.config.block_size)}")


def refuse_overflow(weights: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Raise UserError if a weight is beyond the range of `dtype`. A model that is not finite already may be exported."""
    if any(weight.isfinite().all() and not weight.to(dtype).isfinite().all() for weight in weights):
        name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise UserError(
            f"--dtype {name}: cannot hold weights above {largest:,.0f}, and this model has some; use float32"
        )


def as_text(path: str) -> str:
    """A path may hold any bytes; those that are not UTF-8 become question marks."""
    return path.encode("utf-8", "replace").decode()


def example(tokenizer: tiktoken.Encoding, context: int) -> tuple[str, int]:
    """A prompt, and a number of new tokens that fits the model's context after it."""
    sizes = {prompt: len(tokenizer.encode_ordinary(prompt)) for prompt in PROMPTS}
    prompt = next((prompt for prompt in PROMPTS if sizes[prompt] <= context // 2), PROMPTS[-1])
    return prompt, max(1, min(100, context - sizes[prompt]))


def how_to_load(usage: str, name: str, tokenizer: tiktoken.Encoding, context: int) -> str:
    """`usage` with an example."""
    prompt, new_tokens = example(tokenizer, context)
    path, quoted = shell_join([f"{name}/model.gguf"]), json.dumps(name, ensure_ascii=False)
    return string.Template(usage).substitute(
        path=path, quoted=quoted, prompt=prompt, new_tokens=new_tokens, context=f"{context:,}"
    )


def loading_command(cfg: ExportConfig, tokenizer: tiktoken.Encoding, context: int) -> str:
    """A command that opens the export in the program it was made for."""
    if cfg.format == "gguf":
        return shell_join(["llama-server", "-m", f"{cfg.out_dir}/model.gguf"])
    prompt, new_tokens = example(tokenizer, context)
    # PowerShell drops double quotes inside a word. Escapes of JSON are not all Python's
    quoted = repr if os.name == "nt" else functools.partial(json.dumps, ensure_ascii=False)
    pipeline = f"pipeline({quoted('text-generation')}, {quoted(cfg.out_dir)})"
    call = f"{pipeline}({quoted(prompt)}, max_new_tokens={new_tokens})"
    code = f"from transformers import pipeline; print({call}[0][{quoted('generated_text')}])"
    return shell_join(["python", "-c", code])


def started_from(source: str | None) -> str:
    """The model that a run started from. Of a path only the last part: the card is published, and a path names its owner."""
    if not source:
        return "random weights"
    is_path = os.path.isabs(source) or source.endswith(".pt") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if not is_path:  # a hub id, or looks like one
        return f"`{source}`"
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return f"a model on the trainer's computer, `{name}`"


def model_card(name: str, saved: dict[str, Any], model: GPT, file_format: str, usage: str) -> str:
    """README.md of the exported model: what it is and how it was made, as far as the checkpoint says.

    Args:
        saved: the checkpoint. Its `data`, if present, describes the training text: source, train_tokens,
            train_bytes, val_tokens, val_bytes.
        file_format: hf or gguf.
        usage: how to load the model, in Markdown.
    """
    c, data, count = model.config, saved.get("data"), model.num_parameters()
    rows = {
        "architecture": f"GPT-2: {plural(c.n_layer, 'layer')}, {plural(c.n_head, 'head')}, {c.n_embd} dimensions ({c.n_inner:,} "
        f"feed-forward), context of {c.block_size:,} tokens",
        "parameters": f"{count['total']:,} ({count['blocks']:,} in the blocks, {count['embedding']:,} in the embeddings)",
        "weights": str(model.transformer.wte.weight.dtype).removeprefix("torch."),
        "tokenizer": f"`{tokenizer_name(saved['tokenizer'])}`, {c.vocab_size:,} tokens",
        "started from": started_from(saved["config"].get("init_from")),
        "training text": "not recorded in the checkpoint",
        "iterations": f"{saved['iter']:,}",
        "tokens seen in training": f"{saved['tokens']:,}",
    }
    loss = saved["val_loss"]
    if math.isfinite(loss):
        perplexity = math.exp(min(loss, 700))  # exp overflows above 709
        rows["validation loss"] = f"{figure(loss)} nats per token, at the latest evaluation"
        rows["perplexity"] = f"{perplexity:.2f} per token" if perplexity < 1e6 else "above a million: the run diverged"
    else:
        rows["validation loss"] = f"{loss} at the latest evaluation: not measured, or the run diverged"
    header = {"pipeline_tag": "text-generation"}
    if file_format == "hf":
        header["library_name"] = "transformers"
    if data:
        source = data["source"]
        described = ", ".join(f"{key} `{value}`" for key, value in source.items())
        rows["training text"] = f"{data['train_tokens']:,} tokens, {data['train_bytes']:,} bytes; source: {described}"
        if math.isfinite(loss):
            bits = loss / math.log(2) * data["val_tokens"] / data["val_bytes"]
            rows["bits per byte"] = f"{figure(bits)} of validation text"
        if source["kind"] == "hub":
            header["datasets"] = source["repository"]
            language = source["config"].rpartition(".")[2].replace("simple", "en")
            if re.fullmatch("[a-z]{2,3}", language):  # the hub refuses what is no code of ISO 639, such as zh-yue
                header["language"] = json.dumps(language)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        header="\n".join(f"{key}: {value}" for key, value in header.items()),
        name=name,
        usage=usage,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        licence=licence(saved),
    )


def licence(saved: dict[str, Any]) -> str:
    """What is known of the licence of the texts that a model was trained on."""
    kind = saved["data"]["source"]["kind"] if saved.get("data") else ""
    return LICENCES.get(kind, LICENCE_UNKNOWN) + (STARTED_ELSEWHERE if saved["config"].get("init_from") else "")


def figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def main(cfg: ExportConfig) -> None:
    with end_like_ctrl_c():  # SIGTERM, too, removes what is half-written
        export(cfg)


if __name__ == "__main__":
    start.run(lambda: main(CFG))
