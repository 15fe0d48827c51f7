"""The three scripts repeat code on purpose. Each repeat must say so, and must stay identical.

A top-level function or class may carry the line `# Copied from <script>.py` right above it.
Then its text (decorators, comments and docstring included) must equal the one in that script.
Constants at the top level carry no mark: the same name must have the same value everywhere.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["pretrain_teacher.py", "distill.py", "finetune.py"]


def definitions(text):
    """Yields (name, text, source) per top-level def; `source` is the file named by the marker, or None."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "Args":
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])  # 1-based
            marker = re.match(r"# Copied from (\w+\.py)$", lines[first - 2]) if first > 1 else None
            yield node.name, "\n".join(lines[first - 1 : node.end_lineno]), marker and marker.group(1)


def check_copies(texts):
    """texts: {script: text}. Raises an AssertionError for a drifted copy, and for a duplicate without its mark."""
    originals = {}  # name -> (script, text) of the unmarked definition
    for script, content in texts.items():
        for name, text, source in definitions(content):
            if source is None:
                assert name not in originals, f"{name} is in {originals[name][0]} and {script}: mark one as a copy"
                originals[name] = (script, text)
    for script, content in texts.items():
        for name, text, source in definitions(content):
            if source is not None:
                assert originals.get(name) == (source, text), f"{script}:{name} has drifted from {source}"


def constants(text):
    """{names: value} of the top-level assignments, as text."""
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assignments}


def script_texts():
    return {script: (ROOT / script).read_text() for script in SCRIPTS}


def test_copies_are_identical_and_marked():
    check_copies(script_texts())


def test_constants_of_the_same_name_are_the_same():
    values = {}  # name -> (script, value)
    for script, text in script_texts().items():
        for name, value in constants(text).items():
            first, expected = values.setdefault(name, (script, value))
            assert value == expected, f"{name} is {expected} in {first} and {value} in {script}"
    assert "(LIFE_LOST, GAME_OVER, TIME_LIMIT)" in values


def test_flags_of_the_same_name_have_the_same_type():
    types = {}  # flag -> (script, type)
    for script, text in script_texts().items():
        (args,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
        for field in args.body:
            kind = ast.unparse(field.annotation).removesuffix(" | None")  # None: the checkpoint's
            first, expected = types.setdefault(field.target.id, (script, kind))
            assert kind == expected, f"--{field.target.id} is {expected} in {first} and {kind} in {script}"


def test_every_mark_stands_above_a_definition():
    for script, content in script_texts().items():
        marked = [source for _, _, source in definitions(content) if source is not None]
        assert len(marked) == len(re.findall(r"^# Copied from ", content, re.MULTILINE)), script
        assert script not in marked and set(marked) <= set(SCRIPTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("** 0.6", "** 0.7"),  # the code
        lambda text: text.replace("Draws rows without", "Draws rows with"),  # the docstring
        lambda text: re.sub(r"# Copied from \S+\n(def sample)", r"\1", text),  # the mark
        lambda text: re.sub(r"# Copied from \S+\n(def sample)", r"# Copied from distill.py\n\1", text),  # its source
        lambda text: re.sub(r"(# Copied from \S+\ndef) sample", r"\1 draw", text),  # the name
    ],
)
def test_a_drifted_or_unmarked_copy_is_found(change):
    texts = script_texts()
    changed = change(texts["finetune.py"])
    assert changed != texts["finetune.py"]
    with pytest.raises(AssertionError):
        check_copies(texts | {"finetune.py": changed})
