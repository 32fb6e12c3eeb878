"""What a file is, told by its first bytes: names end in whatever their writers liked."""

import zipfile
import zlib
from pathlib import Path

from semmoe.profiles.engines.records import open_input
from semmoe.profiles.errors import InputError


def container_of(path: Path) -> str:
    """ "pt", "npy", "npz", "safetensors", "json", or "text"; of a gzip file, what is in it.

    Raises InputError where there is no file, or it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with open_input(path) as file:
            head = file.read(512)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"\x80"):  # a pickle: how torch.save wrote before it took to zip files
        return "pt"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    return "json" if head.lstrip().startswith((b"{", b"[")) else "text"


def is_pt(path: Path) -> bool:
    """Whether a file is one that torch.save wrote, or its name says so."""
    return path.is_file() and (path.suffix in (".pt", ".pth") or container_of(path) == "pt")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            return "npz" if any(name.endswith(".npy") for name in file.namelist()) else "pt"
    except (zipfile.BadZipFile, OSError, ValueError):
        return "npz" if path.suffix == ".npz" else "pt"  # whose reader says that it is damaged
