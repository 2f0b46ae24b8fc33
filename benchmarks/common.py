"""Code that several benchmarks share.

Importing this module puts the repository's root at the front of the path, so that `train` and `generate` are the
commands and not the benchmarks of the same names. Import it before them.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


def training_model(model: Any, cfg: Any, machine: Any) -> Callable:
    """The function of `train.training_model`.

    Raises:
        UserError: compiling failed. `train.py` then continues without, but its figures would be taken for compiled ones.
    """
    import train  # imported here: only now is the root on the path
    from internals.start import UserError

    forward, compiling = train.training_model(model, cfg, machine)
    if compiling.startswith("off, "):  # and a reason
        raise UserError(f"--compile {cfg.compile}: {compiling}")
    return forward


def nanogpt_model(folder: str, shape: Any) -> Any:
    """The model of a checkout of nanoGPT in the shape of a `ModelConfig`, without dropout and biases, as its train.py makes it."""
    # Under another name than our own model.py
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, block_size=shape.block_size,
        vocab_size=shape.padded_vocab_size, dropout=0.0, bias=False,
    )  # fmt: skip
    return module.GPT(config)


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """The seconds that a call takes. Waits for a GPU if `device` is cuda."""
    begin = time.perf_counter()
    function()
    if device == "cuda":
        import torch  # imported here: some benchmarks need none

        torch.cuda.synchronize()
    return time.perf_counter() - begin
