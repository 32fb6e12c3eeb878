"""Directories behind URLs: what fsspec knows, the Hugging Face Hub (hf://datasets/OWNER/NAME) among
it.

Credentials come from where the libraries look for them (a login, the environment) and are never
printed: neither is what a URL holds before its host.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from semmoe.profiles.errors import InputError, require_extra

if TYPE_CHECKING:
    import fsspec

# Whose exceptions are about a connection and not about a bug of ours; they share no class.
NETWORK = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3", "aiohttp", "botocore", "s3fs", "gcsfs")


def is_url(path: object) -> bool:
    """Whether a path is a URL that fsspec opens and not a name on this machine."""
    return "://" in str(path)


def shown(url: object) -> str:
    """A URL without the user and the password in it."""
    return re.sub(r"(?<=://)[^/@\s]*@(?=[^/\s]+[/:])", "", str(url)) if is_url(url) else str(url)


def open_url(url: str) -> "tuple[fsspec.AbstractFileSystem, str]":
    """The file system of a URL or a local path, and the path in it. Raises InputError where no
    library reads such a URL."""
    import fsspec

    if url.startswith("hf://"):
        require_extra(f"reading {url}", "huggingface_hub")
    with network(url):
        try:
            return fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{shown(url)} cannot be opened: {error}") from None


@contextmanager
def fetched(url: str, names: tuple[str, ...]) -> Iterator[Path]:
    """A directory with those of the files `names` that lie at `url`, until the block ends.

    Raises InputError for what cannot be read; lines about the directory name the URL.
    """
    filesystem, root = open_url(url)
    with TemporaryDirectory(prefix="semmoe-") as folder:
        for name in names:
            with network(url):
                try:
                    filesystem.get_file(f"{root.rstrip('/')}/{name}", str(Path(folder) / name))
                except FileNotFoundError:
                    (Path(folder) / name).unlink(missing_ok=True)
        try:
            yield Path(folder)
        except InputError as error:
            raise InputError(str(error).replace(folder, shown(url))) from None


def holds(url: str, name: str) -> bool:
    """Whether there is a file of that name at `url`. Raises InputError where nobody can tell."""
    filesystem, root = open_url(url)
    with network(url):
        return filesystem.isfile(f"{root.rstrip('/')}/{name}")


@contextmanager
def network(url: object) -> Iterator[None]:
    """Raise InputError, one line, where a library could not reach what lies at `url`."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:
        if not is_network_failure(error) and not (isinstance(error, OSError) and is_url(url)):
            raise
        raise InputError(f"{shown(url)} cannot be used: {why(error)}") from None


def is_network_failure(error: BaseException) -> bool:
    """Whether an exception is one of a library that talks to other machines."""
    return any(kind.__module__.partition(".")[0] in NETWORK for kind in type(error).__mro__)


def why(error: BaseException) -> str:
    """The first line of what a library says, without credentials."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"hf_\w{8,}", "hf_***", re.sub(r"(?i)\b(bearer|token[=:]?)\s+\S+", r"\1 ***", shown(said)))
