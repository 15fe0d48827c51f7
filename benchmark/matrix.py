"""The paper's experiments: which runs they need, in which order, and a pool or a cluster that does them.

    python benchmark/matrix.py --list                                     # what every table and figure costs
    python benchmark/matrix.py --experiments table1 --games mazes --seeds 1 2 3 --slots 4
    python benchmark/matrix.py --experiments figure8 --backend slurm --dry-run

A run is one command of the three scripts, in a folder of its own below runs/<scale>. The same matrix may be started
again at any time: what is done is skipped, what was interrupted goes on, what failed is tried again. A failed run stops
only what needs it. Pieces are shared: a game's run from scratch is its baseline and a teacher's data, a teacher serves
every student, a student every finetuning. `python benchmark/report.py --collect runs/<scale>/*` makes the pages.
"""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import filelock
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from speed import override  # noqa: E402

import model  # noqa: E402

# --- the paper's experiments ---
METHODS = {  # of stage 2: the kind of student it starts from, and its own flags; {names} are those of the scale below
    "efficientzero": (None, "{small_h}"),
    "efficientzero-l": (None, "{large_h}"),
    "efficientzero-l-512": (None, "{large_h} {twice_the_batch}"),
    "xtra": ("student", ""),
    "xtra-other": ("other-student", ""),  # of the other category's games
    "xtra-small": ("small-student", ""),
    "wo-cross-task": ("student", "--no-cross-task"),
    "wo-pretraining": ("teachers", "{large_h}"),  # the student's teachers, for their data and answers
    "wo-task-weights": ("student", "--no-task-weights"),
    "frozen-h": ("student", "--freeze-representation"),
    "transfer-hg": ("student", "--transfer hg"),
    "transfer-h": ("student", "--transfer h"),
    "bc": ("cloned", "--total-timesteps 0 --num-simulations 0"),  # zero-shot; XTRA's is the first evaluation of "xtra"
    "diverse-efficientzero": (None, "{small_h} {extra}"),
    "diverse-xtra": ("diverse-student", "{extra}"),
}
EXPERIMENTS = {  # the methods of a table or figure; those of stage 1 are the models that Figure 10 compares
    "table1": ["efficientzero", "efficientzero-l", "xtra", "wo-cross-task", "wo-pretraining", "wo-task-weights", "bc"],
    "table2": ["diverse-efficientzero", "diverse-xtra"],
    "figure5": ["xtra"],  # and Figure 9: eta over time, for every target
    "figure7a": ["efficientzero", "xtra", "xtra-other"],
    "figure7b": ["efficientzero", "xtra", "frozen-h"],
    "figure7c": ["efficientzero", "efficientzero-l", "xtra", "xtra-small"],
    "figure7d": ["efficientzero", "xtra"],
    "figure8": ["efficientzero", "transfer-h", "transfer-hg", "xtra"],
    "figure10": ["teacher", "student", "multi-game"],
    "figure11": ["efficientzero", "efficientzero-l", "efficientzero-l-512", "xtra"],
}
OF_THE_PAPER = tuple(EXPERIMENTS)
PROBE = """--blocks 1 --channels 16 --batch-size 32 --learning-rate 0.1 --num-simulations 16 --unroll-steps 5
    --td-steps 5 --no-one-hot-actions --action-gain 30 --steps-per-update 8 --total-timesteps 16000
    --learning-starts 1600 --target-interval 100 --eval-every 1000"""
