"""What can fail while ranks run together, told apart: a collective, and memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ExchangeError(RuntimeError):
    """A collective failed or timed out: one line with rank, step and layer."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left (PyTorch has a type of its own for GPUs
    only)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


@contextmanager
def naming(rank: int, step: str) -> Iterator[None]:
    """A RuntimeError of a collective inside the block becomes an ExchangeError that names rank
    and step."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or isinstance(error, ExchangeError):
            raise
        raise ExchangeError(f"rank {rank}: {step} failed: {short_reason(str(error))}") from error


def short_reason(text: str) -> str:
    """First line of a collective's error, without source files of gloo and advice: "Read error
    [1.2.3.4]:5: Connection reset by peer"."""
    line = text.strip().split("\n")[0]
    line = re.sub(r"\[[^\]\s]*\.(?:cc|cpp|h):\d+\]\s*", "", line)
    return re.split(r"\.?\s+This is typically", line)[0].encode("ascii", "ignore").decode().strip()
