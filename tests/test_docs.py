"""The words around the code: commands parse, files and functions exist, every metric is explained, the examples run."""

import dataclasses
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro

from finetune import GAME_OVER, LIFE_LOST, TIME_LIMIT, atari_rom
from model import EfficientZeroNet, ModelConfig, read_dataset, save_model

ROOT = Path(__file__).resolve().parent.parent
FIVE = ["model.py", "mcts.py", "pretrain_teacher.py", "distill.py", "finetune.py"]
SCRIPTS = FIVE[2:] + [f"benchmark/{name}.py" for name in ("bench", "matrix", "report", "speed")]
STAGES = [f"docs/{script[:-3]}.md" for script in FIVE[2:]]
PAGES = ["README.md", *STAGES, "docs/fork.md", "docs/learning.md", "docs/performance.md"]
PAGES += ["docs/reproduce.md", "docs/results.md", "docs/running.md"]
WITH_COMMANDS = [*PAGES, *SCRIPTS, "benchmark/quickstart.sh"]
ARGS = {script: importlib.import_module(script[:-3].replace("/", ".")).Args for script in SCRIPTS}
FENCED = r"^```(\w*)\n(.*?)^```$"


def read(name):
    return (ROOT / name).read_text()


def blocks(page, language):
    """The fenced blocks of a Markdown page in a language, as texts."""
    return [text for found, text in re.findall(FENCED, read(page), re.M | re.S) if found == language]


PROSE = {page: re.sub(FENCED, "", read(page), flags=re.M | re.S) for page in PAGES}


def commands(name):
    """Yields (script, its arguments) of the commands in a file, with the shell variables assigned before in place."""
    if name.endswith(".md"):
        inline = re.findall(r"`((?:\w+=\w+ )?python [^`\n]+)`", PROSE[name])
        lines = "\n".join([*blocks(name, "bash"), *inline]).splitlines()
    else:
        text = re.sub(r" \\\n +|\n  (?=--)", " ", read(name))  # in a shell script one may go on in the next line
        text = re.sub(r'.*"\$@".*', "", text)  # what a function or a loop puts together
        text = re.sub(r'"\$PYTHON" |^ *run [\w-]+ ', "python ", text, flags=re.M)
        lines = re.sub(r'"(\$RUN[\w/.-]*)"', r"\1", text).splitlines()
    variables = {"RUN": "runs/x"}
    for line in lines:
        line = re.sub(r"^(srun |until )|; do$| &$", "", line.strip())
        for key in sorted(variables, key=len, reverse=True):
            line = line.replace(f"${key}", variables[key])
        if loop := re.match(r"for (\w+) in (\w+) ", line):
            variables[loop[1]] = loop[2]
        elif assignment := re.fullmatch(r"""(\w+)=("[^"$]*"|[^\s"$]+)""", line):
            variables[assignment[1]] = assignment[2].strip('"')
        elif command := re.match(r"(?:\w+=\w+ )?python (\S+\.py)(.*)", line):
            yield command[1], shlex.split(command[2], comments=True)


COMMANDS = [(name, *command) for name in WITH_COMMANDS for command in commands(name)]
assert {name for name, _, _ in COMMANDS} == set(WITH_COMMANDS), "a file in which no command was found"


@pytest.mark.parametrize("name, script, words", COMMANDS, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_commands_parse(name, script, words):
    assert not re.search(r"\$|--(datasets|save-dataset)( \S+\.npz)*+ (?!--)", " ".join(words))
    if "--help" not in words:
        args = tyro.cli(ARGS[script], args=words, config=(tyro.conf.OmitArgPrefixes,))
        assert not hasattr(args, "env_id") or atari_rom(args.env_id) or ":" in args.env_id
        assert (getattr(args, "total_timesteps", 0) + getattr(args, "num_updates", 0)) % 8 == 0  # whole cycles


def test_flags_named_in_the_pages_exist():
    flags, classes = {"--help", "--logdir"}, list(ARGS.values())
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(field.type):
            classes.append(field.type)  # a group, whose flags have no prefix
        else:
            flags |= {f"--{prefix}{field.name.replace('_', '-')}" for prefix in ("", "no-")[: 1 + (field.type is bool)]}
    flags |= {"--entropy-coef", "--gumbel-actions"}  # those that the diffs in docs/forks add
    for page in PAGES:
        text = re.sub(r"^#SBATCH .*$", "", read(page), flags=re.M)  # Slurm's own
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags, page


def test_files_and_functions_named_in_the_pages_exist():
    sources = "".join(read(name) for name in FIVE)
    for page, text in PROSE.items():
        paths = [(ROOT / page).parent / path for path in re.findall(r"\]\((?!http|#)([^)#]+)", text)]
        paths += [ROOT / path for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|sh))`", text)]
        assert [path for path in paths if not path.exists()] == []
        places = re.findall(r"\((`[^()]*)\)|^\| .* \| (`[\w`., ]+) \|$", text, re.M)
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", " ".join(sum(places, ()))):  # "(`function`, `Class.method`)"
            assert re.search(rf"(def|class|import) {name}\b|\b{name}( =|: )", sources), f"{page}: {name}"


