"""internals/file_walk.py: each file once, however it is reached; unreadable ones are named, left-out ones counted."""

import os
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from articles import posix

from internals.file_walk import by_name, find_files
from internals.start import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(*sources, sample=None):
    result = find_files(tuple(map(str, sources)), sample)
    return [path.relative_to(result.root).as_posix() for path in result.paths], result.left_out


@posix
def test_links_are_followed_and_each_file_comes_once(tmp_path):
    make(tmp_path, "in/b/1.txt", "in/c.txt", "elsewhere/2.txt")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "b")  # comes first in the alphabet, but the real folder wins
    (tmp_path / "in" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a.txt").symlink_to("c.txt")
    os.link(tmp_path / "in" / "c.txt", tmp_path / "in" / "e.txt")
    names, left_out = found(tmp_path / "in")
    assert names == ["b/1.txt", "c.txt", "d/2.txt"]
    assert left_out["already taken under another name"] == 4
    for pattern in ("**/*.txt", "**"):
        assert found(tmp_path / "in" / pattern)[0] == names
    assert len(found(tmp_path / "in" / "*/**/*.txt")[0]) == 3  # through the loop, but each file once
    assert found(tmp_path / "in" / "*.txt")[0] == ["c.txt"]
    assert found(tmp_path / "in", tmp_path / "in" / "c.txt")[0] == names


@posix
@pytest.mark.parametrize("source", ["in", "in/*", "in/gone.txt", "in/**/*.txt", "in/g*"])
def test_a_dangling_link_is_named(tmp_path, source):
    make(tmp_path, "in/a.txt")
    (tmp_path / "in" / "gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        found(tmp_path / source)
    (tmp_path / "in" / "gone.txt").unlink()
    (tmp_path / "in" / "gone.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"gone\.txt"):
        found(tmp_path / source)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    make(tmp_path, "in/a.txt", "in/closed/b.txt")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for source in ("in", "in/**", "in/*/*.txt"):
        with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied"):
            found(tmp_path / source)


@pytest.mark.parametrize("source", ["in", "in/*", "in/**/*.txt", "in/**"])
def test_a_file_in_a_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch, source):
    make(tmp_path, "in/a.txt")
    stat = os.stat

    def refuse(path, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied"):
        found(tmp_path / source)


@posix
def test_what_is_left_out_is_counted_by_reason(tmp_path):
    make(
        tmp_path,
        "in/a.txt",
        "in/.hidden.txt",
        "in/.git/x.txt",
        "in/p.png",
        "in/q.PNG",
        "in/README",
        "in/d.xml.bz2",
        "in/s.json",
    )
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    names, left_out = found(tmp_path / "in")
    assert names == ["a.txt"]
    counts = [left_out[reason] for reason in ("hidden", ".png", "without an extension", ".xml.bz2")]
    assert counts == [2, 2, 1, 1]
    assert left_out["not a file (a pipe or a device)"] == 1
    assert any("json" in reason for reason in left_out)
    assert find_files((str(tmp_path / "in"),), None).reasons().startswith("left out 8 files (")
    assert found(tmp_path / "in", tmp_path / "in" / "s.json")[0] == ["a.txt", "s.json"]
    with pytest.raises(UserError, match="pipe or a device"):
        found(tmp_path / "in" / "pipe.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.pdf", "a.docx", "a.html", "dump.xml.bz2"])
def test_a_folder_of_something_else_is_named_for_what_it_is(tmp_path, name):
    make(tmp_path, f"in/{name}")
    for source in ("in", "in/*", f"in/{name}"):
        with pytest.raises(UserError, match=name[name.index(".") :].replace(".", r"\.")):
            found(tmp_path / source)


@pytest.mark.parametrize(
    "pair",
    [("a.jsonl", "a.jsonl.gz"), ("a.txt", "a.txt.zst"), ("a.txt.gz", "a.txt.bz2"), ("s/a.ndjson", "s/a.ndjson.gz")],
)
def test_a_file_beside_its_compressed_self_is_refused(tmp_path, pair):
    make(tmp_path, *(f"in/{name}" for name in pair), "in/b.txt.gz", "in/other/a.txt")
    for sources in (["in"], ["in/**/a.*"], [f"in/{name}" for name in pair]):
        with pytest.raises(UserError, match="and") as error:
            found(*(tmp_path / source for source in sources))
        assert all(os.path.basename(name) in str(error.value) for name in pair)


def test_several_sources_keep_their_order(tmp_path):
    make(tmp_path, "x/b.txt", "x/a.txt", "y/a.txt", "z.txt")
    assert found(tmp_path / "z.txt", tmp_path / "x")[0] == ["z.txt", "x/a.txt", "x/b.txt"]
    names, left_out = found(tmp_path / "y", tmp_path / "x", tmp_path / "x" / "b.txt")
    assert names == ["y/a.txt", "x/a.txt", "x/b.txt"]
    assert left_out["already taken under another name"] == 1


@posix
def test_the_parent_of_a_linked_folder_is_that_of_the_folder_itself(tmp_path):
    make(tmp_path, "here/a.txt", "here/b.txt", "there/b.txt", "there/folder/c.txt")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "folder")
    names, _ = found(tmp_path / "here" / "link" / ".." / "b.txt", tmp_path / "here" / "a.txt")
    assert names == ["there/b.txt", "here/a.txt"]
    assert found(tmp_path / "here" / "link" / "..", tmp_path / "here")[0][:2] == ["there/b.txt", "there/folder/c.txt"]


@posix
def test_a_link_inside_one_of_several_sources_keeps_its_place(tmp_path, monkeypatch):
    make(tmp_path, "x/a.txt", "y/b.txt", "elsewhere/deep/c.txt", "here/d.txt")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    names = ["x/a.txt", "x/link/c.txt", "y/b.txt"]
    assert found(tmp_path / "x", tmp_path / "y")[0] == names
    monkeypatch.chdir(tmp_path / "here")
    assert found("../x", "../y")[0] == names


def test_sources_on_two_drives_are_refused(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b.txt")

    def refuse(paths):
        raise ValueError("Paths don't have the same drive")  # on Windows

    monkeypatch.setattr(os.path, "commonpath", refuse)
    with pytest.raises(UserError, match="--source: the files are on several drives; copy them to one drive"):
        found(tmp_path / "a.txt", tmp_path / "b.txt")


def test_a_glob_takes_files(tmp_path):
    make(tmp_path, "a1.txt", "a2/b.txt", ".a3.txt", ".h/c.txt")
    result = find_files((str(tmp_path / "*"),), None)
    assert [path.name for path in result.paths] == ["a1.txt"]
    assert result.reasons() == (
        "left out 2 files (2 hidden) and 1 folder that the glob names (** takes the files in folders)"
    )
    assert find_files((str(tmp_path / "a*"),), None).reasons().startswith("left out 1 folder that the glob names")
    assert find_files((str(tmp_path / "**" / "[ab]*"),), None).reasons() == ""  # ** takes the files in the folder
    assert found(tmp_path / ".h" / "*.txt")[0] == ["c.txt"]
    assert found(tmp_path / ".a*")[0] == [".a3.txt"]
    with pytest.raises(UserError, match="no file matches"):
        found(tmp_path / "b*")


def test_json_files_of_a_source_of_their_own_are_text(tmp_path):
    make(tmp_path, "a.txt", "text/b.txt", "text/about.json", "json/1.json", "json/2.json")
    names, left_out = found(tmp_path / "a.txt", tmp_path / "json", tmp_path / "text")
    assert names == ["a.txt", "json/1.json", "json/2.json", "text/b.txt"]
    assert left_out == {".json beside other text (give it as a separate --source)": 1}
    assert found(tmp_path / "a.txt", tmp_path / "json" / "*.json")[0] == names[:3]


@posix
def test_a_tilde_that_is_no_home_folder_is_part_of_the_name(tmp_path, monkeypatch):
    make(tmp_path, "~nobody-of-this-name.txt")
    monkeypatch.chdir(tmp_path)
    assert found("~nobody-of-this-name.txt")[0] == ["~nobody-of-this-name.txt"]
    with pytest.raises(UserError, match="there is no such file or folder"):
        found("~nobody-of-this-name/text")


@posix
def test_a_drive_that_numbers_every_file_0_gives_all_its_files(tmp_path, monkeypatch):
    """On Windows: Google Drive's, WebDAV, RAM disks."""
    make(tmp_path, "in/a.txt", "in/b/1.txt", "in/b/2.txt", "in/c/3.txt")
    (tmp_path / "in" / "d.txt").symlink_to("a.txt")
    numbered, stat = found(tmp_path / "in", tmp_path / "in" / "a.txt"), os.stat

    def without_numbers(path, **kwargs):
        status = stat(path, **kwargs)
        return os.stat_result((status.st_mode, 0, *status[2:]))

    monkeypatch.setattr(os, "stat", without_numbers)
    assert found(tmp_path / "in", tmp_path / "in" / "a.txt") == numbered
    assert numbered[0] == ["a.txt", "b/1.txt", "b/2.txt", "c/3.txt"]


def test_files_have_the_same_order_on_every_system():
    """Windows' own order takes A and a as equal, and the order decides the shards."""
    names = ["b/c.txt", "B.txt", "a.txt", "C.txt", "b.txt"]
    for kind in (PurePosixPath, PureWindowsPath):
        ordered = [path.as_posix() for path in sorted(map(kind, names), key=by_name)]
        assert ordered == ["B.txt", "C.txt", "a.txt", "b/c.txt", "b.txt"]
