"""docs/layout.md lists every file, with a comment."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")


def listed_paths() -> list[Path]:
    """Paths of the tree in docs/layout.md, by indentation."""
    block = LAYOUT.split("```")[1]
    found, parents = [], []
    for line in block.strip("\n").splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition(" ")
        path = Path(*parents[:indent], name)
        assert comment.strip() or indent == 0, f"{path} has no comment"
        parents[indent:] = [name]
        found.append(path)
    return found


def test_everything_listed_exists() -> None:
    missing = [str(path) for path in listed_paths() if not (ROOT / path).exists()]
    assert not missing, f"docs/layout.md lists what is not there: {missing}"


def test_every_file_of_the_package_and_every_page_is_listed_with_a_comment() -> None:
    there = {
        path.relative_to(ROOT)
        for path in (*(ROOT / "dpo").rglob("*"), *(ROOT / "docs").glob("*.md"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    unlisted = sorted(map(str, there - set(listed_paths())))
    assert not unlisted, f"the tree in docs/layout.md lacks {unlisted}: add a line with a comment for each"
