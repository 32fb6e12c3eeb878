"""Write and compare files made of pieces of other files, at the speed of the disk and in little memory.

Bytes are moved by the kernel (copy_file_range: blocks are shared where the file system can, else copied without a way
through this process) in parallel over files and parts of files. Every output is allocated in whole before it is
filled: parallel writers then do not fight over its blocks, and a full disk shows at once.
"""

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from profiles.errors import InputError

BATCH_BYTES = 64 << 20  # work of one task; also the length that one recorded checksum covers
BUFFER_BYTES = 512 << 10  # of a comparing thread, twice: fits the processor's cache
KERNEL_COPY = hasattr(os, "copy_file_range")
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class Piece:
    """Bytes of a source file that appear at `offset` of an output file."""

    source: Path
    source_offset: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Edit:
    """Bytes at `offset` of an output file that are computed: `make` gives them, `check` judges what was written."""

    offset: int
    num_bytes: int
    make: Callable[[], bytes]
    check: Callable[[bytes], bool]


Part = Piece | Edit
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FilePlan:
    """An output file: its header, then parts that cover the rest; or a hard link to `link`."""

    name: str  # relative to the output directory
    header: bytes
    size: int
    parts: tuple[Part, ...]
    link: Path | None = None


def merged(parts: Iterable[Part]) -> list[Part]:
    """Parts in order of offset, neighbours that are neighbours in the source too made one."""
    result: list[Part] = []
    for part in sorted((p for p in parts if p.num_bytes), key=lambda p: p.offset):
        last = result[-1] if result else None
        if (
            isinstance(part, Piece)
            and isinstance(last, Piece)
            and part.source == last.source
            and part.offset == last.offset + last.num_bytes
            and part.source_offset == last.source_offset + last.num_bytes
        ):
            result[-1] = replace(last, num_bytes=last.num_bytes + part.num_bytes)
        else:
            result.append(part)
    return result


def batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Consecutive parts of about BATCH_BYTES each; longer pieces are cut."""
    batch: list[Part] = []
    room = BATCH_BYTES
    for part in parts:
        while isinstance(part, Piece) and part.num_bytes > room:
            batch.append(replace(part, num_bytes=room))
            part = Piece(part.source, part.source_offset + room, part.offset + room, part.num_bytes - room)
            yield batch
            batch, room = [], BATCH_BYTES
        batch.append(part)
        room -= part.num_bytes
        if room <= 0:
            yield batch
            batch, room = [], BATCH_BYTES
    if batch:
        yield batch


def run_tasks(tasks: Iterable[Callable[[], T]], *, threads: int, done: Callable[[T], None]) -> None:
    """Run the tasks on threads, a few ahead at a time; `done` gets each result. The first error stops the rest."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: set[Future[T]] = set()
        try:
            for task in tasks:
                waiting.add(pool.submit(task))
                if len(waiting) >= 2 * threads:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done(future.result())
            for future in waiting:
                done(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def write_files(
    files: Sequence[FilePlan], root: Path, *, threads: int, progress: Callable[[int], None] = lambda n: None
) -> None:
    """Write the files under `root`. `progress` is called with the number of bytes that were just written."""

    def tasks() -> Iterator[Callable[[], int]]:
        for file in files:
            target = root / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.link:
                link_file(file.link, target)
                continue
            create_file(target, file.header, file.size)
            for batch in batches(merged(file.parts)):
                yield lambda target=target, batch=batch: fill(target, batch)

    try:
        run_tasks(tasks(), threads=threads, done=progress)
    except OSError as error:
        raise InputError(f"cannot write {root}: {error.strerror or error}") from None


def link_file(source: Path, target: Path) -> None:
    """A hard link to the file behind `source`, which may be a symbolic link of the hub's cache."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise InputError(
            f"--link: {source} cannot be linked into {target.parent} ({error.strerror}): use --copy"
        ) from None


def create_file(target: Path, header: bytes, size: int) -> None:
    """A file of `size` bytes that begins with the header; its blocks are allocated."""
    with target.open("wb") as file:
        file.write(header)
        file.flush()
        if size > len(header):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                os.truncate(file.fileno(), size)


def fill(target: Path, parts: Sequence[Part]) -> int:
    """Write some parts of a file that exists; the number of bytes."""
    output = os.open(target, os.O_RDWR)
    inputs: dict[Path, int] = {}
    try:
        for part in parts:
            if isinstance(part, Edit):
                pwrite_all(output, part.make(), part.offset)
                continue
            if part.source not in inputs:
                inputs[part.source] = os.open(part.source, os.O_RDONLY)
            copy_range(inputs[part.source], output, part)
    finally:
        for descriptor in [output, *inputs.values()]:
            os.close(descriptor)
    return sum(part.num_bytes for part in parts)


def pwrite_all(output: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(output, view, offset)
        view, offset = view[written:], offset + written


def copy_range(source: int, output: int, piece: Piece) -> None:
    """Copy a piece between two open files: by the kernel, or through a buffer where the file systems do not let it."""
    done = 0
    kernel = KERNEL_COPY
    while done < piece.num_bytes:
        left, start, end = piece.num_bytes - done, piece.source_offset + done, piece.offset + done
        if kernel:
            try:
                copied = os.copy_file_range(source, output, left, start, end)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                kernel = False
                continue
        else:
            data = os.pread(source, min(left, 4 << 20), start)
            pwrite_all(output, data, end)
            copied = len(data)
        if not copied:
            raise InputError(f"{piece.source} ended at byte {start:,} while it was copied")
        done += copied


def compare_file(root: Path, name: str, parts: Sequence[Part]) -> Iterator[Callable[[], tuple[str, int, int, int]]]:
    """Tasks that read the written file root/name and its sources again and compare them byte by byte.

    Each gives (file name, offset, number of bytes, CRC-32 of these bytes). Raises InputError at the first difference.
    """
    for batch in batches(parts):
        yield lambda batch=batch: (name, *compare(root / name, batch))


def compare(path: Path, parts: Sequence[Part]) -> tuple[int, int, int]:
    """Compare consecutive parts of a file with their sources: offset, number of bytes, CRC-32."""
    left, right = bytearray(BUFFER_BYTES), bytearray(BUFFER_BYTES)
    crc = 0
    written = os.open(path, os.O_RDONLY)
    inputs: dict[Path, int] = {}
    try:
        for part in parts:
            if isinstance(part, Edit):
                data = os.pread(written, part.num_bytes, part.offset)
                crc = zlib.crc32(data, crc)
                if len(data) != part.num_bytes or not part.check(data):
                    raise InputError(f"{path} differs from its source at byte {part.offset:,}: nothing was kept")
                continue
            if part.source not in inputs:
                inputs[part.source] = os.open(part.source, os.O_RDONLY)
            done = 0
            while done < part.num_bytes:
                size = min(BUFFER_BYTES, part.num_bytes - done)
                ours, theirs = memoryview(left)[:size], memoryview(right)[:size]
                read_into(written, ours, part.offset + done, path)
                read_into(inputs[part.source], theirs, part.source_offset + done, part.source)
                if ours != theirs if size < BUFFER_BYTES else left != right:
                    raise InputError(
                        f"{path} differs from {part.source} at byte {part.offset + done:,}: nothing was kept"
                    )
                crc = zlib.crc32(ours, crc)
                done += size
    finally:
        for descriptor in [written, *inputs.values()]:
            os.close(descriptor)
    return parts[0].offset, sum(part.num_bytes for part in parts), crc


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise InputError(f"{path} ends at byte {offset + done:,}, expected more")
        done += count


def checksums(
    root: Path, name: str, entries: Iterable[Sequence[int]]
) -> Iterator[Callable[[], tuple[str, int, int, int]]]:
    """Tasks that give (name, offset, number of bytes, CRC-32) of root/name for entries that begin so."""
    for offset, num_bytes, *_ in entries:
        yield lambda offset=offset, size=num_bytes: (name, offset, size, checksum(root / name, offset, size))


def checksum(path: Path, offset: int, num_bytes: int) -> int:
    """CRC-32 of a part of a file."""
    buffer = bytearray(BUFFER_BYTES)
    descriptor = os.open(path, os.O_RDONLY)
    crc = done = 0
    try:
        while done < num_bytes:
            view = memoryview(buffer)[: min(BUFFER_BYTES, num_bytes - done)]
            read_into(descriptor, view, offset + done, path)
            crc = zlib.crc32(view, crc)
            done += len(view)
    finally:
        os.close(descriptor)
    return crc
