"""Every block of Python in the README and in docs/ runs, and every file named there exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_python_run(page):
    # The blocks of a page are read in order, as by somebody who follows it.
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names_exist(page):
    text = page.read_text()
    named = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    named += re.findall(r"--config=(configs/\w+\.py)", text)
    for name in named:
        folder = ROOT if name.startswith("configs/") else page.parent
        if "NAME" not in name:
            assert (folder / name).exists(), name
