"""Completions of a run on disk: each is appended to `OUT.partial` when it is finished, so that a
run that fails keeps it.

At the end they are written in input order beside OUT and renamed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import write_file

if TYPE_CHECKING:
    from semmoe.runtime.serving.batch import Completion


class ResultKeeper:
    """Completions as output lines: kept on disk as they come, written in input order at the end."""

    def __init__(self, output: str | None, tokenizer: Any) -> None:
        self._output = Path(output) if output else None
        self._tokenizer = tokenizer
        self._lines: dict[int, dict[str, Any]] = {}

    def add(self, completions: "list[Completion]") -> None:
        for done in completions:
            line = {"id": done.request_id, "rank": done.rank}
            line |= {"text": self._tokenizer.decode(done.token_ids, skip_special_tokens=True)}
            line |= {"token_ids": done.token_ids, "finish_reason": done.finish_reason}
            self._lines[done.index] = line
        if self._output is None:
            return
        try:
            with partial_path(self._output).open(
                "a" if len(self._lines) > len(completions) else "w", encoding="utf-8"
            ) as file:
                for done in completions:
                    file.write(json.dumps(self._lines[done.index], ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {partial_path(self._output)}: {error.strerror}") from None

    @property
    def finished(self) -> int:
        """Requests that are kept."""
        return len(self._lines)

    def finish(self) -> list[dict[str, Any]]:
        """All lines in input order, written under the final name."""
        lines = [self._lines[index] for index in sorted(self._lines)]
        if self._output is not None:
            write_file(self._output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            try:
                partial_path(self._output).unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"cannot write {self._output}: {error.strerror}") from None
        return lines


def partial_path(output: Path) -> Path:
    """Where finished requests of an unfinished run are kept."""
    return output.with_name(output.name + ".partial")


def partial_state(output: Path) -> tuple[int, int, int] | None:
    """What tells whether `OUT.partial` has been written since; None where there is none."""
    try:
        found = partial_path(output).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def kept_results(output: Path, before: tuple[int, int, int] | None) -> str:
    """Where the finished requests of a failed run are, for its message. `before`: the state of
    `OUT.partial` when the run began."""
    if partial_state(output) in (None, before):
        return ""
    with partial_path(output).open(encoding="utf-8") as file:
        return f"; {sum(1 for _ in file)} finished requests are in {partial_path(output)}"
