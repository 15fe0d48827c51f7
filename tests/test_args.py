"""Flags: their defaults, texts and groups, their spelling, and that each is read."""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["pretrain_teacher", "distill", "finetune"]

# flags and defaults by the group of --help that they stand in; the paper's, or the released code's where it has none
TRAINING = {"unroll_steps": 5, "learning_rate": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "max_grad_norm": 5.0}
TRAINING |= {"value_prefix_coef": 1.0, "policy_coef": 1.0, "value_coef": 0.25, "consistency_coef": 2.0}
TRAINING |= {"step_statistics": True, "action_gain": 30.0, "one_hot_actions": False}  # ours
TARGETS = {"gamma": 0.997**4, "td_steps": 5, "clip_rewards": True, "priority_exponent": 0.6, "priority_beta": 0.4}
SEARCH = {"num_simulations": 50, "c_init": 1.25, "dirichlet_alpha": 0.3, "dirichlet_fraction": 0.25}
SEARCH |= {"reanalyze_reuse": 4, "target_interval": 200}
EVALUATION = {"eval_every": 10_000, "eval_episodes": 32, "eval_max_frames": 108_000}
RUN = {"run_dir": None, "resume": False, "checkpoint_every": 1_000, "cuda": True, "torch_deterministic": True}
RUN |= {
    "compile": True,
    "cudagraphs": True,
    "search_cudagraphs": True,
    "track": False,
    "wandb_project_name": "xtra",
    "wandb_entity": None,
}
TRANSFER = {"pretrained": None, "teachers": (), "transfer": "hgf", "freeze_representation": False, "cross_task": True}
TRANSFER |= {"task_weights": True, "paper_loss": False, "offline_batch_size": 256, "similarity_interval": 5_000}
TRANSFER |= {"similarity_updates": 500, "similarity_start": 10_000, "similarity_threshold": 0.1}
DISTILL = {"teachers": (), "policy_target": "teacher", "num_simulations": 50, "c_init": 1.25}
OFFLINE = {"seed": 1, "num_updates": 100_000, "cycle": 8, "batch_size": 256, "channels": 64, "blocks": 4}
ONLINE = {"env_id": "MsPacmanNoFrameskip-v4", "seed": 1, "total_timesteps": 100_000, "steps_per_update": 1}
ONLINE |= {"extra_updates": 0, "num_envs": 8}
ONLINE |= {"learning_starts": 2_000, "selfplay_interval": 100, "batch_size": 256, "channels": None, "blocks": None}
ONLINE |= {"save_dataset": None, "capture_video": False, "selfplay_stream": True}
GROUPS = {
    "pretrain_teacher": {"": OFFLINE | {"datasets": ()}, "search": SEARCH},
    "distill": {"": OFFLINE | DISTILL},
    "finetune": {"": ONLINE, "search": SEARCH, "transfer": TRANSFER},
}
for script, groups in GROUPS.items():
    groups |= {"training": TRAINING, "targets": TARGETS, "evaluation": EVALUATION, "run": RUN | {"exp_name": script}}
FLAGS = {script: {k: v for group in groups.values() for k, v in group.items()} for script, groups in GROUPS.items()}
OTHER = {"transfer": "hg", "policy_target": "actions", "channels": 7, "blocks": 7}  # than the default, and no text


def parse(script, *words):
    module = importlib.import_module(script)
    return vars(model.read_flags(module.Args, module.__doc__, words))


