"""The door for files that are written: whole or not at all, never over an input, a store or what is no file."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from skipcost.bench.kernels import tune
from skipcost.bench.measure.journal import Journal
from skipcost.kernels.outputs import SQLITE, OutputError, append_file, check_output, write_file

ORIGIN: dict[str, Any] = {"device": {"name": "a card"}, "versions": {"torch": "1"}}


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    """A folder that is missing is made; nothing else is left beside the file."""
    write_file(path := tmp_path / "a" / "b" / "x.txt", "µ")

    assert path.read_bytes() == "µ".encode()
    assert [each.name for each in path.parent.iterdir()] == ["x.txt"]


def test_a_link_is_written_through_and_the_mode_is_kept(tmp_path: Path) -> None:
    """The link stays a link, also one to a file that is not there yet; a file stays as readable as it was."""
    (real := tmp_path / "real.txt").write_text("old")
    real.chmod(0o640)
    (link := tmp_path / "link.txt").symlink_to(real)
    (to_nothing := tmp_path / "new.txt").symlink_to("later.txt")

    write_file(link, "new")
    write_file(to_nothing, "made")

    assert link.is_symlink()
    assert (real.read_text(), stat.S_IMODE(real.stat().st_mode)) == ("new", 0o640)
    assert (tmp_path / "later.txt").read_text() == "made"


def special(folder: Path, kind: str) -> Path:
    """A place of a kind that no output may take."""
    path = folder / "place"
    match kind:
        case "a folder":
            path.mkdir()
        case "a FIFO":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(str(path))
        case "is a store":
            path.write_bytes(SQLITE + b"\0" * 84)
        case "cannot write":
            path.symlink_to(path)
    return path


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a socket", "is a store", "cannot write"])
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
def test_what_is_no_file_of_text_is_never_replaced(tmp_path: Path, kind: str, linked: bool) -> None:  # noqa: FBT001
    """A folder, FIFO, socket, store or endless link is refused by name, for writing and for adding, and stays."""
    place = special(tmp_path, kind)
    path = place
    if linked:
        (path := tmp_path / "link").symlink_to(place)
    before = place.lstat()

    for write in (write_file, append_file):
        with pytest.raises(OutputError, match=f"{kind}.*name another file with -o"):
            write(path, "text")

    assert place.lstat() == before
    assert len(list(tmp_path.iterdir())) == 1 + linked


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_what_sqlite_keeps_beside_a_store_is_a_part_of_it(tmp_path: Path, ending: str) -> None:
    """Whether it is there or not; the same name beside another file is any name."""
    (tmp_path / "s.sqlite").write_bytes(SQLITE)
    (tmp_path / "notes").write_text("mine")

    with pytest.raises(OutputError, match="is a store"):
        write_file(tmp_path / f"s.sqlite{ending}", "text")
    write_file(tmp_path / f"notes{ending}", "text")


@pytest.mark.parametrize("way", ["itself", "relative", "link", "hard link", "around"])
def test_an_input_is_never_replaced_by_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The file that is read stays, however it is named."""
    monkeypatch.chdir(tmp_path)
    (source := tmp_path / "b.jsonl").write_text("read")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    names = {
        "itself": source,
        "relative": Path("b.jsonl"),
        "link": tmp_path / "link",
        "hard link": tmp_path / "hard",
        "around": tmp_path / "folder" / ".." / "b.jsonl",
    }

    with pytest.raises(OutputError, match="is what this command reads or writes"):
        write_file(names[way], "text", [tmp_path / "absent", source])

    assert source.read_text() == "read"


def test_two_outputs_in_one_place_are_refused_before_either_is_there(tmp_path: Path) -> None:
    """The second would replace the first."""
    with pytest.raises(OutputError, match="is what this command reads or writes"):
        check_output(tmp_path / "x", [tmp_path / "y" / ".." / "x"], "--verdicts")


@pytest.mark.parametrize(("name", "why"), [("x" * 300, "File name too long"), ("file/x", "Not a directory")])
def test_a_place_that_cannot_be_is_one_sentence(tmp_path: Path, name: str, why: str) -> None:
    """With the system's reason and the option, before anything is written."""
    (tmp_path / "file").write_text("mine")

    with pytest.raises(OutputError, match=f"cannot write .*: {why}; nothing was written; name another file with --x"):
        check_output(tmp_path / name, option="--x")

    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    """What is written beside it has a name of its own."""
    write_file(path := tmp_path / ("x" * 255), "text")

    assert path.read_text() == "text"


def test_a_place_that_is_read_only_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before hours of measuring, not after; asked of the nearest folder that is there."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, _mode: asked.append(path))

    with pytest.raises(OutputError, match="it is read-only for this user"):
        check_output(tmp_path / "new" / "x.txt")

    assert asked == [tmp_path]


@pytest.mark.parametrize("there", [True, False], ids=["a file is there", "none is"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: bool,  # noqa: FBT001
) -> None:
    """One sentence that says what is kept; the old file is whole, and no half one is beside it."""
    path = tmp_path / "x.html"
    if there:
        path.write_text("old")
    opened = os.fdopen

    def full(*given: Any) -> Any:
        file = opened(*given)

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, _data: bytes) -> None:
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", full)

    with pytest.raises(OutputError, match=r"No space left on device; 3 cases are kept in s\.sqlite; name another"):
        write_file(path, "new", kept="3 cases are kept in s.sqlite")

    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"] * there


def test_letters_that_no_file_can_hold_are_replaced(tmp_path: Path) -> None:
    """A file's name that is no UTF-8 may stand in a text."""
    write_file(path := tmp_path / "x", "a\udcffb")
    append_file(path, "\udcff")

    assert path.read_text() == "a?b?"


@pytest.mark.parametrize("content", ["my notes", "my notes\nof today", "[1]\n", '{"a": 1}\n3\n', b"\xff\xfe"])
def test_a_journal_does_not_go_on_with_another_file(tmp_path: Path, content: str | bytes) -> None:
    """A file that does not hold rows is left as it is, its last line too."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()

    with pytest.raises(ValueError, match=r"line \d of .*x\.jsonl is"):
        Journal(path, ORIGIN)

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["{}", "[]", "text", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [[]]}', "[" * 99999]
)
def test_tiles_are_not_written_over_another_file(tmp_path: Path, content: str) -> None:
    """What `tune` goes on with is a file that it wrote itself."""
    (path := tmp_path / "x.json").write_text(content)

    with pytest.raises(ValueError, match="is no file of tiles"):
        tune.write([], path)

    assert path.read_text() == content


def test_tiles_and_their_timings_are_two_files(tmp_path: Path) -> None:
    """Said before anything is timed."""
    (path := tmp_path / "x.json").touch()

    with pytest.raises(OutputError, match="is what this command reads or writes"):
        tune.main(["-o", str(path), "--journal", str(path)], device="cpu")


def test_a_baseline_is_replaced_by_a_baseline_alone(tmp_path: Path) -> None:
    """A file that people reviewed is not lost to a report; one of its own kind is how it is brought up to date."""
    path, kept = tmp_path / "b.jsonl", '{"format": "skipcost baseline", "schema": 1}\n'
    path.write_text(kept)

    for other in ("<html>", '{\n "format": "skipcost calibration"}', "[]"):
        with pytest.raises(
            OutputError, match="is a skipcost baseline, which nothing else replaces; nothing was written"
        ):
            write_file(path, other)
    before = path.read_text()
    write_file(path, kept + '{"case": "x"}\n')

    assert before == kept
    assert path.read_text() == kept + '{"case": "x"}\n'
