"""`--tokenizer train`: a byte-level BPE (Radford et al., 2019), trained on a sample of the source.

find_tokenizer     the tokenizer of a folder of shards: its name, or the text of its tokenizer.json
sample_texts       source -> training articles, spread over it, of bounded size
train_tokenizer    texts -> the text of a tokenizer.json
"""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from config import PrepareConfig
from internals.articles import is_held_out
from internals.encodings import INVALID
from internals.files import sha256, sha256_of, write_text
from internals.progress import Progress
from internals.reader import Chunk, ReadOptions
from internals.screen import listed
from internals.shards import TOKENIZER_FILE
from internals.start import UserError
from internals.text_files import Source
from internals.tokenizer import NAMES, given_tokenizer, is_json, load_tokenizer, tokenizer_name
from internals.tokenizer_json import OWN_PATTERN, byte_alphabet, own_tokenizer, to_json

SAMPLE_BYTES = 32 << 20  # seconds of training, some hundred MB of memory
# Of a text whose pieces hardly repeat (Chinese, Thai, DNA): time and memory grow with the different pieces
VARIED_SAMPLE_BYTES = 8 << 20
VARIED = 0.5  # characters of the different pieces / characters of all, in the first `JUDGED` characters
JUDGED = 1 << 20
LONGEST_PIECE = 1000  # characters: a merge reads the whole piece, and a text without blanks may be one piece
LEAST_COUNT = 2  # a pair of tokens that occurs only once in the sample does not become a token


def find_tokenizer(cfg: PrepareConfig, source: Source, progress: Progress) -> str:
    """The tokenizer of the shards, as `load_tokenizer` takes it. Writes nothing."""
    if cfg.tokenizer in NAMES:
        return cfg.tokenizer
    path = Path(cfg.data_dir) / TOKENIZER_FILE
    if progress.tokenizers and path.exists() and sha256(path) == progress.tokenizers[-1]:
        return path.read_bytes().decode()
    # A folder's earlier tokenizer may have fewer tokens. The same command may now name the size that was chosen for it.
    text = make_tokenizer(cfg, source, progress, or_fewer=cfg.vocab_size is None or bool(progress.tokenizers))
    if progress.tokens and progress.tokenizers[-1] != sha256_of(text):
        raise UserError(f"{path}: is missing and cannot be recreated; restore it, or give --overwrite to start again")
    return text


def make_tokenizer(cfg: PrepareConfig, source: Source, progress: Progress, or_fewer: bool) -> str:
    """The text of a tokenizer.json, trained or given. `or_fewer` as for `train_tokenizer`."""
    if not cfg.trained_size:
        return given_tokenizer(cfg.tokenizer)
    began = time.monotonic()
    print(f"training a tokenizer of {cfg.trained_size:,} tokens")
    texts = filter(None, sample_texts(cfg, source, progress.tail))
    if (first := next(texts, None)) is None:
        raise UserError(without_training_text(cfg, progress.tail))
    text = train_tokenizer(itertools.chain([first], texts), cfg.trained_size, or_fewer)
    size = load_tokenizer(text).n_vocab
    fewer = f" of {size:,} tokens, all that the text yields," if size < cfg.trained_size else ""
    print(f"trained {tokenizer_name(text)}{fewer} in {time.monotonic() - began:.0f} s")
    return text


def without_training_text(cfg: PrepareConfig, tail: bool) -> str:
    if tail:  # the end of the text is held out, not whole documents
        return f"--source {listed(cfg.sources)}: holds next to no text to train a tokenizer on; give more text"
    return (
        "--tokenizer train: all documents fall into the validation share, so there is no text to train on; give them "
        "different ids, or leave the ids out, or give a smaller --val-fraction"
    )


def write_tokenizer(tokenizer: str, cfg: PrepareConfig, source: Source, progress: Progress) -> None:
    """Write a tokenizer.json to the folder, before its first shard. Its hash is saved first, which marks it as ours."""
    if not is_json(tokenizer):
        return
    progress.tokenizers = list(dict.fromkeys([*progress.tokenizers, sha256_of(tokenizer)]))
    progress.save(cfg, source)
    write_text(Path(cfg.data_dir) / TOKENIZER_FILE, tokenizer)


