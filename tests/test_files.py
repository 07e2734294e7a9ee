"""Files are written atomically, and errors name the file and the cause."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.store import files


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".tmp-")]


def test_writers_replace_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    files.write_text(path, "a longer first text — ü\n")
    files.write_text(path, "ß")
    assert path.read_bytes() == "ß".encode()
    files.write_bytes(path, b"\0\r\n")
    assert path.read_bytes() == b"\0\r\n"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def broken() -> None:
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".tmp-")
            assert temporary.suffix == ".bin"
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_nothing_is_visible_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with files.atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_data_reach_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write_bytes(tmp_path / "a", b"x")
    assert events == ["file", "replace", "folder"]


def test_a_failed_rename_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write the file '.*a\.txt': No space left on device"):
        files.write_text(tmp_path / "a.txt", "x")
    assert os.listdir(tmp_path) == []


def test_a_block_that_writes_nothing_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written"), files.atomic_file(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_long_names_and_links_work(tmp_path: Path) -> None:
    name = "ä" * 120 + ".json"  # 245 bytes, near the limit of 255
    files.write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "target.txt")
    files.write_text(tmp_path / "link.txt", "through")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "target.txt").read_text() == "through"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    files.write_text(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it is a folder\. Give the name of a file"):
        files.write_text(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is a device or a pipe"):
        files.write_text(tmp_path / "pipe", "x")


def test_json_is_sorted_indented_strict_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"b": [np.float32(0.5), np.int64(3), np.bool_(True), float("nan")], "a": {2: -np.inf, "p": path}}
    files.write_json(path, value)
    text = path.read_text()
    assert text.startswith('{\n  "a": {\n    "2": null,')
    assert text.endswith("}\n")
    assert files.read_json(path) == {"a": {"2": None, "p": str(path)}, "b": [0.5, 3, True, None]}
    files.write_json(path, {"x": np.arange(3), "y": (1, 2)})
    assert json.loads(path.read_text()) == {"x": [0, 1, 2], "y": [1, 2]}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, 1)
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    with pytest.raises(TypeError, match="must differ as strings"):
        files.write_json(path, {1: "a", "1": "b"})
    assert files.read_json(path) == 1


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file is empty"),
        (b'{"a": [1, 2', r"not complete JSON \(Expecting"),
        (b"\x93NUMPY\x01", "not complete JSON .*decode"),
        (b'{"a": NaN}', "it holds NaN, which is not JSON"),
        (b"[" * 100_000, "not complete JSON"),
    ],
)
def test_bad_json_is_named_with_its_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read '.*run\.json': .*{cause}"):
        files.read_json(path)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read '.*none\.json': No such file or directory"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="Is a directory"):
        files.read_json(tmp_path)


def test_arrays_round_trip_under_the_exact_name(tmp_path: Path) -> None:
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    files.write_array(tmp_path / "a.samples", array[::2])
    assert os.listdir(tmp_path) == ["a.samples"]
    back = np.load(tmp_path / "a.samples", allow_pickle=False)
    assert back.dtype == np.float32
    assert np.array_equal(back, array[::2])


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the array holds Python objects \(dtype object\)"):
        files.write_array(tmp_path / "a.npy", np.array([{}, 1]))
    assert os.listdir(tmp_path) == []


def test_a_folder_below_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot make the folder '.*a/b': '.*/file' is a file, not a folder"):
        files.make_folder(tmp_path / "file" / "a" / "b")
    with pytest.raises(UserError, match=r"'.*/file' is a file, not a folder\. Choose another path"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"'.*/file' is a file, not a folder"):
        files.write_json(tmp_path / "file" / "run.json", {})
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"'.*/broken' is a broken link"):
        files.make_folder(tmp_path / "broken" / "a")


def test_folders_are_made_once_and_kept(tmp_path: Path) -> None:
    folder = files.make_folder(tmp_path / "a" / "b")
    (folder / "kept").write_text("x")
    assert files.make_folder(str(folder)) == folder
    assert (folder / "kept").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked"))
    with pytest.raises(UserError, match=r"'.*/locked' cannot be written to: no permission"):
        files.make_folder(tmp_path / "locked")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system where nothing can be made")
def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot make the folder '/proc/fewstep/a': .+\. Choose a path"):
        files.make_folder("/proc/fewstep/a")


KILLED = """
import sys, time
from fewstep.store.files import atomic_file
with atomic_file(sys.argv[1]) as path:
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_after_a_kill_the_old_file_is_unchanged_and_the_temporary_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert isinstance(process.stdout, io.BufferedReader)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"
    assert len(leftovers(tmp_path)) == 1
    assert files.clean_temporaries(tmp_path) == 1
    assert os.listdir(tmp_path) == ["a.bin"]


def test_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    ours = tmp_path / ".tmp-0123456789abcdef-a.bin"
    for name in (ours.name, ".tmp-notes", ".tmp-0123456789abcdeX-a", "a.bin"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-0123456789abcdef-folder").mkdir()
    assert files.clean_temporaries(tmp_path, older_than=60) == 0
    os.utime(ours, (time.time() - 100, time.time() - 100))
    assert files.clean_temporaries(tmp_path, older_than=60) == 1
    assert not ours.exists()
    assert len(os.listdir(tmp_path)) == 4
    assert files.clean_temporaries(tmp_path / "missing") == 0
