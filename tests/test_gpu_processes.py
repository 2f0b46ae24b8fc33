"""Training on several GPUs that compute nothing: what the processes exchange, and how a run ends. Needs a fake GPU."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPO, needs_fake_gpu, run_on_fake_gpu, write_data

from internals import checkpoint

pytestmark = needs_fake_gpu

PARAMETERS = 842_624 + (320 - 257) * 128  # of the demo's model, with the padding rows of its vocabulary

# train.py, with a few lines before it
SCRIPT = """
import json, os, sys, time
sys.path[:0] = [{repo!r}, os.environ["FAKE_GPU_DIR"]]
import counts
import torch, torch.distributed as dist, train
from config import TrainConfig
from internals import cli, start
RANK = int(os.environ["RANK"])
{before}
start.run(lambda: train.main(cli.parse(TrainConfig, "")))
{after}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "bytes", train_tokens=60_000, val_tokens=5_000)


def launch(text: Path, out_dir: Path, *flags, processes: int = 2, before: str = "", after: str = "", **card):
    """A run of the demo's model under torchrun, one card per process."""
    script = out_dir.parent / "script.py"
    script.write_text(SCRIPT.format(repo=str(REPO), before=before, after=after))
    command = ["torchrun", "--standalone", f"--nproc-per-node={processes}", script, "--preset=demo", "--compile=off"]
    command += [f"--data-dir={text}", f"--out-dir={out_dir}", "--eval-interval=2", *flags]
    return run_on_fake_gpu(*command, timeout=580, FAKEGPU_COUNT=processes, OMP_NUM_THREADS=1, **card)


def test_two_and_eight_processes_train_and_resume_each_others_run(text, tmp_path):
    """In the loop NCCL carries only the gradients, once an iteration."""
    out_dir, told = (
        tmp_path / "run",
        "print('nccl: ' + json.dumps(counts.counts()['nccl']) + '\\n', end='', flush=True)",
    )
    for iters, processes, batch_size in ((2, 2, 16), (3, 8, 4), (4, 2, 16)):
        mode, trained = (["--resume"], 1) if iters > 2 else ([], 2)
        result = launch(text, out_dir, f"--max-iters={iters}", *mode, processes=processes, after=told)
        assert result.returncode == 0, result.stderr
        assert f"batch_size 32 -> {batch_size}: it must divide the {batch_size} sequences a process" in result.stdout
        assert result.stdout.count("Done in") == 1 and ("resuming   at iteration" in result.stdout) == bool(mode)
        saved = checkpoint.load(out_dir / "last.pt")
        assert (saved["iter"], saved["tokens"], len(saved["rng"])) == (iters, iters * 4096, processes)
        assert saved["config"]["batch_size"] == json.loads((out_dir / "config.json").read_text())["batch_size"] == 32
        exchanges = {"AllReduce type 7 op 0": [trained, trained * 4 * PARAMETERS]}  # a sum of float32
        assert [json.loads(counted) for counted in re.findall(r"nccl: (\{[^}]*\})", result.stdout)] == [
            exchanges
        ] * processes


def test_out_of_memory_on_one_card_halves_the_batch_of_all(text, tmp_path):
    flags = ["--tokens-per-iter=65536", "--batch-size=256", "--max-iters=2"]
    told = "print(f'micro-steps: {sorted(sizes)}\\n', end='', flush=True)"
    before = """
sizes, retry_smaller = set(), train.MicroBatch.retry_smaller
def noted(self, compute, *args):
    result = retry_smaller(self, compute, *args)
    sizes.add(self.size)
    return result
train.MicroBatch.retry_smaller = noted
"""
    cards = {"FAKEGPU_MIB": 4000, "FAKEGPU_BUSY_MIB": "0,2920"}  # others hold too little to end the run
    result = launch(text, tmp_path / "run", *flags, before=before, after=told, **cards)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Out of memory: micro-steps now have 128 sequences, not 256, of the same text.") == 1
    assert "Done in" in result.stdout
    # One set per process; both evaluated with all 256 sequences, before there were gradients and moments
    assert result.stdout.count("micro-steps: [128, 256]") == 2, result.stdout


@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_process_ends_the_others_while_they_wait_for_its_gradients(text, tmp_path, dying):
    """No signal and no exception reaches them there. The launcher would kill them after 30 seconds, with status -9."""
    deadly = f"""
exchanges, all_reduce = iter(range(1000)), dist.all_reduce
def deadly(tensor, *rest):
    if tensor.is_cuda and next(exchanges) == 1 and RANK == {dying}:
        time.sleep(1)  # the others are waiting by now
        os.kill(os.getpid(), 9)
    return all_reduce(tensor, *rest)
dist.all_reduce = deadly
"""
    result = launch(text, tmp_path / "run", "--max-iters=5", before=deadly)
    assert sorted(re.findall(r"exitcode +: (-?\d+)", result.stderr)) == ["-9", "2"], result.stderr
    assert result.stderr.count("error: another process of this run ended, so this one ends too") == dying
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iter"] == 0
