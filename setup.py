"""Copies `configs/` and `data/` into a wheel; everything else about the build is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs/*.yaml", "data/*.jsonl", "data/README.md")
"""What `dpo/distribution.py` finds in an installed package. An editable install finds it in the checkout."""


class BuildWithSettingsAndData(build_py):
    """The package as it is, and the shipped files beside it in `dpo/shipped/`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in SHIPPED for path in Path().glob(pattern)):
            target = Path(self.build_lib, "dpo", "shipped", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithSettingsAndData})
