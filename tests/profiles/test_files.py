"""Writing: whole or not at all, whatever happens inside the block."""

import os
from pathlib import Path

import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import inside, new_directory, new_file, write_file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, "\u00e4lter\n")
    with new_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == "\u00e4lter\n".encode()
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]
    for wrong in (tmp_path / "no" / "b", path / "b"):
        with pytest.raises(InputError, match=f"^cannot write {wrong}: "):
            write_file(wrong, b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="^cannot write .*folder: "):
        write_file(tmp_path / "folder", b"")
    assert names(tmp_path) == ["a.json", "folder"]


@pytest.mark.parametrize("lock", [False, True])
def test_a_directory_is_there_when_it_is_whole(tmp_path: Path, lock: bool) -> None:
    path = tmp_path / "out"
    for content in ("old", "new"):
        with new_directory(path, lock=lock) as folder:
            (folder / "file").write_text(content)
            assert folder.parent == tmp_path and (not path.exists() or (path / "file").read_text() == "old")
        assert names(path) == ["file"] and (path / "file").read_text() == content
    with pytest.raises(ZeroDivisionError), new_directory(path, lock=lock) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"^cannot write the thing: .* \(/nothing/here\)$"):
        with new_directory(path, what="the thing", lock=lock):
            Path("/nothing/here").read_text()
    assert names(tmp_path) == ["out"] and names(path) == ["file"]


def test_one_run_at_a_time_and_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "left").mkdir(parents=True)
    (tmp_path / ".out.replaced").mkdir()
    with new_directory(tmp_path / "out", lock=True) as folder:
        assert names(folder) == [".lock"]
        with pytest.raises(InputError, match="another run is writing"), new_directory(tmp_path / "out", lock=True):
            raise AssertionError
        (folder / "file").write_text("first")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_a_name_from_a_file_stays_in_its_folder(tmp_path: Path) -> None:
    folder, snapshot = tmp_path / "t", tmp_path / "models--a--b" / "snapshots" / "main"
    for made in (folder / "rank-000", snapshot, tmp_path / "models--a--b" / "blobs"):
        made.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"a")
    (folder / "b.parquet").symlink_to("a.parquet")
    (tmp_path / "outside").write_bytes(b"x")
    (folder / "link.parquet").symlink_to("../outside")
    os.mkfifo(folder / "pipe.parquet")
    (folder / "null.parquet").symlink_to("/dev/null")
    (folder / "no.parquet").symlink_to(tmp_path / "nothing")
    (folder / "up").symlink_to(tmp_path)
    for good in ("a.parquet", "b.parquet", "missing.parquet"):
        assert inside(folder, good, "trace.json: file", ending=".parquet") == folder / good
    assert inside(folder, "rank-000/a", "f", folders=1) == folder / "rank-000" / "a"
    blob = tmp_path / "models--a--b" / "blobs" / ("0123456789abcdef" * 4)
    blob.write_bytes(b"blob")
    (snapshot / "x").symlink_to(f"../../blobs/{blob.name}")
    assert inside(snapshot, "x", "f") == snapshot / "x"
    singles = [
        "/etc/passwd",
        "..",
        ".",
        "",
        "../outside",
        "rank-000/a",
        "a//b",
        "./a",
        "a\0b",
        "a\\b",
        "\x1b[2J",
        3,
        None,
        True,
        ["a"],
    ]
    files = ["link.parquet", "pipe.parquet", "null.parquet", "rank-000", "no.parquet", "x" * 256, "a.txt"]
    for bad in [*singles, *files]:
        with pytest.raises(InputError, match=r"^trace.json: parts\[0\].file is ") as refused:
            inside(folder, bad, "trace.json: parts[0].file", ending="" if bad == "rank-000" else ".parquet")
        assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)
    for bad in ("up/outside", "a/b/c", "rank-000/..", "/a"):
        with pytest.raises(InputError, match=r"^f is "):
            inside(folder, bad, "f", folders=1)
