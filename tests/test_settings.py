"""internals/settings.py: the config.json of a run repeats it; an edited one is checked."""

import json
import re

import pytest
from conftest import assert_user_error, run_script
from runs import assert_same_end, flags, run_command

from config import TrainConfig
from internals.cli import parse
from internals.settings import as_typed, with_settings_of
from internals.start import UserError

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_can_be_repeated_from_its_config_json(data_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_command(data_dir, first, *flags(data_dir, first, max_iters=5)[2:])
    run_command(data_dir, second, "--config", first / "config.json")
    assert_same_end(second, first)
    run_command(data_dir, tmp_path / "third", f"--config={first / 'config.json'}", "--seed", "7")
    changed = [json.loads((folder / "config.json").read_text()) for folder in (second, tmp_path / "third")]
    assert {name for name in changed[0] if changed[0][name] != changed[1][name]} == {"seed", "out_dir"}
    (tmp_path / "nonsense.json").write_text('{"colour": 1}')
    for file, words in (("nonsense.json", "not the config.json of a run"), ("missing.json", "there is no such file")):
        result = run_script("train.py", "--config", tmp_path / file)
        assert_user_error(result, "--config", file, words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("optimizer", "sgd", "--optimizer 'sgd': must be muon or adamw"),
        ("compile", True, "--compile True: must be auto or on or off"),
        ("max_iters", 1e4, "--max-iters 10000.0: must be a whole number"),
        ("batch_size", "all", "--batch-size 'all': must be a whole number or auto"),
        ("learning_rate", "high", "--learning-rate 'high': must be a number"),
        ("sample_prompt", 5, "--sample-prompt 5: must be text"),
        ("init_from", None, "--init-from None: must be text"),
        ("init_from", ["x"], "--init-from ['x']: must be text"),
        ("learning_rate", 10**400, ""),  # more than a float holds
    ],
)
def test_an_edited_config_file_is_checked(tmp_path, name, value, words):
    (tmp_path / "config.json").write_text(json.dumps({**TrainConfig().settings(), name: value}))
    with pytest.raises(UserError, match=f"not the config.json of a run .{re.escape(words)}"):
        with_settings_of(TrainConfig(), str(tmp_path / "config.json"))


def test_a_config_file_of_brackets_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"not the config.json of a run"):
        with_settings_of(TrainConfig(), str(tmp_path / "config.json"))


def test_a_config_file_that_does_not_fit_the_preset_is_refused(tmp_path):
    """It is taken into the preset's values, not into the defaults, where this one would fit."""
    (tmp_path / "config.json").write_text('{"model": {"n_embd": 510}}')
    with pytest.raises(UserError, match=r"not the config.json of a run .--n-head 4: must divide --n-embd 510"):
        parse(TrainConfig, "", ["--preset", "demo", "--config", str(tmp_path / "config.json")])


def test_an_edited_config_file_may_leave_min_lr_to_the_learning_rate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TrainConfig().settings(), "min_lr": None}))
    cfg = parse(TrainConfig, "", ["--config", str(tmp_path / "config.json"), "--learning-rate", "5e-3"])
    assert cfg.min_lr is None and cfg.final_lr == 5e-4


@pytest.mark.parametrize(
    ("value", "typed"),
    [(0.001234567, "0.001234567"), (1e-3 / 3, "0.0003333333333333333"), (4.0, "4"), (6e-4, "0.0006"), (None, "None")],
)
def test_a_setting_is_typed_with_all_its_digits(value, typed):
    assert as_typed(value) == typed
    assert value is None or float(typed) == value
