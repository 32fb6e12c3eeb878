"""Writing: whole or not at all, whatever happens inside the block."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.files import (
    LOCK_MARK,
    check_directory_target,
    inside,
    new_directory,
    new_file,
    open_file,
    write_file,
)


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


def test_a_directory_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in ("old", "new"):
        with new_directory(path) as folder:
            (folder / "file").write_text(content)
            assert folder.parent == tmp_path and (not path.exists() or (path / "file").read_text() == "old")
        assert names(path) == ["file"] and (path / "file").read_text() == content
    with pytest.raises(ZeroDivisionError), new_directory(path) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"^cannot write the thing: .* \(/nothing/here\)$"):
        with new_directory(path, what="the thing"):
            Path("/nothing/here").read_text()
    assert names(tmp_path) == ["out"] and names(path) == ["file"]


def test_one_run_at_a_time_and_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "left").mkdir(parents=True)
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.lock").write_text(f"{LOCK_MARK}\n1")
    told = rf"^another run is writing .*out: process {os.getpid()} since \d.*"
    with new_directory(tmp_path / "out") as folder:
        assert names(folder) == []
        with pytest.raises(InputError, match=told), new_directory(tmp_path / "out"):
            raise AssertionError
        with pytest.raises(InputError, match=told):
            check_directory_target(tmp_path / "out")
        (folder / "file").write_text("first")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    (tmp_path / ".a.tmp").write_text("half")
    (tmp_path / ".a.lock").touch()
    with new_file(tmp_path / "a") as file:
        file.write(b"a")
        with pytest.raises(InputError, match=told.replace("out", "a", 1)):
            write_file(tmp_path / "a", b"b")
    assert names(tmp_path) == ["a", "out"] and (tmp_path / "a").read_bytes() == b"a"


def test_a_killed_run_leaves_a_lock_that_holds_nobody_up(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from semmoe.profiles.files import new_directory
with new_directory(pathlib.Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []
    # Killed between the renames: the old one has its name again before anything else is done.
    (tmp_path / "out" / "old").touch()
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.lock").touch()
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


# `left`: with the lock of a killed run, of which a link is not either.
@pytest.mark.parametrize(
    ("end", "kind", "left"),
    [
        *(
            (end, kind, False)
            for end in ("partial", "replaced", "lock", "tmp")
            for kind in ("link", "directory", "file")
        ),
        *((end, "link", True) for end in ("partial", "replaced", "tmp")),
    ],
)
def test_what_semmoe_did_not_make_is_left_alone(tmp_path: Path, end: str, kind: str, left: bool) -> None:
    precious, taken = tmp_path / "precious", tmp_path / f".out.{end}"
    precious.mkdir()
    (precious / "file").write_text("x")
    if kind == "link":
        taken.symlink_to(precious)
    elif kind == "directory":
        taken.mkdir()
        (taken / "file").write_text("x")
    else:
        taken.write_text("x")
    if left:
        (tmp_path / ".out.lock").touch()
    with pytest.raises(InputError, match=rf"^cannot write .*out: .*\.out\.{end}"):
        if end == "tmp":
            write_file(tmp_path / "out", b"")
        else:
            with new_directory(tmp_path / "out"):
                raise AssertionError
    assert os.path.lexists(taken) and (precious / "file").read_text() == "x" and not (tmp_path / "out").exists()
    assert kind != "directory" or (taken / "file").read_text() == "x"


def test_links_lead_and_the_current_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "none").symlink_to("missing/x")
    (tmp_path / "file").write_text("old")
    (tmp_path / "to-file").symlink_to("file")
    with new_directory(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["new"]
    write_file(tmp_path / "to-file", b"new")
    assert (tmp_path / "to-file").is_symlink() and (tmp_path / "file").read_text() == "new"
    monkeypatch.chdir(tmp_path / "here")
    for path, wrong in ((".", "the current directory"), ("..", "the current directory"), ("../file", "no directory")):
        with pytest.raises(InputError, match=wrong):
            check_directory_target(Path(path))
    with pytest.raises(InputError, match="does not exist"):
        check_directory_target(tmp_path / "none")
    for path in (Path("."), tmp_path / "link"):
        with pytest.raises(InputError, match="is a directory"):
            write_file(path, b"")
    with pytest.raises(InputError, match="neither a file nor absent"):
        write_file(Path("/dev/null"), b"")


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


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a directory"), (Path("/dev/zero"), "a device")):
        with pytest.raises(OSError, match=f"it is {kind}, expected a file"):
            open_file(path)
    (tmp_path / "file").write_bytes(b"x")
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"x"
