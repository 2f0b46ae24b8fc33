"""internals/wikipedia.py: Wikipedia from the hub, with the hub's faults and with kills at random moments.

PREPARE_KILLS=50 sets the number of kills in the last test. With WIKIPEDIA_SAMPLE_DIR and TIKTOKEN_CACHE_DIR it then
takes real articles.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import hub
import pytest
from articles import as_text, command, files, kill_until, make_articles, posix, texts, write_parquet
from conftest import assert_user_error, needs_wikipedia, run_script, without_network_settings
from hub_commands import hub_command, without_pauses

from internals.shards import read_meta
from internals.source_size import vocab_size_for
from internals.start import UserError
from internals.wikipedia import TEXT_PER_BYTE, HubWikipedia, check_retryable, mixed


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The Hugging Face libraries of this process write into a folder of the test."""
    from huggingface_hub import constants

    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path))


def test_the_hub(tmp_path, serve, hub_folder):
    handler, env = serve()
    handler.commit = "1" * 40
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert "4 files" in result.stdout
    meta = read_meta(tmp_path / "out")
    assert meta["source"] == {
        "kind": "hub", "repository": "wikimedia/wikipedia", "config": "20231101.simple", "revision": "main",
        "commit": "1" * 40, "files": 4,
        "bytes": sum(path.stat().st_size for path in hub_folder.rglob("*.parquet")),
    }  # fmt: skip
    want = [as_text(row) for n in range(4) for row in make_articles(1000, seed=n)]
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(want)
    assert len(handler.downloads) == 4
    assert {revision for _, revision in handler.downloads} == {"1" * 40}
    names = [name for name, _ in handler.downloads]
    assert sorted(files(tmp_path / "out")) == ["meta.json", "train_000000.bin", "val_000000.bin"]
    again = run_script(*hub_command(tmp_path / "out"), env={**env, "HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and "finished" in again.stdout  # without asking the hub
    assert [name for name, _ in handler.downloads] == names


def test_the_order_of_the_files_never_changes():
    """A folder that is half done must find the same files in the same places."""
    names = [f"20231101.en/train-{n:05d}-of-00041.parquet" for n in range(41)]
    order = [names.index(file["name"]) for file in mixed([{"name": name} for name in names])]
    assert order[:6] == [23, 39, 34, 40, 1, 17] and sorted(order) == list(range(41))


def test_no_file_is_downloaded_that_max_tokens_do_not_reach(tmp_path, serve, hub_folder):
    """Training the tokenizer downloads no more either, if the first file holds its sample, as on the hub."""
    names = [{"name": str(path.relative_to(hub_folder))} for path in hub_folder.rglob("*.parquet")]
    order = [file["name"] for file in mixed(names)]
    write_parquet(hub_folder / order[0], make_articles(8000, seed=9))  # long enough: chunks are read ahead
    handler, env = serve()
    flags = ["--preset", "laptop", "--language", "simple", "--vocab-size", "300", "--workers", "1"]
    arguments = ["prepare_data.py", *flags, "--data-dir", str(tmp_path / "out"), "--overwrite"]
    sample = "from internals import tokenizer_training; tokenizer_training.SAMPLE_BYTES = 100_000"
    for max_tokens, reached, end in (("100_000", 1, "max_tokens"), ("1e9", 4, "source")):
        handler.downloads.clear()
        result = run_script(*without_pauses([*arguments, "--max-tokens", max_tokens], sample), env=env)
        assert result.returncode == 0, result.stderr
        assert sorted(name for name, _ in handler.downloads) == sorted(order[:reached])
        assert read_meta(tmp_path / "out")["end"] == end


STOP_BEFORE_THE_END = """
def stop(self):
    raise KeyboardInterrupt
prepare_data.Pipeline.finish = stop
"""


def test_preset_laptop_takes_a_small_wikipedia_by_its_size(tmp_path, serve, hub_folder):
    """It resumes, and is finished, with the same numbers and without asking the hub."""
    for path in hub_folder.rglob("*.parquet"):
        write_parquet(path, make_articles(60, seed=int(path.name[6:11])))
    vocab_size = vocab_size_for(TEXT_PER_BYTE * sum(path.stat().st_size for path in hub_folder.rglob("*.parquet")))
    _, env = serve()
    arguments = ["prepare_data.py", "--preset", "laptop", "--language", "simple", "--data-dir", str(tmp_path / "out")]
    stopped = run_script(*without_pauses(arguments, STOP_BEFORE_THE_END), env=env)
    assert f"chosen by the size of the source: --vocab-size {vocab_size}, --val-fraction 0.1" in stopped.stdout
    assert "Continue: " in stopped.stderr
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    for state, word in (("is half done,", "resuming"), ("is finished, and was prepared", "is finished: nothing to do")):
        other = run_script(*arguments, "--language", "de", env=offline)
        assert_user_error(
            other, f"{state} from another source (wikimedia/wikipedia 20231101.simple, revision main, not"
        )
        assert "chosen by" not in other.stdout
        result = run_script(*arguments, env=offline)
        assert result.returncode == 0 and word in result.stdout, result.stderr
    meta = read_meta(tmp_path / "out")
    assert meta.get("chosen_vocab_size", meta["vocab_size"]) == vocab_size < 8192 and meta["val_fraction"] == 0.1


def test_a_half_done_folder_of_another_source_is_refused_before_the_hub_is_asked(tmp_path):
    stopped = run_script(*without_pauses(command(tmp_path / "out", "sample"), STOP_BEFORE_THE_END))
    assert "Continue: " in stopped.stderr
    env = {**without_network_settings(), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert_user_error(result, "is half done, from another source (the sample,")


@needs_wikipedia
def test_preset_laptop_takes_english_wikipedia_and_needs_no_flag(tmp_path, serve, hub_folder):
    """Real text, and a smaller sample for the tokenizer to keep the test short."""
    readme = hub_folder / "README.md"
    readme.write_text(readme.read_text().replace("simple", "en"))
    (hub_folder / "20231101.en").mkdir()
    for path in Path(os.environ["WIKIPEDIA_SAMPLE_DIR"]).glob("*.parquet"):
        (hub_folder / "20231101.en" / path.name).symlink_to(path)
    handler, env = serve()
    arguments = ["prepare_data.py", "--preset", "laptop", "--data-dir", str(tmp_path / "out")]
    sample = "from internals import tokenizer_training; tokenizer_training.SAMPLE_BYTES = 4_000_000"
    result = run_script(*without_pauses(arguments, sample), env=env)
    assert result.returncode == 0, result.stderr
    meta = read_meta(tmp_path / "out")
    assert (meta["vocab_size"], meta["val_fraction"], meta["max_tokens"]) == (8192, 0.005, 60_000_000)
    assert meta["source"]["config"] == "20231101.en" and {name for name, _ in handler.downloads} == {
        f"20231101.en/train-{n:05d}-of-00004.parquet" for n in range(4)
    }
    again = run_script(*arguments, env={**env, "HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and "finished" in again.stdout  # without asking the hub


@pytest.mark.parametrize("keep", [[], ["--keep-downloads"]])
def test_faults_of_the_hub_are_overcome(tmp_path, serve, keep):
    _, env = serve()
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    faults = ["error", "drop", "stall", "truncate", "limit", "corrupt", "ok", "corrupt"]
    faults += ["error", "stall", "drop", "truncate", "drop"]
    handler, env = serve(faults)
    handler.unanswered = 1
    code = without_pauses(
        hub_command(tmp_path / "out", *keep), "from internals import wikipedia; wikipedia.ANSWER_SECONDS = 5"
    )
    result = run_script(*code, env={**env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert result.returncode == 0, result.stderr
    assert not handler.faults and not handler.unanswered  # every fault occurred
    assert "no answer in 5 s; trying again" in result.stderr
    assert files(tmp_path / "out") == files(tmp_path / "once")


ONE_FILE = "20231101.simple/train-00000-of-00004.parquet"


@pytest.fixture
def one_file(hub_folder):
    """The repository on the hub, with only one file."""
    for path in hub_folder.rglob("*.parquet"):
        if not path.match(ONE_FILE):
            path.unlink()
    return hub_folder / ONE_FILE


def test_a_download_continues_where_it_stopped(tmp_path, serve, one_file):
    """After a broken connection, and in the next run."""
    _, env = serve()
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    handler, env = serve(["drop"] + ["error"] * 1000)
    small = "from internals import wikipedia; wikipedia.BLOCK_BYTES = 1000"
    assert run_script(*without_pauses(hub_command(tmp_path / "out"), small), env=env).returncode == 2
    part = tmp_path / "out" / ".downloads-in-progress" / f"{ONE_FILE}.part"
    there = part.stat().st_size
    assert there > one_file.stat().st_size // 2 - 1000 and set(handler.begins) == {0, there}
    handler.faults.clear()
    handler.begins.clear()
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert handler.begins == [there] and files(tmp_path / "out") == files(tmp_path / "once")


@pytest.mark.parametrize("more", [None, 1])
def test_a_part_of_something_else_is_not_continued_for_ever(tmp_path, serve, one_file, more):
    """A login page, for example. It may be longer than the file."""
    handler, env = serve()
    part = tmp_path / "out" / ".downloads-in-progress" / f"{ONE_FILE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (one_file.stat().st_size + more if more else 10))
    result = run_script(*without_pauses(hub_command(tmp_path / "out")), env=env)
    assert result.returncode == 0, result.stderr
    assert handler.begins == ([0] if more else [10, 0])


@pytest.mark.parametrize("fault", ["error", "corrupt"])
def test_a_hub_that_stays_broken_is_one_message_and_the_run_resumes(tmp_path, serve, fault):
    _, env = serve()
    assert run_script(*hub_command(tmp_path / "once"), env=env).returncode == 0
    handler, env = serve(["ok", "ok"] + [fault] * 1000)
    result = run_script(*without_pauses(hub_command(tmp_path / "out")), env=env)
    assert result.returncode == 2, result.stderr
    # Another thread may be writing, so the message may begin in the middle of a line
    errors = re.findall(r"error: 20231101.*", result.stderr)
    assert len(errors) == 1 and "tried 12 times" in errors[0] and "Traceback" not in result.stderr, result.stderr
    state = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert state["file"] >= 1  # the whole files are done (the third may overtake the second)
    handler.faults.clear()
    handler.downloads.clear()
    handler.commit = "2" * 40  # the branch moves, the folder keeps its commit
    result = run_script(*hub_command(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "out") == files(tmp_path / "once")
    assert len(handler.downloads) <= 3 and {revision for _, revision in handler.downloads} == {hub.SHA}


def test_what_the_hub_does_not_have(tmp_path, serve):
    _, env = serve()
    for flags, words in (
        (["--language", "xx"], ["--language", "20231101.xx"]),
        (["--dump", "20200101"], ["--dump", "20231101"]),
        (["--revision", "nowhere"], ["--revision"]),
    ):
        assert_user_error(run_script(*hub_command(tmp_path / "out", *flags), env=env), *words)
    result = run_script(*hub_command(tmp_path / "out"), env={**env, "HF_HUB_OFFLINE": "1"})
    assert_user_error(result, "HF_HUB_OFFLINE")


TOKEN = r"is HF_TOKEN right, or what hf auth login stored\? .* HF_HUB_DISABLE_IMPLICIT_TOKEN=1"


@pytest.mark.parametrize(
    ("status", "hint"),
    [(408, ""), (429, ""), (500, ""), (503, ""), (401, TOKEN), (403, TOKEN), (404, "is --revision right")],
)
def test_which_answers_of_the_hub_are_worth_another_try(own_cache, status, hint):
    error = OSError(f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status)
    if hint:
        with pytest.raises(UserError, match=rf"a file: the hub refuses it \({status} Client Error\); {hint}"):
            check_retryable("a file", error)
    else:
        check_retryable("a file", error)


@pytest.mark.parametrize("keep", [[], ["--keep-downloads"]])
@pytest.mark.parametrize(
    ("status", "words"), [(403, ["the hub refuses it (403", "HF_TOKEN"]), (500, ["500", "12 times"])]
)
def test_the_hubs_answer_is_told_when_it_refuses_to_describe_a_file(tmp_path, serve, keep, status, words):
    """With --keep-downloads, huggingface_hub asks with HEAD first, and hides the answer in the cause of another error."""
    handler, env = serve()
    handler.file_status = status
    result = run_script(*without_pauses(hub_command(tmp_path / "out", *keep)), env=env)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    [message] = re.findall(r"error: 20231101.*", result.stderr)
    assert all(word in message for word in words), message


def test_a_cache_of_load_dataset_does_not_answer_for_a_failing_hub(tmp_path, serve):
    handler, env = serve()
    code = "from datasets import load_dataset; load_dataset('wikimedia/wikipedia', '20231101.simple', split='train')"
    assert run_script("-c", code, env={**env, "HF_HUB_DISABLE_XET": "1"}).returncode == 0
    handler.tree_failures = 8
    result = run_script(*without_pauses(hub_command(tmp_path / "out")), env=env)
    assert result.returncode == 0 and not handler.tree_failures, result.stderr
    assert "trying again" in result.stderr


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_both_variables_that_forbid_the_network_are_known(tmp_path, serve, variable):
    handler, env = serve()
    result = run_script(*without_pauses(hub_command(tmp_path / "new")), env={**env, variable: "1"})
    assert_user_error(result, "is incomplete in the cache", variable)
    assert run_script(*without_pauses(hub_command(tmp_path / "out"), STOP_BEFORE_THE_END), env=env).returncode != 0
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    (tmp_path / "out" / "progress.json").write_text(json.dumps(progress | {"file": 2, "row": 0, "end": ""}, indent=2))
    handler.downloads.clear()
    result = run_script(*without_pauses(hub_command(tmp_path / "out")), env={**env, variable: "1"})
    assert_user_error(result, "is not on this machine", variable)
    assert not handler.downloads


def test_an_endpoint_with_a_slash_at_its_end(tmp_path, serve):
    _, env = serve()
    result = run_script(*hub_command(tmp_path / "out"), env={**env, "HF_ENDPOINT": env["HF_ENDPOINT"] + "/"})
    assert result.returncode == 0, result.stderr


def test_an_empty_endpoint_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    HubWikipedia("simple", "20231101", "main", tmp_path)
    assert "HF_ENDPOINT" not in os.environ


def test_a_folder_named_like_the_repository_is_not_taken_for_the_hub(tmp_path, serve):
    """As `hf download` leaves it, or a clone of the dataset."""
    handler, env = serve()
    (tmp_path / "wikimedia" / "wikipedia").mkdir(parents=True)
    (tmp_path / "wikimedia" / "wikipedia" / "train.jsonl").write_text('{"text": "no Wikipedia"}\n')
    there = f"import os, sys; sys.path.insert(0, os.getcwd()); os.chdir({str(tmp_path)!r})"
    result = run_script(*without_pauses(hub_command(tmp_path / "out"), there), env=env)
    assert result.returncode == 0, result.stderr
    assert len(handler.downloads) == 4


@pytest.mark.parametrize(
    ("flags", "faults", "words"),
    [
        (["--text-column", "body"], [], "has no column 'body'"),
        ([], ["error"] * 1000, "tried 12 times"),
    ],
)
def test_a_mistake_or_a_failing_hub_does_not_cost_the_old_shards(tmp_path, serve, flags, faults, words):
    handler, env = serve()
    assert run_script(*hub_command(tmp_path / "out"), env=env).returncode == 0
    before = files(tmp_path / "out")
    handler.faults.extend(faults)
    result = run_script(*without_pauses(hub_command(tmp_path / "out", "--overwrite", *flags)), env=env)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert before.items() <= files(tmp_path / "out").items()


@posix
@pytest.mark.parametrize("more", [[], ["--tokenizer", "train", "--vocab-size", "300"]])
def test_kills_at_random_moments(tmp_path, serve, hub_folder, more):
    kills, low, high = int(os.environ.get("PREPARE_KILLS", "2")), 0.0, 3.0 if more else 1.5
    if (
        not more
        and "PREPARE_KILLS" in os.environ
        and "WIKIPEDIA_SAMPLE_DIR" in os.environ
        and "TIKTOKEN_CACHE_DIR" in os.environ
    ):
        for path in hub_folder.rglob("*.parquet"):
            path.unlink()
            path.symlink_to(os.path.join(os.environ["WIKIPEDIA_SAMPLE_DIR"], path.name))
        more, low, high = ["--tokenizer", "gpt2"], 0.0, 4.0
    _, env = serve()
    arguments = hub_command(tmp_path / "out", "--shard-tokens", "1000000", *more)
    once = run_script(*hub_command(tmp_path / "once", "--shard-tokens", "1000000", *more), env=env)
    assert once.returncode == 0, once.stderr
    kill_until(kills, arguments, tmp_path / "out", files(tmp_path / "once"), low, high, env=env)
