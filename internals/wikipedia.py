"""The hub's Wikipedia."""

import hashlib
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

from internals.files import DISK_FULL, sha256
from internals.start import UserError, first_line
from internals.text_files import SourceFile, count

T = TypeVar("T")


REPOSITORY = "wikimedia/wikipedia"

ATTEMPTS = 6  # at a request of the hub, each longer after the last: 1, 2, 4, 8, 16 s, and what huggingface_hub adds

ANSWER_SECONDS = 120  # to wait for an answer about the repository; for a file huggingface_hub waits 10 s at a time


class HubWikipedia:
    """One language and dump of `wikimedia/wikipedia`: `datasets` names the files, `huggingface_hub` fetches them.

    The revision is resolved to a commit once, and all that follows, also after a stop, is of that commit. The dump lies
    ordered by page id, old articles first; the files are taken in an order that has nothing to do with it (by the hash
    of their names), so that the first quarter of them is a fair quarter.

    `resolved` is what an earlier run found out, from its `provenance()`. A file lies in `folder` from its download,
    which begins when the file before it is read, until `release`; one that is in the Hugging Face cache is read there.

    Raises:
        UserError: the hub cannot be reached or has no such thing.
    """

    def __init__(self, language: str, dump: str, revision: str, folder: Path):
        self.config, self.folder = f"{dump}.{language}", folder
        self.identity = {"kind": "hub", "repository": REPOSITORY, "config": self.config, "revision": revision}
        # Xet, the hub's newer protocol, has been seen to hang for over an hour (github.com/huggingface/xet-core, issue 883).
        # Plain HTTP asks again after 10 s of silence and goes on where it stood. To be set before the first import.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        warnings.filterwarnings("ignore", "Not enough free disk space")  # huggingface_hub's, beside our own message
        self.commit, self.files = "", []
        self.seconds_per_byte = 0.0  # of the last download
        self._downloads: dict[int, Future] = {}

    def resolve(self) -> dict[str, Any]:
        """Find the commit and its files. Returns them for `restore`, as plain data."""
        from huggingface_hub import HfApi

        def find() -> tuple[str, list[SourceFile]]:
            api = HfApi()
            commit = api.dataset_info(REPOSITORY, revision=self.identity["revision"]).sha
            names = self._file_names(commit)
            infos = api.get_paths_info(REPOSITORY, names, revision=commit, repo_type="dataset")
            return commit, [SourceFile(i.path, i.size, i.lfs.sha256 if i.lfs else None) for i in infos]

        self.commit, files = self._patiently(f"{REPOSITORY} {self.config}", lambda: _within(ANSWER_SECONDS, find))
        self.files = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        return {"commit": self.commit, "files": [vars(file) for file in self.files]}

    def restore(self, resolved: dict[str, Any]) -> None:
        self.commit, self.files = resolved["commit"], [SourceFile(**file) for file in resolved["files"]]
        for path in self.folder.rglob("*.incomplete"):  # of a download that was killed; nothing would go on with it
            path.unlink()

    def _file_names(self, commit: str) -> list[str]:
        import datasets

        available = datasets.get_dataset_config_names(REPOSITORY, revision=commit)
        if self.config not in available:
            language = self.config.split(".", 1)[1]
            others = [name.split(".")[0] for name in available if name.split(".", 1)[-1] == language]
            hint = f"--dump {' or '.join(others)}" if others else "a --language that https://wikimedia.org lists"
            raise UserError(f"--dump, --language: {REPOSITORY} has no {self.config}; give {hint}")
        builder = datasets.load_dataset_builder(REPOSITORY, self.config, revision=commit)
        prefix = f"hf://datasets/{REPOSITORY}@{commit}/"
        return [str(name).removeprefix(prefix) for name in builder.config.data_files["train"]]

    def summary(self) -> str:
        size = sum(file.bytes for file in self.files) / 1e9
        return f"{REPOSITORY} {self.config} at commit {self.commit[:12]}: {count(len(self.files), 'file')} of {size:,.2f} GB"

    def provenance(self) -> dict[str, Any]:
        return {
            **self.identity,
            "commit": self.commit,
            "files": len(self.files),
            "bytes": sum(file.bytes for file in self.files),
        }

    def is_one_document(self, text_column: str) -> bool:
        return False

    def fetch(self, number: int) -> Path:
        """The file with this number, downloaded and checked; the one behind it is being downloaded from now on."""
        for ahead in (number, number + 1):
            if ahead < len(self.files) and ahead not in self._downloads:
                file = self.files[ahead]
                self._downloads[ahead] = _in_background(
                    lambda file=file: self._patiently(file.name, lambda: self._download(file))
                )
        return self._downloads[number].result()

    def release(self, before: int) -> None:
        """The files before this one are done with: delete what was downloaded of them."""
        for number in [n for n in self._downloads if n < before]:
            del self._downloads[number]
        for file in self.files[:before]:
            (self.folder / file.name).unlink(missing_ok=True)
        if before == len(self.files):
            shutil.rmtree(self.folder, ignore_errors=True)

    def most_bytes_at_once(self) -> int:
        """Of downloaded files: the one at work, the next one, and one that is done but not yet noted so."""
        return sum(sorted((file.bytes for file in self.files), reverse=True)[:3])

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _download(self, file: SourceFile) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        where = {"repo_id": REPOSITORY, "filename": file.name, "repo_type": "dataset", "revision": self.commit}
        cached = try_to_load_from_cache(**where)
        for path in (self.folder / file.name, Path(cached) if isinstance(cached, str) else None):
            if path and path.exists() and _is_whole(path, file):
                return path
        begin = time.monotonic()
        path = Path(hf_hub_download(**where, local_dir=self.folder, force_download=True))
        self.seconds_per_byte = (time.monotonic() - begin) / file.bytes
        if not _is_whole(path, file):  # huggingface_hub looks at the size alone
            path.unlink()
            raise OSError("what came is not what the hub has (its SHA-256 differs)")
        return path

    @staticmethod
    def _patiently(what: str, action: Callable[[], T]) -> T:
        """`action`, again and again with longer pauses while the network or the hub is at fault."""
        from huggingface_hub import constants

        for attempt in range(ATTEMPTS):
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # those of the libraries and of their libraries have no common base
                if getattr(error, "errno", None) in DISK_FULL:
                    raise
                status = getattr(getattr(error, "response", None), "status_code", 0)
                if constants.HF_HUB_OFFLINE:
                    raise UserError(f"{what}: is not on this machine, and HF_HUB_OFFLINE is set; go online") from error
                if 400 <= status < 500 and status not in (408, 429):  # asking again would not help
                    hint = "is HF_TOKEN right?" if status in (401, 403) else "is --revision right?"
                    raise UserError(f"{what}: the hub refuses it ({first_line(error)}); {hint}") from error
                if attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"{what}: could not be fetched ({first_line(error)}), tried {ATTEMPTS} times; "
                        "what is done is kept: give the same command when the network is back"
                    ) from error
                pause = 2**attempt
                tqdm.write(f"{what}: {first_line(error)}; trying again in {pause} s", file=sys.stderr)
                time.sleep(pause)
        raise AssertionError("not reached")


def _in_background(action: Callable[[], T]) -> Future:
    """`action` in a thread of its own. Not a pool's: Python, ending, would wait for that, and so for the network."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # whatever it is, it belongs to the one who waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _within(seconds: float, action: Callable[[], T]) -> T:
    """The result of `action`. Raises OSError where there is none after so many seconds."""
    try:
        return _in_background(action).result(timeout=seconds)
    except FutureTimeoutError as error:
        raise OSError(f"no answer in {seconds:g} s") from error


def _is_whole(path: Path, file: SourceFile) -> bool:
    return path.stat().st_size == file.bytes and (file.sha256 is None or sha256(path) == file.sha256)
