"""Every hyperparameter, once: its value, its range, its meaning.

A field's default is what you get, and the comment beside it is its `--help` text. There are two ways to change it:

    edit the default (or the preset's entry) in this file     max_iters: Count = 8_000
    or give the flag                                          python train.py --max-iters 8000

A preset is a named set of other defaults (`PRESETS`, at the end). Flags win over the preset, the preset over the
defaults. The dataclasses are frozen, and what follows from other values is a property or a method.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

# ----------------------------------------------------------------------------------------------------------------------
# The types and ranges of fields


class Range(NamedTuple):
    words: str  # completes the message "--flag value: must be ..."
    contains: Callable[[Any], bool]


Count = Annotated[int, Range("at least 1, and below 2^63", lambda value: 1 <= value < 2**63)]
Natural = Annotated[int, Range("0 or more, and below 2^63", lambda value: 0 <= value < 2**63)]
Rate = Annotated[float, Range("from 0 to 1e12", lambda value: 0 <= value <= 1e12)]  # float32 holds a product of three
Fraction = Annotated[float, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
Share = Annotated[float, Range("above 0 and below 1", lambda value: 0 < value < 1)]
Probability = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Positive = Annotated[float, Range("above 0, and finite", lambda value: 0 < value < math.inf)]
Auto = Literal["auto"]
CountOrAuto = Annotated[int | Auto, Range("at least 1, below 2^63, or auto", lambda n: n == "auto" or 1 <= n < 2**63)]
FractionOrAuto = Annotated[float | Auto, Range("at least 0 and below 1, or auto", lambda n: n == "auto" or 0 <= n < 1)]
Samples = Annotated[int, Range("from 1 to 65,536", lambda value: 1 <= value <= 65_536)]
Workers = Annotated[int, Range("from 1 to 256", lambda value: 1 <= value <= 256)]
ShardTokens = Annotated[int, Range("from 1 to 2^31 - 1", lambda value: 1 <= value < 2**31)]  # an int32 in the header
VocabSize = Annotated[int, Range("from 257 (bytes, end-of-text) to 65,536", lambda value: 257 <= value <= 65_536)]
PATH = "path"  # marks a field in which the command line replaces a leading ~
FilePath = Annotated[str, PATH]
Folder = Annotated[str, PATH, Range("a path, not empty", lambda value: value != "")]
Strings = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # --flag a b --flag c -> (("a", "b"), ("c",))
Numbers = tyro.conf.UseAppendAction[tuple[tuple[int, ...], ...]]
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def flag_of(field_name: str) -> str:
    """`flag_of("n_layer") -> "--n-layer"`"""
    return f"--{field_name.replace('_', '-')}"


def unescape(text: str) -> str:
    r"""A text from the command line with `\n`, `\r`, `\t` and `\\` as the characters that they stand for."""
    characters = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: characters[match[1]], text)


def parts(annotation: Any) -> Iterator[Any]:
    """The pieces of a type: types, allowed words and ranges. `list(parts(CountOrAuto))` is `[int, "auto", Range(...)]`."""
    kind, inside = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        yield from inside
    elif kind is Annotated:
        yield from chain(parts(inside[0]), (mark for mark in inside[1:] if isinstance(mark, Range)))
    elif inside and kind is not tuple:  # a union
        yield from chain.from_iterable(map(parts, inside))
    else:
        yield annotation


@functools.cache
def rules(cls: type) -> dict[str, list[Any]]:
    """For each field, what its type consists of."""
    return {name: list(parts(hint)) for name, hint in get_type_hints(cls, include_extras=True).items()}


class Checked:
    """Base of the configurations: checks the type and the range of each field, and raises ValueError. The command line
    checks types, too, but somebody may edit a default here, or a config.json."""

    def __post_init__(self):
        for name, found in rules(type(self)).items():
            value, flag = getattr(self, name), flag_of(name)
            limits = [part for part in found if isinstance(part, Range)]
            allowed = [part for part in found if part not in limits]
            words = [kind for kind in allowed if isinstance(kind, str)]
            # Other types, such as tuples, are left to tyro. An int will do for a float, but a bool is no int here
            if set(allowed) <= {*words, *KINDS} and value is not tyro.MISSING:
                fits = value in words or type(value) in allowed or (type(value) is int and float in allowed)
                require(fits, f"{flag} {value!r}: must be {' or '.join(KINDS.get(kind, kind) for kind in allowed)}")
            for limit in [] if value is None else limits:
                require(limit.contains(value), f"{flag} {value}: must be {limit.words}")


# ----------------------------------------------------------------------------------------------------------------------
# Fields of several commands


@dataclass(frozen=True)
class Preset(Checked):
    preset: Literal["wikipedia", "wikipedia-150m", "laptop", "demo"] = "wikipedia"  # a named set of defaults


@dataclass(frozen=True)
class DataDir(Preset):
    data_dir: Folder = "data/wikipedia"  # folder of token shards: prepare_data.py writes it, train.py reads it


@dataclass(frozen=True)
class Compute(Preset):
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one, else mps, else cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the arithmetic; auto: the fastest safe one


@dataclass(frozen=True)
class CheckpointFile(Preset):
    checkpoint: Folder = "checkpoints/wikipedia/best.pt"  # the model: best.pt, last.pt or their folder; generate.py also takes a GPT-2 in Hugging Face format (a folder or a hub id)


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class ModelConfig(Checked):
    n_layer: Count = 6  # transformer blocks
    n_head: Count = 6  # attention heads in a block; must divide n_embd
    n_embd: CountOrAuto = 384  # embedding dimensions, the width of the residual stream; auto: by the size of the text
    n_inner: CountOrAuto = 1536  # feed-forward dimensions; auto: 4 times n_embd, as in GPT-2
    block_size: Count = 256  # context: the most tokens that the model sees at once
    vocab_size: tyro.conf.Fixed[Count] = 50257  # the tokenizer's; train.py takes it from the data's meta.json
    dropout: FractionOrAuto = 0.0  # probability; auto: 0, but 0.1 or 0.2 if the run reads its text several times

    def __post_init__(self):
        super().__post_init__()
        require(
            self.n_embd == "auto" or self.n_embd % self.n_head == 0,
            f"--n-head {self.n_head}: must divide --n-embd {self.n_embd} (each head gets an equal share)",
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 64, which suits matrix units."""
        return math.ceil(self.vocab_size / 64) * 64


