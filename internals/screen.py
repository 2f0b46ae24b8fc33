"""Words on the screen: numbers, durations, printable text, lines of 80 columns, the progress bar, the next command."""

import os
import re
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import GenerateConfig, PrepareConfig, TrainConfig, flag_of
from internals.cli import COMMANDS, with_preset
from internals.shell import shell_join
from internals.start import CONTROLS

REPO = Path(__file__).resolve().parents[1]
PROMPT = "The history of"  # if a command needs one and the run has none
WIDTH = 80  # columns of printed lines; the bar follows the terminal
NAMES = 9  # columns of the names in a summary: "iteration", "reference"

# ----------------------------------------------------------------------------------------------------------------------
# Numbers and lines


def plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}{ending if count != 1 else ''}"


def rounded(count: int) -> str:
    """`30.0 million`; below a million in full."""
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{plural(days, 'day')} {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def short_seconds(seconds: float) -> str:
    """Seconds in three digits: 0.0123 s, 4.56 s, 12.3 s. From 100 on as `duration`."""
    return duration(seconds) if seconds >= 100 else f"{seconds:.3g} s"


def about(seconds: float) -> str:
    """A long duration that is only roughly known."""
    days, hours = round(seconds / 86_400), round(seconds / 3600)
    if not hours:
        return plural(round(seconds / 60), "minute")
    return plural(days, "day") if days > 1 else plural(hours, "hour")


def size(count: float) -> str:
    """Bytes for people, in powers of 1,024 as GPU makers count memory."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def file_size(count: float) -> str:
    """Bytes for people, in powers of 1,000 as disks and downloads are counted."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} KB"


def short_loss(loss: float) -> str:
    """A loss in five characters, four of them digits: 2.330, 10.83, 260.3. After divergence: 1.2e+07."""
    return f"{loss:.3g}" if loss >= 1000 else f"{loss:.{3 - (loss >= 10) - (loss >= 100)}f}"


def short_rate(tokens_per_second: float) -> str:
    rate = tokens_per_second
    return f"{rate / 1e6:.2f} M tokens/s" if rate >= 1e6 else f"{rate:,.0f} tokens/s"


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey, and without halves of characters."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text.translate(CONTROLS))


def listed(names: Sequence[str], limit: int = 3) -> str:
    """`listed(["a", "b", "c", "d"], 3) -> "a, b, c and 1 more"`"""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return printable(", ".join(names[:limit])) + more


def wrap(text: str, first: str = "", indent: str = "") -> str:
    """A text in lines of at most 80 columns, broken only at spaces: a number, a path or a flag stays whole."""
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
    return "\n".join(lines)


def lines(rows: dict[str, str]) -> str:
    """Rows of a name and a text, one below the other. A long text continues below its beginning."""
    return "\n".join(wrap(text, f"{name:<{NAMES}}  ", " " * (NAMES + 2)) for name, text in rows.items())


def evaluation_line(row: dict[str, Any], max_iters: int, best: bool = False, reference: str = "") -> str:
    """An evaluation in one line: `100/600  val 2.330  3.36 bits/byte (best)  train 2.370  reference 2.330`.

    Args:
        row: of metrics.jsonl. It has no training loss at iteration 0. The line omits that loss if there is no room.
        reference: the reference run at this iteration, in words.
    """
    total = f"{max_iters:,}"
    beginning = [
        f"{row['iter']:>{len(total)},}/{total}",
        f"val {short_loss(row['val_loss'])}",
        f"{row['bits_per_byte']:.2f} bits/byte {'(best)' if best else '      '}",
    ]
    loss = row.get("train_loss")
    training = [] if loss is None else [f"train {short_loss(loss)}"]
    end = [reference] if reference else []
    line = "  ".join([*beginning, *training, *end]).rstrip()
    return line if len(line) <= WIDTH else "  ".join([*beginning, *end]).rstrip()


# ----------------------------------------------------------------------------------------------------------------------
# The progress bar of a run


class TrainingBar:
    """`100/600 |███▌           | loss 2.330  11,873 tokens/s  MFU 45%  1 min 20 s left`, only on a terminal.

    The time left is estimated from the median of the last iterations and from the last evaluation. So neither the first
    iteration, which may compile, nor a pause of the machine misleads it for long.
    """

    def __init__(self, cfg: TrainConfig, iter: int, is_main: bool):
        self.cfg, self.iter = cfg, iter
        self.recent: deque[float] = deque(maxlen=50)  # seconds of iterations
        self.evaluation_seconds, self.iterated = 0.0, time.perf_counter()
        # None: only where stderr is a terminal. Some terminals claim to have no rows, and tqdm would then show nothing
        hidden = None if is_main else True
        self.bar = tqdm(total=cfg.max_iters, initial=iter, disable=hidden, bar_format=" ", nrows=24)

    def iteration(self, loss: float, tokens_per_second: float, utilisation: str, seconds: float) -> None:
        """Advance by an iteration that took `seconds`."""
        self.iter, self.iterated = self.iter + 1, time.perf_counter()
        if self.bar.disable:
            return
        self.recent.append(seconds)
        left = f"{duration(self.seconds_left())} left"
        loss_text, rate = f"loss {short_loss(loss)}", short_rate(tokens_per_second)
        total = f"{self.cfg.max_iters:,}"
        head = f"{self.iter:>{len(total)},}/{total}"
        self.bar.ncols = terminal_width() - 1  # in the last column some terminals begin a new line
        for fields in ([loss_text, rate, utilisation, left], [loss_text, rate, left], [loss_text, left], [loss_text]):
            text = "  ".join(filter(None, fields))
            if len(f"{head} |***| {text}") <= self.bar.ncols:
                break
        self.bar.bar_format = f"{head} |{{bar}}| {text}"
        self.bar.update()

    def evaluated(self) -> None:
        """An evaluation, with its sample, pictures and checkpoints, ends now. It began after the last iteration."""
        self.evaluation_seconds = time.perf_counter() - self.iterated

    def seconds_left(self) -> float:
        left = self.cfg.max_iters - self.iter
        evaluations = -(-self.cfg.max_iters // self.cfg.eval_interval) - self.iter // self.cfg.eval_interval
        return statistics.median(self.recent) * left + self.evaluation_seconds * evaluations * (left > 0)

    def close(self) -> None:
        self.bar.close()


def terminal_width() -> int:
    """Columns of stderr's terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH
    except (OSError, ValueError):  # no terminal, no file at all
        return WIDTH


# ----------------------------------------------------------------------------------------------------------------------
# The next command


def command(script: str, preset: str, **flags: Any) -> str:
    """A command to paste into a shell. Flags that have the preset's value anyway are left out.

    `command("train.py", "demo", out_dir="my runs/1", resume=True)` gives
    `python train.py --preset demo --out-dir 'my runs/1' --resume`. A run that resumes takes its settings from last.pt,
    so then only the folder, which the preset names, can be left out.
    """
    usual, words = with_preset(COMMANDS[script], preset), []
    if preset != TrainConfig.preset:
        words += ["--preset", preset]
    for name, value in flags.items():
        flag = flag_of(name)
        if value is True:
            words.append(flag)
        elif value != getattr(usual, name) or (flags.get("resume") and name != "out_dir"):
            # A value that begins with a dash must not look like a flag
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return started_with(script, words)


def command_to_generate(best: Path, cfg: TrainConfig) -> str:
    """The command to try a model. The preset is only there for the path of its checkpoint."""
    checkpoint = best.as_posix()  # on Windows, too: like the preset's path
    usual = with_preset(GenerateConfig, cfg.preset).checkpoint
    preset = cfg.preset if checkpoint == usual else TrainConfig.preset
    prompt = cfg.sample_prompt
    if printable(prompt) != prompt:  # an escape must not reach the terminal
        prompt = ""
    return command("generate.py", preset, checkpoint=checkpoint, prompt=prompt or PROMPT)


def command_to_train(cfg: PrepareConfig) -> str:
    """The command to train on a prepared folder. If that is not the preset's, the checkpoints get their own folder."""
    own = cfg.data_dir != with_preset(PrepareConfig, cfg.preset).data_dir
    out_dir = {"out_dir": f"checkpoints/{Path(cfg.data_dir).resolve().name}"} if own else {}
    return command("train.py", cfg.preset, data_dir=cfg.data_dir, **out_dir)


def started_with(script: str, words: Iterable[str]) -> str:
    """The command line of a script. It starts train.py with torchrun if this process was started that way."""
    path = script if Path.cwd() == REPO else str(REPO / script)
    return f"{launcher() if script == 'train.py' else 'python'} {shell_join([path, *words])}"


def launcher() -> str:
    """`python`, or the torchrun that started several processes. On several machines each has its own --node-rank."""
    env = os.environ
    if env.get("WORLD_SIZE", "1") == "1" or "LOCAL_WORLD_SIZE" not in env:  # torchrun sets both
        return "python"
    processes, machines = env["LOCAL_WORLD_SIZE"], env.get("GROUP_WORLD_SIZE", "1")
    if machines == "1":
        return f"torchrun --standalone --nproc-per-node {processes}"
    place = f"--nnodes {machines} --node-rank {env['GROUP_RANK']} --nproc-per-node {processes}"
    return f"torchrun {place} --master-addr {env['MASTER_ADDR']} --master-port {env['MASTER_PORT']}"


def given_command(without: str) -> str:
    """The command line of this process without one flag. Without --check it starts the run itself."""
    return started_with(Path(sys.argv[0]).name, (word for word in sys.argv[1:] if word != without))
