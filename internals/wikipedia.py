"""Wikipedia from the Hugging Face hub: pin a commit, download, check, retry."""

import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from internals.data_folder import Downloads
from internals.files import sha256, temporary_folder, writing
from internals.network import answer_within, in_background, patiently, wait_for
from internals.screen import file_size, plural
from internals.start import UserError, first_line
from internals.text_files import Source, SourceFile

T = TypeVar("T")

REPOSITORY = "wikimedia/wikipedia"
# Tries per request, besides those of huggingface_hub. The pauses are 1, 2, 4, 8, 16 and 32 s, then a minute each: half a
# minute in all for a first answer, and for a file six minutes, in which a router can restart
ATTEMPTS, FILE_ATTEMPTS = 6, 12
TEXT_PER_BYTE = 1.7  # of the hub's files: English has 20.2 GB of text in 11.7 GB
FILE_BYTES = 3  # of the hub's files per token, with a margin: English takes 2.5 with GPT-2's tokenizer
BLOCK_BYTES = 1 << 18  # of a download: what a broken connection may lose; huggingface_hub's 10 MB may never arrive
OFFLINE = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE"
ANSWER_SECONDS = 120  # to wait for an answer about the repository; for a file, huggingface_hub waits 10 s at a time


class HubWikipedia(Source):
    """One language and dump of `wikimedia/wikipedia`. `datasets` names the files, `huggingface_hub` downloads them.

    The revision is resolved to a commit once. All files, in later runs too, come from that commit. A dump is sorted by
    page id, so old articles come first. The files are taken in the order of their names' hashes instead, which makes
    the first quarter of them a fair sample.

    A download into the data folder begins when the file before it is read, and stays until `release`. A file in the
    Hugging Face cache is read there and stays there. With `keep`, downloads go to that cache, where other programs and
    later runs find them, even runs with another data folder.
    """

    counts_as_long = True  # reading a part means downloading a file

    def __init__(
        self, language: str, dump: str, revision: str, data_dir: Path, keep: bool = False, max_tokens: int | None = None
    ):
        self.config, self.data_dir, self.keep, self.max_tokens = f"{dump}.{language}", data_dir, keep, max_tokens
        self.downloads = Downloads(data_dir)
        self.identity = {"kind": "hub", "repository": REPOSITORY, "config": self.config, "revision": revision}
        # Xet, the hub's newer protocol, has hung for over an hour (github.com/huggingface/xet-core, issue 883). Plain
        # HTTP asks again after 10 s of silence and continues the download. Set this before the first import. It matters
        # for `keep` alone: `_download_part` always takes plain HTTP.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        warnings.filterwarnings("ignore", "Not enough free disk space")  # huggingface_hub's; we print our own message
        if endpoint := os.environ.pop("HF_ENDPOINT", "").rstrip("/"):  # with the slash, it would ask for //api
            os.environ["HF_ENDPOINT"] = endpoint
        if forbidden := os.environ.get("HF_DATASETS_OFFLINE"):  # huggingface_hub ignores this variable
            os.environ.setdefault("HF_HUB_OFFLINE", forbidden)
        self.commit, self.files, self.current = "", [], 0
        self.bytes = 0  # of all files
        self._futures: dict[int, Future] = {}

    @property
    def text_bytes(self) -> float:
        """An estimate, after `recall` or `resolve`."""
        return TEXT_PER_BYTE * self.bytes

    def recall(self, provenance: dict[str, Any]) -> None:
        self.bytes = provenance["bytes"]

    def resolve(self, known: dict[str, Any]) -> dict[str, Any]:
        find = functools.partial(answer_within, ANSWER_SECONDS, self._find_files)
        resolved = known or ask_hub(f"{REPOSITORY} {self.config}", find)
        self.commit, self.files = resolved["commit"], [SourceFile(**file) for file in resolved["files"]]
        self.bytes = sum(file.bytes for file in self.files)
        return resolved

    def _find_files(self) -> dict[str, Any]:
        import datasets
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return self._find_cached(cache_folder())
        commit = HfApi().dataset_info(REPOSITORY, revision=self.identity["revision"]).sha
        # With hf://, a folder wikimedia/wikipedia on this machine is not taken for the hub. With an empty cache, an old one
        # of load_dataset does not answer where the hub fails
        with tempfile.TemporaryDirectory() as empty:
            ask = {"path": f"hf://datasets/{REPOSITORY}", "revision": commit, "cache_dir": empty}
            self._check_config(datasets.get_dataset_config_names(**ask))
            builder = datasets.load_dataset_builder(name=self.config, **ask)
        prefix = f"hf://datasets/{REPOSITORY}@{commit}/"
        names = [str(name).removeprefix(prefix) for name in builder.config.data_files["train"]]
        infos = HfApi().get_paths_info(REPOSITORY, names, revision=commit, repo_type="dataset")
        if not names or len(infos) != len(names):
            raise OSError(f"the hub names {len(names)} files, and knows {len(infos)} of them")
        files = [{"name": i.path, "bytes": i.size, "sha256": i.lfs.sha256 if i.lfs else None} for i in infos]
        return {"commit": commit, "files": mixed(files)}

    def _find_cached(self, cache: Path) -> dict[str, Any]:
        """The files of the revision's commit in the Hugging Face cache, or of the newest complete commit there."""
        revision, snapshots = self.identity["revision"], cache / "snapshots"
        reference = cache / "refs" / revision
        wanted = [reference.read_text().strip()] if reference.is_file() else []
        others = [path.name for path in sorted(snapshots.glob("*"), key=os.path.getmtime, reverse=True)]
        wanted += [name for name in others if name == revision or revision == "main"]
        for commit in wanted:
            paths = sorted((snapshots / commit / self.config).glob("*.parquet"))
            count = re.search(r"-of-(\d+)\.parquet$", paths[0].name) if paths else None
            if count and len(paths) == int(count[1]):
                return {"commit": commit, "files": mixed([cached_file(self.config, path) for path in paths])}
        raise UserError(
            f"{REPOSITORY} {self.config}, revision {revision}: is incomplete in the cache ({cache.parent}), and {OFFLINE} "
            "is set; go online and unset it"
        )

    def _check_config(self, available: list[str]) -> None:
        if self.config not in available:
            language = self.config.split(".", 1)[1]
            others = [name.split(".")[0] for name in available if name.split(".", 1)[-1] == language]
            languages = f"a --language of https://huggingface.co/datasets/{REPOSITORY}"
            hint = f"--dump {' or '.join(others)}" if others else languages
            raise UserError(f"--dump, --language: {REPOSITORY} has no {self.config}; give {hint}")

    def summary(self) -> str:
        files = plural(len(self.files), "file")
        text = f"{REPOSITORY} {self.config} at commit {self.commit[:12]}: {files} of {file_size(self.bytes)}"
        blobs = cache_folder() / "blobs"
        stopped = len(list(blobs.glob("*.incomplete")))
        if self.keep and stopped:  # not deleted: they may be another program's
            text += (
                f"\nnote: {plural(stopped, 'stopped download')} in {blobs}; delete the .incomplete files there while no "
                "program is downloading"
            )
        return text

    def provenance(self) -> dict[str, Any]:
        return {**self.identity, "commit": self.commit, "files": len(self.files), "bytes": self.bytes}

    def fetch(self, number: int) -> Path:
        """The path of a file, downloaded and checked. The next file's download begins now, if it is likely needed."""
        self.current = number
        early = self._futures.get(number)
        if early and early.done() and early.exception():  # ahead of time; the network may be back by now
            del self._futures[number]
        for ahead, file in enumerate(self.files[number : number + 2], number):
            if ahead not in self._futures and (ahead == number or self._is_likely_needed(ahead)):
                self._futures[ahead] = in_background(functools.partial(self._fetch, file))
        return wait_for(self._futures[number])

    def _is_likely_needed(self, number: int) -> bool:
        """Whether `max_tokens` reaches beyond the files before this one. A wrong no only delays its download."""
        before = sum(file.bytes for file in self.files[:number])
        return self.max_tokens is None or before < FILE_BYTES * self.max_tokens

    def sample_files(self, size: int) -> range:
        """The first files that hold `size` bytes. They are in mixed order, so no other file has to be downloaded."""
        sums = itertools.accumulate((file.bytes for file in self.files), initial=0)
        return range(min(len(self.files), sum(before < size for before in sums)))

    def release(self, before: int) -> None:
        """Delete the downloads before this number."""
        for number in [n for n in self._futures if n < before]:
            del self._futures[number]
        self.downloads.delete(file.name for file in self.files[:before])

    @property
    def missing(self) -> list[int]:
        """Bytes of each file that is not done, likely needed and not in the Hugging Face cache."""
        needed = (
            self.files[number] for number in range(self.current, len(self.files)) if self._is_likely_needed(number)
        )
        return [file.bytes for file in needed if not self._cached(file)]

    @property
    def missing_bytes(self) -> int:
        return sum(self.missing)

    @property
    def peak_bytes(self) -> int:
        sizes = sorted(self.missing, reverse=True)
        return sum(sizes if self.keep else sizes[:3])  # one is read, the next one arrives, one is not yet saved as done

    @property
    def bytes_on_disk(self) -> int:
        total = 0
        for path in self.downloads.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a finished download has just been renamed
                total += path.stat().st_size if path.is_file() else 0
        return total

    @property
    def download_folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) if self.keep else self.data_dir

    def _where(self, file: SourceFile) -> dict[str, str]:
        """The file, as huggingface_hub names it."""
        return {"repo_id": REPOSITORY, "filename": file.name, "repo_type": "dataset", "revision": self.commit}

    def _cached(self, file: SourceFile) -> Path | None:
        """The file's path in the Hugging Face cache."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(**self._where(file))
        return Path(path) if isinstance(path, str) else None

    def _fetch(self, file: SourceFile) -> Path:
        return ask_hub(file.name, functools.partial(self._download, file), self.download_folder, FILE_ATTEMPTS)

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import constants, hf_hub_download

        constants.DOWNLOAD_CHUNK_SIZE = BLOCK_BYTES
        cached = self._cached(file)
        for path in (self.downloads.folder / file.name, cached):
            if path and path.exists() and is_whole(path, file):
                return path
        if constants.HF_HUB_OFFLINE:
            state = f"is damaged ({cached})" if cached else "is not on this machine"
            raise UserError(f"{file.name}: {state}, and {OFFLINE} is set; go online and unset it")
        start, part = time.monotonic(), self.downloads.folder / f"{file.name}.part"
        left = file.bytes - (part.stat().st_size if part.exists() else 0)
        if self.keep:
            path = Path(hf_hub_download(**self._where(file), force_download=bool(cached)))
        else:
            path = self._download_part(file, part)
        if left > 0:
            sharing = sum(not future.done() for future in list(self._futures.values()))  # downloads on the same line
            self.seconds_per_byte = (time.monotonic() - start) / left / max(1, sharing)
        if not is_whole(path, file):  # huggingface_hub checks the size only
            path.resolve().unlink()  # in the cache, the path is a link to it
            path.unlink(missing_ok=True)
            raise OSError("the download is damaged (its SHA-256 is not the hub's)")
        return path

    def _download_part(self, file: SourceFile, part: Path) -> Path:
        """Download a file into the data folder, from the byte where an earlier try or an earlier run stopped.

        hf_hub_download would begin at the first byte. HfFileSystem of huggingface_hub calls `http_get` like this, too.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as content:
            if content.tell() > file.bytes:  # the hub sent something else
                content.seek(0)
                content.truncate()
            http_get(
                hf_hub_url(**self._where(file)),
                content,
                resume_size=content.tell(),
                headers=build_hf_headers(),
                expected_size=file.bytes,
                displayed_filename=file.name,
            )
        return part.replace(part.with_suffix(""))


