"""Errors as one line, short lists, files written whole."""

import os

import pytest

from ramslib.errors import (
    InputError,
    file_errors,
    input_errors,
    one_line,
    shorten,
    write_atomically,
    writing,
)


def test_an_error_is_one_line():
    assert one_line(InputError("a\n  b")) == "a b"
    assert one_line(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert one_line(KeyError("top1")) == "KeyError: 'top1'"
    assert one_line(RuntimeError("a\nb\tc")) == "RuntimeError: a b c"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(OSError()) == "OSError"
    assert len(one_line(ValueError("x" * 10_000))) < 400


def test_a_long_list_is_shortened():
    assert shorten(["a"]) == "a"
    assert shorten(["a", "b", "c"]) == "a, b, c"
    assert shorten(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert shorten(range(5), count=1) == "0 and 4 more"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_no_part(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write(part):
        assert part == tmp_path / f".table.csv.{os.getpid()}.part"
        part.write_text("half")
        raise error

    with pytest.raises((InputError, KeyboardInterrupt)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_what_cannot_be_written_is_named_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match="a.txt: cannot be written .*Is a directory.*; move it"):
        with writing(tmp_path / "a.txt", "move it"):
            tmp_path.write_text("")
    with pytest.raises(ValueError, match="other"), writing(tmp_path):
        raise ValueError("other")


def test_what_cannot_be_read_is_named_once(tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(InputError, match=f"^{file}: cannot be read .*No such file.*; find it$"):
        with file_errors(file, "find it"):
            file.read_text()
    with pytest.raises(InputError, match="^a line of it$"), file_errors(file):
        raise InputError("a line of it")
    with pytest.raises(InputError, match="^no run .a setting.; give one$"):
        with input_errors("no run", "give one"):
            raise InputError("a setting")
    with pytest.raises(MemoryError), file_errors(file):
        raise MemoryError


def test_a_link_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("not mounted")
    with pytest.raises(InputError, match="link: is a symbolic link"):
        write_atomically(tmp_path / "link", lambda part: part.write_text("new"))
    assert (tmp_path / "link").is_symlink()
