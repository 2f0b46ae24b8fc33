"""Wikipedia's files in the Hugging Face cache and on the disk: found, counted, kept, downloaded again if damaged."""

import errno
import os
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from articles import command, config, files, make_articles, posix, write_parquet
from conftest import assert_user_error, run_script
from hub_commands import hub_command, without_pauses

from internals import wikipedia
from internals.progress import Display, Progress
from internals.start import UserError
from internals.text_files import SourceFile
from internals.wikipedia import HubWikipedia, ask_hub


def test_files_in_the_hugging_face_cache_are_used_and_left_there(tmp_path, serve):
    handler, env = serve()
    code = "from huggingface_hub import snapshot_download as s; s('wikimedia/wikipedia', repo_type='dataset')"
    assert run_script("-c", code, env={**env, "HF_HUB_DISABLE_XET": "1"}).returncode == 0
    assert len(handler.downloads) == 4
    cached = files(tmp_path / "home1" / "hub")
    at_once = "from internals import progress; progress.MEASURE_SECONDS = 0.0"
    result = run_script(*without_pauses(hub_command(tmp_path / "out"), at_once), env=env)
    assert result.returncode == 0, result.stderr
    assert "needs about" in result.stdout and "download" not in result.stdout
    assert len(handler.downloads) == 4
    assert cached.items() <= files(tmp_path / "home1" / "hub").items()


@pytest.mark.parametrize("by", ["snapshot_download('wikimedia/wikipedia', repo_type='dataset')",
                                "load_dataset('wikimedia/wikipedia', '20231101.simple', split='train')"])  # fmt: skip
def test_offline_with_the_dataset_in_the_cache(tmp_path, serve, by):
    handler, env = serve()
    env = {**env, "HF_HUB_DISABLE_XET": "1"}
    code = f"from huggingface_hub import snapshot_download; from datasets import load_dataset; {by}"
    assert run_script("-c", code, env=env).returncode == 0
    handler.downloads.clear()
    offline = {**env, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run_script(*hub_command(tmp_path / "out"), env=offline)
    assert result.returncode == 0, result.stderr
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    assert files(tmp_path / "out") == files(tmp_path / "once")
    cached = list((tmp_path / "home1" / "hub").rglob("train-00002*"))
    assert cached
    blob, whole = cached[0].resolve(), cached[0].read_bytes()
    blob.write_bytes(bytes(len(whole)))
    result = run_script(*hub_command(tmp_path / "damaged"), env=offline)
    assert_user_error(result, "train-00002", "is damaged", str(cached[0]), "HF_HUB_OFFLINE")
    blob.write_bytes(whole)
    for path in cached:
        path.unlink()
    assert_user_error(
        run_script(*hub_command(tmp_path / "other"), env=offline), "HF_HUB_OFFLINE", "incomplete in the cache"
    )


def test_kept_downloads_are_found_by_later_runs(tmp_path, serve):
    handler, env = serve()
    result = run_script(*hub_command(tmp_path / "first", "--keep-downloads"), env=env)
    assert result.returncode == 0, result.stderr
    assert len(handler.downloads) == 4 and ".downloads-in-progress" not in os.listdir(tmp_path / "first")
    flags = ["--val-fraction", "0.3"]
    for name, more in (("second", {}), ("offline", {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})):
        result = run_script(*hub_command(tmp_path / name, *flags), env={**env, **more})
        assert result.returncode == 0, result.stderr
    assert len(handler.downloads) == 4
    _, elsewhere = serve()
    result = run_script(*hub_command(tmp_path / "fresh", *flags), env=elsewhere)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "second") == files(tmp_path / "offline") == files(tmp_path / "fresh")
    assert_user_error(run_script(*command(tmp_path / "x", "sample", "--keep-downloads")), "--keep-downloads")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system, such as Linux has in /dev/shm")
def test_kept_downloads_need_room_on_their_own_disk(tmp_path):
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a temporary folder on another file system than /dev/shm")
    source = SimpleNamespace(files=[], download_folder=tmp_path)
    display = Display(config(tmp_path, "wikipedia"), source, Progress())
    assert display.needed_for_downloads(10**18) == 10**18  # on the data folder's disk, which is checked with the shards
    source.download_folder = tmp_path / "not" / "made" / "yet"
    assert display.needed_for_downloads(10**18) == 10**18
    source.download_folder = Path("/dev/shm")
    assert display.needed_for_downloads(1) == 0
    with pytest.raises(UserError, match=r"--keep-downloads: needs .* GB more in /dev/shm"):
        display.needed_for_downloads(10**18)


@pytest.mark.parametrize(
    ("cached", "max_tokens", "missing", "at_one_time"),
    [
        ([], None, 615, 312),
        ([0, 1, 2, 3], None, 209, 209),
        ([0, 1, 2, 3, 4, 5], None, 0, 0),
        ([], 35, 201, 201),  # at 3 bytes a token, they end in the second file
        ([0, 1], 35, 0, 0),
    ],
)
def test_only_missing_files_count_as_downloads(tmp_path, monkeypatch, cached, max_tokens, missing, at_one_time):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # HubWikipedia sets it
    monkeypatch.setattr(
        HubWikipedia, "_cached", lambda self, file: Path(file.name) if int(file.name) in cached else None
    )
    for keep in (False, True):
        source = HubWikipedia("simple", "20231101", "main", tmp_path, keep, max_tokens)
        source.files = [SourceFile(str(number), 100 + number, None) for number in range(6)]
        assert (source.missing_bytes, source.peak_bytes) == (missing, missing if keep else at_one_time)
        assert source.bytes_on_disk == 0 and (keep or source.download_folder == tmp_path)
        monkeypatch.setattr(source, "_fetch", lambda file: Path(file.name))
        source.fetch(5)
        assert source.missing_bytes == (105 if missing in (209, 615) else 0)  # those before it are done


