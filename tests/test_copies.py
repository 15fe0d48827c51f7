"""The three scripts repeat code on purpose. Each repeat says so, and stays identical.

A function or class of two scripts is marked `# Copied from <script>.py` in all but one; then its text is the one in
that script, decorators, comments and docstring included. Only `Args` is each script's own.
"""

import ast
import re
from pathlib import Path

import pytest

SCRIPTS = ["pretrain_teacher.py", "distill.py", "finetune.py"]
TEXTS = {script: (Path(__file__).resolve().parent.parent / script).read_text() for script in SCRIPTS}


def definitions(text):
    """(name, text, script named by the mark above it or None) of each function and class at the top level."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])  # 1-based
            mark = re.fullmatch(r"# Copied from (\w+\.py)", lines[first - 2])
            yield node.name, "\n".join(lines[first - 1 : node.end_lineno]), mark and mark[1]


def check(texts):
    found = [(script, *definition) for script, text in texts.items() for definition in definitions(text)]
    originals = {name: (script, text) for script, name, text, source in found if source is None}
    assert len(originals) == [source for *_, source in found].count(None), "two of one name without a mark"
    for script, name, text, source in found:
        assert source is None or originals.get(name) == (source, text), f"{script}: {name} has drifted from {source}"
    marks = sum(len(re.findall("^# Copied from ", text, re.M)) for text in texts.values())
    assert marks == sum(source is not None for *_, source in found), "a mark above nothing"


def test_copies_are_marked_and_identical():
    check(TEXTS)
    assert all("LIFE_LOST, GAME_OVER, TIME_LIMIT = 1, 2, 3\n" in text for text in TEXTS.values())


@pytest.mark.parametrize("old, new", [
    ("mass / mass.sum()", "mass / mass.max()"),  # the code
    ("# Copied from pretrain_teacher.py\ndef sample", "def sample"),  # the mark
    ("# Copied from pretrain_teacher.py\ndef sample", "# Copied from pretrain_teacher.py\n\ndef sample"),  # its place
])  # fmt: skip
def test_a_drifted_or_unmarked_copy_is_found(old, new):
    assert old in TEXTS["finetune.py"]
    with pytest.raises(AssertionError):
        check(TEXTS | {"finetune.py": TEXTS["finetune.py"].replace(old, new)})
