"""internals/windows.py: the order in which training and evaluation visit the tokens."""

import numpy as np
import pytest
from conftest import random_tokens

from internals.start import UserError
from internals.windows import TokenStream, TrainingWindows, ValidationWindows


def test_a_stream_reads_across_shards(tmp_path):
    tokens = random_tokens(250)
    stream = TokenStream([tokens[:100], tokens[100:200], tokens[200:]])
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, end = sorted(rng.integers(0, 251, 2))
        if end > start:
            assert np.array_equal(stream.read(start, end - start), tokens[start:end])


def test_every_epoch_visits_every_window_once():
    stream = TokenStream([np.arange(1000, dtype=np.uint16)])
    windows = TrainingWindows(stream, block_size=16, seed=7)
    orders = []
    for epoch in range(3):
        numbers = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        starts = [windows.start(n) for n in numbers]
        offset = min(starts)
        assert 0 <= offset < 16
        assert sorted(starts) == list(range(offset, offset + 16 * windows.per_epoch, 16))
        assert max(starts) + 17 <= 1000
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2]
    assert len({min(starts) for starts in orders}) > 1


def test_the_order_is_a_pure_function_of_seed_and_number():
    stream = TokenStream([random_tokens(5000)])
    all_of_them = TrainingWindows(stream, 16, seed=1).batch(range(700))
    for ranks in (2, 4):  # 700 windows are more than two epochs; the order of the calls does not matter
        for rank in reversed(range(ranks)):
            windows = TrainingWindows(stream, 16, seed=1)
            assert np.array_equal(windows.batch(range(rank, 700, ranks)), all_of_them[rank::ranks])
    assert not np.array_equal(TrainingWindows(stream, 16, seed=2).batch(range(20)), all_of_them[:20])


def test_the_order_never_changes():
    """A run that an earlier version began must read on at the same place. NumPy keeps this generator's numbers."""
    windows = TrainingWindows(TokenStream([np.arange(1000, dtype=np.uint16)]), block_size=16, seed=1337)
    assert [windows.start(n) for n in range(5)] == [88, 536, 712, 24, 824]
    assert [windows.start(windows.per_epoch + n) for n in range(5)] == [675, 739, 403, 355, 803]


def test_a_window_is_its_inputs_and_targets():
    stream = TokenStream([np.arange(200, dtype=np.uint16)])
    batch = TrainingWindows(stream, 16, seed=0).batch(range(5))
    assert batch.shape == (5, 17) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all()


def test_validation_windows():
    stream = TokenStream([np.arange(1000, dtype=np.uint16)])
    everything = ValidationWindows(stream, 16, eval_tokens=10_000)
    assert len(everything) == (1000 - 1) // 16
    assert np.array_equal(everything.batch(0, 62)[:, :-1].ravel(), np.arange(62 * 16))
    some = ValidationWindows(stream, 16, eval_tokens=160)
    batch = some.batch(0, len(some))
    assert batch.shape == (10, 17)
    assert batch[0, 0] == 0 and batch[-1, 0] > 800  # from the whole split, not only from its beginning
    assert np.array_equal(np.concatenate([some.batch(0, 3), some.batch(3, 10)]), batch)


@pytest.mark.parametrize("eval_tokens", [160, 16 * 40, 16 * 61])
def test_validation_windows_are_spread_over_the_whole_split(eval_tokens):
    some = ValidationWindows(TokenStream([np.arange(1000, dtype=np.uint16)]), 16, eval_tokens)
    starts = some.batch(0, len(some))[:, 0]
    assert len(some) == eval_tokens // 16 and starts[0] == 0
    gaps = np.diff([*starts, 62 * 16]) // 16  # the split holds 62 windows
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="--block-size"):
        TrainingWindows(TokenStream([random_tokens(16)]), 16, seed=0)
    with pytest.raises(UserError, match="--val-fraction"):
        ValidationWindows(TokenStream([random_tokens(16)]), 16, eval_tokens=100)


def test_eval_tokens_are_an_upper_bound():
    stream = TokenStream([random_tokens(100)])
    assert len(ValidationWindows(stream, 16, eval_tokens=31)) == 1
    with pytest.raises(UserError, match="--eval-tokens 15: must hold at least one window of --block-size 16"):
        ValidationWindows(stream, 16, eval_tokens=15)


def test_a_token_that_the_vocabulary_lacks_is_a_damaged_shard():
    tokens = np.arange(100, dtype=np.uint16)
    tokens[70] = 300
    stream = TokenStream([tokens], vocab_size=300, name="data/mine")
    windows = ValidationWindows(stream, block_size=16, eval_tokens=1000)
    windows.batch(0, 4)
    with pytest.raises(UserError, match=r"data/mine: has token 300, but a vocabulary of 300, .* --check with the same"):
        windows.batch(4, 5)