def sample_texts(cfg: PrepareConfig, source: Source, tail: bool) -> Iterator[str]:
    """Training articles spread over the source, about `sample_bytes` of text together, or all there are.

    The sample depends only on the source and the flags. If the end of the text is held out (`tail`), it leaves out
    twice that share, because the exact place of the cut is known only after all tokens are counted. If the
    share is above a third, it leaves out half of what is not held out.
    """
    options = ReadOptions.of(cfg)
    numbers = source.sample_files(SAMPLE_BYTES)
    size, limit, val_fraction = sum(source.files[n].bytes for n in numbers), math.inf, cfg.held_out
    if tail:
        share, val_fraction = max(1 - 2 * cfg.held_out, (1 - cfg.held_out) / 2), 0.0
        chunks = (chunk for number in numbers for chunk in source.chunks(number, options))
        total = sum(size_of(training_texts(chunk, val_fraction)) for chunk in chunks)
        limit = share * min(total, cfg.max_tokens or math.inf)  # bytes of text: a token has at least one
        size *= limit / max(1, total)  # spread the sample over the part of the source before the limit
    chunks = (chunk for number in numbers for chunk in source.chunks(number, options))
    wanted = sample_bytes(text for chunk in chunks for text in training_texts(chunk, val_fraction))
    before = seen = taken = 0  # the first in bytes of the source, the others of text
    for number in numbers:
        for chunk in source.chunks(number, options):
            # Whenever the sample's share that is taken lags behind the share of the source that is read
            is_due = taken * size <= wanted * (before + chunk.position)
            if is_due or tail:
                texts = training_texts(chunk, val_fraction)
                if is_due:
                    taken += size_of(texts)
                    yield from first_bytes(texts, limit - seen)
                seen += size_of(texts)
            if seen >= limit:
                return
        before += source.files[number].bytes


def sample_bytes(texts: Iterable[str]) -> int:
    """How much text to train on, judged by the first texts."""
    splitter, pieces, room = pre_tokenizer(OWN_PATTERN), [], JUDGED
    for text in texts:
        pieces += [piece for piece, _ in splitter.pre_tokenize_str(text[:room])]
        room -= len(text[:room])
        if not room:
            break
    different, all_of_them = (sum(map(len, some)) for some in (set(pieces), pieces))
    return VARIED_SAMPLE_BYTES if different > VARIED * all_of_them else SAMPLE_BYTES


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def first_bytes(texts: list[str], room: float) -> Iterator[str]:
    """The first `room` bytes of the texts; a character that is cut is left out."""
    for text in texts:
        data = text.encode()
        if len(data) > room:
            yield data[: max(0, int(room))].decode("utf-8", "ignore")
            return
        yield text
        room -= len(data)


def training_texts(chunk: Chunk, val_fraction: float) -> list[str]:
    texts = []
    for article in chunk.articles():
        if chunk.starts and chunk.ends and article.is_blank:
            continue  # `tokenize` leaves it out, too
        text = (article.heading + article.text).decode("utf-8", "surrogateescape")
        text = INVALID.sub("\ufffd", text)  # as articles.py does
        if not is_held_out(text.encode() if article.id is None else article.id, val_fraction):
            texts.append(text)
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int, or_fewer: bool = False) -> str:
    """The tokenizer.json of a BPE of `vocab_size` tokens, end-of-text included.

    Raises:
        UserError: the texts have too few different pairs for that many tokens, and not `or_fewer`.
    """
    tokens = learn_tokens(texts, vocab_size - 1)
    if len(tokens) < vocab_size - 1 and not or_fewer:
        raise UserError(
            f"--vocab-size {vocab_size}: the training text has pairs for {len(tokens) + 1:,} tokens; give --vocab-size "
            f"{len(tokens) + 1}, or more text (a larger --max-tokens, if that cut it)"
        )
    return to_json(own_tokenizer("trained", tokens))


def learn_tokens(texts: Iterable[str], count: int, pattern: str = OWN_PATTERN) -> list[bytes]:
    """The 256 bytes and the results of merges, in order, `count` in all or as many as there are.

    A terminal shows a bar. Ctrl-C takes effect when the library returns, after seconds.
    """
    from tokenizers import Tokenizer, models, trainers  # imported here: only training needs it

    alphabet = byte_alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        min_frequency=LEAST_COUNT,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(texts, trainer)
    byte, vocab = {character: value for value, character in enumerate(alphabet)}, bpe.get_vocab()
    return [bytes(byte[character] for character in token) for token in sorted(vocab, key=vocab.__getitem__)]


def pre_tokenizer(pattern: str) -> Any:
    """Cuts a text into the pieces inside which tokens merge."""
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(one), "isolated") for one in (pattern, rf"[\s\S]{{{LONGEST_PIECE}}}")]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