ONE_HOT = "--one-hot-actions --action-gain 4"  # the gain of 30 is for one plane of a/18
AN_HOUR = "--total-timesteps 80000 --target-interval 200 --eval-every 2500"  # on one core
# EfficientZero with one thing changed at a time, and what follows from it, to find settings that learn on a CPU.
PROBES = {
    "first": "",
    "steps-1": "--steps-per-update 1 --total-timesteps 2000 --learning-starts 400",
    "long": "--total-timesteps 40000 --eval-every 2500",
    "gain-3": "--action-gain 3",
    "policy-01": "--policy-coef 0.1",
    "one-hot": ONE_HOT,
    "one-hot-td-20": f"{ONE_HOT} --td-steps 20",
    "one-hot-long": f"{ONE_HOT} {AN_HOUR}",
    "one-hot-td-20-long": f"{ONE_HOT} {AN_HOUR} --td-steps 20",
}
METHODS |= {f"probe-{name}": (None, f"{PROBE} {flags}") for name, flags in PROBES.items()}
EXPERIMENTS["probes"] = [f"probe-{name}" for name in PROBES]
OF_SIZE = {"efficientzero-l", "efficientzero-l-512", "xtra-small"}  # which a scale with one size of h has not
PIECES = {"small-teacher", "small-student", "diverse-student", "cloned"}  # which only others need
EVERY_CATEGORY = {"table1", "figure5", "probes"}  # the other figures are of the first: the paper's are of shooters

SHOOTERS = ["Assault", "Carnival", "Centipede", "DemonAttack", "Phoenix"]
MAZES = ["Alien", "Amidar", "BankHeist", "MsPacman", "WizardOfWor"]
PROBED = {"shooters": SHOOTERS, "mazes": MAZES}
DIVERSE = ["Carnival", "Centipede", "Phoenix", "Pooyan", "Riverraid", "VideoPinball", "WizardOfWor", "YarsRevenge"]
TOY_SIZE = """--channels 16 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2 --td-steps 3
    --eval-episodes 16 --checkpoint-every 52"""
CPU_SIZE = f"""--channels 16 --batch-size 32 --learning-rate 0.1 --num-simulations 16 --td-steps 20 {ONE_HOT}
    --eval-episodes 8 --eval-max-frames 20000 --eval-every 500"""
