"""Write files made of pieces of other files, and compare what was written, at the speed of the disk
and in little memory.

Bytes are moved by the kernel (copy_file_range: blocks are shared where the file system can, else
copied without a way through this process) in parallel over files and parts of files. Every output
is allocated in whole before it is filled: parallel writers then do not fight over its blocks, and a
full disk shows at once.

A few megabytes are copied, then read again from both files and compared while they are still in the
processor's cache: so a comparison of every byte costs a third of the copy. The same reading gives a
checksum of what was written, a multilinear hash modulo 2**64 (Lemire and Kaser, "Strongly universal
string hashing is fast", 2014): words times fixed odd numbers, summed. It is meant to notice damage,
not forgery, and is four times as fast as CRC-32 of zlib.
"""

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import allocate
from semmoe.profiles.progress import Stages

BATCH_BYTES = 64 << 20  # work of one task; also the length that one recorded checksum covers
CACHED_BYTES = 4 << 20  # copied, then compared
BUFFER_BYTES = 256 << 10  # of a comparing thread, twice; also what the checksum takes at a time
WEIGHTS = np.random.Generator(np.random.PCG64(1)).integers(0, 2**64, BUFFER_BYTES // 8, np.uint64) | np.uint64(1)
BLOCK_FACTOR = 0x9E3779B97F4A7C15  # odd: of the checksum so far, at each further block
THREADS = 4  # copies wait for the disk and for memory, not for processors
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
    """Bytes at `offset` of an output file that are computed: `make` gives them, `check` judges
    what was written."""

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


def total_bytes(files: Sequence[FilePlan]) -> int:
    """Bytes that writing the files takes on the disk."""
    return sum(file.size for file in files if not file.link)


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


def batches(parts: Sequence[Part], size: int) -> Iterator[list[Part]]:
    """Consecutive parts of `size` bytes together; pieces are cut to fit, an edit is alone."""
    batch: list[Part] = []
    room = size
    for part in parts:
        if isinstance(part, Edit):
            if batch:
                yield batch
            yield [part]
            batch, room = [], size
            continue
        while part.num_bytes >= room:
            yield [*batch, replace(part, num_bytes=room)]
            part = Piece(part.source, part.source_offset + room, part.offset + room, part.num_bytes - room)
            batch, room = [], size
        if part.num_bytes:
            batch.append(part)
            room -= part.num_bytes
    if batch:
        yield batch


def run_tasks(tasks: Iterable[Callable[[], T]], *, done: Callable[[T], None]) -> None:
    """Run the tasks on THREADS, a few ahead at a time; `done` gets each result. The first error
    stops the rest."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: set[Future[T]] = set()
        try:
            for task in tasks:
                waiting.add(pool.submit(task))
                if len(waiting) >= 2 * THREADS:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done(future.result())
            for future in waiting:
                done(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Written(NamedTuple):
    """A stretch of an output file that was written; `checksum` is -1 where it was not read
    again."""

    name: str
    offset: int
    num_bytes: int
    checksum: int


def write_files(
    files: Sequence[FilePlan], root: Path, *, verify: bool, progress: Stages | None
) -> dict[str, list[list[int]]]:
    """Write the files under `root`, telling `progress` how far it is.

    With `verify`, checksums [offset, bytes, checksum] by file name come back, and InputError is
    raised where a byte is not what it should be.
    """
    sums: dict[str, list[list[int]]] = defaultdict(list)
    total, done = sum(part.num_bytes for file in files for part in file.parts), 0

    def keep(written: Written) -> None:
        nonlocal done
        done += written.num_bytes
        if verify:
            sums[written.name].append([written.offset, written.num_bytes, written.checksum])
        if progress:
            progress("writing", done, total)

    def tasks() -> Iterator[Callable[[], Written]]:
        for file in files:
            target = root / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.link:
                link_file(file.link, target)
                continue
            create_file(target, file.header, file.size)
            for batch in batches(file.parts, BATCH_BYTES):
                yield lambda name=file.name, batch=batch: fill(root, name, batch, verify=verify)

    try:
        run_tasks(tasks(), done=keep)
    except OSError as error:
        raise InputError(f"cannot write {root}: {error.strerror or error}") from None
    return {name: sorted(entries) for name, entries in sums.items()}


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
        allocate(file.fileno(), size)


def fill(root: Path, name: str, parts: Sequence[Part], *, verify: bool) -> Written:
    """Write consecutive parts of a file that exists, and compare them where asked."""
    output = os.open(root / name, os.O_RDWR)
    inputs: dict[Path, int] = {}
    checksum = 0 if verify else -1
    buffers = bytearray(BUFFER_BYTES), bytearray(BUFFER_BYTES)
    try:
        for part in parts:
            if isinstance(part, Piece) and part.source not in inputs:
                inputs[part.source] = os.open(part.source, os.O_RDONLY)
        for cached in batches(parts, CACHED_BYTES):
            for part in cached:
                if isinstance(part, Edit):
                    pwrite_all(output, part.make(), part.offset)
                else:
                    copy_range(inputs[part.source], output, part)
            if verify:
                checksum = compare(root / name, output, inputs, cached, checksum, buffers)
    finally:
        for descriptor in [output, *inputs.values()]:
            os.close(descriptor)
    return Written(name, parts[0].offset, sum(part.num_bytes for part in parts), checksum)


def pwrite_all(output: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(output, view, offset)
        view, offset = view[written:], offset + written


def copy_range(source: int, output: int, piece: Piece) -> None:
    """Copy a piece between two open files: by the kernel, or through a buffer where the file
    systems do not let it."""
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


def compare(
    path: Path,
    output: int,
    inputs: Mapping[Path, int],
    parts: Sequence[Part],
    checksum: int,
    buffers: tuple[bytearray, bytearray],
) -> int:
    """Read parts of an output and their sources; the checksum, continued. Raises InputError
    where they differ."""
    if isinstance(edit := parts[0], Edit):
        data = read_range(output, edit.offset, edit.num_bytes, path)
        check_edit(path, edit, data)
        for start in range(0, len(data), BUFFER_BYTES):
            checksum = add_block(checksum, memoryview(data)[start : start + BUFFER_BYTES])
        return checksum
    written, expected = buffers
    for block in batches(parts, BUFFER_BYTES):
        size = sum(part.num_bytes for part in block)
        read_into(output, memoryview(written)[:size], block[0].offset, path)
        place = 0
        for part in block:
            assert isinstance(part, Piece)
            view = memoryview(expected)[place : place + part.num_bytes]
            read_into(inputs[part.source], view, part.source_offset, part.source)
            place += part.num_bytes
        whole = size == BUFFER_BYTES
        if (written != expected) if whole else (written[:size] != expected[:size]):
            raise InputError(f"{path} differs from its source after byte {block[0].offset:,}: nothing was kept")
        checksum = add_block(checksum, memoryview(written)[:size])
    return checksum


def check_edit(path: Path, edit: Edit, data: bytes) -> None:
    """Raise InputError where computed bytes, as read from the output, are not right."""
    if not edit.check(data):
        raise InputError(f"{path} differs from its source after byte {edit.offset:,}: nothing was kept")


def add_block(checksum: int, block: memoryview) -> int:
    """The checksum of a stretch of bytes after one more block of at most BUFFER_BYTES."""
    if len(block) % 8:
        block = memoryview(bytes(block) + bytes(-len(block) % 8))
    words = np.frombuffer(block, "<u8")
    return (checksum * BLOCK_FACTOR + int(words.dot(WEIGHTS[: len(words)]))) % 2**64


def read_range(descriptor: int, offset: int, num_bytes: int, path: Path) -> bytes:
    data = bytearray(num_bytes)
    read_into(descriptor, memoryview(data), offset, path)
    return bytes(data)


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise InputError(f"{path} ends at byte {offset + done:,}, expected more")
        done += count


def check_parts(path: Path, expected: Sequence[Part], parts: Sequence[Part]) -> None:
    """Raise InputError unless `parts`, which were copied and compared, are what a file should
    consist of."""

    def pieces(some: Sequence[Part]) -> list[Piece]:
        return [part for part in some if isinstance(part, Piece)]

    def edits(some: Sequence[Part]) -> list[Edit]:
        return [part for part in some if isinstance(part, Edit)]

    same_edits = [(e.offset, e.num_bytes) for e in edits(expected)] == [(e.offset, e.num_bytes) for e in edits(parts)]
    if pieces(expected) != pieces(parts) or not same_edits:
        raise InputError(f"{path} was not written as its header says: nothing was kept")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for edit in edits(expected):
            check_edit(path, edit, read_range(descriptor, edit.offset, edit.num_bytes, path))
    finally:
        os.close(descriptor)


def checksums(root: Path, name: str, entries: Iterable[Sequence[int]]) -> Iterator[Callable[[], Written]]:
    """Tasks that give the checksums of stretches of root/name; entries begin with offset and
    number of bytes."""
    for offset, num_bytes, *_ in entries:
        yield lambda offset=offset, size=num_bytes: Written(name, offset, size, checksum_of(root / name, offset, size))


def checksum_of(path: Path, offset: int, num_bytes: int) -> int:
    """The checksum of a stretch of a file."""
    buffer = bytearray(BUFFER_BYTES)
    descriptor = os.open(path, os.O_RDONLY)
    checksum = 0
    try:
        for start in range(0, num_bytes, BUFFER_BYTES):
            view = memoryview(buffer)[: min(BUFFER_BYTES, num_bytes - start)]
            read_into(descriptor, view, offset + start, path)
            checksum = add_block(checksum, view)
    finally:
        os.close(descriptor)
    return checksum
