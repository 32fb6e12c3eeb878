"""The process group: opened once at the edge, passed in everywhere, closed at the end.

NCCL on CUDA, gloo on CPU. Rank, world size and address come from the environment that torchrun sets
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Ranks that share one device, or CPU ranks,
use gloo; NCCL needs a GPU of its own for every rank.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # not after a group is open, which it would keep in defaults of its functions

from semmoe.profiles.errors import InputError
from semmoe.runtime.ranks.failures import ExchangeError, is_out_of_memory, naming, short_reason
from semmoe.runtime.ranks.watch import open_store

BACKENDS = ("auto", "nccl", "gloo")

Shared = TypeVar("Shared")


@dataclass(eq=False)
class Group:
    """This process in the group of all ranks. `handle` is there until the group is closed."""

    rank: int
    size: int
    device: torch.device
    backend: str
    handle: dist.ProcessGroup


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: `device` is "auto", "cpu", "cuda" or "cuda:N". Raises InputError
    where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {device}: this machine has no GPU that PyTorch can use")
        index = local_rank % torch.cuda.device_count() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    return chosen


def choose_backend(backend: str, device: torch.device, local_size: int) -> str:
    """nccl or gloo. Raises InputError for NCCL without a GPU for each of this machine's
    `local_size` ranks."""
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend}: expected one of {', '.join(BACKENDS)}")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if backend == "nccl":
        if device.type != "cuda" or not dist.is_nccl_available():
            raise InputError("--backend nccl needs GPUs and a PyTorch with NCCL: on CPUs use --backend gloo")
        if local_size > gpus:
            raise InputError(f"--backend nccl: {local_size} ranks on this machine, but {gpus} GPUs: one rank per GPU")
    if backend == "auto":
        return "nccl" if device.type == "cuda" and local_size <= gpus and dist.is_nccl_available() else "gloo"
    return backend


def check_group(device: str, backend: str, num_ranks: int) -> None:
    """Raise InputError where this machine has not what that many ranks need."""
    choose_backend(backend, choose_device(device, 0), num_ranks)


def read_environment() -> tuple[int, int, int, int]:
    """Rank, world size, rank on this machine and ranks on this machine. Raises InputError
    outside torchrun."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise InputError("RANK and WORLD_SIZE are not set: start the ranks with torchrun, or with --nproc") from None
    return rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))


@contextmanager
def open_group(*, backend: str = "auto", device: str = "auto", timeout_s: float = 300.0) -> Iterator[Group]:
    """The group of all ranks; a collective that waits longer than `timeout_s` seconds raises.

    Raises InputError on every rank where one lacks the device or the backend. Running out of memory
    inside the block becomes one line that names the rank.
    """
    rank, size, local_rank, local_size = read_environment()
    chosen, refusal = torch.device("cpu"), ""
    try:
        chosen = choose_device(device, local_rank)
        backend = choose_backend(backend, chosen, local_size)
    except InputError as error:
        refusal = str(error)
    store = meet(rank, size, refusal, timeout_s)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # kernels, events and streams of libraries follow the current device
    if backend == "nccl":
        options["device_id"] = chosen
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"rank {rank} cannot join the group of {size}: {short_reason(str(error))}") from None
    assert dist.group.WORLD is not None, "init_process_group has just made it"
    group = Group(rank, size, chosen, backend, dist.group.WORLD)
    try:
        yield group
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"rank {rank} is out of memory: {short_reason(str(error))}") from error
    # Not after an exception: with peers gone, an orderly end can block.
    dist.destroy_process_group()
    # The placed model keeps the Group for good, and gloo's threads are to be gone before the
    # interpreter is: one that gives up a tensor then aborts the process (PyTorch's issue 190489).
    del group.handle


def meet(rank: int, size: int, refusal: str, timeout_s: float) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The store of all ranks, once every rank is there. Raises InputError on all of them
    with the `refusal` of one ("": none), ExchangeError where a rank does not come in time.

    Looks now and then in place of one long wait, so that a signal can end it.
    """
    end, keys = time.monotonic() + timeout_s, [f"ready/{each}" for each in range(size)]
    with naming(rank, "the meeting of all ranks"):
        store = open_store("group", timeout_s)
        store.set(keys[rank], refusal)
        while not store.check(keys):
            if time.monotonic() > end:
                missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
                raise ExchangeError(f"rank {rank} waited {timeout_s:g} s for rank {', '.join(missing)} to start")
            time.sleep(0.02)
        refusals = [told.decode() for told in store.multi_get(keys)]
    if told := [each for each in refusals if each]:
        raise InputError(told[0])
    return store


def share(make: Callable[[], Shared], group: Group) -> Shared:
    """What `make` returns on rank 0, on every rank; any picklable object. Its InputError is
    raised on every rank."""
    shared: list[Any] = [None, ""]
    if group.rank == 0:
        try:
            shared = [make(), ""]
        except InputError as error:
            shared = [None, str(error)]
    device = group.device if group.backend == "nccl" else None
    with naming(group.rank, "the exchange of what rank 0 has read"):
        dist.broadcast_object_list(shared, src=0, group=group.handle, device=device)
    value, refusal = shared
    if refusal:
        raise InputError(refusal)
    return value


def hand_out(make: Callable[[], list[Shared]], group: Group) -> Shared:
    """Of what `make` returns on rank 0, picklable and one for each rank, this rank's own. Its
    InputError is raised on every rank."""
    parts: list[Any] | None = None
    if group.rank == 0:
        try:
            parts = [(part, "") for part in make()]
        except InputError as error:
            parts = [(None, str(error))] * group.size
    own: list[Any] = [None]
    with naming(group.rank, "the exchange of what rank 0 has read"):
        dist.scatter_object_list(own, parts, src=0, group=group.handle)
    part, refusal = own[0]
    if refusal:
        raise InputError(refusal)
    return part


def together(make: Callable[[], Shared], group: Group) -> Shared:
    """What `make` returns on this rank, once it has returned on all of them.

    `make` must not need the others. The InputError of one rank is raised on every rank.
    """
    made, refusal = None, ""
    try:
        made = make()
    except InputError as error:
        refusal = str(error)
    refusals = [""] * group.size
    with naming(group.rank, "the agreement that all ranks are ready"):
        dist.all_gather_object(refusals, refusal, group=group.handle)
    if told := [each for each in refusals if each]:
        raise InputError(told[0])
    return made  # pyright: ignore
