"""Completions of a run on disk: each is appended to `OUT.partial` when it is finished, so that a
run that fails keeps it.

At the end they are written in input order beside OUT and renamed.
"""

import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import write_file

if TYPE_CHECKING:
    from semmoe.runtime.serving.batch import Completion


class ResultKeeper:
    """Completions as output lines: kept on disk as they come, written in input order at the end.

    Finished requests of an earlier run that failed are moved to `OUT.partial.1` (2, 3, ...), and
    `tell` gets a line that says so.
    """

    def __init__(self, output: str | None, tokenizer: Any, tell: Callable[[str], None] = lambda line: None) -> None:
        self._output = Path(output) if output else None
        self._tell = tell
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
            first = len(self._lines) == len(completions)
            if first:
                self._move_earlier(partial_path(self._output))
            with partial_path(self._output).open("x" if first else "a", encoding="utf-8") as file:
                for done in completions:
                    file.write(json.dumps(self._lines[done.index], ensure_ascii=False) + "\n")
        except OSError as error:
            drop_cut_line(partial_path(self._output))
            raise InputError(f"cannot write {partial_path(self._output)}: {error.strerror}") from None

    def _move_earlier(self, partial: Path) -> None:
        """Make room for this run's finished requests, and lose none of an earlier one's."""
        if not os.path.lexists(partial):
            return
        if not (count := whole_lines(partial)):
            partial.unlink()
            return
        kept = (partial.with_name(f"{partial.name}.{number}") for number in itertools.count(1))
        free = next(path for path in kept if not os.path.lexists(path))
        partial.rename(free)
        self._tell(f"{count} finished requests of an earlier run were in {partial}: they are kept in {free}")

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


def whole_lines(path: Path) -> int:
    """Lines of a file that are whole; a full disk cuts the last one."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def drop_cut_line(path: Path) -> None:
    """Leave whole lines only: a full disk has cut the last one."""
    with suppress(OSError), path.open("r+b") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


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
    return f"; {whole_lines(partial_path(output))} finished requests are in {partial_path(output)}"
