"""The command line comes from the dataclasses: every flag, default and comment appears once, and mistakes are named."""

import dataclasses
import inspect
import re
import typing

import pytest
from conftest import run_script, unboxed

from config import PRESETS, ExportConfig, GenerateConfig, ModelConfig, PrepareConfig, Preset, TrainConfig, unescape
from internals import cli, screen
from internals.cli import COMMANDS, parse, with_preset
from internals.run_length import resolve_auto
from internals.settings import differences, upgrade, with_settings
from internals.start import UserError


def flags(cls) -> dict[str, str]:
    """Each field's flag and its comment, read from the source without tyro."""
    found = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        for name in owner.__annotations__:
            if name == "model":
                found |= flags(ModelConfig)
            elif "Fixed" not in str(typing.get_type_hints(owner, include_extras=True)[name]):
                line = re.search(rf"^    {name}: [^#\n]*(?:  # (.*))?$", inspect.getsource(owner), re.M)
                found[name] = line[1]
    return found


@pytest.mark.parametrize("script", COMMANDS)
def test_help_shows_every_field_with_its_comment_and_default(script):
    shown = run_script(script, "--help")
    assert shown.returncode == 0, shown.stderr
    text = unboxed(shown.stdout)
    for name, comment in flags(COMMANDS[script]).items():
        assert comment, f"{name} has no comment on its line"
        flag = name.replace("_", "-")
        assert re.search(rf"--(no-)?{flag}\b", text), f"--{flag} is not in {script} --help"
        assert " ".join(comment.split()) in text, f"the comment of {name} is not in {script} --help"
    assert text.count("(default:") + text.count("(repeatable)") + text.count("(required)") >= len(
        flags(COMMANDS[script])
    )


