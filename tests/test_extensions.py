"""References of the form path/to/file.py:name: resolved, refused in one line, stored with a run."""

import json

import pytest

from ramslib import extensions
from ramslib.errors import InputError
from ramslib.extensions import is_reference, key_values, resolve, store_sources


@pytest.fixture(autouse=True)
def trusted(tmp_path, monkeypatch):
    """A list of trusted code that starts empty."""
    monkeypatch.setattr(extensions, "TRUSTED", tmp_path / "home" / "trusted_sources")


def write(folder, code="def idea(*given):\n    return 42\n", name="ideas.py"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(code)
    return folder / name


def test_a_name_is_a_key_or_a_reference(tmp_path):
    path = write(tmp_path)
    assert resolve("known", {"known": len}, "strength") is len
    assert resolve(max, {"known": len}, "strength") is max, "a function stands for itself"
    assert resolve(f"{path}:idea", {}, "strength")() == 42
    assert is_reference(f"{path}:idea")
    assert not is_reference("attention") and not is_reference(3) and not is_reference("weights.py")


def test_an_edited_file_is_imported_again(tmp_path):
    path = write(tmp_path)
    first = resolve(f"{path}:idea", {}, "strength")
    assert resolve(f"{path}:idea", {}, "strength") is first, "the same code is imported once"
    write(tmp_path, "def idea(*given):\n    return 43\n")
    assert resolve(f"{path}:idea", {}, "strength")() == 43


@pytest.mark.parametrize(
    "code, name, words",
    [
        ("def idea(:\n", "idea", ["ideas.py:1", "SyntaxError"]),
        ("import json\nimport no_such_package\n", "idea", ["ideas.py:2", "no_such_package"]),
        ("x = 1\ny = x / 0\n", "idea", ["ideas.py:2", "ZeroDivisionError"]),
        ("def idea():\n    pass\n", "idee", ["no function 'idee'", "'idea'"]),
        ("idea = 3\n", "idea", ["no function 'idea'"]),
        ("def idea(strength): ...\n", "idea", ["too many", "idea(strength, threshold, recorded)"]),
        ("def idea(a, b, c, d): ...\n", "idea", ["missing", "'d'", "define idea(strength, "]),
    ],
)
def test_bad_code_is_one_line_that_says_where(tmp_path, code, name, words):
    path = write(tmp_path, code)
    with pytest.raises(InputError) as caught:
        resolve(f"{path}:{name}", {}, "proposal")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_unknown_names_and_missing_files_are_one_line(tmp_path):
    with pytest.raises(InputError, match="unknown proposal 'x'; choose one of a, b, or give"):
        resolve("x", {"a": 1, "b": 2}, "proposal")
    with pytest.raises(InputError, match="no.py: cannot be read"):
        resolve(f"{tmp_path}/no.py:idea", {}, "proposal")


def test_a_key_knows_code_and_not_places(tmp_path):
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    values = {"proposal": f"{one}:idea", "epochs": 3}
    assert key_values(values) == key_values(values | {"proposal": f"{other}:idea"})
    write(tmp_path / "b", "def idea():\n    return 0\n")
    assert key_values(values) != key_values(values | {"proposal": f"{other}:idea"})
    assert key_values(values)["epochs"] == 3


def test_a_run_keeps_its_code(tmp_path):
    path, run = write(tmp_path), tmp_path / "run"
    run.mkdir()
    values = {"proposal": f"{path}:idea", "loss": f"{path}:idea", "strength": "last_class"}
    stored = store_sources(values, run)
    (run / "config.json").write_text(json.dumps(stored))
    assert len(list((run / "sources").iterdir())) == 1
    path.unlink()
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    located = extensions.locate_sources(stored, moved)
    assert resolve(located["proposal"], {}, "proposal")() == 42
    assert located["strength"] == "last_class"
    again = store_sources(located, moved)
    assert again == stored, "a copy is not copied once more"


def test_code_of_a_foreign_run_is_not_executed(tmp_path):
    canary = tmp_path / "canary"
    run = tmp_path / "run"
    code = f"open({str(canary)!r}, 'w').close()\n\n\ndef idea(*given):\n    return 1\n"
    path = write(run / "sources", code)
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="written elsewhere.*ramslib trust"):
        resolve(f"{path}:idea", {}, "proposal")
    assert not canary.exists()
    assert extensions.trust(run) == [path]
    assert resolve(f"{path}:idea", {}, "proposal")() == 1 and canary.exists()


def test_marks_say_what_a_function_reads():
    @extensions.reads(blocks=2)
    def strength(recorded):
        return recorded

    @extensions.per_scale
    def loss(outputs, labels):
        return labels

    assert (strength.reads_blocks, strength.reads_tokens) == (2, False)
    assert loss.per_scale
