"""Wikipedia from the Hugging Face hub: pin a commit, download, check, retry."""

import functools
import hashlib
import itertools
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from internals.files import DISK_FULL, sha256, system_error
from internals.start import UserError, first_line
from internals.text_files import Source, SourceFile, counted

T = TypeVar("T")

REPOSITORY = "wikimedia/wikipedia"
ATTEMPTS = 6  # per request, with pauses of 1, 2, 4, 8 and 16 s between them and what huggingface_hub adds
ANSWER_SECONDS = 120  # to wait for an answer about the repository; for a file, huggingface_hub waits 10 s at a time


class HubWikipedia(Source):
    """One language and dump of `wikimedia/wikipedia`. `datasets` names the files, `huggingface_hub` downloads them.

    The revision is resolved to a commit once. All files, also those of later runs, are of that commit. A dump is sorted
    by page id, so old articles come first. The files are taken in the order of their names' hashes instead, which makes
    the first quarter of them a fair quarter.

    A download into `folder` begins when the file before it is read, and stays until `release`. A file in the Hugging
    Face cache is read there and stays there.
    """

    def __init__(self, language: str, dump: str, revision: str, folder: Path):
        self.config, self.folder = f"{dump}.{language}", folder
        self.identity = {"kind": "hub", "repository": REPOSITORY, "config": self.config, "revision": revision}
        # Xet, the hub's newer protocol, has hung for over an hour (github.com/huggingface/xet-core, issue 883). Plain
        # HTTP asks again after 10 s of silence and continues the download. Set this before the first import.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        warnings.filterwarnings("ignore", "Not enough free disk space")  # huggingface_hub's; we print our own message
        self.commit, self.files = "", []
        self._downloads: dict[int, Future] = {}

    def resolve(self, known: dict[str, Any]) -> dict[str, Any]:
        find = functools.partial(answer_within, ANSWER_SECONDS, self._find_files)
        resolved = known or patiently(f"{REPOSITORY} {self.config}", find)
        self.commit, self.files = resolved["commit"], [SourceFile(**file) for file in resolved["files"]]
        for path in self.folder.rglob("*.incomplete"):  # of a killed download; huggingface_hub would not resume it
            path.unlink()
        return resolved

    def _find_files(self) -> dict[str, Any]:
        import datasets
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(REPOSITORY, revision=self.identity["revision"]).sha
        self._check_config(datasets.get_dataset_config_names(REPOSITORY, revision=commit))
        builder = datasets.load_dataset_builder(REPOSITORY, self.config, revision=commit)
        prefix = f"hf://datasets/{REPOSITORY}@{commit}/"
        names = [str(name).removeprefix(prefix) for name in builder.config.data_files["train"]]
        infos = HfApi().get_paths_info(REPOSITORY, names, revision=commit, repo_type="dataset")
        files = [{"name": i.path, "bytes": i.size, "sha256": i.lfs.sha256 if i.lfs else None} for i in infos]
        return {"commit": commit, "files": sorted(files, key=lambda f: hashlib.sha256(f["name"].encode()).digest())}

    def _check_config(self, available: list[str]) -> None:
        if self.config not in available:
            language = self.config.split(".", 1)[1]
            others = [name.split(".")[0] for name in available if name.split(".", 1)[-1] == language]
            hint = f"--dump {' or '.join(others)}" if others else "a --language that https://wikimedia.org lists"
            raise UserError(f"--dump, --language: {REPOSITORY} has no {self.config}; give {hint}")

    def summary(self) -> str:
        size = sum(file.bytes for file in self.files) / 1e9
        files = counted(len(self.files), "file")
        return f"{REPOSITORY} {self.config} at commit {self.commit[:12]}: {files} of {size:,.2f} GB"

    def provenance(self) -> dict[str, Any]:
        size = sum(file.bytes for file in self.files)
        return {**self.identity, "commit": self.commit, "files": len(self.files), "bytes": size}

    def fetch(self, number: int) -> Path:
        """The path of a file, downloaded and checked. The download of the next file begins now."""
        for ahead, file in enumerate(self.files[number : number + 2], number):
            if ahead not in self._downloads:
                self._downloads[ahead] = in_background(functools.partial(self._fetch, file))
        return self._downloads[number].result()

    def release(self, before: int) -> None:
        """Delete the downloads before this number."""
        for number in [n for n in self._downloads if n < before]:
            del self._downloads[number]
        for file in self.files[:before]:
            (self.folder / file.name).unlink(missing_ok=True)
        if before == len(self.files):
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def peak_bytes(self) -> int:  # of three files: one is read, the next one comes, one is not noted as done yet
        return sum(sorted((file.bytes for file in self.files), reverse=True)[:3])

    @property
    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _fetch(self, file: SourceFile) -> Path:
        return patiently(file.name, functools.partial(self._download, file))

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        where = {"repo_id": REPOSITORY, "filename": file.name, "repo_type": "dataset", "revision": self.commit}
        cached = try_to_load_from_cache(**where)
        for path in (self.folder / file.name, Path(cached) if isinstance(cached, str) else None):
            if path and path.exists() and is_whole(path, file):
                return path
        start = time.monotonic()
        path = Path(hf_hub_download(**where, local_dir=self.folder, force_download=True))
        self.seconds_per_byte = (time.monotonic() - start) / file.bytes
        if not is_whole(path, file):  # huggingface_hub checks the size only
            path.unlink()
            raise OSError("the download is damaged (its SHA-256 is not the hub's)")
        return path


def is_whole(path: Path, file: SourceFile) -> bool:
    return path.stat().st_size == file.bytes and (file.sha256 is None or sha256(path) == file.sha256)


def patiently(what: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried several times with longer and longer pauses while the network or the hub fails."""
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the errors of the libraries, and of their libraries, have no common base
            if getattr(system_error(error), "errno", None) in DISK_FULL:
                raise
            check_retryable(what, error)
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{what}: could not be fetched ({first_line(error)}), tried {ATTEMPTS} times; "
                    "what is done is kept: give the same command when the network is back"
                ) from error
            pause = 2 ** (attempt - 1)
            tqdm.write(f"{what}: {first_line(error)}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def check_retryable(what: str, error: Exception) -> None:
    """Raise UserError if asking again cannot help."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}: is not on this machine, and HF_HUB_OFFLINE is set; go online") from error
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if 400 <= status < 500 and status not in (408, 429):
        hint = "is HF_TOKEN right?" if status in (401, 403) else "is --revision right?"
        raise UserError(f"{what}: the hub refuses it ({first_line(error)}); {hint}") from error


def in_background(action: Callable[[], T]) -> Future:
    """Run `action` in a daemon thread. At exit, Python would wait for the thread of a pool, and so for the network."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # any error: whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def answer_within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`. Raises OSError if it takes longer."""
    try:
        return in_background(action).result(timeout=seconds)
    except FutureTimeoutError as error:
        raise OSError(f"no answer in {seconds:g} s") from error