SCALES = {  # sizes, games and budgets; what a method is and which runs it needs is the same at each
    "paper": {
        "categories": {"shooters": SHOOTERS, "mazes": MAZES},
        "targets": {"shooters": SHOOTERS, "mazes": MAZES},
        "diverse": DIVERSE,
        "diverse_targets": ["Assault", "BattleZone", "Hero", "Krull", "Seaquest"],
        "env_id": "{}NoFrameskip-v4",
        "students": 1,  # different students; every seed of stage 2 from the same one
        "online": "",  # flags of finetune.py
        "teacher": "",
        "student": "",
        "small_h": "--blocks 1",
        "large_h": "--blocks 4",
        "twice_the_batch": "--batch-size 512",
        "extra": "--extra-updates 20000",
        "environment": {},
    },
    "small": {  # real Atari within hours on a CPU; too little to learn much; with the departures of PROBES' last lines
        # Not DemonAttack: where the agent hides, games last to the cut, and an evaluation takes minutes.
        "categories": {"shooters": ["Carnival", "Phoenix", "Assault"], "mazes": ["Alien", "Amidar", "MsPacman"]},
        "targets": {"shooters": ["Assault"], "mazes": ["MsPacman"]},
        "diverse": ["Carnival", "Phoenix", "Alien", "Amidar"],
        "diverse_targets": ["Krull"],
        "env_id": "{}NoFrameskip-v4",
        "students": 3,
        "online": f"""{CPU_SIZE} --steps-per-update 8 --total-timesteps 16000 --learning-starts 1600
            --target-interval 100 --offline-batch-size 32 --similarity-start 400 --similarity-interval 400
            --similarity-updates 40""",
        "teacher": f"{CPU_SIZE} --num-updates 2000 --target-interval 100 --eval-every 2000",
        "student": f"{CPU_SIZE} --num-updates 2000 --eval-every 2000",
        "small_h": "--blocks 1",
        "large_h": "--blocks 1",  # the same: an hour has no room for another size of h
        "twice_the_batch": "--batch-size 64",
        "extra": "--extra-updates 800",
        "environment": {"OMP_NUM_THREADS": "1"},
    },
    "toy": {  # games of tests/toy_env.py
        "categories": {
            "falling": ["Fruit-v0", "Rocks-v0", "Storm-v0"],
            "catching": ["Catch-v0", "Catch-v1", "Catch-v3"],
        },
        "targets": {"falling": ["Storm-v0"], "catching": ["Catch-v3"]},
        "diverse": ["Fruit-v0", "Rocks-v0", "Catch-v0", "Catch-v1"],
        "diverse_targets": ["Storm-v0", "Catch-v3"],
        "env_id": "toy_env:{}",
        "students": 5,
        "online": f"""{TOY_SIZE} --total-timesteps 312 --eval-every 40 --learning-starts 96 --target-interval 48
            --offline-batch-size 16 --similarity-start 48 --similarity-interval 48 --similarity-updates 16""",
        "teacher": f"{TOY_SIZE} --num-updates 400 --eval-every 80 --target-interval 48",
        "student": f"{TOY_SIZE} --num-updates 320 --eval-every 80",
        "small_h": "--blocks 1",
        "large_h": "--blocks 2",
        "twice_the_batch": "--batch-size 32",
        "extra": "--extra-updates 64",
        # On a GPU each of these runs would compile for a minute.
        "environment": {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    },
}


@dataclass
class Args:
    experiments: tuple[Literal[tuple(EXPERIMENTS)], ...] = ()  # tables, figures, or probes; --list: all but probes
    methods: tuple[str, ...] = ()  # only these methods of the experiments, and what they need; default: all
    games: tuple[str, ...] = ()  # target games or categories; default: the paper's for each experiment
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of stage 2; those of data, teachers and students: see --students
    scale: Literal[tuple(SCALES)] = "paper"  # toy: tests/toy_env.py; small: real Atari, reduced, on a CPU
    students: int | None = None  # students, of seeds 1, 2, ..., that --seeds take in turn; default: 1, small: 3, toy: 5
    folder: str | None = None  # where the run folders are; default: runs/{scale}
    list: bool = False  # whether to print all commands with their cost, and do nothing
    card: str | None = None  # of the prices: H200 or H100-floor (paper), CPU (small, toy)
    backend: Literal["local", "slurm"] = "local"  # a pool of processes here, or array jobs of benchmark/slurm.sh
    slots: int | None = None  # runs at a time, of the local pool; default: one for each GPU; on a CPU give it
    dry_run: bool = False  # whether the slurm backend prints what it would submit, and does nothing


# --- from experiments to runs ---
def add_run(jobs, plan, method, games, seed, words, needs=()):
    """Adds a run to `jobs`, {folder: run}, unless it is there -> its folder.

    games: what its name says of them. words: script and flags, with {names} of the scale. needs: folders of other runs.
    """
    name = model.file_name(f"{method}__{games}__{seed}")
    folder = f"{plan.folder}/{name}"
    words = f"{words} --seed {seed} --exp-name {plan.scale_name}-{method} --run-dir {folder} --resume"
    words = override(words.format(**vars(plan)).split())  # of a flag given twice the method's, which comes last
    leaves = ["model.pt"] + ["dataset.npz"] * ("--save-dataset" in words) + ["targets.npz"] * method.endswith("teacher")
    job = SimpleNamespace(method=method, folder=folder, words=words, needs=tuple(needs), leaves=leaves)
    jobs.setdefault(folder, job)
    return folder


def add_scratch(jobs, plan, game, seed):
    """EfficientZero: the baseline of a game, and what its teacher learns from."""
    folder = f"{plan.folder}/{model.file_name(f'efficientzero__{game}__{seed}')}"
    words = f"finetune.py {plan.online} {METHODS['efficientzero'][1]} --env-id {plan.env_id.format(game)}"
    return add_run(jobs, plan, "efficientzero", game, seed, f"{words} --save-dataset {folder}/dataset.npz")


def add_teachers(jobs, plan, games, seed, size):
    """One teacher for each game -> their folders."""
    prefix = "" if size == plan.large_h else "small-"
    folders = []
    for game in games:
        source = add_scratch(jobs, plan, game, seed)
        words = f"pretrain_teacher.py --datasets {source}/dataset.npz {plan.teacher} {size}"
        folders.append(add_run(jobs, plan, f"{prefix}teacher", game, seed, words, [source]))
    return folders


def add_multi_game(jobs, plan, games, seed, name):
    """Offline RL on all games at once, without teachers (App. C)."""
    sources = [add_scratch(jobs, plan, game, seed) for game in games]
    data = " ".join(f"{source}/dataset.npz" for source in sources)
    words = f"pretrain_teacher.py --datasets {data} {plan.teacher} {plan.large_h}"
    return add_run(jobs, plan, "multi-game", name, seed, words, sources)


def add_student(jobs, plan, kind, games, seed, name):
    """A student of the teachers of `games`. kind: student, diverse-student, small-student, or cloned."""
    size = plan.small_h if kind == "small-student" else plan.large_h
    teachers = add_teachers(jobs, plan, games, seed, size)
    words = f"distill.py --teachers {' '.join(teachers)} {plan.student} {size}"
    words += " --policy-target actions" if kind == "cloned" else ""
    return add_run(jobs, plan, kind, name, seed, words, teachers)


def offline_games(plan, target, kind):
    """The games that a student for this target has learned, and what the student is called."""
    if kind == "diverse-student":
        return plan.diverse, "diverse"
    [category] = [name for name, games in plan.targets.items() if target in games]
    if kind == "other-student":  # of another category: the student of its last game
        category = next(name for name in plan.categories if name != category)
        target = plan.categories[category][-1]
    return [game for game in plan.categories[category] if game != target], f"{category}-without-{target}"


def add_method(jobs, plan, method, game, seed):
    """A model of the paper for one target game, with all that it needs."""
    first_seed = 1 + (seed - 1) % plan.students  # of stage 1: data, teachers, student
    if method == "efficientzero":
        return add_scratch(jobs, plan, game, seed)
    if method in ("teacher", "student", "multi-game"):
        games, name = offline_games(plan, game, "student")
        if method == "teacher":
            return add_teachers(jobs, plan, games, first_seed, plan.large_h)
        if method == "multi-game":
            return add_multi_game(jobs, plan, games, first_seed, name)
        return add_student(jobs, plan, "student", games, first_seed, name)
    start, flags = METHODS[method]
    needs = []
    if start:
        games, name = offline_games(plan, game, start)
        if start == "teachers":
            needs = add_teachers(jobs, plan, games, first_seed, plan.large_h)
            flags += f" --teachers {' '.join(needs)}"
        else:
            kind = "student" if start == "other-student" else start
            needs = [add_student(jobs, plan, kind, games, first_seed, name)]
            flags += f" --pretrained {needs[0]}"
    words = f"finetune.py {plan.online} --env-id {plan.env_id.format(game)} {flags}"
    return add_run(jobs, plan, method, game, seed, words, needs)


def choose_games(plan, experiment, games):
    """The targets of an experiment, of those that are wanted; without a wish the paper's."""
    if experiment == "table2":
        groups = {"diverse": plan.diverse_targets}
    else:
        groups = PROBED if experiment == "probes" else plan.targets
    default = groups if experiment in EVERY_CATEGORY else [*groups][:1]
    wanted = [game for name in games or default for game in groups.get(name, [name])]
    return [game for group in groups.values() for game in group if game in wanted]


def plan_runs(plan, experiments, games, seeds, methods=()):
    """All runs of the experiments, in an order in which each comes after what it needs: {folder: run}.

    games, methods: only these and what they need; none: all.
    """
    jobs = {}
    left_out = OF_SIZE if plan.small_h == plan.large_h else set()
    for seed in seeds:
        for experiment in experiments:
            for game in choose_games(plan, experiment, games):
                for method in EXPERIMENTS[experiment]:
                    if method in left_out or (methods and method not in methods):
                        continue
                    add_method(jobs, plan, method, game, seed)
    return jobs


# --- what runs cost ---
def read_prices(scale, card):
    """What runs cost at a scale on a card, by benchmark/prices.csv -> {method: {"hours": (0.9, "scaled"), ...}}.

    measured: in such a run; scaled: from a shorter one; counted: from bytes and FLOPs; guessed: from another method.
    The row of "others" is for all methods that have none. card: None for the first of the scale.
    """
    with open(ROOT / "benchmark" / "prices.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == scale]
    cards = list(dict.fromkeys(row["card"] for row in rows))
    card = card or cards[0]
    if card not in cards:
        raise SystemExit(f"error: --card {card} has no prices at --scale {scale}; choose of {', '.join(cards)}")
    prices = defaultdict(lambda: prices["others"])
    for row in rows:
        if row["card"] == card:
            cells = {name: row[name].split() for name in ("hours", "memory_gb", "disk_gb")}
            prices[row["method"]] = {name: (float(number), how) for name, (number, how) in cells.items()}
    return prices


def shell_line(job, environment):
    """The command of a run, for a shell in the repository's root."""
    assignments = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join(["env", *assignments, "python", *job.words])


def with_this_python():
    """The environment in which `python` is the one that runs here, for the commands of `shell_line`."""
    return os.environ | {"PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}


def print_commands(jobs, left, prices, environment):
    """Every command, and before it its price and whether it has been done. left: those that have not."""
    for job in jobs.values():
        price = {name: f"{number:g} {how}" for name, (number, how) in prices[job.method].items()}
        done = "; done" if job.folder not in left else ""
        print(f"# hours {price['hours']}, GB {price['memory_gb']}, GB on the disk {price['disk_gb']}{done}")
        print(shell_line(job, environment))


def cost(jobs, prices):
    """One line of a Markdown table: how many runs, their hours by how these are known, GB at most, GB on the disk."""
    hours = Counter()
    for job in jobs.values():
        number, how = prices[job.method]["hours"]
        hours[how] += number
    parts = ", ".join(f"{number:,.1f} {how}" for how, number in hours.items())
    memory, how = max(prices[job.method]["memory_gb"] for job in jobs.values())
    disk = sum(prices[job.method]["disk_gb"][0] for job in jobs.values())
    return f"{len(jobs)} | {hours.total():,.1f} | {parts} | {memory:g} {how} | {disk:.1f}"


def print_totals(plans, left, prices):
    """A Markdown table of what experiments cost, each by itself and all of them, which share pieces.

    plans: {experiment: its runs}. left: the runs of all that are not done yet.
    """
    print("\n| experiment | runs | hours | of which | GB of GPU memory, or RAM | GB on the disk |")
    print("|---|---|---|---|---|---|")
    together = {folder: job for jobs in plans.values() for folder, job in jobs.items()}
    rows = plans | {"all of these together": together} if len(plans) > 1 else dict(plans)
    rows |= {"left to do": left} if 0 < len(left) < len(together) else {}
    for name, jobs in rows.items():
        print(f"| {name} | {cost(jobs, prices)} |")


# --- the state of a run ---
def is_done(job, environment):
    """Whether the run ended well before, and what it left is there. Exits with one line if it did with other flags."""
    path = ROOT / job.folder / "done"
    if not path.exists():
        return False
    if path.read_text().strip() != shell_line(job, environment):
        raise SystemExit(f"error: {path} is of a run with other flags; move its folder away, or give another --folder")
    return all((ROOT / job.folder / name).exists() for name in job.leaves)


def is_locked(job):
    """Whether a process works in the run folder: one that a killed matrix.py left behind."""
    path = ROOT / job.folder / "lock"
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0, fallback_to_soft=False):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks: the run says so
        return False


def progress(job):
    """Where a run is, as the last bar in its log says: "41%, 00:31 left"."""
    path = ROOT / job.folder / "log.txt"
    text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
    bars = re.findall(r"(\d+%)\|[^|\n]*\|[^\n]*?<([\d:?]+),[^\n]*update", text)
    return f"{bars[-1][0]}, {bars[-1][1]} left" if bars else ""


def last_lines(job, count=3):
    """The end of a run's log, without bars."""
    path = ROOT / job.folder / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.strip() and "%|" not in line][-count:]


# --- a pool of processes on this machine ---
def start_run(job, environment, gpu):
    """Starts a run as a process of its own; what it says is appended to its log."""
    folder = ROOT / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    variables = with_this_python()
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    job.since = time.time()
    with open(folder / "log.txt", "a") as log:
        command = ["bash", "-c", f"exec {shell_line(job, environment)}"]
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)


