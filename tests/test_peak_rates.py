"""internals/device.py: the peak rates of GPUs, calculated from cores and clock rates."""

import pytest

from internals.device import PEAK_FLOPS

TURING, AMPERE_OR_ADA = 8, 4  # 16-bit FLOP that the tensor cores do for each CUDA core and clock, with 32-bit sums


@pytest.mark.parametrize(
    ("card", "cores", "boost", "per_core"),
    [
        ("RTX 2070", 2304, 1.620e9, TURING),
        ("RTX 2080", 2944, 1.710e9, TURING),
        ("RTX 2080 Ti", 4352, 1.545e9, TURING),
        ("RTX 3060", 3584, 1.777e9, AMPERE_OR_ADA),
        ("RTX 3070", 5888, 1.725e9, AMPERE_OR_ADA),
        ("RTX 3080", 8704, 1.710e9, AMPERE_OR_ADA),
        ("RTX 4060", 3072, 2.460e9, AMPERE_OR_ADA),
        ("RTX 4070", 5888, 2.475e9, AMPERE_OR_ADA),
        ("RTX 4070 Ti", 7680, 2.610e9, AMPERE_OR_ADA),
        ("RTX 4080", 9728, 2.505e9, AMPERE_OR_ADA),
        ("RTX 4090", 16384, 2.520e9, AMPERE_OR_ADA),
    ],
)
def test_the_peak_of_a_geforce_card_follows_from_its_cores_and_its_clock(card, cores, boost, per_core):
    assert PEAK_FLOPS[f"NVIDIA GeForce {card}"] == pytest.approx(cores * boost * per_core, rel=0.003)


@pytest.mark.parametrize(("form", "boost"), [("PCIE", 1.370e9), ("SXM2", 1.530e9)])
@pytest.mark.parametrize("memory", ["16GB", "32GB"])
def test_the_peak_of_a_v100_follows_from_its_tensor_cores_and_its_clock(form, boost, memory):
    flops = 640 * 64 * 2 * boost  # 64 products and sums for each tensor core and clock
    assert PEAK_FLOPS[f"Tesla V100-{form}-{memory}"] == pytest.approx(flops, rel=0.003)
