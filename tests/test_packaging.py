"""requirements.txt, requirements-dev.txt, pyproject.toml and the Makefile say the same of what is installed."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement  # pytest brings it
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]


def specifiers(lines):
    """The specifiers of requirements by name; comments and -r lines are left out."""
    parsed = [Requirement(text) for line in lines if (text := re.sub(r"(^|\s+)#.*|^-r .*", "", line).strip())]
    assert len({requirement.name for requirement in parsed}) == len(parsed)
    return {requirement.name: requirement.specifier for requirement in parsed}


RUN_LINES, DEV_LINES = [(ROOT / f"requirements{x}.txt").read_text().splitlines() for x in ("", "-dev")]
RUN, RANGES = specifiers(RUN_LINES), specifiers(PROJECT["dependencies"] + EXTRAS["plot"])


def test_same_packages():
    assert RUN.keys() == RANGES.keys()
    assert DEV_LINES[0] == "-r requirements.txt"
    assert specifiers(DEV_LINES) == specifiers(EXTRAS["dev"])
    assert set(EXTRAS) == {"plot", "dev"}


@pytest.mark.parametrize("name", RUN)
def test_a_pin_lies_in_its_range_and_a_range_is_the_same(name):
    pin = re.fullmatch(r"==([\d.]+)", str(RUN[name]))
    assert RANGES[name].contains(pin[1]) if pin else RUN[name] == RANGES[name]
    operators = sorted(specifier.operator for specifier in RANGES[name])
    assert operators == ["<", ">="]  # no range is open


@pytest.mark.parametrize("line", RUN_LINES + DEV_LINES[1:])
def test_each_line_has_its_reason(line):
    assert re.fullmatch(r"[a-z-]+[=<>][\d.,=<>]+  # \w.+", line)


def test_modules_are_the_files_at_the_top():
    assert PYPROJECT["tool"]["setuptools"]["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))


def test_the_makefile_takes_the_same_pythons():
    [check] = re.findall(r"\((\d+), (\d+)\) <= sys\.version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    low, high = ".".join(check[:2]), ".".join(check[2:])
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={low},<{high}")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + low.replace(".", "")
