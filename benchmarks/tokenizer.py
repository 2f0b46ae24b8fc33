"""Bytes and characters a token of gpt2 and of own vocabularies, for texts in several languages.

    python benchmarks/tokenizer.py --text en=WIKIPEDIA_FOLDER hi=hindi.txt de=german.txt --vocab-sizes 4096 8192 16384 32768
    python benchmarks/tokenizer.py --text hi=hindi.txt --vocab-sizes 8192 --patterns      what other patterns give
    python benchmarks/tokenizer.py --text en=FOLDER --vocab-sizes 16384 --samples 4 8 16 32 64    how much text training needs

A text is what `prepare_data.py --source` takes; of a .txt file, each paragraph (up to a blank line) is a document. One
half of the documents, drawn at random, trains; the other half is measured. A language with less than 1 MB is not
measured. `gpt2` is the gpt2 vocabulary on the same half. A text may have pairs for fewer tokens than asked for. Speeds
are tiktoken's in one thread, by the time of the processor.
"""

import random
import time
from dataclasses import dataclass

import common  # noqa: F401  (puts the root on the path, so it comes first)
import tiktoken
import tyro

from internals import tokenizer_json
from internals.file_walk import find_files
from internals.reader import ReadOptions
from internals.readers import read_chunks
from internals.start import UserError, run
from internals.text_files import SAMPLE
from internals.tokenizer import load_tokenizer
from internals.tokenizer_training import learn_tokens

LEAST_BYTES = 1_000_000
CONTRACTION = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
BLANKS = r"\s*[\r\n]+)|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]"

# By llama.cpp's names; a star marks a pattern that llama.cpp lacks.
PATTERNS = {
    "gpt-2": tokenizer_json.GPT2_PATTERN,
    "gpt-2 with marks *": tokenizer_json.GPT2_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
        r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
    ),
    "llama-bpe": rf"(?:{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}",
    "qwen35": tokenizer_json.OWN_PATTERN,
    "qwen35, 3 digits *": tokenizer_json.OWN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "granite-embedding": rf"(?:[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?:{CONTRACTION})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?:{CONTRACTION})?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",
}


@dataclass(frozen=True)
class Tokenizers:
    text: tuple[str, ...]  # LANGUAGE=SOURCE for each text
    vocab_sizes: tuple[int, ...] = (4_096, 8_192, 16_384, 32_768)  # of the tokenizers to be trained
    samples: tuple[int, ...] = ()  # MB of text to train on, one after another; empty: the whole half
    patterns: bool = False  # train with other patterns, too
    max_mb: float = 64.0  # of each half, at most


def halves(source: str, max_mb: float) -> tuple[list[str], list[str]]:
    """Documents to train on and to measure, each at most `max_mb`."""
    found = find_files((source,), SAMPLE)
    documents = []
    for path in found.paths:
        chunks = read_chunks(path, path.name, ReadOptions(separator="\n\n" if path.suffix == ".txt" else ""))
        documents += [article.text.decode("utf-8", "replace") for chunk in chunks for article in chunk.articles()]
    random.Random(0).shuffle(documents)
    middle = len(documents) // 2
    return first_mb(documents[:middle], max_mb), first_mb(documents[middle:], max_mb)


def first_mb(documents: list[str], megabytes: float) -> list[str]:
    room, kept = megabytes * 1e6, []
    for document in documents:
        if room > 0:
            kept.append(document)
            room -= len(document.encode())
    return kept


def measure(language: str, name: str, encoding: tiktoken.Encoding, documents: list[str], seconds: float | None) -> None:
    begin = time.thread_time()  # of the processor: other work on the machine does not count
    tokens = sum(len(encoding.encode_to_numpy(document, disallowed_special=())) for document in documents)
    duration = time.thread_time() - begin
    size, characters = sum(len(document.encode()) for document in documents), sum(map(len, documents))
    trained = f"{seconds:.1f} s" if seconds is not None else "-"
    print(
        f"| {language} | {name} | {encoding.n_vocab:,} | {trained} | {size / tokens:.3f} | {characters / tokens:.3f} "
        f"| {size / duration / 1e6:.1f} |",
        flush=True,
    )


def main() -> None:
    args = tyro.cli(Tokenizers, description=__doc__)
    if wrong := [text for text in args.text if "=" not in text]:
        raise UserError(f"--text {wrong[0]}: give LANGUAGE=SOURCE")
    print("| language | tokenizer | tokens | trained in | bytes a token | characters a token | MB/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for language, _, source in (text.partition("=") for text in args.text):
        train, other = halves(source, args.max_mb)
        if 2 * min(sum(len(text.encode()) for text in half) for half in (train, other)) < LEAST_BYTES:
            print(f"| {language} | not measured: less than 1 MB of text | | | | | |")
            continue
        measure(language, "gpt2", load_tokenizer("gpt2"), other, None)
        patterns = PATTERNS if args.patterns else {"own": tokenizer_json.OWN_PATTERN}
        for name, pattern in patterns.items():
            for size in args.vocab_sizes:
                for sample in args.samples or (args.max_mb,):
                    part = first_mb(train, sample)
                    begin = time.perf_counter()
                    tokens = learn_tokens(part, size - 1, pattern)
                    seconds = time.perf_counter() - begin
                    ranks = {token: rank for rank, token in enumerate(tokens)}
                    ends = {tokenizer_json.END_OF_TEXT: len(tokens)}
                    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ends)
                    measure(language, f"{name}, {sample:g} MB" if args.samples else name, encoding, other, seconds)


if __name__ == "__main__":
    run(main)
