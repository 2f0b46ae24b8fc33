"""internals/text_stream.py: text as it grows, whole characters, where it stops, and how it is printed."""

import json
import re

import pytest
import tiktoken
from generating import BYTES, EOT, Forced, forced_bytes

import generate
from config import GenerateConfig
from internals import text_stream
from internals.text_stream import TextStream, print_json
from model import GPT


def texts_of(model: GPT, **options) -> list[str]:
    """The text of one sample as it grows, from before its first token to its end."""
    stream = text_stream.TextStream(BYTES, **options)
    steps = generate.continue_text(model, [1], 1000, generate.Sampling(temperature=0), [stream])
    texts = [stream.text for _ in steps]
    assert stream.ended
    return texts


HARD = "naïve 日本語 — 👩‍👩‍👧 🏳️‍🌈 中文维基百科 \u0000 ẹ́"


def test_the_stream_never_shows_half_a_character():
    seen = texts_of(Forced(forced_bytes(HARD)))
    assert all(HARD.startswith(text) for text in seen) and seen[-1] == HARD
    # Each character as soon as it is whole
    assert sorted(set(seen), key=len) == [HARD[:n] for n in range(len(HARD) + 1)]


def test_a_stream_counts_its_tokens():
    stream = text_stream.TextStream(BYTES)
    list(generate.continue_text(Forced(forced_bytes(HARD)), [1], 1000, generate.Sampling(temperature=0), [stream]))
    assert stream.ended and len(stream.ids) == len(HARD.encode()) + 1


def test_a_character_cut_off_by_the_end_is_one_replacement_mark():
    model = Forced(list("日本".encode()))
    assert generate.generate_text(model, BYTES, "x", 5, temperature=0) == ["日\ufffd"]
    model = Forced([*"日".encode()[:2], *b"ab", EOT])
    assert generate.generate_text(model, BYTES, "x", 50, temperature=0) == ["\ufffdab"]


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("aaab", ["aab"], "a"),
        ("one two three", ["three", "two"], "one "),
        ("one two", ["o", "one"], ""),
        ("one two thr", ["three"], "one two thr"),
        ("日本語", ["本"], "日"),
    ],
)
def test_the_text_ends_before_a_stop_text_and_never_shows_a_part_of_it(text, stop, expected):
    seen = texts_of(Forced(forced_bytes(text)), stop=stop)
    assert all(expected.startswith(text) for text in seen) and seen[-1] == expected


def test_end_of_text_ends_the_text_unless_told_otherwise():
    rows = [*b"one", EOT, *b"two"]
    assert generate.generate_text(Forced(rows), BYTES, "x", 7, temperature=0) == ["one"]
    assert generate.generate_text(Forced(rows), BYTES, "x", 7, temperature=0, ignore_eot=True) == [
        "one<|endoftext|>two"
    ]


def test_the_prompt_is_taken_literally():
    assert generate.encode(BYTES, "<|endoftext|>") == list(b"<|endoftext|>")
    assert generate.encode(BYTES, "") == [EOT]


def test_samples_are_printed_one_after_the_other_with_a_blank_line_between(monkeypatch):
    written = []
    monkeypatch.setattr(text_stream, "write", written.append)
    streams = [text_stream.TextStream(BYTES) for _ in range(3)]

    def steps():
        yield streams
        for tokens in ([65, 97, 49], [66, 98, 50], [EOT, 99, EOT], [None, EOT, None]):
            for stream, token in zip(streams, tokens, strict=True):
                if token is not None:
                    stream.push(token)
            yield streams

    text_stream.print_text("> ", steps())
    assert "".join(written) == "> AB\n\n> abc\n\n> 12\n"
    assert written[:3] == ["> ", "A", "B"]  # each as it comes


@pytest.mark.parametrize(("stop", "expected"), [(r"\n", "one\n"), ("wo", "one\nt\n"), (r"\\n", "one\ntwo\n")])
def test_a_stop_text_may_be_a_line_break(monkeypatch, capsys, stop, expected):
    """The shell passes backslash and n."""
    monkeypatch.setattr(generate, "open_model", lambda source: (Forced(forced_bytes("one\ntwo")), BYTES, "forced"))
    monkeypatch.setattr(generate, "pack_weights", lambda model: model)
    generate.main(GenerateConfig(stop=(stop,), temperature=0.0, device="cpu"))
    assert capsys.readouterr().out == expected


def test_json_leaves_no_control_character_for_a_terminal(capsys):
    stream = TextStream(BYTES, (), False)
    for byte in "\x9b31m\x7f".encode():
        stream.push(byte)
    stream.end()
    print_json("\x9b", 1, iter([[stream]]))
    line = capsys.readouterr().out
    assert not re.search("[\x7f-\x9f]", line) and json.loads(line)["text"] == "\x9b31m\x7f"
    assert json.loads(line)["prompt"] == "\x9b"


def test_a_character_begun_in_the_stop_text_is_forgotten():
    ranks = {bytes([i]): i for i in range(256)} | {b"\n\xc3": 256}
    pairs = tiktoken.Encoding("pairs", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    stream = TextStream(pairs, ["\n"])
    assert not stream.push(ord("a")) and stream.push(256) and stream.text == "a"