# ----------------------------------------------------------------------------------------------------------------------
# python prepare_data.py


@dataclass(frozen=True)
class PrepareConfig(DataDir):
    source: Strings = ()  # wikipedia (the hub's), sample (embedded), or files, folders, globs of .parquet, .jsonl, .ndjson, .json, .txt, wiki_00 (WikiExtractor's); all but .parquet also .gz, .zst, .bz2; several are one text; none: wikipedia, for demo the sample
    preset_source: tyro.conf.Fixed[str] = "wikipedia"  # the source where no --source is given
    by_size: tyro.conf.Fixed[bool] = False  # vocab_size and val_fraction: None means by the source's size
    usual_vocab_size: tyro.conf.Fixed[VocabSize] = 16_384  # without --vocab-size; a text may yield fewer tokens
    language: str = "en"  # of --source wikipedia: en, simple, de, ...
    dump: str = "20231101"  # of --source wikipedia: the date of the dump
    revision: str = "main"  # of --source wikipedia: a branch, tag or commit of the dataset repository
    text_column: str = "text"  # of .parquet, .jsonl and .json: the column that holds the text
    encoding: str = "utf-8"  # of all files but .parquet: any that Python knows (cp1252, ...); a byte-order mark wins
    separator: str = ""  # text between the documents of a .txt file, such as '<|endoftext|>' or '\n\n\n'; empty: a file is one document
    tokenizer: FilePath = "gpt2"  # gpt2: 50,257 tokens; bytes: 257, needs no download; train: a new one, trained on the source; or the tokenizer.json of another data folder
    vocab_size: VocabSize | None = None  # tokens of --tokenizer train; None: 16,384 (laptop, demo: by the text's size)
    val_fraction: Share | None = None  # share held out; None: 0.005 (sample: 0.1; laptop, demo: by the text's size)
    shard_tokens: ShardTokens = 100_000_000  # tokens in a shard file (2 bytes each)
    max_tokens: Count | None = None  # stop after about this many, at an article's end or inside a long one; None: all
    workers: Workers | None = None  # tokenizing threads; None: one for each CPU core, at most 8
    keep_downloads: bool = False  # of --source wikipedia: keep the downloaded files, in the Hugging Face cache (12 GB for en); later runs find them
    overwrite: bool = False  # delete the shards in data_dir and start again; flags and files are checked first, but not every line of the text
    show: Numbers = ()  # write nothing, but print the text around these tokens of the training split in data_dir

    def __post_init__(self):
        super().__post_init__()
        require("" not in self.sources, "--source: is empty; give wikipedia, sample, or a file, folder or glob")
        require(all(self.source), "--source: names nothing; give wikipedia, sample, or a file")
        several_with_hub = "wikipedia" in self.sources and len(self.sources) > 1
        require(not several_with_hub, "--source wikipedia: cannot be combined with files; give each its own folder")
        require(self.tokenizer != "", "--tokenizer: is empty; give gpt2, bytes, train or a tokenizer.json")
        size_fits = self.vocab_size is None or self.tokenizer == "train"
        require(size_fits, f"--vocab-size {self.vocab_size}: only for --tokenizer train; others have a fixed size")
        require(all(self.show), "--show: names no token; give token numbers, counted from 0")
        for name in ("separator", "text_column"):
            value = getattr(self, name)
            require(value.encode("utf-8", "ignore").decode() == value, f"{flag_of(name)}: is not UTF-8")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in order: each `--source` once, or the preset's."""
        given = (self.source,) if isinstance(self.source, str) else tuple(chain.from_iterable(self.source))
        return tuple(dict.fromkeys(given)) or (self.preset_source,)

    @property
    def trained_size(self) -> int | None:
        """The vocabulary size of the tokenizer to train; None: none is trained."""
        return (self.vocab_size or self.usual_vocab_size) if self.tokenizer == "train" else None

    @property
    def held_out(self) -> float:
        """The validation share in use: the embedded sample is so small that it needs a larger one."""
        if self.val_fraction is not None:
            return self.val_fraction
        return 0.1 if self.sources == ("sample",) else 0.005

    @property
    def separator_text(self) -> str:
        return unescape(self.separator)

    @property
    def least_tokens(self) -> dict[str, int]:
        """What `train.py` needs of each split: one window of the preset's model to validate on, two to train on."""
        window = PRESETS[self.preset].get("block_size", ModelConfig.block_size)
        return {"val": window + 1, "train": 2 * window}


