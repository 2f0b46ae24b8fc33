"""Several processes in one run: joining those that torchrun started, and ending when one of them ends.

Gradients travel by NCCL, from GPU to GPU. Everything else travels by gloo, from CPU to CPU: it does not wait for a GPU,
and it stops waiting when a process has died.
"""

import atexit
import contextlib
import importlib
import os
import selectors
import socket
import threading
from typing import Any

import torch
import torch.distributed as dist

from internals.settings import as_typed
from internals.start import FIRST_PROCESS_ENDED, UserError

LOST_PROCESS = (
    "another process of this run ended, so this one ends too. What it printed, perhaps on another machine, says why; if "
    "training had begun, continue with --resume"
)
# Seconds for a process to end by itself after another one has ended. More than the seconds for which a process lets
# process 0 speak first (internals/start.py).
GRACE = 5
LAST_PORT = 65535
WRITING = threading.Lock()  # held while checkpoints are written; the end of another process must not interrupt that


def place_among_processes() -> tuple[int, int]:
    """(rank, number of processes), from torchrun's environment variables; (0, 1) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return 0, 1
    faults = [f"no {name}" for name in names if not given.get(name)]
    faults += [f"{name} is not a number" for name in names[:4] if given.get(name) and not given[name].isdecimal()]
    if not faults and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        faults.append("RANK is not below WORLD_SIZE")
    if not faults and int(given["MASTER_PORT"]) > LAST_PORT:
        faults.append(f"MASTER_PORT is above {LAST_PORT}")
    if faults:
        raise UserError(
            f"the environment has {' '.join(f'{name}={value}' for name, value in given.items())}, but "
            f"{' and '.join(faults)}; start several processes with torchrun, or unset these for one"
        )
    return int(given["RANK"]), int(given["WORLD_SIZE"])


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started. Returns this process's own device."""
    if device.type == "mps":
        raise UserError("--device mps: several processes need cuda or cpu")
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node: process {local_rank + 1} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes"
            )
        if not dist.is_nccl_available():
            raise UserError("several GPUs need NCCL, which PyTorch has on Linux alone; on Windows, use WSL")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # torch.distributed.nn.functional stores the process group of the moment in default arguments. PyTorch would import
    # it later by itself: the group would never be freed, and its threads may abort the process while Python shuts down.
    # Imported now, the module stores none.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    Watch.start()
    return device


def require_same(values: dict[str, Any]) -> None:
    """Raise UserError if another process has other values. Each machine has its own command line, config.py and data.
    Their gradients would be added up, but every process would go its own way, or wait for ever."""
    everyone = [values] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for other in everyone:
        if changed := [name for name, value in values.items() if value != other[name]]:
            found = ", ".join(f"{name}: {as_typed(values[name])} and {as_typed(other[name])}" for name in changed)
            raise UserError(f"the processes differ ({found}); give all machines the same command, config.py and data")


def leave_processes() -> None:
    """End a run that went well. Waits for all processes, which may not come here after a failure."""
    if dist.is_initialized():
        any_process(False)
        Watch.stop()
        dist.destroy_process_group()


def any_process(value: bool) -> bool:
    """Whether `value` is true in any process. Waits for the other processes, not for the device."""
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def is_failed_exchange(error: RuntimeError) -> bool:
    """NCCL and the store have their own exceptions for this. Gloo raises a RuntimeError that names its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def why_exchange_failed(error: RuntimeError) -> str:
    """Another process has ended, or this machine's network, NCCL or shared memory is not as they need it."""
    if FIRST_PROCESS_ENDED.is_set() or (Watch.current and Watch.current.one_ended.wait(1)):
        return LOST_PROCESS
    *_, reason = str(error).strip().splitlines() or [type(error).__name__]  # NCCL puts it last
    return f"the processes cannot exchange data ({reason}); see docs/training.md, Several GPUs"


class Watch:
    """Ends this process when another one of the run has ended too early.

    A process whose GPU waits for a dead one's gradients sits in a call that neither an exception nor a signal reaches.
    NCCL itself gives up after 30 minutes, torchrun after 30 seconds. So a thread watches: every process has a
    connection to process 0, and the system closes it when the process dies, unless its machine loses power or
    network. Nothing is sent on it, so a process that is merely slow or stopped is never taken for dead. When one
    connection closes, process 0 closes all of them, and so tells the others.
    """

    current: "Watch | None" = None  # one per process, like PyTorch's process group

    @classmethod
    def start(cls) -> None:
        cls.current = cls(connect_to_first())
        atexit.register(cls.stop)  # after a failure, the others learn of it before Python's slow shutdown

    @classmethod
    def stop(cls) -> None:
        """Stop watching, because this process ends. The others end too, or learn of it now: its connections close."""
        cls.current.over.set()
        cls.current.close()
        cls.current.thread.join()

    def __init__(self, connections: list[socket.socket]):
        self.connections, self.over, self.one_ended = connections, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # the other side has closed it
                connection.shutdown(socket.SHUT_RDWR)  # wakes the waiting thread; closing would not

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self.connections:
                selector.register(connection, selectors.EVENT_READ)
            selector.select()
        self.one_ended.set()
        if int(os.environ["RANK"]) > 0:
            FIRST_PROCESS_ENDED.set()
        self.close()
        if self.over.wait(GRACE):
            return
        with WRITING:
            if int(os.environ["RANK"]) == 0:
                os.write(2, f"\nerror: {LOST_PROCESS}\n".encode())
            os._exit(2)


def connect_to_first() -> list[socket.socket]:
    """In process 0, connections to all others; in the others, one to process 0."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    port: list[Any] = [None]
    try:
        if rank > 0:
            dist.broadcast_object_list(port)
            return [socket.create_connection((os.environ["MASTER_ADDR"], port[0]), timeout=60)]
        dual = socket.has_dualstack_ipv6()  # a free port, for IPv4 and IPv6 if the system has both
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=processes, dualstack_ipv6=dual) as server:
            server.settimeout(60)
            port[0] = server.getsockname()[1]
            dist.broadcast_object_list(port)
            return [server.accept()[0] for _ in range(1, processes)]
    except OSError as error:
        raise UserError(
            f"process {rank} cannot connect to process 0 at {os.environ['MASTER_ADDR']}:{port[0]} ({error}); "
            "let the machines reach each other on all ports"
        ) from error
