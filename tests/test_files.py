"""Files that appear whole or not at all, whatever has their temporary names, however writing them ends."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hubert_lightning import files
from hubert_lightning.files import (
    also_named,
    is_unfinished,
    new_folder,
    replacing,
    unfinished_name,
    write_whole,
)
from hubert_lightning.units.label_writer import LabelWriter


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def python(code: str, *arguments: object, **how: object) -> "subprocess.CompletedProcess[str]":
    typed = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(typed, capture_output=True, text=True, **how)  # type: ignore[call-overload]


def test_a_file_of_the_users_with_a_name_like_a_temporary_one_stays(tmp_path: Path) -> None:
    theirs = {name: name.encode() for name in ("out.json.part", ".out.json.part", "out.json.link", ".out.json.tmp")}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    write_whole(tmp_path / "out.json", b"ours")
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert names(tmp_path) == {*theirs, "out.json"}


def test_a_link_at_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    for name in ("out.json.part", f".{os.getpid()}.out.json"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    write_whole(tmp_path / "out.json", b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert not (tmp_path / "out.json").is_symlink()


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.json", tmp_path / "out.json"
    link.symlink_to(target)
    for content in (b"first", b"second"):  # the first time it leads nowhere
        write_whole(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert names(tmp_path) == {"elsewhere", "out.json"}
    assert names(tmp_path / "elsewhere") == {"real.json"}


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out.json").symlink_to(tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"out\.json: cannot be written \(Too many levels of symbolic links\)"):
        write_whole(tmp_path / "out.json", b"")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_that_open_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "new", b"")
        (tmp_path / "opened").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "opened").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(mode)
    write_whole(tmp_path / "old", b"new")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == mode


def test_a_path_that_is_no_regular_file_is_written_to_and_stays(tmp_path: Path) -> None:
    write_whole(Path("/dev/null"), b"nothing")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(ValueError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_whole(Path("/dev/full"), b"something")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert not [path for path in Path("/dev").iterdir() if is_unfinished(path)]
    said = python("from hubert_lightning.files import *; write_whole(Path('/dev/stdout'), b'said')").stdout
    assert said == "said"


KILLED = """
import os, signal, sys
from pathlib import Path
from hubert_lightning.files import new_folder, replacing
out = Path(sys.argv[1])
with replacing(out / "file") as file, new_folder(out / "folder") as folder:
    (folder / "inside").write_text("half")
    file.write(b"half")
    print(*sorted(path.name for path in out.iterdir()), sep="\\n", flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


def test_unfinished_files_of_a_killed_process_are_removed_by_the_next_one(tmp_path: Path) -> None:
    left = python(KILLED, tmp_path, "SIGKILL").stdout.split()
    assert names(tmp_path) == set(left)
    assert len(left) == 2
    assert all(is_unfinished(Path(name)) for name in left)
    (tmp_path / left[0].replace(".unfinished", ".unfinished.txt")).write_bytes(b"theirs")
    python("from hubert_lightning.files import *; import sys; write_whole(Path(sys.argv[1]), b'')", tmp_path / "file")
    assert names(tmp_path) == {"file", left[0] + ".txt"}


def test_unfinished_files_of_a_living_process_are_not_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, "SIGSTOP"], stdout=subprocess.PIPE) as writing:
        assert writing.stdout is not None
        half = {writing.stdout.readline().decode().strip() for _ in range(2)}
        other = "from hubert_lightning.files import *; import sys; write_whole(Path(sys.argv[1]), b'other')"
        assert not python(other, tmp_path / "file").returncode
        assert names(tmp_path) == half | {"file"}
        writing.send_signal(signal.SIGCONT)
    assert writing.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"half"
    assert names(tmp_path) == {"file", "folder"}


@pytest.mark.parametrize(
    ("kind", "young_stays"),
    [("ext4", False), ("xfs", False), ("overlay", False), ("nfs4", True), ("lustre", True), ("fuse.sshfs", True)],
)
def test_on_a_shared_disk_only_old_unfinished_files_are_removed(
    kind: str, young_stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "of several"
    folder.mkdir()
    mounts = tmp_path / "mounts"
    point = str(folder).replace(" ", r"\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/ {point} {kind} rw 0 0\nserver:/ {point}-2 nfs rw 0 0\n")
    monkeypatch.setattr(files, "MOUNT_TABLE", mounts)
    young, old, filled = (unfinished_name(folder / name) for name in ("young", "old", "filled"))
    filled.mkdir()
    for path in (young, old, filled / "inside"):
        path.write_bytes(b"half")
    for path in (old, filled):
        os.utime(path, (0, time.time() - 1.1 * files.ABANDONED_AFTER))
    write_whole(folder / "out", b"")
    assert names(folder) == {"out", *({young.name, filled.name} if young_stays else ())}


def test_a_link_of_the_users_that_is_called_as_an_unfinished_file_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    link = unfinished_name(tmp_path / "out")
    link.symlink_to(tmp_path / "theirs")
    write_whole(tmp_path / "out", b"ours")
    assert link.is_symlink()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hubert_lightning.files import new_folder, replacing_all
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
out = Path(sys.argv[1])
try:
    with replacing_all(out / "companion", out / "main") as (companion, main):
        companion.write(b"new")
        main.write(b"new" * 10_000)
except ValueError as error:
    print(error)
try:
    with new_folder(out / "folder") as folder:
        (folder / "first").write_bytes(b"new")
        (folder / "second").write_bytes(b"new" * 10_000)
except ValueError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    for name in ("companion", "main"):
        (tmp_path / name).write_bytes(b"old")
    said = python(FULL_DISK, tmp_path, 20_000).stdout.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"{tmp_path / 'main'}: cannot be written (File too large); finished files are kept")
    assert said[1].startswith(f"{tmp_path / 'folder'}: cannot be written (File too large); finished files are kept")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"companion": b"old", "main": b"old"}
    assert python(FULL_DISK, tmp_path, 50_000).stdout == ""
    assert (tmp_path / "main").read_bytes() == b"new" * 10_000


