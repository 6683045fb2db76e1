"""Code is loaded from nowhere that others can write to, and only whole."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_gem._kernels import trust
from hf_gem._kernels.trust import checked, is_intact, make_private, seal, seal_of

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no modes")
as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")

STRANGER = 54321


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    before = os.umask(0)
    try:
        folder = make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert make_private(folder) == folder


def refuses(folder, match):
    for function in (checked, make_private):
        with pytest.raises(PermissionError, match=match):
            function(folder)


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o703, 0o1777])
def test_a_folder_that_others_can_write_to(tmp_path, mode):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    refuses(folder, f"others can write to {folder}, which has mode {mode:04o}")


def test_a_folder_that_others_can_exchange(tmp_path):
    above = tmp_path / "shared"
    folder = make_private(above / "x" / "mine")
    above.chmod(0o777)
    refuses(folder, f"others can write to {above}, ")
    above.chmod(0o1777)  # as /tmp
    assert checked(folder) == folder


def test_a_folder_that_is_read(tmp_path):
    tmp_path.chmod(0o755)
    assert checked(tmp_path) == tmp_path.resolve()
    with pytest.raises(FileNotFoundError):
        checked(tmp_path / "missing")


def test_links_lead_to_what_is_checked(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    assert checked(tmp_path / "link") == (tmp_path / "shared").resolve()
    (tmp_path / "shared").chmod(0o777)
    refuses(tmp_path / "link", "others can write to .*shared")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="dangling"):
        make_private(tmp_path / "dangling" / "cache")
    assert not (tmp_path / "nowhere").exists()


@as_root
def test_a_folder_of_somebody_else(tmp_path):
    folder = make_private(tmp_path / "theirs" / "cache")
    os.chown(folder.parent, STRANGER, STRANGER)
    refuses(folder, f"belongs to user {STRANGER}")


def test_owners(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    strangers = {uid for uid in (0, 999, 1000, 65534) if trust._is_strangers(SimpleNamespace(st_uid=uid))}
    assert strangers == {999, 65534}
    # In a container where the number of root is not known, all that is root's has the number of nobody.
    monkeypatch.setattr(Path, "stat", lambda path: SimpleNamespace(st_uid=65534))
    assert not trust._is_strangers(SimpleNamespace(st_uid=65534))


@pytest.mark.parametrize(
    ("name", "members", "primary", "others"),
    [
        ("ada", [], 7, False),
        ("ada", ["ada"], 7, False),
        ("ada", ["bob"], 7, True),
        ("team", [], 7, True),
        ("ada", [], 8, True),
    ],
)
def test_the_group_of_one_user(monkeypatch, name, members, primary, others):
    """With the umask 002, which goes with such groups, all folders can be written to by their group."""
    group = SimpleNamespace(gr_name=name, gr_gid=7, gr_mem=members)
    user = SimpleNamespace(pw_name="ada", pw_gid=primary)
    monkeypatch.setattr(pytest.importorskip("grp"), "getgrgid", {7: group}.__getitem__)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", {1000: user}.__getitem__)
    status = SimpleNamespace(st_mode=stat.S_IFDIR | 0o775, st_gid=7, st_uid=1000)
    assert trust._others_write(status) == others
    status.st_gid = 9  # which nobody knows
    assert trust._others_write(status)
    status.st_mode = stat.S_IFDIR | 0o755
    assert not trust._others_write(status)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kernels.so"
    path.write_bytes(b"code" * 1000)
    path.chmod(0o700)
    seal_of(path).write_text(seal(path))
    assert is_intact(path)
    return path


def test_a_damaged_file(file):
    content = file.read_bytes()
    for damaged in (b"", content[:-1], content + b"x", b"C" + content[1:]):
        file.write_bytes(damaged)
        assert not is_intact(file)


@pytest.mark.parametrize("checksum", [b"", b"0" * 64, b"\xff\x00"])
def test_a_damaged_checksum(file, checksum):
    seal_of(file).write_bytes(checksum)
    assert not is_intact(file)


def test_half_of_the_pair(file):
    seal_of(file).unlink()
    assert not is_intact(file)
    seal_of(file).write_text(seal(file))
    file.unlink()
    assert not is_intact(file)


def test_no_file_of_its_user(file):
    file.chmod(0o777)
    assert not is_intact(file)
    file.chmod(0o700)
    elsewhere = file.with_name("elsewhere.so")
    Path(file).rename(elsewhere)
    file.symlink_to(elsewhere)
    assert not is_intact(file)


@as_root
def test_a_file_of_somebody_else(file):
    os.chown(file, STRANGER, STRANGER)
    assert not is_intact(file)
