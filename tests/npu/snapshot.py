"""The committed lists of aclnn calls: read, compared, and written anew with UPDATE_SNAPSHOTS=1 in the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"


def matches(name: str, section: str, calls: Sequence[object]) -> bool:
    """Whether a section of a file lists exactly these calls; writes it when asked to."""
    file = FOLDER / f"{name}.txt"
    sections = _read(file)
    lines = [str(call) for call in calls]
    if os.environ.get("UPDATE_SNAPSHOTS"):
        sections[section] = lines
        FOLDER.mkdir(exist_ok=True)
        file.write_text("\n".join(_section(*item) for item in sorted(sections.items())))
    assert sections.get(section) == lines, f"{file}: {_section(section, lines)}"
    return True


def _section(name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"== {name}", *lines, ""])


def _read(file: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("== "):
            current = sections.setdefault(line.removeprefix("== "), [])
        elif line:
            current.append(line)
    return sections
