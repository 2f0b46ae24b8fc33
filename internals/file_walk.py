"""The files that a source names: a file, a folder or a glob. Each file comes once, and left-out files are counted."""

import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from internals.screen import listed, plural
from internals.start import UserError, first_line

TEXT_TYPES = (".jsonl", ".ndjson", ".json", ".txt")  # these may be compressed
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
KNOWN = ".parquet, .jsonl, .ndjson, .json, .txt or wiki_00 (all but .parquet also .gz, .zst or .bz2)"
WIKI_EXTRACTOR = re.compile(r"wiki_\d+")  # AA/wiki_00


def file_type(name: str) -> str:
    """`.parquet`, `.jsonl`, `.json`, `.txt` or `wiki` (WikiExtractor's), compressed or not; empty for other files."""
    name = os.path.basename(name).lower()
    stem = uncompressed(name)
    if WIKI_EXTRACTOR.fullmatch(stem):
        return "wiki"
    ending = os.path.splitext(stem)[1]
    if ending in TEXT_TYPES:
        return ".jsonl" if ending == ".ndjson" else ending
    return ".parquet" if name.endswith(".parquet") else ""


def uncompressed(name: str) -> str:
    """`uncompressed("a.txt.gz") -> "a.txt"`"""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in COMPRESSIONS else name


@dataclass
class Found:
    """The files of a source, in the order in which they are read."""

    root: Path  # names of files are relative to it
    paths: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> files
    folders: int = 0  # left out, because a glob names them and not their files

    def reasons(self) -> str:
        """`left out 3 files (2 hidden, 1 .png) and 1 folder`; empty if nothing is left out."""
        parts = []
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
            parts.append(f"{plural(self.left_out.total(), 'file')} ({reasons})")
        if self.folders:
            parts.append(f"{plural(self.folders, 'folder')} that the glob names (** takes the files in folders)")
        return f"left out {' and '.join(parts)}" if parts else ""


def find_files(sources: tuple[str, ...], sample: Path, ours: Collection[Path] = ()) -> Found:
    """The text files that `--source` names, one after another, each file once, without `ours`, which the command wrote.

    Raises:
        UserError: a source does not exist, something cannot be read, or two files are one text, compressed and not.
    """
    walk = Walk()
    found = [Found(sample.parent, [sample]) if source == "sample" else walk.find(source) for source in sources]
    root, written = found[0].root, {path.resolve(): path.name for path in ours}
    everything = (path for part in found for path in part.paths)
    paths = walk.each_once(p for p in everything if p.name not in written.values() or p.resolve() not in written)
    chosen, alone = [], [expanded(source) for source in sources]
    for part in found:
        inside = set(part.paths)
        taken = walk.choose([path for path in paths if path in inside], alone)
        # Only the root is resolved: a link inside the source keeps its place
        chosen += [absolute(part.root) / path.relative_to(part.root) for path in taken] if len(found) > 1 else taken
        paths = [path for path in paths if path not in inside]
    if len(found) > 1:
        try:
            root = Path(os.path.commonpath([absolute(part.root) for part in found]))
        except ValueError as error:  # two drives of Windows have no common folder
            raise UserError("--source: the files are on several drives; copy them to one drive") from error
    result = Found(root, chosen, walk.left_out, walk.folders)
    if not chosen:
        reasons = result.reasons() or "it is empty"
        raise UserError(
            f"--source {listed(sources)}: holds no text files ({reasons}); give {KNOWN}, and rename other plain text to .txt"
        )
    refuse_pairs(chosen, root)
    return result


def absolute(folder: Path) -> Path:
    """The absolute path of a folder. Through a link, `..` leads out of the folder that the link names."""
    return Path(os.path.realpath(folder) if ".." in folder.parts else os.path.abspath(folder))


def expanded(path: str) -> Path:
    """`~` is the home folder. Unlike Path.expanduser, no error if there is no such user: `~notes.txt` may be a file."""
    return Path(os.path.expanduser(path))


def refuse_pairs(paths: list[Path], root: Path) -> None:
    """Raise UserError if a file and its compressed copy are both there: the text would count twice."""
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.with_name(uncompressed(path.name)), path)
        if other != path:
            names = " and ".join(str(p.relative_to(root)) for p in (other, path))
            raise UserError(
                f"--source: {names} look like the same text twice; move one of them away, or rename it if it is another text"
            )


