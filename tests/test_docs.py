"""The words around the code: commands parse, files and functions exist, every metric is explained, the examples run."""

import dataclasses
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from finetune import LIFE_LOST, Replay, add_frames, atari_rom, save_dataset
from model import EfficientZeroNet, ModelConfig, save_model

ROOT = Path(__file__).resolve().parent.parent
FIVE = ["model.py", "mcts.py", "pretrain_teacher.py", "distill.py", "finetune.py"]
SCRIPTS = FIVE[2:] + ["benchmark/report.py", "benchmark/speed.py"]
STAGES = [f"docs/{script[:-3]}.md" for script in FIVE[2:]]
PAGES = ["README.md", *STAGES, "docs/performance.md"]


def read(name):
    return (ROOT / name).read_text()


def blocks(name, language):
    """The fenced blocks of a Markdown page in a language, as texts."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), re.M | re.S)


def args_class(script):
    return importlib.import_module(script[:-3].replace("/", ".")).Args


def commands(name):
    """Yields (script, its arguments) of the commands in a file, with the shell variables assigned before in place."""
    if name.endswith(".md"):
        inline = re.findall(r"`(python [^`\n]+)`", re.sub(r"^```.*?^```$", "", read(name), flags=re.M | re.S))
        lines = "\n".join([*blocks(name, "bash"), *inline]).splitlines()
    elif name.endswith(".sh"):
        text = re.sub(r"\s*\\?\n  (?=\S)", " ", read(name))  # a command or a string that goes on in the next line
        lines = text.replace("$PYTHON", "python").splitlines()
    else:
        lines = re.findall(r"^    ((?:\w+=\w+ )?python .*)$", read(name), re.M)
    variables = {"RUN": "runs/x"}
    for line in lines:
        line = re.sub(
            r"^(srun |until )|^torchrun --nproc-per-node \d+(?= )",
            lambda x: "python" if "torchrun" in x[0] else "",
            line.strip(),
        ).removesuffix("; do")
        for key, value in sorted(variables.items(), key=lambda item: -len(item[0])):
            line = line.replace(f"${key}", value)
        if assignment := re.fullmatch(r"""(\w+)=("[^"$]*"|[^\s"$]+)""", line):
            variables[assignment[1]] = assignment[2].strip('"')
        elif re.match(r"(\w+=\w+ )?python \S+\.py", line):
            words = shlex.split(line, comments=True)
            words = words[words.index("python") + 1 :]
            yield words[0], words[1:]


COMMANDS = [
    (name, script, words) for name in [*PAGES, *SCRIPTS, "benchmark/quickstart.sh"] for script, words in commands(name)
]


def test_there_are_commands_in_every_file():
    assert {name for name, _, _ in COMMANDS} == {*PAGES, *SCRIPTS, "benchmark/quickstart.sh"}


@pytest.mark.parametrize("name, script, words", COMMANDS, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_commands_parse(name, script, words):
    assert script in SCRIPTS and not any("$" in word for word in words)
    if "--help" in words:
        return
    args = tyro.cli(args_class(script), args=words)
    if hasattr(args, "env_id"):
        assert atari_rom(args.env_id) or ":" in args.env_id


def test_flags_named_in_the_pages_exist():
    flags = {"--help", "--logdir", "--nproc-per-node"}
    for script in SCRIPTS:
        for field in dataclasses.fields(args_class(script)):
            flag = field.name.replace("_", "-")
            flags |= {f"--{flag}", f"--no-{flag}"} if isinstance(field.default, bool) else {f"--{flag}"}
    for page in PAGES:
        text = re.sub(r"^#SBATCH .*$", "", read(page), flags=re.M)  # Slurm's own
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags, page


def test_files_and_functions_named_in_the_pages_exist():
    sources = "".join(read(name) for name in FIVE)
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
        for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):  # links, relative to the page
            assert (ROOT / page).parent.joinpath(path).exists(), f"{page}: {path}"
        for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|sh))`", text):  # names, relative to the repository
            assert (ROOT / path).exists(), f"{page}: {path}"
        for group in re.findall(r"\((`[^()]*)\)", text):  # "(`function`, `Class.method`)": where it is done
            for name in re.findall(r"`(?:\w+\.)?(\w+)`", group):
                assert re.search(rf"\b{name}\b", sources) or (ROOT / f"{name}.py").exists(), f"{page}: {name}"


@pytest.mark.parametrize("script", FIVE[2:])
def test_every_logged_metric_is_explained(script):
    page = re.sub(r"<\w+>", "*", read(f"docs/{script[:-3]}.md"))
    keys = set(re.findall(r'add_(?:scalar|text)\(f?"([^"]+)"', read(script)))
    assert len(keys) > 5
    for key in keys:
        for term in ("value_prefix", "policy", "value", "consistency") if "{name}" in key else ("",):
            wanted = re.sub(r"{[\w.]+}", "*", key.replace("{name}", term))
            assert f"`{wanted}`" in page or f"`{wanted}/*`" in page, key
    columns = re.search(r'"(env_steps,[\w,]+)', read(script))[1].split(",")
    assert all(f"`{column}`" in page for column in columns)


def test_the_differences_are_numbered_without_gaps():
    for page in STAGES:
        section = read(page).split("## Implementation details")[1].split("\n## ")[0]
        numbers = [int(n) for n in re.findall(r"^(?:\| )?(\d+)(?:\.| \|)", section, re.M)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 10, page


def test_sizes():
    assert len(read("README.md").splitlines()) <= 200
    assert len(read("benchmark/quickstart.sh").splitlines()) <= 40
    assert len(read("benchmark/report.py").splitlines()) <= 120
    lines = {name: len(read(name).splitlines()) for name in FIVE}
    stated = {name: int(n) for name, n in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", read("README.md"), re.M)}
    assert stated.keys() == lines.keys()
    for name in FIVE:
        assert abs(lines[name] - stated[name]) <= 15, f"{name} has {lines[name]} lines, README.md says {stated[name]}"
    assert sum(lines.values()) < 3900


def test_nothing_points_outside_the_repository():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    word = re.compile(r"\bsess[i]ons?\b|\bcla[u]de\b|\bhelper ag[e]nt|(?<![\w.])/(?:work|tmp|root|home)/", re.I)
    for name in files:
        if (ROOT / name).suffix in {".py", ".md", ".sh", ".txt", ".toml", ".json", ""} and (ROOT / name).is_file():
            found = word.search(read(name))
            assert found is None, f"{name}: {found[0]}"


def test_the_dataset_reader_of_the_docs_runs(tmp_path, capsys):
    rng, replay = np.random.default_rng(0), Replay(24, 2, "cpu")
    for step in range(10):  # 20 rows: two full chunks and a part of one
        add_frames(replay, rng.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8), age=np.full(2, step))
    replay.acted[:18], replay.reward[:18], replay.end[6] = True, 2.0, LIFE_LOST
    save_dataset(f"{tmp_path}/data", replay, {"env_id": "PhoenixNoFrameskip-v4"})
    (code,) = blocks("docs/finetune.md", "python")
    assert len(code.splitlines()) == 5
    space = {"folder": f"{tmp_path}/data"}
    exec(code, space)
    assert capsys.readouterr().out.split() == "PhoenixNoFrameskip-v4 (20, 96, 96, 3) mean reward 2.0".split()
    order = np.r_[0:20:2, 1:20:2]  # the streams of the two environments, one after the other
    assert (space["frames"] == replay.frames[order].permute(0, 2, 3, 1).numpy()).all()
    assert space["steps"]["life_lost"].nonzero()[0].tolist() == [3]


def test_the_model_loader_of_the_docs_runs(tmp_path, capsys):
    torch.manual_seed(0)
    save_model(f"{tmp_path}/model.pt", EfficientZeroNet(ModelConfig.of_width(4, 1)), {}, ["a"], {"updates": 3})
    (code,) = blocks("docs/pretrain_teacher.md", "python")
    assert len(code.splitlines()) == 5
    exec(code, {"folder": str(tmp_path)})
    assert capsys.readouterr().out.startswith("['a'] {'updates': 3} tensor([[0.0556")  # uniform over 18 actions
