"""Flags: each is read, has a help text and its documented default; and each logged metric is documented."""

import ast
import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["pretrain_teacher", "distill", "finetune"]

ALL = {
    "seed": 1,
    "cuda": True,
    "torch_deterministic": True,
    "track": False,
    "wandb_project_name": "xtra",
    "wandb_entity": None,
    "run_dir": None,
    "resume": False,
    "checkpoint_every": 1_000,
    "compile": torch.cuda.is_available(),
    "cudagraphs": torch.cuda.is_available(),
    "batch_size": 256,
    "learning_rate": 0.2,
    "num_simulations": 50,
    "unroll_steps": 5,
    "td_steps": 5,
    "eval_every": 10_000,
    "eval_episodes": 32,
    "eval_max_frames": 108_000,
}
OWN = {
    "pretrain_teacher": {
        "datasets": (),
        "num_updates": 100_000,
        "channels": 64,
        "blocks": 4,
        "reanalyze_cache": True,
    },
    "distill": {"teachers": (), "num_updates": 100_000, "policy_target": "teacher", "channels": 64, "blocks": 4},
    "finetune": {
        "env_id": "MsPacmanNoFrameskip-v4",
        "total_timesteps": 100_000,
        "extra_updates": 0,
        "num_envs": 8,
        "learning_starts": 2_000,
        "channels": None,
        "blocks": None,
        "save_dataset": None,
        "capture_video": False,
        "pretrained": None,
        "teachers": (),
        "transfer": "hgf",
        "freeze_representation": False,
        "cross_task": True,
        "task_weights": True,
        "offline_batch_size": 256,
        "similarity_interval": 5_000,
        "similarity_updates": 500,
        "similarity_start": 10_000,
        "similarity_threshold": 0.1,
        "paper_loss": False,
        "reanalyze_cache": True,
    },
}


def args_class(script):
    return importlib.import_module(script).Args


def source(script):
    return (ROOT / f"{script}.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_defaults(script):
    found = {field.name: field.default for field in fields(args_class(script))}
    assert found == ALL | OWN[script] | {"exp_name": script}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    tree = ast.parse(source(script))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    flags = {field.name for field in fields(args_class(script))}
    assert flags - read == set() and read - flags == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_is(script):
    lines = source(script).splitlines()
    (args,) = [
        node for node in ast.parse(source(script)).body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ]
    for field in args.body:
        assert re.search(r"  # \S.{5,}", lines[field.lineno - 1]), field.target.id


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_text_and_default(script):
    environment = os.environ | {"COLUMNS": "240", "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source(script), re.MULTILINE))
    for field in fields(args_class(script)):
        flag = "--" + field.name.replace("_", "-")
        assert f"{flag} " in text or f"{flag}, " in text, flag
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        assert f"{comments[field.name]} (default: {default})" in text, flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_underscores_and_hyphens_both_work(script):
    values = {bool: None, int: "7", float: "0.5", str: "7"}
    for field in fields(args_class(script)):
        kind = str if field.default is None else type(field.default)
        if kind is tuple:
            words, expected = ["a", "b"], ("a", "b")
        elif kind is bool:
            words, expected = [], not field.default
        elif field.name in ("transfer", "policy_target"):
            words = [{"transfer": "hg", "policy_target": "actions"}[field.name]]
            expected = words[0]
        else:
            words = [values[kind]]
            expected = 7 if field.name in ("channels", "blocks") else kind(words[0])
        prefix = "--no_" if kind is bool and field.default else "--"
        for flag in (prefix + field.name, (prefix + field.name).replace("_", "-")):
            args = tyro.cli(args_class(script), args=[flag, *words])
            assert getattr(args, field.name) == expected, flag


def logged_keys(script):
    """The TensorBoard keys of the script's add_scalar calls, with <name> for what is filled in."""
    keys = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_scalar":
            key = node.args[0]
            if isinstance(key, ast.BinOp):  # "eval/episodic_return" + suffix
                key = key.left
            parts = key.values if isinstance(key, ast.JoinedStr) else [key]
            names = [f"<{ast.unparse(x.value)}>" if isinstance(x, ast.FormattedValue) else x.value for x in parts]
            keys.add("".join(names))
    return keys


TERMS = ["value_prefix", "policy", "value", "consistency"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_documented(script):
    keys = logged_keys(script)
    assert {"eval/episodic_return", "losses/loss", "losses/<name>_loss", "charts/learning_rate"} <= keys
    keys = {key.replace("<name>", term) for key in keys for term in TERMS}
    page = (ROOT / "docs" / f"{script}.md").read_text()
    plain = {re.sub(r"/<[\w.]+>$", "", key) for key in keys}  # without the game at its end
    missing = sorted(key for key in plain if not re.search(rf"`{key}(/[<{{]\w+[>}}])?`", page))
    assert not missing


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_documented_metric_is_logged(script):
    keys = {key.replace("<name>", term) for key in logged_keys(script) for term in TERMS}
    page = (ROOT / "docs" / f"{script}.md").read_text()
    named = set(re.findall(r"`((?:charts|losses|eval|search|transfer)/[\w/]*\w)", page))
    assert named and not {key for key in named if not any(other.startswith(key) for other in keys)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_name_in_the_docs_exists(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    flags = {"--" + field.name.replace("_", "-") for other in SCRIPTS for field in fields(args_class(other))}
    named = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][a-z-]+[a-z]", page)}
    assert named - flags - {"--help", "--logdir"} == set()
