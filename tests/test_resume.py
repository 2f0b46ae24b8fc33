"""A run that is stopped inside a file resumes there, in every format, and the shards are the same, byte for byte."""

import gzip
import json

import pytest
from articles import as_text, config, files, make_articles, write_jsonl, write_parquet

import prepare_data
from internals import reader
from internals.tokenizer_json import END_OF_TEXT
from prepare_data import Pipeline, prepare

ROWS = make_articles(1500, words=100)
TEXT = "\n\n".join(map(as_text, ROWS[:300]))
SEPARATED = END_OF_TEXT.join([*(as_text(row) for row in ROWS[300:310]), TEXT, *(as_text(row) for row in ROWS[310:])])
WIKI = "".join(f'<doc id="{row["id"]}" title="{row["title"]}">\n{row["text"]}\n</doc>\n' for row in ROWS)
CONTENTS = {
    "a.txt": TEXT.encode(),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "separated.txt": SEPARATED.encode(),
    "separated.txt.gz": gzip.compress(SEPARATED.encode()),
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "wiki_00": WIKI.encode(),
}


def stop_after(monkeypatch, chunks):
    """Stop the next run like a kill: after it has appended so many chunks, and before it saves that."""
    append, appended = Pipeline.append, []

    def stopping(self, work):
        append(self, work)
        appended.append(work)
        if len(appended) == chunks:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "COMMIT_SECONDS", -1.0)  # after each chunk
    monkeypatch.setattr(Pipeline, "append", stopping)


@pytest.mark.parametrize("name, overwrite", [*((name, False) for name in (*CONTENTS, "a.parquet")), ("a.json", True)])
def test_a_stop_inside_a_file(tmp_path, monkeypatch, name, overwrite):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 10_000)
    path, out = tmp_path / name, tmp_path / "out"
    if name in CONTENTS:
        path.write_bytes(CONTENTS[name])
    else:
        write_parquet(path, ROWS)
    flags = {"separator": END_OF_TEXT if "separated" in name else "", "shard_tokens": 20_000}
    prepare(config(tmp_path / "once", path, **flags))
    if overwrite:  # other text, which the stopped run deletes; it is then resumed without the flag
        write_jsonl(tmp_path / "old.jsonl", make_articles(60, seed=9))
        prepare(config(out, tmp_path / "old.jsonl"))
    for chunks in (3, 2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="finished work is kept"):
            stop_after(patched, chunks)
            prepare(config(out, path, overwrite=overwrite, **flags))
        overwrite = False
    progress = json.loads((out / "progress.json").read_text())
    assert progress["file"] == 0 and progress["row"] > 2
    prepare(config(out, path, **flags))
    assert files(out) == files(tmp_path / "once")
