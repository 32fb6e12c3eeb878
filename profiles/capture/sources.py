"""Records of a source of text: local files, directories, standard input, or a data set of the
Hugging Face hub, as a stream.

Lines of JSON, CSV rows, Parquet rows and hub rows are records with fields; a line of plain text is
a record that is a string.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from semmoe.profiles.document import parse_json
from semmoe.profiles.errors import InputError, require_extra
from semmoe.profiles.files import open_file

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".csv")
MAX_CSV_FIELD = 1 << 30


@dataclass(frozen=True, eq=False)
class Record:
    """One row of a source: a dict of fields, or a string for plain text."""

    value: Any
    place: str  # file and number, unique in the source
    source: str  # what it was read from, for people
    domain: str = ""  # of the source itself: the file's name in a directory


@dataclass
class ReadProgress:
    """How much of a source has been read. `total` of 0: unknown."""

    done: int = 0
    total: int = 0

    @property
    def fraction(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None


def open_source(source: str, progress: ReadProgress | None = None) -> Iterator[Record]:
    """Records of `source`: a file, a directory of files, "-" for standard input, "demo" for the
    embedded prompts.

    A file's type is its suffix, .gz after it allowed. Plain text is one record per line that is not
    blank. Raises InputError, at once for a source that is not there and while reading for one that
    is damaged, with file and line.
    """
    if source == "-":
        return _stdin_records()
    if source == "demo":
        from semmoe.profiles.demo.paths import demo_prompts_path

        source = str(demo_prompts_path())
    root = Path(source)
    if root.is_dir():
        files = sorted(f for f in root.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
        if not files:
            raise InputError(f"{source} holds no file with one of the suffixes {', '.join(SUFFIXES)}")
    elif root.is_file():
        if _suffix(root) not in SUFFIXES:
            raise InputError(f"{source} has none of the suffixes {', '.join(SUFFIXES)} (.gz may follow)")
        files = [root]
    else:
        raise InputError(f"{source} is neither a file nor a directory (a data set of the hub is --dataset {source})")
    progress = progress or ReadProgress()
    progress.total = sum(f.stat().st_size for f in files)
    return _file_records(root, files, progress)


def open_dataset(name: str, *, subset: str | None = None, split: str | None = None) -> Iterator[Record]:
    """Rows of a data set of the hub (or a folder that `datasets` can read), streamed. Raises
    InputError with the library's reason."""
    require_extra(f"reading the data set {name}", "datasets")
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # the library raises many types, each with a reason in its first line
        raise InputError(f"data set {name} cannot be opened: {_reason(error)}") from None
    if isinstance(data, dict):
        if len(data) > 1:
            raise InputError(f"data set {name} has the splits {', '.join(map(str, data))}: choose one with --split")
        found, data = next(iter(data.items()))
        split = str(found)
    return _dataset_records(name, str(split), data)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def _dataset_records(name: str, split: str, rows: Iterable[Any]) -> Iterator[Record]:
    try:
        for number, row in enumerate(rows):
            yield Record(row, f"{split}:{number}", f"data set {name}, split {split}")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data set {name} cannot be read: {_reason(error)}") from None


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def _file_records(root: Path, files: list[Path], progress: ReadProgress) -> Iterator[Record]:
    readers = {".jsonl": _json_lines, ".json": _json_document, ".txt": _text_lines, ".csv": _csv_rows}
    before = 0
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        domain = "" if file == root else file.name.split(".")[0]
        if _suffix(file) == ".parquet":
            rows = _parquet_rows(file)
            for number, row in enumerate(rows):
                yield Record(row, f"{name}:{number}", name, domain)
        else:
            try:
                with open_file(file) as raw:
                    stream = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
                    for number, row in readers[_suffix(file)](stream, str(file)):
                        progress.done = before + raw.tell()
                        yield Record(row, f"{name}:{number}", name, domain)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        before += file.stat().st_size
        progress.done = before


def _stdin_records() -> Iterator[Record]:
    """Lines of standard input: JSON where the first line is an object, else plain text."""
    stream = sys.stdin.buffer
    lines = (line for line in stream)
    first = next((line for line in lines if line.strip()), b"")

    def joined() -> Iterator[bytes]:
        yield first
        yield from lines

    read = _json_lines if first.lstrip().startswith(b"{") else _text_lines
    for number, row in read(joined(), "standard input"):
        yield Record(row, f"stdin:{number}", "standard input")


def _decode(line: bytes, where: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
        ) from None


def _text_lines(stream: Iterable[bytes], where: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, 1):
        if text := _decode(line, where, number).strip():
            yield number, text


def _json_lines(stream: Iterable[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not (text := _decode(line, where, number).strip()):
            continue
        try:
            value = parse_json(text)
        except ValueError as error:
            raise InputError(f"{where}, line {number}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}, line {number}: {type(value).__name__}, expected a JSON object with fields")
        yield number, value


def _json_document(stream: BinaryIO, where: str) -> Iterator[tuple[int, Any]]:
    """A list of objects, an object that holds one list, or lines of objects under the wrong
    suffix."""
    content = stream.read()
    try:
        value = parse_json(content)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})") from None
    except json.JSONDecodeError:
        yield from _json_lines(io.BytesIO(content), where)
        return
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 and len(value) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(row, dict | str):
            raise InputError(f"{where}, item {number}: {type(row).__name__}, expected a JSON object with fields")
        yield number, row


def _csv_rows(stream: Iterable[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    lines = (_decode(line, where, number) for number, line in enumerate(stream, 1))
    rows = csv.DictReader(lines, strict=True)
    try:
        for row in rows:
            if None in row:
                raise InputError(f"{where}, line {rows.line_num}: more values than the header has columns")
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(f"{where}, line {rows.line_num}: not CSV ({error})") from None


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} cannot be read as Parquet: {_reason(error)}") from None
