"""The share of a model's samples that is copied word for word from its training text.

    python train.py --preset demo
    python benchmarks/copied.py checkpoints/demo

Twenty new articles of 200 tokens at the defaults of generate.py, seed 0. A character is copied if it lies in a run of
50 or more characters that the training text has, too.
"""

from dataclasses import dataclass
from pathlib import Path

import common  # noqa: F401  (puts the root on the path, so it comes first)
import torch
import tyro

from config import GenerateConfig
from generate import generate_text
from internals import checkpoint
from internals.start import run
from internals.windows import TokenStream

RUN = 50  # characters; the demo's sentences have 65 on average


@dataclass(frozen=True)
class Copied:
    out_dir: tyro.conf.Positional[str]  # of the run; its data folder must still be there


def copied_spans(sample: str, text: str, shortest: int = RUN) -> list[tuple[int, int]]:
    """The spans of the longest runs of `sample` that occur in `text`.

    `copied_spans("an old dog", "the old door", 3) -> [(2, 9)]`
    """
    spans, end = [], 0
    for start in range(len(sample)):
        stop = max(start + shortest, end + 1)  # a run that ends earlier lies inside the one before
        if stop > len(sample) or sample[start:stop] not in text:
            continue
        while stop < len(sample) and sample[start : stop + 1] in text:
            stop += 1
        spans.append((start, stop))
        end = stop
    return spans


def main() -> None:
    args = tyro.cli(Copied, description=__doc__)
    last = checkpoint.load(Path(args.out_dir) / "last.pt")
    model, tokenizer, _ = checkpoint.load_model(Path(args.out_dir) / "best.pt")
    tokens = TokenStream.open(last["config"]["data_dir"], "train")
    text = tokenizer.decode(tokens.read(0, len(tokens)).tolist())
    defaults = GenerateConfig()
    options = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p")}
    generator = torch.Generator().manual_seed(0)
    samples = generate_text(
        model, tokenizer, "", defaults.max_new_tokens, num_samples=20, generator=generator, **options
    )
    spans = [copied_spans(sample, text) for sample in samples]
    copied = sum(len({i for span in of_sample for i in range(*span)}) for of_sample in spans)
    runs = [sample[start:stop] for sample, of_sample in zip(samples, spans, strict=True) for start, stop in of_sample]
    longest = max(runs, key=len, default="")
    characters = sum(map(len, samples))
    print(
        f"{len(samples)} samples, {characters:,} characters, {copied / characters:.1%} of them in runs of {RUN} or more"
    )
    print(f"the longest run has {len(longest)} characters: {longest!r}")


if __name__ == "__main__":
    run(main)