@pytest.mark.parametrize(("there", "under_way", "seconds"), [(0, 1, 1.0), (0, 2, 0.5), (5, 1, 2.0), (10, 1, 0.0)])
def test_downloads_at_the_same_time_share_the_line(tmp_path, monkeypatch, there, under_way, seconds):
    """Ten seconds for a file of ten bytes, some of which an earlier run had downloaded."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # HubWikipedia sets it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source, clock = HubWikipedia("simple", "20231101", "main", tmp_path), iter([0, 10])
    source.downloads.folder.mkdir()
    (source.downloads.folder / "a.parquet.part").write_bytes(b"x" * there)
    source._futures = {number: Future() for number in range(3)}
    for number in range(under_way, 3):
        source._futures[number].set_result("done")
    monkeypatch.setattr(wikipedia, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(source, "_cached", lambda file: None)
    monkeypatch.setattr(source, "_download_part", lambda file, part: part)
    monkeypatch.setattr(wikipedia, "is_whole", lambda path, file: True)
    source._download(SourceFile("a.parquet", 10, None))
    assert source.seconds_per_byte == seconds


def test_a_download_may_get_its_name_while_the_disk_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # HubWikipedia sets it
    source, is_file = HubWikipedia("simple", "20231101", "main", tmp_path), Path.is_file
    source.downloads.folder.mkdir()
    (source.downloads.folder / "a.incomplete").write_bytes(b"12")
    assert source.bytes_on_disk == 2
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and path.unlink() is None)
    assert source.bytes_on_disk == 0


def test_stopped_downloads_in_the_cache_are_named_and_stay(tmp_path, serve):
    _, env = serve()
    blobs = tmp_path / "home1" / "hub" / "datasets--wikimedia--wikipedia" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("a", "b"):
        (blobs / f"{name}.incomplete").write_text("some of it")
    for flags in ([], ["--keep-downloads"]):
        result = run_script(*hub_command(tmp_path / f"out{len(flags)}", *flags), env=env)
        assert result.returncode == 0 and len(list(blobs.glob("*.incomplete"))) == 2, result.stderr
        assert (f"2 stopped downloads in {blobs}; delete the" in result.stdout) == bool(flags)


def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path, serve):
    handler, env = serve()
    assert run_script(*hub_command(tmp_path / "first", "--keep-downloads"), env=env).returncode == 0
    damaged = next((tmp_path / "home1" / "hub").rglob("train-00002*")).resolve()
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    result = run_script(*hub_command(tmp_path / "second", "--keep-downloads"), env=env)
    assert result.returncode == 0, result.stderr
    assert len(handler.downloads) == 5 and files(tmp_path / "second") == files(tmp_path / "first")


@pytest.mark.parametrize(
    "variables", [{"HF_HOME": "/proc/nowhere"}, {"HF_HOME": "{}/file/x"}, {"HF_HUB_CACHE": "/proc/x"}]
)
@posix
def test_a_cache_that_cannot_be_written_is_named_and_not_retried(tmp_path, serve, variables):
    _, env = serve()
    (tmp_path / "file").write_text("x")
    variables = {name: value.format(tmp_path) for name, value in variables.items()}
    result = run_script(*hub_command(tmp_path / "out"), env={**env, **variables})
    assert_user_error(result, "HF_HOME", *variables.values())
    assert "trying again" not in result.stderr


def test_a_full_cache_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def fill():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=rf"^{tmp_path}: could not be written \(No space left on device\)"):
        ask_hub("a file", fill)


def test_the_users_own_downloads_stay(tmp_path, serve, hub_folder):
    _, env = serve()
    name = "20231101.simple/train-00000-of-00004.parquet"
    for path in ("downloads/mine.txt", f"downloads/{name}"):
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes((hub_folder / name).read_bytes())
    mine = files(tmp_path / "out")
    for more in ([], [], ["--overwrite"]):
        result = run_script(*hub_command(tmp_path / "out", *more), env=env)
        assert result.returncode == 0, result.stderr
        assert mine.items() <= files(tmp_path / "out").items()
    assert not (tmp_path / "out" / ".downloads-in-progress").exists()


COUNT_DOWNLOADS = """
from internals import parquet, wikipedia
prepare_data.COMMIT_SECONDS, parquet.CHUNK_ROWS = 0.0, 100  # so that a file has more chunks than are read ahead
fetch = wikipedia.HubWikipedia.fetch
def counting(self, number):
    print("downloads:", len(list(self.downloads.folder.rglob("*.parquet"))))
    return fetch(self, number)
wikipedia.HubWikipedia.fetch = counting
"""


def test_at_most_three_downloads_are_on_the_disk(tmp_path, serve, hub_folder):
    """One is read, the next one arrives, and one is done but not yet saved as done."""
    for n in range(4, 8):
        write_parquet(hub_folder / "20231101.simple" / f"train-{n:05d}-of-00004.parquet", make_articles(1000, seed=n))
    _, env = serve()
    result = run_script(*without_pauses(hub_command(tmp_path / "out", "--workers", "1"), COUNT_DOWNLOADS), env=env)
    assert result.returncode == 0, result.stderr
    counts = [int(count) for count in re.findall(r"downloads: (\d+)", result.stdout)]
    assert len(counts) >= 2 * 8 and max(counts) <= 3  # each file is asked for before, while and after it is read