def test_preparing_needs_no_torch_and_training_and_generating_no_datasets():
    code = (
        "import sys, prepare_data\nassert 'torch' not in sys.modules\n"
        "import train, generate\nassert 'datasets' not in sys.modules"
    )
    result = run_script("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_of_a_preset_is_a_field(preset):
    names = {f.name for cls in (*COMMANDS.values(), ModelConfig) for f in dataclasses.fields(cls)}
    assert set(PRESETS[preset]) <= names
    for cls in COMMANDS.values():
        assert with_preset(cls, preset).preset == preset


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default():
    plain = parse(TrainConfig, "", [])
    demo = parse(TrainConfig, "", ["--preset", "demo"])
    both = parse(TrainConfig, "", ["--preset=demo", "--learning_rate", "0.5", "--n-layer", "3"])
    assert (plain.model.n_layer, plain.out_dir) == (6, "checkpoints/wikipedia")
    assert (demo.model.n_layer, demo.out_dir) == (PRESETS["demo"]["n_layer"], "checkpoints/demo")
    assert (both.learning_rate, both.model.n_layer, both.data_dir) == (0.5, 3, "data/demo")


def test_the_default_shape_is_the_one_that_was_asked_for():
    model = TrainConfig().model
    assert (model.n_layer, model.n_head, model.n_embd, model.n_inner, model.block_size) == (6, 6, 384, 1536, 256)
    assert (TrainConfig().max_iters, TrainConfig().tokens_per_iter) == (16_000, 65_536)
    assert dataclasses.replace(model, vocab_size=50257).padded_vocab_size == 50304
    assert dataclasses.replace(model, vocab_size=64).padded_vocab_size == 64


@pytest.mark.parametrize(
    ("given", "meant"),
    [(r"\n", "\n"), (r"a\r\n\tb", "a\r\n\tb"), (r"\\n", r"\n"), (r"\x", r"\x"), ("\n", "\n"), ("\\", "\\")],
)
def test_escapes_on_the_command_line(given, meant):
    assert unescape(given) == meant == PrepareConfig(separator=given).separator_text


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1


@pytest.mark.parametrize(
    ("cls", "args", "words"),
    [
        (TrainConfig, ["--n-head", "5"], ["--n-head 5", "--n-embd 384"]),
        (TrainConfig, ["--dropout", "1.5"], ["--dropout 1.5"]),
        (TrainConfig, ["--dropout", "nan"], ["--dropout nan"]),
        (TrainConfig, ["--dropout", "1"], ["--dropout 1.0", "below 1"]),
        (TrainConfig, ["--beta1", "1"], ["--beta1 1.0", "below 1"]),
        (TrainConfig, ["--beta2", "1"], ["--beta2 1.0", "below 1"]),
        (TrainConfig, ["--batch-size", "0"], ["--batch-size 0"]),
        (
            TrainConfig,
            ["--tokens-per-iter", "65537"],
            ["--tokens-per-iter 65,537", "must be a multiple of 256", "give 65536 or 65792"],
        ),
        (TrainConfig, ["--learning-rate", "inf"], ["--learning-rate inf"]),
        (TrainConfig, ["--min-lr", "1"], ["--min-lr 1.0", "--learning-rate"]),
        (TrainConfig, ["--resume", "--overwrite"], ["--resume and --overwrite"]),
        (TrainConfig, ["--preset", "nonsense"], ["nonsense", "--preset"]),
        (TrainConfig, ["--bogus", "3"], ["--bogus"]),
        (TrainConfig, ["--vocab-size", "3"], ["--vocab-size"]),
        (TrainConfig, ["--n-layer", "x"], ["--n-layer"]),
        (TrainConfig, ["--device", "tpu"], ["tpu", "--device"]),
        (TrainConfig, ["--max-iters", "1e308"], ["--max-iters 1", "below 2^63"]),
        (TrainConfig, ["--tokens-per-iter", "1e308"], ["--tokens-per-iter 1", "below 2^63"]),
        (TrainConfig, ["--warmup-iters", "1e308"], ["--warmup-iters 1", "below 2^63"]),
        (TrainConfig, ["--muon-lr-scale", "1e308"], ["--muon-lr-scale 1e+308", "from 0 to 1e12"]),
        (GenerateConfig, ["--num-samples", "65537"], ["--num-samples 65537", "from 1 to 65,536"]),
        (PrepareConfig, ["--val-fraction", "1"], ["--val-fraction 1.0"]),
        (PrepareConfig, ["--source", ""], ["--source"]),
        (PrepareConfig, ["--max-tokens", "0"], ["--max-tokens 0"]),
        (PrepareConfig, ["--shard-tokens", "2147483648"], ["--shard-tokens 2147483648", "from 1 to 2^31 - 1"]),
    ],
)
def test_a_wrong_value_is_named_and_ends_with_status_2(cls, args, words, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(cls, "", args)
    assert exit.value.code == 2
    told = capsys.readouterr()
    text = unboxed(told.err)
    assert told.out == ""
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n_head", 5, "config.py: --n-head 5: must divide --n-embd 128"),
        ("optimizer", "sgd", "config.py: --optimizer 'sgd': must be muon or adamw"),
        ("tokens_per_iter", 1000, "config.py: --tokens-per-iter 1,000: must be a multiple of"),
    ],
)
def test_an_impossible_value_in_the_file_is_one_message(monkeypatch, name, value, words):
    monkeypatch.setitem(PRESETS["demo"], name, value)
    with pytest.raises(UserError, match=re.escape(words)):
        parse(TrainConfig, "", ["--preset", "demo"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_misspelt_key_of_a_preset_is_named_and_a_right_one_counts(monkeypatch, preset):
    monkeypatch.setitem(PRESETS[preset], "n_layer", 2)
    assert parse(TrainConfig, "", ["--preset", preset]).model.n_layer == 2
    monkeypatch.setitem(PRESETS[preset], "n_layers", 2)
    for cls in COMMANDS.values():
        with pytest.raises(UserError, match=rf"config.py: PRESETS\['{preset}'\]: there is no field n_layers"):
            parse(cls, "", ["--preset", preset])


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("epoch_tokens", [80_000, 10**9])
def test_every_preset_can_be_shared_out(preset, processes, epoch_tokens):
    cfg = resolve_auto(with_preset(TrainConfig, preset), epoch_tokens, processes).cfg
    size, steps = cfg.micro_batch_size(processes), cfg.accumulation_steps(processes)
    assert size * steps * processes * cfg.model.block_size == cfg.tokens_per_iter
    fits = lambda n: cfg.tokens_per_iter % (n * processes * cfg.model.block_size) == 0  # noqa: E731
    assert size == max(n for n in range(1, cfg.batch_size + 1) if fits(n))  # no smaller than necessary


def test_a_batch_size_shrinks_to_what_divides():
    expected = {
        "wikipedia": [64, 64, 32, 16],
        "wikipedia-150m": [8, 8, 8, 8],
        "laptop": [32, 16, 4, 2],
        "demo": [32, 16, 4, 2],
    }
    configs = {preset: resolve_auto(with_preset(TrainConfig, preset), 10**9).cfg for preset in expected}
    sizes = {preset: [cfg.micro_batch_size(n) for n in (1, 2, 8, 16)] for preset, cfg in configs.items()}
    assert sizes == expected
    assert TrainConfig(batch_size=100).micro_batch_size(1) == 64
    assert TrainConfig(batch_size=100).settings()["batch_size"] == 100  # the settings keep the value that the user gave


def test_what_follows_from_other_values():
    cfg = TrainConfig()
    assert cfg.accumulation_steps(processes=1) == 4
    assert cfg.accumulation_steps(processes=2) == 2
    with pytest.raises(ValueError, match=r"multiple of 768 \(--block-size 256 x 3 processes\); give 65280 or 66048"):
        cfg.accumulation_steps(processes=3)
    with pytest.raises(ValueError, match=r"give 131072$"):
        cfg.accumulation_steps(processes=512)
    assert cfg.warmup == 500
    assert TrainConfig(max_iters=60).warmup == 6
    assert PrepareConfig().held_out == 0.005
    assert PrepareConfig(source="sample").held_out == 0.1
    assert PrepareConfig(tokenizer="train").trained_size == 16_384
    assert PrepareConfig(source="sample", val_fraction=0.3).held_out == 0.3


def test_differences_count_what_the_older_side_lacks_as_its_default():
    now = dataclasses.asdict(TrainConfig(max_iters=100))
    then = dataclasses.asdict(TrainConfig())
    assert differences(then, now, then) == {"max_iters": (16_000, 100)}
    del then["seed"], then["model"]["dropout"]
    defaults = dataclasses.asdict(TrainConfig())
    assert differences(then, now, defaults) == {"max_iters": (16_000, 100)}
    now["model"]["dropout"], now["seed"] = 0.5, 7
    assert differences(then, now, defaults) == {"max_iters": (16_000, 100), "seed": (1337, 7), "dropout": (0.0, 0.5)}


def test_the_end_of_the_cosine_follows_the_learning_rate_unless_it_is_given():
    assert TrainConfig().final_lr == 4e-4
    for args in (["--lr", "1e-5"], ["--learning-rate=1e-5"]):
        assert parse(TrainConfig, "", args).final_lr == pytest.approx(1e-6)
    assert parse(TrainConfig, "", ["--lr", "1e-2", "--min-lr", "0"]).final_lr == 0.0
    assert parse(TrainConfig, "", ["--preset", "demo", "--lr", "1e-3"]).final_lr == pytest.approx(1e-4)


def test_whole_numbers_may_be_written_with_an_exponent(capsys):
    assert parse(TrainConfig, "", ["--max-iters", "1e6"]).max_iters == 1_000_000
    assert parse(PrepareConfig, "", ["--max-tokens", "1.2e9"]).max_tokens == 1_200_000_000
    assert parse(PrepareConfig, "", ["--max-tokens", "1_000"]).max_tokens == 1_000
    assert parse(PrepareConfig, "", ["--workers", "5.0"]).workers == 5
    for value in ("1.5", "1.5e0", "e6", "nan", "inf", "1,000", "1.000"):
        with pytest.raises(SystemExit):
            parse(TrainConfig, "", ["--max-iters", value])
        err = unboxed(capsys.readouterr().err)
        assert "--max-iters" in err and f"'{value}' is not a whole number, such as 1000 or 1e3" in err


@pytest.mark.parametrize(
    ("cls", "flag", "value", "words"),
    [
        (TrainConfig, "--max-minutes", "1h", "'1h' is not a number, such as 0.5, nor None"),
        (TrainConfig, "--dropout", "10%", "'10%' is not a number, such as 0.5, nor auto"),
        (TrainConfig, "--grad-clip", "1,5", "'1,5' is not a number, such as 0.5"),
        (PrepareConfig, "--max-tokens", "1.2B", "'1.2B' is not a whole number, such as 1000 or 1e3, nor None"),
    ],
)
def test_a_value_that_is_no_number_is_told_in_one_sentence(capsys, cls, flag, value, words):
    with pytest.raises(SystemExit):
        parse(cls, "", [flag, value])
    assert f"Error parsing {flag}: {words}" in unboxed(capsys.readouterr().err)


def test_a_word_in_place_of_a_number_may_be_written_in_any_case():
    assert parse(TrainConfig, "", ["--batch-size", "Auto", "--max-minutes", "none"]).batch_size == "auto"
    assert parse(TrainConfig, "", ["--max-minutes", "2", "--dropout", "auto"]).max_minutes == 2.0
    assert parse(GenerateConfig, "", ["--top-k", "none"]).top_k is None


@pytest.mark.parametrize(
    ("cls", "args", "hint"),
    [
        (TrainConfig, ["\u2013preset", "demo"], "\u2013preset: a flag begins with two plain hyphens: --preset"),
        (TrainConfig, ["-preset", "demo"], "-preset: a flag begins with two plain hyphens: --preset"),
        (TrainConfig, ["--resume", "True"], "--resume takes no value: give it alone, or leave it out"),
        (TrainConfig, ["--eval_only=False"], "--eval-only takes no value: give it alone, or leave it out"),
        (TrainConfig, ["--eval_iters=20"], "--eval-iters is called otherwise here: --eval-tokens"),
        (TrainConfig, ["--checkpoint", "a"], "--checkpoint is called otherwise here: --out-dir, or --init-from"),
        (GenerateConfig, ["--start=Once"], "--start is called otherwise here: --prompt; for a file, --prompt - < FILE"),
        (GenerateConfig, ["--prompt", "-x"], "a value that begins with a hyphen needs an equals sign: --prompt=-x"),
        (GenerateConfig, ["--top-k", "many"], None),
        (TrainConfig, ["--max-iters", "-5"], None),
    ],
)
def test_a_refused_command_line_gets_a_hint(capsys, monkeypatch, cls, args, hint):
    for rank in ("0", "1"):  # torchrun's other processes say nothing
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(cli, "first_process_has_spoken", lambda seconds: True)
        with pytest.raises(SystemExit):
            parse(cls, "", args)
        found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
        assert found == ([f"hint: {hint}"] if hint and rank == "0" else [])


def test_a_new_preset_whose_type_does_not_name_it_is_told_so(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", {"n_layer": 2})
    with pytest.raises(
        UserError, match=r"^config\.py: --preset 'tiny': must be .*; add a new preset's name to the type of Preset"
    ):
        parse(TrainConfig, "", ["--preset", "tiny"])


def test_a_home_folder_is_expanded_and_an_empty_path_refused(monkeypatch, capsys):
    for name in ("HOME", "USERPROFILE"):  # Windows reads the latter
        monkeypatch.setenv(name, "/home/somebody")
    assert parse(TrainConfig, "", ["--out-dir=~/run"]).out_dir == "/home/somebody/run"
    assert parse(PrepareConfig, "", ["--data-dir=~/data"]).data_dir == "/home/somebody/data"
    assert parse(GenerateConfig, "", ["--checkpoint=~/best.pt"]).checkpoint == "/home/somebody/best.pt"
    assert parse(TrainConfig, "", ["--init-from=~/gpt2"]).init_from == "/home/somebody/gpt2"
    for cls, flag in ((TrainConfig, "--out-dir"), (TrainConfig, "--data-dir"), (PrepareConfig, "--data-dir"),
                      (GenerateConfig, "--checkpoint"), (ExportConfig, "--out-dir")):  # fmt: skip
        with pytest.raises(SystemExit) as exit:
            parse(cls, "", [flag, ""])
        assert exit.value.code == 2 and "not empty" in unboxed(capsys.readouterr().err)


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig])
@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_are_refused_alike(cls, seed, capsys):
    with pytest.raises(SystemExit):
        parse(cls, "", ["--seed", seed])
    assert "below 2^63" in unboxed(capsys.readouterr().err)


def test_settings_of_an_earlier_version_get_their_names_of_today():
    """Muon's learning rate was a number of its own; now it is a multiple of the learning rate. Before there was a choice
    of Muon's momentum, all runs had the same."""
    old = {"learning_rate": 3e-3, "muon_learning_rate": 0.012, "optimizer": "muon"}
    same = {"learning_rate": 3e-3, "muon_momentum": 0.95}
    assert upgrade(old) == {**same, "muon_lr_scale": pytest.approx(4), "optimizer": "muon"}
    assert upgrade({"learning_rate": 3e-3}) == {**same, "optimizer": "adamw"}
    now = TrainConfig(muon_momentum=0.9)
    before = {name: value for name, value in now.settings().items() if name != "muon_momentum"}
    assert with_settings(now, before).muon_momentum == 0.95


def test_the_folders_follow_from_the_preset():
    for cls, name, value in (
        (TrainConfig, "out_dir", "checkpoints/{}"),
        (GenerateConfig, "checkpoint", "checkpoints/{}/best.pt"),
        (ExportConfig, "checkpoint", "checkpoints/{}/best.pt"),
    ):
        for preset in PRESETS:
            assert getattr(with_preset(cls, preset), name) == value.format(preset)


def test_the_default_preset_can_be_edited(monkeypatch):
    monkeypatch.setattr(Preset, "preset", "demo")
    for cls in COMMANDS.values():
        required = ["--out-dir", "x"] if cls is ExportConfig else []
        assert parse(cls, "", required) == parse(cls, "", [*required, "--preset", "demo"])
    assert parse(TrainConfig, "", ["--preset", "wikipedia"]).out_dir == "checkpoints/wikipedia"
    assert "--preset" not in screen.command("train.py", "demo", resume=True)
    monkeypatch.setattr(Preset, "preset", "damo")
    with pytest.raises(UserError, match=r"config.py: --preset 'damo': must be wikipedia or"):
        parse(TrainConfig, "", [])
