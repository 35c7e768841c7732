import os
import stat

import pytest

from lorica.errors import AdapterFileError
from lorica.files import folder as folder_module
from lorica.files.folder import new_folder, parse_json


def make(target, content="new", *, overwrite=False, fail=False):
    with new_folder(target, marker="m.json", overwrite=overwrite, error=AdapterFileError) as here:
        (here / "m.json").write_text(content)
        (here / "sub").mkdir()
        (here / "sub" / "n").write_text(content)
        if fail:
            raise RuntimeError("the power fails")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_whole(tmp_path):
    before = os.umask(0o077)
    try:
        make(tmp_path / "deep" / "x")
    finally:
        os.umask(before)
    assert names(tmp_path / "deep") == {"x"}
    assert (tmp_path / "deep" / "x" / "sub" / "n").read_text() == "new"
    made = [tmp_path / "deep" / "x", *(tmp_path / "deep" / "x").rglob("*")]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made}
    assert modes == {0o644, 0o755}


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        make(tmp_path / "x", fail=True)
    assert not names(tmp_path)


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    make(tmp_path / "x", "old")
    with pytest.raises(AdapterFileError, match="exists already"):
        make(tmp_path / "x")
    with pytest.raises(RuntimeError):
        make(tmp_path / "x", overwrite=True, fail=True)
    assert (tmp_path / "x" / "m.json").read_text() == "old"
    make(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "m.json").read_text() == "new" and names(tmp_path) == {"x"}


def test_the_old_folder_comes_back_if_the_swap_fails(tmp_path, monkeypatch):
    make(tmp_path / "x", "old")
    rename = os.rename

    def failing(source, target):
        if ".tmp-" in str(source):
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(folder_module, "exchange", lambda new, old: False)  # as on other systems
    monkeypatch.setattr(folder_module.os, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "m.json").read_text() == "old" and names(tmp_path) == {"x"}


def test_other_things_are_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterFileError, match="holds other things"):
        make(tmp_path / "home", overwrite=True)
    assert names(tmp_path / "home") == {"thesis.txt"}
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("file", "link"):
        with pytest.raises(AdapterFileError, match="is not a folder"):
            make(tmp_path / name, overwrite=True)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    assert names(tmp_path / "x") == {"m.json", "sub"}


def test_json_that_python_would_take():
    assert parse_json(b'{"a": [1, 2.5, null]}', "here") == {"a": [1, 2.5, None]}
    for raw in (
        b'{"a": Infinity}',
        b'{"a": 1, "a": 1}',
        b"[]",
        b"",
        b"{} {}",
        b'\xef\xbb\xbf{"a": 1}',
    ):
        with pytest.raises(AdapterFileError, match="here"):
            parse_json(raw, "here")
