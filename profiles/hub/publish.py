"""A directory of semmoe on the Hugging Face Hub, as a data set: pushed in one commit.

What a push needs of huggingface_hub comes with the extra models; reading hf:// URLs is
`semmoe.profiles.hub.urls`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from semmoe.profiles.errors import InputError, require_extra
from semmoe.profiles.hub.urls import network, open_url

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationDelete

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD = "README.md"
MADE_BY_US = "<!-- made by semmoe push -->"
DOCUMENTS = ("trace.json", "plan.json")  # either makes a directory what it is


@dataclass(frozen=True, kw_only=True)
class Push:
    """How a directory is pushed.

    Fields:
        private: make a repository that is not there yet private.
        force: replace another trace or plan that lies there.
        message: of the commit.
    """

    private: bool = False
    force: bool = False
    message: str = ""


def repository(name: str) -> str:
    """OWNER/NAME of a data set, also from hf://datasets/OWNER/NAME. Raises InputError for what is
    none."""
    repo = name.removeprefix("hf://").removeprefix("datasets/").rstrip("/")
    if not REPO.fullmatch(repo):
        raise InputError(f"{name} is not a data set of the Hugging Face Hub: expected OWNER/NAME")
    return repo


def push(folder: Path, names: list[str], card: str, repo: str, how: Push) -> str:
    """Commit files of a directory and their card to a data set, which is made where it is not
    there.

    Parameters:
        folder, names: the files, by name in the directory.
        card: Markdown; a card that somebody else wrote stays.
        repo: OWNER/NAME.

    Returns the URL that other commands take. Raises InputError where another trace or plan lies
    there and `force` is not given, and for what the Hub refuses; nothing was changed then.
    """
    require_extra("pushing to the Hugging Face Hub", "huggingface_hub")
    from huggingface_hub import CommitOperationAdd, HfApi

    url, api = f"hf://datasets/{repo}", HfApi()
    with network(url):
        there = api.repo_exists(repo, repo_type="dataset")
        old = api.list_repo_files(repo, repo_type="dataset") if there else []
        if any(name in old for name in DOCUMENTS) and not how.force:
            raise InputError(f"{url} holds a trace or a plan already: choose another name, or replace it with --force")
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        if CARD not in old or _is_ours(url):
            operations.append(CommitOperationAdd(CARD, card.encode()))
        operations += _leftovers(old, names)
        if not there:
            api.create_repo(repo, repo_type="dataset", private=how.private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=how.message, repo_type="dataset")
    return url


def _is_ours(url: str) -> bool:
    filesystem, root = open_url(url)
    return MADE_BY_US.encode() in cast(bytes, filesystem.cat_file(f"{root}/{CARD}"))


def _leftovers(old: list[str], names: list[str]) -> "list[CommitOperationDelete]":
    """Files of the trace or plan that lay there before, by the names that semmoe gives."""
    from huggingface_hub import CommitOperationDelete

    if not any(name in old for name in DOCUMENTS):
        return []
    ours = re.compile(r"part-\d+\.parquet|counts\.parquet|tables\.safetensors|trace\.json|plan\.json")
    return [CommitOperationDelete(name) for name in old if ours.fullmatch(name) and name not in names]
