"""benchmarks/race.py and train.py: equal work for each competitor, and figures that are what they say."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, load_benchmark, write_data
from tiny_nanogpt import SHAPE, write_nanogpt
from torch.nn import functional as F

import train
from config import TrainConfig
from internals.cli import parse

sys.path.append(str(REPO / "benchmarks"))
import race


@pytest.mark.parametrize("batch_size", ["3", "auto"])
def test_nanogpts_step_is_a_plain_one_on_the_tokens_that_are_printed(tmp_path, monkeypatch, batch_size):
    data = str(write_data(tmp_path / "data", train_tokens=4_000))
    cfg = parse(TrainConfig, "", [*SHAPE.split(), "--data-dir", data, "--batch-size", batch_size, "--max-iters", "1"])
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=257))
    nanogpt = write_nanogpt(tmp_path / "nanogpt")
    runner = race.NanoGPT(str(nanogpt), "nanoGPT", cfg, race.read_text(data, None))
    read, loss = [], runner.loss
    monkeypatch.setattr(runner, "loss", lambda forward, batch: (read.append(batch), loss(forward, batch))[1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    runner.optimizer.zero_grad = lambda **_: None  # keeps the gradient
    weight = runner.model.wte.weight.detach().clone().requires_grad_()
    runner.step(0)
    tokens = torch.from_numpy(np.concatenate(read))
    assert tokens[:, 1:].numel() == cfg.tokens_per_iter
    logits = weight[tokens[:, :-1]] @ weight.T
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(runner.model.wte.weight.grad, weight.grad)
    assert runner.optimizer.param_groups[0]["lr"] == train.get_lr(0, cfg)


def test_a_race_says_in_bits_per_byte_who_overtakes_whom(capsys):
    text = race.Text(None, None, 257, bytes_per_token=4.0)
    assert text.bits(2.0) == pytest.approx(2.0 / math.log(2) / 4)
    points = {"nanoGPT seed 1": ((10.0, 3.0), (20.0, 2.0)), " seed 1": ((5.0, 2.5), (8.0, 1.5))}
    curves = {name: [race.Point(0, *point) for point in curve] for name, curve in points.items()}
    race.print_overtaking(curves, dict.fromkeys(curves, text))
    assert "in 8 s, 0.400 of its time; -0.1803 at its end" in capsys.readouterr().out


def test_the_speed_is_the_median_and_the_ratios_say_how_many_times(monkeypatch):
    module = load_benchmark("train")
    turns = iter([module.Turn(1.0, 0.1, 4.0), module.Turn(9.0, 0.9, 40.0), module.Turn(2.0, 0.2, 8.0)])

    class Competitor:
        def __init__(self, name, *_):
            self.name = name

        def turn(self):
            return next(turns)

        def end(self):
            return 7

    monkeypatch.setattr(module, "Competitor", Competitor)
    measured = module.measure(["ours"], module.Comparison(rounds=3, tokens_per_iter=1024), None)
    assert measured == {"ours": module.Result(128.0, 7, 2.0, 0.2)}
    results = {"ours": module.Result(3000.0, 2**30, 0.5, 0.1), "peer": module.Result(1500.0, 2**31, 1.0, 0.2)}
    ours, peer = (line.split() for line in module.table(results).splitlines()[1:])
    assert ours == ["ours", "3,000", "1.00x", "1,024", "1.00x", "0.500", "0.100"]
    assert peer == ["peer", "1,500", "2.00x", "2,048", "0.50x", "1.000", "0.200"]
