"""A run whose text and prompt hold script tags, and the contents of a page: its tags, its data, its text."""

import html.parser
import json

import numpy as np
import pytest
from conftest import write_splits
from runs import tiny

import train
from internals import report

TEXT = "Ein Käfer, 三只猫 und “zwei” 🦉 </script><script>alert(1)</script><b>fett</b>\n\nNoch ein Satz. " * 12
PROMPT = "<img src=x onerror=alert(2)>é"


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    """A data folder of TEXT, whose validation passage holds multi-byte characters and script tags."""
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    return write_splits(tmp_path_factory.mktemp("text") / "data", {"train": np.tile(tokens, 3), "val": tokens})


@pytest.fixture(scope="module")
def run(text_data, tmp_path_factory):
    """A finished run of three evaluations."""
    out_dir = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *of_the_curves: None)
        train.train(tiny(text_data, out_dir, sample_prompt=PROMPT))
    return out_dir


class Parsed(html.parser.HTMLParser):
    """The tags of a page, and the contents of its scripts and style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.inside, self.blocks, self.text = [], None, [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.blocks.append((*self.inside, text))
        else:
            self.text += text

    @property
    def data(self) -> dict:
        return json.loads(next(text for _, attributes, text in self.blocks if attributes.get("id") == "data"))


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def parsed(path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))
