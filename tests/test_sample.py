"""sample/: its sentences were not made from frames, and benchmarks/copied.py finds what a model copies from them."""

import json
import random
import re
from collections import Counter

from conftest import REPO, load_benchmark

copied_spans = load_benchmark("copied").copied_spans

ROWS = [json.loads(line) for line in (REPO / "sample" / "articles.jsonl").read_text(encoding="utf-8").splitlines()]
WORD = re.compile(r"[^\W_]+(?:'\w+)?")
SENTENCE_END = re.compile(r"(?<=[.?!:])\s+|\n+")
NUMBERS = {"two", "three", "four", "five", "six", "seven", "eight", "ten", "twelve", "hundred", "thousand"}


def frames(rows: list[dict]) -> Counter:
    """How often each sentence occurs once names, nouns and numbers are masked: `A young dog is called a puppy.` and
    `A young sheep is called a lamb.` both are `a young _ is called a _.`

    All words except the 150 most frequent ones are masked. Of these, titles, capitalised words inside a sentence, and
    numbers are masked, too.
    """
    text = "\n".join(row["text"] for row in rows)
    count = Counter(word.lower() for word in WORD.findall(text))
    titles = {
        word.lower() for row in rows for word in WORD.findall(row["title"]) if word[0].isupper() and word != "The"
    }
    kept = {word for word, _ in count.most_common(150)} - titles - NUMBERS

    def mask(word: re.Match) -> str:
        small = word[0].lower() if word.start() == 0 else word[0]  # a capital inside a sentence marks a name
        return small if small in kept else "_"

    return Counter(WORD.sub(mask, sentence) for sentence in SENTENCE_END.split(text) if sentence)


def test_no_sentence_is_a_frame_that_was_filled_in_more_than_three_times():
    counts = frames(ROWS)
    assert len(counts) > 4000
    assert {sentence: count for sentence, count in counts.items() if count > 3} == {}


def test_the_count_finds_frames():
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefghijklm", k=6)).capitalize() for _ in range(40)]
    made = [
        {
            "title": name,
            "text": f"{name} is a town on the river {rng.choice(names)}. It has {rng.randint(2, 90)} streets.",
        }
        for name in names
    ]
    counts = frames(ROWS + made)
    assert counts["_ is a _ on the _ _."] >= 40 and counts["it has _ _."] >= 40
    assert frames(ROWS + made[:4])["_ is a _ on the _ _."] >= 4  # four are enough to be found


def test_the_articles_are_those_of_a_small_encyclopedia():
    assert [row["id"] for row in ROWS] == [str(n) for n in range(1, len(ROWS) + 1)]
    assert all(set(row) == {"id", "url", "title", "text"} for row in ROWS)
    assert len({row["title"] for row in ROWS}) == len({row["text"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["title"] == row["title"].strip() and 400 < len(row["text"]) < 3000, row["title"]
        assert re.fullmatch(r"[\w ,.;:?'()–\-\n]+", row["text"]), row["title"]  # only letters and plain marks
        assert row["text"].endswith(".") and "  " not in row["text"], row["title"]
    assert 300_000 < sum(len(row["text"].encode()) for row in ROWS) < 500_000


def test_its_words_are_few():
    """A model of a million parameters learns a small vocabulary: 1,000 words make up nine tenths of the text."""
    words = Counter(word.lower() for row in ROWS for word in WORD.findall(row["text"]))
    assert sum(count for _, count in words.most_common(1000)) > 0.9 * words.total()


def test_what_a_sample_has_copied_is_found():
    rng = random.Random(0)
    for _ in range(300):
        text, sample = ("".join(rng.choices("ab", k=length)) for length in (60, 25))
        spans = copied_spans(sample, text, shortest=5)
        everywhere = [(i, j) for i in range(25) for j in range(i + 5, 26) if sample[i:j] in text]
        longest = [(i, j) for i, j in everywhere if (i - 1, j) not in everywhere and (i, j + 1) not in everywhere]
        assert spans == longest