def cache_folder() -> Path:
    """The repository's folder in the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"datasets--{REPOSITORY.replace('/', '--')}"


def check_writable(what: str, folder: str | Path) -> None:
    """Raise UserError if the Hugging Face cache cannot be written: its libraries report that as a failing network."""
    try:
        os.makedirs(folder, exist_ok=True)
        with temporary_folder(folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{what}: the cache {folder} cannot be written ({error.strerror}); make it writable, or point HF_HOME to another folder"
        ) from error


def mixed(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(files, key=lambda file: hashlib.sha256(file["name"].encode()).digest())


def cached_file(config: str, path: Path) -> dict[str, Any]:
    """A file of the Hugging Face cache. There, a large file lies under its SHA-256."""
    name = path.resolve().name
    digest = name if re.fullmatch("[0-9a-f]{64}", name) else None
    return {"name": f"{config}/{path.name}", "bytes": path.stat().st_size, "sha256": digest}


def is_whole(path: Path, file: SourceFile) -> bool:
    return path.stat().st_size == file.bytes and (file.sha256 is None or sha256(path) == file.sha256)


def ask_hub(what: str, action: Callable[[], T], folder: Path | None = None, attempts: int = ATTEMPTS) -> T:
    """The result of `action`, tried several times while the network or the hub fails.

    Args:
        folder: where `action` writes; None: the Hugging Face cache.
    """
    from huggingface_hub import constants

    advice = (
        "try again when the network is back; if it is slow to answer, set HF_HUB_DOWNLOAD_TIMEOUT=60 (seconds); or check "
        "HF_ENDPOINT, HF_TOKEN and the variables of your proxy"
    )
    # Only a full disk gets here: `patiently` explains every other failure
    with writing(str(folder or constants.HF_HUB_CACHE), "finished work is kept"):
        return patiently(what, action, attempts, advice, functools.partial(check_retryable, what))


def check_retryable(what: str, error: Exception) -> None:
    """Raise UserError if asking again cannot help."""
    from huggingface_hub import constants

    for folder in (constants.HF_HOME, constants.HF_HUB_CACHE):
        check_writable(what, folder)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if 400 <= status < 500 and status not in (408, 429):
        hint = "is --revision right?"
        if status in (401, 403):
            hint = "is HF_TOKEN right, or what hf auth login stored? The data is public: HF_HUB_DISABLE_IMPLICIT_TOKEN=1 sends neither"
        raise UserError(f"{what}: the hub refuses it ({first_line(error)}); {hint}") from error