@functools.cache
def source(script):
    return (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_the_papers(script):
    assert parse(script) == FLAGS[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_nothing_else_of_the_command_line(script):
    read = set(re.findall(r"\bargs\.(\w+)", source(script)))
    read |= {"eval_episodes", "exp_name", "resume", "run_dir", "track"} & set(
        re.findall(r"\bargs\.(\w+)", source("model"))
    )
    (terms,) = re.findall(r'getattr\(args, f"\{name\}_coef"\) for name in (\(.*?\))', source(script))
    assert read | {f"{name}_coef" for name in ast.literal_eval(terms)} == FLAGS[script].keys()
    assert "argv" not in source(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_of_every_flag_in_its_group_what_it_is_and_its_default(script):
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    comments = dict(re.findall(r"^    (\w+): .*?  # (\S.{5,})$", source(script), re.M))
    panels = {}  # title: its text
    for title, text in re.findall(r"╭─ (?:(\w+) )?options ─+╮(.*?)╰", done.stdout, re.S):
        panels[title] = " ".join(text.replace("│", " ").split())
    assert panels.keys() == GROUPS[script].keys()
    for group, flags in GROUPS[script].items():
        for name, default in flags.items():
            text = f"{comments[name]} (default: {'' if default == () else default})"
            assert re.search(rf"--{name.replace('_', '-')}[ ,].*{re.escape(text)}", panels[group]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_underscores_and_hyphens_both_work(script):
    values, words = {}, {"_": [], "-": []}
    for name, default in FLAGS[script].items():
        value = OTHER.get(name, {bool: not default, int: 7, float: 0.5, tuple: ("a", "b")}.get(type(default), "a"))
        values[name] = value
        flag = ("--no_" if default is True else "--") + name
        for joint in words:
            words[joint].append(flag.replace("_", joint))
            words[joint] += [] if isinstance(value, bool) else value if isinstance(value, tuple) else [str(value)]
    assert parse(script, *words["_"]) == values and parse(script, *words["-"]) == values


@pytest.mark.parametrize(
    "words",
    [
        "--teachers a --teachers b",
        "--seed 1 --seed=2",
        "--env-id a --env_id b",
        "--cuda --no-cuda",
        "--teachers",  # of an unset variable, as all that follow
        "--teachers --seed 1",
        "--teachers ''",
        "--teachers a ''",
        "--pretrained=",
        "--pretrained None",
        "--run-dir ''",
        "--save-dataset ''",
    ],
)
def test_no_flag_that_was_given_is_dropped(words):
    flag = re.match(r"--[a-z-]+", words)[0]
    with pytest.raises(SystemExit, match=f"^error: {flag} is given (twice|without a value); give"):
        parse("finetune", *shlex.split(words))


def test_a_home_folder_is_found_where_no_shell_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home folder")
    flags = parse("finetune", "--run-dir=~/a", "--teachers", "~/b", "c~d", "--exp-name", "~")
    assert flags["run_dir"] == "/home folder/a" and flags["teachers"] == ("/home folder/b", "c~d")


def test_output_that_nobody_reads_or_that_a_terminal_cannot_show_ends_nothing():
    read, write = os.pipe()
    output = model.Output(open(write, "w", encoding="ascii"))
    print("Köln ─", file=output)
    assert os.read(read, 100) == b"K?ln ?\n"  # at once
    os.close(read)
    with pytest.raises(BrokenPipeError):
        print("lost", file=output.stream, flush=True)
    for _ in range(3):
        print("lost", file=output, flush=True)


def test_names_and_commands_can_be_pasted(monkeypatch):
    assert model.file_name("my_env:ns/Env-v0__a b*__1") == "my_env-ns-Env-v0__a-b-__1"
    assert len(model.file_name(300 * "Ä" + 300 * "x")) <= 255
    monkeypatch.setattr(sys, "orig_argv", ["/my python", "-W", "ignore", "/my code/finetune.py"])
    monkeypatch.setattr(sys, "argv", ["/my code/finetune.py"])
    words = shlex.split(model.command("distill.py", "--teachers", "runs/a b"))
    assert words == ["/my python", "/my code/distill.py", "--teachers", "runs/a b"]


def test_in_a_log_file_the_bar_is_a_line_every_30_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(model.time, "monotonic", lambda: now)
    bar = model.Progress(total=20, unit="update", mininterval=0, miniters=1)
    for _ in range(20):
        now += 10
        bar.update()
        model.Progress.write("a line of the run")
    bar.close()
    out, err = capsys.readouterr()
    assert out == 20 * "a line of the run\n"  # and nothing that would clear a bar
    done = [line.split("|")[2].split()[0] for line in err.strip().splitlines()]
    assert "\r" not in err and done == ["3/20", "6/20", "9/20", "12/20", "15/20", "18/20"]


@pytest.mark.parametrize("columns", [60, 100, 160])
def test_help_is_wrapped_between_words(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    finetune = importlib.import_module("finetune")
    with pytest.raises(SystemExit):
        model.read_flags(finetune.Args, finetune.__doc__, ["--help"])
    text = capsys.readouterr().out
    about = re.split(r"\n.{0,3}options ", text)[0]  # with a box around it, or without if stdout is no terminal
    commands = [line for line in about.splitlines() if line.startswith("    ")]
    assert len(commands) == 2 and max(map(len, commands)) < 100  # not wrapped: they are to be pasted
    assert max(len(line) for line in text.splitlines() if line not in commands) <= columns
    words, expected = (" ".join(x.split()) for x in (about, finetune.__doc__))
    assert words.endswith(expected)