def advance(job, jobs, environment, free_slots, gpus):
    """Takes a run to its next state, if its time has come -> that state, or None.

    free_slots: a list of numbers; slot i computes on GPU i, or on i modulo their number, if there are any.
    """
    if job.state == "running":
        status = job.process.poll()
        if status is None:
            return None
        if status and "is in use by another process" in "".join(last_lines(job)):  # left behind by a killed matrix.py
            return "elsewhere"
        if status == 0:
            with model.whole_file(ROOT / job.folder / "done") as file:
                file.write(f"{shell_line(job, environment)}\n".encode())
        free_slots.append(job.slot)
        return "failed" if status else "done"
    if job.state not in ("waiting", "elsewhere"):
        return None
    needed = {jobs[folder].state for folder in job.needs}
    if needed & {"failed", "stopped"}:
        return "stopped"
    if job.state == "waiting" and (needed - {"done"} or not free_slots):
        return None
    if job.state == "waiting":
        job.slot = free_slots.pop(0)
    if is_locked(job):
        return "elsewhere"
    job.process = start_run(job, environment, gpus[job.slot % len(gpus)] if gpus else None)
    return "running"


def remaining(jobs, prices, slots):
    """How many runs are in which state, and the hours that the rest takes, at the speed of those that are done."""
    states = ", ".join(f"{count} {state}" for state, count in Counter(job.state for job in jobs.values()).items())
    timed = [job for job in jobs.values() if job.hours]
    priced = sum(prices[job.method]["hours"][0] for job in timed)
    slower = sum(job.hours for job in timed) / priced if priced else 1.0
    hours = sum(prices[job.method]["hours"][0] for job in jobs.values() if job.state in ("waiting", "running"))
    return f"{states}; about {hours * slower / slots:.2f} h left"


