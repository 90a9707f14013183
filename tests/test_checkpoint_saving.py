"""Saves that do not finish: what was there before stays, whatever happens."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import logits

import qcompile
from qcompile import storage
from qcompile.errors import ConfigError, FormatError


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bar_counts_bytes(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    seen = []
    from rich.progress import Progress

    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *a, **k: (seen.append(k["completed"]), update(*a, **k)))
    qcompile.load(checkpoint[1], progress=True)
    with storage.Folder(checkpoint[1]) as folder:
        assert folder.size[1] == seen[-1]
    assert seen == sorted(seen)
    assert len(seen) > 14
    assert "kB" in capsys.readouterr().err


def test_an_existing_folder_is_not_touched_unasked(checkpoint, copied):
    before = files(copied)
    with pytest.raises(ConfigError, match="copied exists; pass overwrite=True"):
        qcompile.save(checkpoint[0], copied)
    assert files(copied) == before


def test_overwrite_replaces_the_whole_folder(checkpoint, copied):
    (copied / "stale.safetensors").write_bytes(b"")
    qcompile.save(checkpoint[0], copied, overwrite=True)
    assert files(copied) == files(checkpoint[1])
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not the folder of a checkpoint"):
        qcompile.save(checkpoint[0], tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not the folder of a checkpoint"):
        qcompile.save(checkpoint[0], tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_changes_nothing(checkpoint, copied, monkeypatch, overwrite):
    before, add = files(copied), storage.ShardWriter.add

    def full(self, name, tensor):
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(storage.ShardWriter, "add", full)
    target = copied if overwrite else copied.with_name("new")
    with pytest.raises(OSError, match="No space left"):
        qcompile.save(checkpoint[0], target, overwrite=overwrite)
    assert files(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_the_old_folder_returns_when_the_new_one_cannot_be_renamed(checkpoint, copied, monkeypatch):
    before, rename = files(copied), Path.rename

    def refuse(self, target):
        if self.name.endswith("partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        qcompile.save(checkpoint[0], copied, overwrite=True)
    assert files(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, {tests!r})
    import qcompile
    from qcompile import storage
    from pathlib import Path

    model = qcompile.load({source!r})
    {patch}
    qcompile.save(model, {target!r}, overwrite=True)
"""
WRITING = """
    storage.ShardWriter._write = lambda self, name, tensor: os.kill(os.getpid(), signal.SIGKILL)
"""
RENAMING = """
    rename = Path.rename
    def kill(self, target):
        rename(self, target)
        if target.name.endswith("replaced"):
            os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = kill
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_leaves_the_old_checkpoint(moment, checkpoint, copied):
    before = files(copied)
    patch = textwrap.dedent(WRITING if moment == "writing" else RENAMING)
    code = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), source=str(checkpoint[1]), target=str(copied), patch=patch
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copied.parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in copied.parent.iterdir() if path != copied]
    for path in left:
        with pytest.raises(FormatError, match=r"did not finish|interrupted save"):
            qcompile.load(path)
    if moment == "writing":
        assert len(left) == 1
        assert files(copied) == before
        left[0].rename(copied.parent / "renamed")  # even under another name it is no checkpoint
        with pytest.raises(FormatError, match="renamed holds no config"):
            qcompile.load(copied.parent / "renamed")
    else:
        with pytest.raises(FormatError, match="interrupted save put the old one aside as"):
            qcompile.load(copied)
        (aside,) = [path for path in left if path.name.endswith("replaced")]
        aside.rename(copied)
        assert files(copied) == before
    qcompile.save(checkpoint[0], copied, overwrite=True)
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))