def test_files_that_belong_together_match_wherever_writing_is_killed(tmp_path: Path) -> None:
    """Killed before every system call that gives or takes a name, the main file has its own companions or is gone."""
    code = """
import os, signal, sys
from pathlib import Path
from hubert_lightning import files
calls = 0
def fatal(function):
    def counted(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted
os.replace, os.rename, os.fsync = fatal(os.replace), fatal(os.rename), fatal(os.fsync)
with files.replacing_all(*(Path(sys.argv[1], name) for name in ("a", "b", "main"))) as opened:
    for file in opened:
        file.write(b"new")
"""
    for call in range(1, 20):
        folder = tmp_path / str(call)
        folder.mkdir()
        for name in ("a", "b", "main"):
            (folder / name).write_bytes(b"old")
        ended = python(code, folder, call).returncode
        there = {path.name: path.read_bytes() for path in folder.iterdir() if not is_unfinished(path)}
        if "main" in there:
            assert set(there.values()) in ({b"old"}, {b"new"}), (call, there)
        python(code, folder, 99, check=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict.fromkeys(("a", "b", "main"), b"new")
        if not ended:
            break
    assert call == 11  # three files brought to the disk, one set aside, three named, each name synced; then it ends


def test_a_read_error_names_the_file_that_was_read_and_not_the_one_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")

    def write_file() -> None:
        with replacing(tmp_path / "out") as file:
            file.write(b"new")
            (tmp_path / "gone").read_bytes()

    def fill_folder() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "new").write_bytes(b"new")
            (tmp_path / "gone").read_bytes()

    for write in (write_file, fill_folder):
        with pytest.raises(ValueError, match=r"gone: cannot be read \(No such file or directory\)"):
            write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    tmp_path.chmod(0o555)
    try:
        for write in (lambda: write_whole(tmp_path / "out", b"new"), lambda: new_folder(tmp_path / "x").__enter__()):
            with pytest.raises(ValueError, match=r": cannot be written \(Permission denied\)"):
                write()
    finally:
        tmp_path.chmod(0o755)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out": b"old"}


def test_a_folder_in_place_of_a_file_and_the_reverse_are_errors(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"folder: cannot be written \(Is a directory\)"):
        write_whole(tmp_path / "folder", b"")
    with pytest.raises(ValueError, match=r"file/out: cannot be written \((File exists|Not a directory)\)"):
        write_whole(tmp_path / "file" / "out", b"")
    assert names(tmp_path) == {"folder", "file"}


def test_the_longest_name_that_a_disk_allows_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127, "語" * 85):
        write_whole(tmp_path / name, b"whole")
        assert (tmp_path / name).read_bytes() == b"whole"


def test_a_file_gets_another_name_at_once_and_leaves_no_third(tmp_path: Path) -> None:
    (tmp_path / "best-3.ckpt").write_bytes(b"three")
    (tmp_path / "best.ckpt").write_bytes(b"two")
    (tmp_path / "best.ckpt.link").write_bytes(b"theirs")
    also_named(tmp_path / "best-3.ckpt", tmp_path / "best.ckpt")
    also_named(tmp_path / "best-3.ckpt", tmp_path / "best.ckpt")
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "best-3.ckpt")
    assert names(tmp_path) == {"best-3.ckpt", "best.ckpt", "best.ckpt.link"}


def test_writing_into_a_folder_of_many_files_lists_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings, scandir = 0, os.scandir

    def counted(folder: object) -> object:
        nonlocal listings
        listings += 1
        return scandir(folder)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", counted)
    for number in range(50):
        write_whole(tmp_path / str(number), b"")
    assert listings == 1


def test_a_label_store_begins_where_only_unfinished_files_lie(tmp_path: Path) -> None:
    from helpers import LABEL_SOURCE

    unfinished_name(tmp_path / "source.json").write_bytes(b"half")
    LabelWriter(tmp_path, LABEL_SOURCE, num_shards=1).__enter__()
    assert (tmp_path / "source.json").exists()