class Walk:
    """Finds files, and counts what it leaves out."""

    def __init__(self):
        self.left_out: Counter[str] = Counter()
        self.folders = 0

    def find(self, source: str) -> Found:
        """The files of a file, a folder or a glob, of any type, sorted. Links to folders are followed."""
        path = expanded(source)
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError as error:
            if path.is_symlink():
                raise unreadable(path, "broken link") from error
            return self.match(source, path)
        except (OSError, ValueError) as error:
            if glob.has_magic(str(path)):
                return self.match(source, path)
            raise unreadable(path, error) from error
        if stat.S_ISDIR(mode):
            return Found(path, sorted(self.files_in(path), key=by_name))
        if not stat.S_ISREG(mode):
            raise UserError(f"--source {source}: is a pipe or a device; write its text to a file, and give that")
        return Found(path.parent, [path])

    def match(self, source: str, pattern: Path) -> Found:
        paths = []
        for path in sorted(self.expand(pattern), key=by_name) if glob.has_magic(str(pattern)) else []:
            if os.path.isdir(path):  # unlike Path.is_dir, no error in a folder that may be listed but not entered
                if "**" not in pattern.parts:
                    self.folders += 1
            elif self.is_regular(path):
                paths.append(path)
        if not paths:
            raise UserError(
                f"--source {source}: there is no such file or folder, and no file matches; "
                f"give wikipedia, sample, or a file, folder or glob of {KNOWN}"
            )
        return Found(Path(os.path.commonpath([path.parent for path in paths])), paths)

    def expand(self, pattern: Path) -> set[Path]:
        """What a glob matches. As in a shell, a name that begins with a dot is matched only by a dot."""
        start = Path(pattern.anchor)
        matches = {start}
        for number, part in enumerate(pattern.relative_to(start).parts):
            if part == "**":
                last = number == len(pattern.relative_to(start).parts) - 1
                matches = {
                    p for m in matches if os.path.isdir(m) for p in (self.files_in(m) if last else self.folders_in(m))
                }
            elif glob.has_magic(part):
                names = ((m, entry.name) for m in matches if os.path.isdir(m) for entry in entries(m))
                matches = {m / name for m, name in names if fnmatch.fnmatch(name, part) and self.is_visible(name, part)}
            else:
                matches = {m / part for m in matches if os.path.lexists(m / part)}
        return matches

    def is_visible(self, name: str, part: str = "*") -> bool:
        if name.startswith(".") and not part.startswith("."):
            self.left_out["hidden"] += 1
            return False
        return True

    def is_regular(self, path: Path) -> bool:
        regular = stat.S_ISREG(status_of(path).st_mode)
        if not regular:
            self.left_out["not a file (a pipe or a device)"] += 1
        return regular

    def files_in(self, folder: Path) -> Iterator[Path]:
        for inside in self.folders_in(folder):
            for entry in entries(inside):
                path = inside / entry.name
                if self.is_visible(entry.name) and not os.path.isdir(path) and self.is_regular(path):
                    yield path

    def folders_in(self, folder: Path) -> Iterator[Path]:
        """The folder and all folders below it. Links are followed last, so that a folder is found under its own name.
        Each folder comes once, so a link to a folder above does not loop."""
        seen, own, linked = set(), [folder], []
        while own or linked:
            folder = own.pop() if own else linked.pop()
            identity = identity_of(folder)
            if identity in seen:
                self.left_out["already taken under another name"] += 1
                continue
            seen.add(identity)
            yield folder
            for entry in sorted(entries(folder), key=lambda e: e.name, reverse=True):
                if not entry.name.startswith(".") and os.path.isdir(entry.path):
                    (linked if entry.is_symlink() else own).append(folder / entry.name)

    def each_once(self, paths: Iterable[Path]) -> list[Path]:
        """The paths, one for each file. Of several paths to a file, its own name is kept, not a link."""
        paths, names = list(paths), {}
        for path in paths:
            names.setdefault(identity_of(path), []).append(path)
        for several in names.values():
            if len(several) > 1:
                self.left_out["already taken under another name"] += len(several) - 1
                several.sort(key=lambda path: path.resolve() != path.absolute())
        kept = {several[0] for several in names.values()}
        return list(dict.fromkeys(path for path in paths if path in kept))

    def choose(self, paths: list[Path], alone: list[Path]) -> list[Path]:
        """The text files among these. A .json beside other text usually describes that text and is not part of it."""
        types = {path: file_type(path.name) for path in paths}
        others = any(kind not in ("", ".json") for kind in types.values())
        chosen = []
        for path, kind in types.items():
            if kind == ".json" and others and not any(os.path.abspath(path) == os.path.abspath(a) for a in alone):
                self.left_out[".json beside other text (give it as a separate --source)"] += 1
            elif kind:
                chosen.append(path)
            else:
                self.left_out["".join(path.suffixes[-2:]).lower() or "without an extension"] += 1
        return chosen


def by_name(path: Path) -> tuple[str, ...]:
    """Sorts paths the same everywhere; Windows' own order takes A and a as equal."""
    return path.parts


def status_of(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        reason = "broken link" if os.path.islink(path) else error
        raise unreadable(path, reason) from error


def identity_of(path: Path) -> tuple[int, int] | str:
    """What all names of a file or folder have in common.

    Some drives of Windows (WebDAV, Google Drive, RAM disks) number every file 0. There it is the path without links.
    """
    status = status_of(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.normcase(os.path.realpath(path))


def entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as inside:
            return list(inside)
    except OSError as error:
        raise unreadable(folder, error) from error


def unreadable(path: Path, reason: OSError | ValueError | str) -> UserError:
    text = reason if isinstance(reason, str) else getattr(reason, "strerror", None) or first_line(reason)
    return UserError(f"{path}: cannot be read ({text}); make it readable, or move it out of --source")