# ----------------------------------------------------------------------------------------------------------------------
# python train.py


# Fields that are not settings of a run: the command's mode, its files, and what determines a new run's max_iters
NOT_SETTINGS = (
    "preset", "data_dir", "out_dir", "resume", "auto_resume", "overwrite", "check", "eval_only", "config",
    "max_minutes", "max_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(Compute, DataDir):
    out_dir: Folder = "checkpoints/wikipedia"  # folder for best.pt, last.pt, config.json, metrics.jsonl, samples.jsonl, loss.png, run.html
    resume: bool = False  # continue out_dir/last.pt with its settings; flags change them, except model and optimizer
    auto_resume: bool = False  # continue if there is a run in out_dir, else start one: one command for a scheduler
    overwrite: bool = False  # delete the run in out_dir and start again; it is kept if the first evaluation fails
    check: bool = False  # test the setup, report whether the run fits and how long it takes, write nothing
    eval_only: bool = False  # evaluate out_dir/best.pt (or --init-from) on the validation split, write nothing
    config: FilePath = ""  # start with the settings in this config.json of another run, except its preset and folders
    init_from: FilePath = ""  # start from this model (best.pt, its folder, a GPT-2 folder, a hub id), with its sizes

    max_iters: Count = 16_000  # iterations (optimizer steps) in the run
    max_minutes: Positive | None = None  # of a new run: sets max_iters so that the whole command takes this long
    max_epochs: Positive | None = None  # of a new run: lowers max_iters to at most this many passes over the text
    batch_size: CountOrAuto = 64  # most sequences per device and micro-step; auto: as many as fit into GPU memory
    tokens_per_iter: CountOrAuto = 65_536  # for all devices and micro-steps; auto: by the size of the text
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for the matrices in the blocks, with adamw for all else
    learning_rate: Annotated[Rate, tyro.conf.arg(aliases=("--lr",))] = 4e-3  # the peak, reached when warm-up ends
    muon_lr_scale: Rate = 1.0  # Muon's learning rate, as a multiple of learning_rate
    min_lr: Rate | None = None  # the end of the cosine, reached at max_iters; None: a tenth of learning_rate
    warmup_iters: Natural = 500  # iterations of linear warm-up; at most a tenth of the run
    muon_momentum: Fraction = 0.95  # Muon: decay of the mean of gradients
    weight_decay: Rate = 0.1  # on matrices only, times their learning rate: Muon's decay muon_lr_scale times as fast
    beta1: Fraction = 0.9  # AdamW: decay of the mean of gradients
    beta2: Fraction = 0.95  # AdamW: decay of the mean of squared gradients
    grad_clip: Rate = 1.0  # largest gradient norm; 0: no clipping

    log_interval: Count = 10  # iterations between rows of metrics.jsonl
    eval_interval: CountOrAuto = 500  # iterations between evaluations on the validation split; auto: a tenth of the run
    eval_tokens: Count = 1_048_576  # validation tokens at an evaluation, at most: the same windows every time
    checkpoint_interval: Count = 250  # iterations between saves of last.pt (each evaluation saves it too)

    sample_prompt: str = ""  # each evaluation shows how the model continues this text; empty: a new article
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # also gets the rows of metrics.jsonl

    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: takes a minute, then a GPU is faster; auto: on cuda
    seed: Natural = 1337  # of initial weights, dropout and batch order

    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self):
        super().__post_init__()
        modes = [name for name in ("resume", "auto_resume", "overwrite", "check", "eval_only") if getattr(self, name)]
        require(len(modes) <= 1, f"{' and '.join(map(flag_of, modes))}: give one of them")
        if not (self.resume or self.auto_resume or self.eval_only):  # these take settings from a file
            self.check_together()

    def check_together(self) -> None:
        """Raise ValueError if settings contradict each other."""
        most = f"must not be above --learning-rate {self.learning_rate}"
        require(self.final_lr <= self.learning_rate, f"--min-lr {self.min_lr}: {most}")
        least = f"must hold at least one window of --block-size {self.model.block_size}"
        require(self.eval_tokens >= self.model.block_size, f"--eval-tokens {self.eval_tokens}: {least}")
        if self.tokens_per_iter != "auto":
            self.sequences_per_process(processes=1)

    def sequences_per_process(self, processes: int) -> int:
        """Sequences of an iteration that each process reads. Raises ValueError if it is not a whole number."""
        unit = self.model.block_size * processes
        count, rest = divmod(self.tokens_per_iter, unit)
        numbers = " or ".join(f"{n * unit}" for n in (count, count + 1) if n)
        require(
            rest == 0,
            f"--tokens-per-iter {self.tokens_per_iter:,}: must be a multiple of {unit:,} (--block-size "
            f"{self.model.block_size}{f' x {processes} processes' if processes > 1 else ''}); give {numbers}",
        )
        return count

    def micro_batch_size(self, processes: int) -> int:
        """Sequences in a micro-step of each process: `batch_size`, or the next smaller number that divides its share."""
        count = self.sequences_per_process(processes)
        return next(size for size in range(min(self.batch_size, count), 0, -1) if count % size == 0)

    def accumulation_steps(self, processes: int) -> int:
        """Micro-steps in an iteration, on each process."""
        return self.sequences_per_process(processes) // self.micro_batch_size(processes)

    @property
    def warmup(self) -> int:
        """Iterations of warm-up in use: at most a tenth of the run."""
        return min(self.warmup_iters, self.max_iters // 10)

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the cosine."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    def settings(self) -> dict[str, Any]:
        """The configuration as plain data, for last.pt and config.json: `min_lr` is a number there."""
        return {**asdict(self), "min_lr": self.final_lr}


# ----------------------------------------------------------------------------------------------------------------------
# python generate.py


@dataclass(frozen=True)
class GenerateConfig(Compute, CheckpointFile):
    prompt: str = ""  # the text to continue; -: read it from stdin; empty: a new article, from end-of-text
    interactive: bool = False  # ask for prompts, one after another
    max_new_tokens: Natural = 200  # tokens to generate, at most
    temperature: Rate = 0.8  # below 1 favours likely tokens, above 1 unlikely ones; 0: always the likeliest token
    top_k: Count | None = 200  # sample among the k likeliest tokens; None: all
    top_p: Probability = 1.0  # sample among the likeliest tokens that together have this probability; 1: all
    num_samples: Samples = 1  # continuations of the prompt
    seed: Natural | None = None  # the same seed on the same device makes the same text; None: a new one each time
    ignore_eot: bool = False  # keep generating after <|endoftext|>
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # end before this text ('\n': a line break); may be repeated
    stream: bool = True  # --no-stream: print the text when it is complete
    json: bool = False  # print JSON lines, one for each sample, instead of text
    html: FilePath = ""  # also write an HTML page with each token's probability and, for short texts, attention

    def __post_init__(self):
        super().__post_init__()
        require("" not in self.stop, "--stop: is empty; give the text to end before")
        require(not (self.interactive and self.prompt), "--interactive and --prompt: give one of them")
        require(not (self.interactive and self.html), "--interactive and --html: give one of them")


# ----------------------------------------------------------------------------------------------------------------------
# python export.py


@dataclass(frozen=True)
class ExportConfig(CheckpointFile):
    out_dir: Folder = tyro.MISSING  # the folder to create; must not exist yet
    format: Literal["hf", "gguf"] = "hf"  # hf: a Hugging Face GPT-2 folder; gguf: model.gguf for llama.cpp
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights; 16 bits halve the files


# ----------------------------------------------------------------------------------------------------------------------
# Presets: other defaults for the fields above. A command takes the fields that it has


PRESETS: dict[str, dict[str, Any]] = {
    # The defaults above: 30.0 million parameters, 1.05 billion tokens, 53 minutes of an RTX 4090 (calculated).
    "wikipedia": {},
    # GPT-2's width and context, about 150 million parameters, 4.2 billion tokens; 7.3 GiB and 20 hours of an RTX 4090 (calculated).
    "wikipedia-150m": {
        "n_layer": 16, "n_head": 12, "n_embd": 768, "n_inner": 3072, "block_size": 1024,
        "batch_size": 8, "tokens_per_iter": 262_144, "learning_rate": 6e-4, "muon_lr_scale": 4.0,
    },
    # An hour on two CPU cores: real Wikipedia text or your own, with its own tokenizer.
    "laptop": {
        "tokenizer": "train", "by_size": True, "max_tokens": 60_000_000, "data_dir": "data/laptop",
        "n_layer": 4, "n_head": 4, "n_embd": "auto", "n_inner": "auto", "block_size": 256, "dropout": "auto",
        "batch_size": 32, "tokens_per_iter": "auto", "max_iters": 4_800, "max_epochs": 30.0, "warmup_iters": 200,
        "learning_rate": 8e-3, "muon_lr_scale": 0.5, "eval_interval": "auto", "eval_tokens": 262_144,
    },
    # Minutes on two CPU cores: the embedded sample, with its own tokenizer. Downloads nothing.
    "demo": {
        "preset_source": "sample", "tokenizer": "train", "by_size": True, "data_dir": "data/demo",
        "n_layer": 4, "n_head": 4, "n_embd": 128, "n_inner": 512, "block_size": 128, "dropout": 0.2,
        "batch_size": 32, "tokens_per_iter": 4_096, "max_iters": 600, "warmup_iters": 60,
        "learning_rate": 4e-3, "muon_lr_scale": 2.5, "eval_interval": 100, "eval_tokens": 32_768,
    },
}  # fmt: skip
