"""Code that several benchmarks share.

Importing this module puts the repository's root at the front of the path, so that `train` and `generate` are the
commands and not the benchmarks of the same names. Import it before them.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


def load_nanogpt(folder: str) -> ModuleType:
    """model.py of a checkout of nanoGPT, under another name than our own model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module