@pytest.mark.parametrize("script", FIVE[2:])
def test_what_is_logged_is_explained_and_nothing_else(script):
    page, logged = read(f"docs/{script[:-3]}.md"), set()
    for key in re.findall(r'(?:add_(?:scalar|text)\(f?|tag=)"([^"]+)"', read(script)):
        for term in ("value_prefix", "policy", "value", "consistency") if "{name}_loss" in key else ("",):
            logged.add(re.sub(r"([/_]?{[^{}]+})+$", "", key.replace("{name}", term or "{name}")))  # but what varies
    rows = re.findall(r"^\| (`\w+/.*?|`hyperparameters`) \|", page, re.M)
    assert logged == {key for row in rows for key in re.findall(r"`(.+?)(?:[/_]?<\w+>)*`", row)}
    assert all(f"`{column}`" in page for column in re.search(r'"(env_steps,[\w,]+)', read(script))[1].split(","))


def test_the_differences_are_numbered_without_gaps():
    for page in STAGES:
        section = read(page).split("## Implementation details")[1].split("\n## ")[0]
        numbers = [int(n) for n in re.findall(r"^(?:\| )?(\d+)(?:\.| \|)", section, re.M)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 10, page


def test_sizes():
    lines = {name: len(read(name).splitlines()) for name in FIVE}
    stated = {name: int(n) for name, n in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", read("README.md"), re.M)}
    assert stated == {name: pytest.approx(lines[name], abs=15) for name in FIVE}
    assert sum(lines.values()) <= 4281


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_points_outside_the_repository():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    word = re.compile(r"\bsess[i]ons?\b|\bcla[u]de\b|\bhelper ag[e]nt|(?<![\w.])/(?:work|tmp|root|home)/", re.I)
    for name in files:
        if (ROOT / name).suffix in {".py", ".md", ".sh", ".txt", ".toml", ".json", ""} and (ROOT / name).is_file():
            assert word.search(read(name)) is None, name


@pytest.mark.parametrize("name", ["activation", "entropy", "eta", "gumbel"])
def test_the_forks_of_the_docs_apply(name):
    check = ["git", "apply", "--check", f"docs/forks/{name}.diff"]
    assert subprocess.run(check, cwd=ROOT, capture_output=True, text=True).stderr == ""


def test_the_dataset_writer_and_reader_of_the_docs_agree(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
    how = {2: (False, False, True), 4: (True, False, True), 6: (False, True, False)}  # over, time is up, life lost
    reader, writer = blocks("docs/finetune.md", "python")
    assert len(reader.splitlines()) == 5 and len(writer.splitlines()) == 10
    space = {"path": f"{tmp_path}/own.npz", "room": 13, "env_id": "PhoenixNoFrameskip-v4"}
    space["steps"] = ((frames[t], t, t / 2, *how.get(t, (False,) * 3)) for t in range(9))
    exec(writer, space)
    exec(reader, space)
    shown = [0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]  # a game's last frame comes twice, and the stream's
    acted = np.diff(shown, prepend=-1) > 0
    expected = {"frames": frames[shown], "acted": acted, "action": shown * acted, "reward": shown * acted / 2}
    expected["end"] = [0, 0, LIFE_LOST, 0, GAME_OVER, 0, 0, TIME_LIMIT, 0, 0, 0, 0]
    assert all(np.array_equal(space["data"][name], wanted) for name, wanted in expected.items())
    assert read_dataset(space["path"])["env_id"] == "PhoenixNoFrameskip-v4"


def test_the_model_loader_of_the_docs_runs(tmp_path, capsys):
    save_model(f"{tmp_path}/model.pt", EfficientZeroNet(ModelConfig.of_width(4, 1)), env_ids=["a"], scores={"a": 3.0})
    exec(*blocks("docs/pretrain_teacher.md", "python"), {"folder": str(tmp_path)})
    assert capsys.readouterr().out.startswith("['a'] {'a': 3.0} tensor([[0.0556")  # uniform over 18 actions