def under_way(jobs, title):
    """The runs that have a slot, as a table for the terminal."""
    table = Table("run", "state", "progress", "minutes", title=title, title_justify="left")
    for job in jobs.values():
        if job.state in ("running", "elsewhere"):
            minutes = f"{(time.time() - job.since) / 60:.1f}"
            table.add_row(os.path.basename(job.folder), job.state, progress(job), minutes)
    return table


def run_local(jobs, prices, environment, slots, gpus, poll_seconds=1.0):
    """Does all runs, `slots` at a time, each as soon as what it needs is done. In a terminal with a live table, in a
    log with a line for each change. When this process is ended, it ends those that it started."""
    console = Console(soft_wrap=True, highlight=False)
    free_slots = list(range(slots))
    for job in jobs.values():
        job.state = "done" if is_done(job, environment) else "waiting"
        job.hours, job.since = 0.0, time.time()
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while any(job.state in ("waiting", "running", "elsewhere") for job in jobs.values()):
                # What runs comes first: the slot that it leaves is for the first run that waits.
                for job in sorted(jobs.values(), key=lambda job: job.state != "running"):
                    try:
                        state = advance(job, jobs, environment, free_slots, gpus)
                    except OSError as error:  # of this run: its folder is a file, say
                        console.print(f"{job.folder}: {error}")
                        state = "failed"
                        free_slots.append(job.slot)
                    if state in (None, job.state):
                        continue
                    job.state = state
                    if state in ("done", "failed"):
                        job.hours = (time.time() - job.since) / 3600 if state == "done" else 0.0
                        state += f" after {(time.time() - job.since) / 60:.1f} min; {remaining(jobs, prices, slots)}"
                    console.print(f"{time.strftime('%H:%M:%S')} {os.path.basename(job.folder)}: {state}")
                if console.is_terminal:
                    live.update(under_way(jobs, remaining(jobs, prices, slots)), refresh=True)
                time.sleep(poll_seconds)
    finally:
        for job in jobs.values():
            if job.state == "running":
                job.process.terminate()


