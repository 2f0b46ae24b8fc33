"""The reference run of a preset: sample/PRESET.json, written by benchmarks/reference.py and shown beside your run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import NOT_SETTINGS, TrainConfig
from internals.cli import with_preset
from internals.run import describe_data
from internals.screen import short_loss
from internals.settings import differences, upgrade

REFERENCES = Path(__file__).resolve().parents[1] / "sample"
# Settings that do not change how the loss falls: where and how a run computes, what it shows and when. The seed changes
# it a little, and a reference has one seed.
NOT_LEARNING = {
    *NOT_SETTINGS, "device", "dtype", "compile", "batch_size", "log_interval", "eval_interval", "checkpoint_interval",
    "sample_prompt", "seed", "tracker",
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A run with the settings of this one, on the same text or on another."""

    losses: dict[int, float]  # by iteration, in nats per token; for another text, at equal bits per byte
    bits_per_byte: dict[int, float]
    same_text: bool
    description: str  # of that run: its text, machine, seed and date

    @property
    def label(self) -> str:
        return "reference" if self.same_text else "reference, other articles"

    @property
    def summary(self) -> str:
        """The reference in words, for the start-up summary."""
        if self.same_text:
            return f"{self.description}; its losses are printed next to yours"
        return f"{self.description}, on other articles; its bits per byte are printed next to yours"

    def beside(self, iter: int) -> str:
        """The reference at an iteration, for the line of an evaluation. Two texts compare only in bits per byte."""
        if iter not in self.losses:
            return ""
        figure = short_loss(self.losses[iter]) if self.same_text else f"{self.bits_per_byte[iter]:.2f}"
        return f"{self.label} {figure}"


def find_reference(cfg: TrainConfig, meta: dict[str, Any]) -> Reference | None:
    """The preset's reference, if every setting that decides how the loss falls is the same. `meta` is the data's."""
    path = REFERENCES / f"{cfg.preset}.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    preset = with_preset(TrainConfig, cfg.preset).settings()
    changed = differences(upgrade(saved["settings"]), cfg.settings(), preset)
    if changed.keys() - NOT_LEARNING:
        return None
    same_text, scale = saved["data_sha256"] == describe_data(meta)["sha256"], bits_per_nat(meta)
    losses, bits = ({int(iter): value for iter, value in saved[name].items()} for name in ("val_loss", "bits_per_byte"))
    if not same_text:
        losses = {iter: value / scale for iter, value in bits.items()}
    text = "" if same_text else f"{saved['text']}, "
    return Reference(losses, bits, same_text, f"{text}{saved['hardware']}, seed {saved['seed']}, {saved['date']}")


def bits_per_nat(meta: dict[str, Any]) -> float:
    """Bits per byte of a loss of one nat per token. The bytes per token are the mean of the whole validation split."""
    split = meta["splits"]["val"]
    return split["tokens"] / split["bytes"] / math.log(2)