# --- a cluster ---
def submitted_runs(path):
    """The runs that were submitted before: of those that Slurm has not finished yet {folder: job id}, and the folders
    of the others. path: a file with a line "id folder" for each.
    """
    if not path.exists():
        return {}, set()
    submitted = {folder: job_id for job_id, folder in map(str.split, path.read_text().splitlines())}
    known = subprocess.check_output(["squeue", "--noheader", "--me", "--array", "--format=%i"], text=True).split()
    queued = {folder: job_id for folder, job_id in submitted.items() if job_id in known}
    return queued, submitted.keys() - queued.keys()


def run_slurm(jobs, folder, environment, dry_run):
    """Submits what is neither done nor queued: one array for all runs that need the same others."""
    files = ROOT / folder / "slurm"
    ids, ended = submitted_runs(files / "submitted.txt") if shutil.which("squeue") else ({}, set())  # {folder: job id}
    done = {job.folder for job in jobs.values() if is_done(job, environment)}
    arrays = defaultdict(list)  # {what they need: runs}
    for job in jobs.values():
        if job.folder not in done | ids.keys():
            arrays[job.needs].append(job)
    for job in jobs.values():
        if job.folder in ended - done:
            told = f"{job.folder} did not end well and is submitted again; its log ends with:"
            print(told, *last_lines(job), sep="\n  ")
    for number, (needs, runs) in enumerate(arrays.items(), start=1):
        name = f"{os.path.basename(folder)}-{time.strftime('%m%d-%H%M%S')}-{number}"
        dependency = ":".join(["afterok", *(ids[need] for need in needs if need not in done)])
        command = ["sbatch", "--parsable", f"--array=1-{len(runs)}", f"--job-name={name}"]
        command += [f"--output={folder}/slurm/%x-%a.txt"]
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency != "afterok" else []
        command += ["benchmark/slurm.sh", f"{folder}/slurm/{name}.txt"]
        lines = [f"{job.folder}\t{shell_line(job, environment)}" for job in runs]
        print(shlex.join(command))
        if dry_run:
            print(*lines, sep="\n", end="\n\n")
            array = f"ARRAY{number}"
        else:
            files.mkdir(parents=True, exist_ok=True)
            (files / f"{name}.txt").write_text("\n".join(lines) + "\n")
            said = subprocess.run(command, cwd=ROOT, env=with_this_python(), capture_output=True, text=True)
            if said.returncode:
                raise SystemExit(f"error: sbatch refused {name}: {said.stderr.strip()}")
            array = said.stdout.strip().split(";")[0]  # on some clusters ";cluster" follows
        for task, job in enumerate(runs, start=1):
            ids[job.folder] = f"{array}_{task}"
        if not dry_run:
            with open(files / "submitted.txt", "a") as file:
                file.writelines(f"{ids[job.folder]} {job.folder}\n" for job in runs)
    count = sum(map(len, arrays.values()))
    print(f"{len(done)} done, {len(jobs) - len(done) - count} queued, {count} to submit, in {len(arrays)} arrays")


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    for name, numbers in {"slots": [args.slots], "students": [args.students], "seeds": args.seeds}.items():
        if any(number is not None and number < 1 for number in numbers):
            raise SystemExit(f"error: --{name} is {' '.join(map(str, numbers))}, expected 1 or more")
    if args.dry_run and args.backend == "local":
        raise SystemExit("error: --dry-run is for --backend slurm; --list prints the commands")
    if args.slots and args.backend == "slurm":
        raise SystemExit("error: --slots is for --backend local; edit benchmark/slurm.sh for what a job gets")
    plan = SimpleNamespace(**SCALES[args.scale], scale_name=args.scale)
    plan.students = args.students or plan.students
    plan.folder = os.path.relpath(args.folder or ROOT / "runs" / args.scale, ROOT)
    if not re.fullmatch(r"[\w./+-]+", plan.folder):
        raise SystemExit(f"error: --folder is {plan.folder} from {ROOT}, expected no blanks nor signs; rename it")
    if "probes" in args.experiments and args.scale != "small":
        raise SystemExit(f"error: --experiments probes is of --scale small, not of {args.scale}; give that")
    probed = PROBED if "probes" in args.experiments else {}
    known = {*plan.targets, *sum([*plan.targets.values(), *probed.values()], []), *plan.diverse_targets}
    unknown = [game for game in args.games if game not in known]
    if unknown:
        choice = ", ".join(sorted(known))
        raise SystemExit(f"error: --games {unknown[0]} is no target at --scale {args.scale}; choose of {choice}")
    methods = {method for names in EXPERIMENTS.values() for method in names}
    unknown = [method for method in args.methods if method not in methods]
    if unknown:
        raise SystemExit(f"error: --methods {unknown[0]} is none; choose of {', '.join(sorted(methods))}")
    if not args.experiments and not args.list:
        raise SystemExit(f"error: --experiments is empty; give some of {', '.join(EXPERIMENTS)}, or --list")
    experiments = args.experiments or OF_THE_PAPER
    plans = {name: plan_runs(plan, [name], args.games, args.seeds, args.methods) for name in experiments}
    for name in [name for name, runs in plans.items() if not runs]:
        print(f"{name} has none of these games and methods", file=sys.stderr)
        del plans[name]
    jobs = plan_runs(plan, plans, args.games, args.seeds, args.methods)
    if not jobs:
        raise SystemExit("error: nothing to do: none of the --experiments has these --games and --methods")
    prices = read_prices(args.scale, args.card)
    if args.list:
        left = {folder: job for folder, job in jobs.items() if not (ROOT / folder / "done").exists()}
        print_commands(jobs, left, prices, plan.environment)
        print_totals(plans, left, prices)
        sys.exit()
    if args.backend == "slurm" and not args.dry_run and not shutil.which("sbatch"):
        raise SystemExit("error: there is no sbatch here; submit on a machine of the cluster, or see --dry-run")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    gpus = [gpu for gpu in gpus if gpu]
    if args.backend == "local" and not (gpus or args.slots or plan.environment.get("CUDA_VISIBLE_DEVICES") == ""):
        raise SystemExit("error: there is no GPU here, without which a run may take weeks; give --slots to run it so")
    if args.dry_run:
        run_slurm(jobs, plan.folder, plan.environment, args.dry_run)
        sys.exit()
    (ROOT / plan.folder).mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(ROOT / plan.folder / "matrix.lock", timeout=0, fallback_to_soft=False).acquire()
    except filelock.Timeout:
        raise SystemExit(f"error: another matrix.py works in {plan.folder}; wait for it, or end it") from None
    except (OSError, NotImplementedError) as error:
        print(f"warning: {plan.folder} cannot be locked ({error}); see to it that no other matrix.py uses it")
    if args.backend == "slurm":
        run_slurm(jobs, plan.folder, plan.environment, args.dry_run)
        sys.exit()
    slots = args.slots or max(1, len(gpus))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    try:
        run_local(jobs, prices, plan.environment, slots, gpus)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    for job in jobs.values():
        if job.state == "failed":
            print(f"\n{job.folder} failed, see its log.txt, which ends with:", *last_lines(job), sep="\n  ")
    states = Counter(job.state for job in jobs.values())
    print("\n" + ", ".join(f"{count} {state}" for state, count in states.items()))
    if states["failed"]:
        print(f"{states['stopped']} runs need what failed; the same command tries again")
        sys.exit(1)
    print(f"python benchmark/report.py --collect {plan.folder}/*")
