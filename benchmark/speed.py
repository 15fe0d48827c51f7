"""How long an update takes, and where its time goes: a table in the terminal, and a CSV.

    python benchmark/speed.py                     # every stage at full size; 15 minutes on two cores
    python benchmark/speed.py --quick             # toy networks, for a CPU: two minutes
    python benchmark/speed.py --cases xtra --flags="--num-simulations 25"

Each case runs the main loop of its script in a process of its own, with timers around the script's functions. The
update counter is set to --stored-steps first; the steps until there are random. On a GPU, blocks of updates without
timers, which give the time of an update, alternate with blocks whose timers wait for the GPU, which give its split; on
a CPU each block gives both. Reported is the block with the median time. XTRA on a GPU measures gradient similarity in
10 % of its updates, as every run does from update 10,000 on (--flags="--similarity-start 90000": in none).
"""

import ast
import contextlib
import csv
import functools
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts; they come before torch, as it reads what they set


@dataclass
class Args:
    quick: bool = False  # toy networks
    cases: tuple[str, ...] = ()  # of efficientzero, efficientzero-l, xtra, teacher, student; default: all
    flags: str = ""  # more flags for the scripts; each gets those that it has
    stored_steps: int | None = None  # steps in each replay; default: 20000 on a GPU, 2000 on a CPU, 400 with --quick
    offline_games: int | None = None  # of xtra and student, 1 to 4; default: 4 on a GPU, 2 on a CPU
    repeats: int | None = None  # blocks to take the median of; default: 5, on a CPU at full size 3
    seed: int = 1  # seed of the runs
    output: str = "speed.csv"  # the table to write


class Plan(NamedTuple):
    """What is measured of each case."""

    stored_steps: int
    repeats: int
    block: int  # updates: the 200 of a target network, whose searches are cached; or a few, best a multiple of 8 envs
    warm_up: int  # updates before the first block
    tasks: int  # offline games
    eval_steps: int  # environment steps of the evaluation
    flags: str


PLANS = {
    "gpu": Plan(20_000, 5, 200, 200, 4, 25, "--total-timesteps 100000 --num-updates 100000 --similarity-start 0 "
                "--similarity-interval 200 --similarity-updates 20"),
    "cpu": Plan(2_000, 3, 1, 0, 2, 4, "--total-timesteps 10000 --num-updates 10000"),
    "quick": Plan(400, 5, 16, 16, 2, 25, "--total-timesteps 10000 --num-updates 10000 --channels 16 --blocks 1 "
                  "--batch-size 8 --offline-batch-size 8 --num-simulations 8 --unroll-steps 3"),
}  # fmt: skip
# The learning rate has no warm-up here, as the counter jumps over it.
FLAGS = "--learning-starts {first} --learning-rate 0.01 --env-id AssaultNoFrameskip-v4 --seed {seed} --run-dir {run}"
CASES = {  # name: script, flags
    "efficientzero": ("finetune", "--blocks 1 --channels 64"),
    "efficientzero-l": ("finetune", "--blocks 4 --channels 64"),
    "xtra": ("finetune", "--blocks 4 --channels 64 --teachers {teachers}"),
    "teacher": ("pretrain_teacher", "--blocks 4 --channels 64 --datasets {data}"),
    "student": ("distill", "--blocks 4 --channels 64 --teachers {teachers}"),
}
GAMES = ["Phoenix", "DemonAttack", "Alien", "Amidar"]  # offline
FLOOR = {"efficientzero": (7.0, 3.07), "xtra": (22.9, 8.04)}  # counted: ms on one H100, TFLOP of an update

# Self time, by name in a script; a name that it does not have is skipped. The network's own functions are timed where
# it is frozen: in training they are part of the loss.
TIMED = {
    "sampling": ["sample", "make_targets", "make_batch", "teacher_batch", "stack_frames", "gather_frames",
                 "model.augment", "model.upload"],
    "network": ["mcts.Nodes.evaluate", "model.EfficientZeroNet.recurrent_inference"],
    "tree": ["mcts.run_step", "mcts.make_tree"],
    "transfers": ["mcts.Nodes.outputs", "mcts.search", "run_search", "reanalyze"],
    "encoding": ["model.EfficientZeroNet.initial_inference", "model.inference_copy", "model.refresh"],
    "training": ["unroll_loss", "cloning_loss", "combine_losses", "gradient_cosines", "compute_gradients",
                 "transfer_gradients", "model.gradients", "model.Recorded.__call__", "model.check_finite",
                 "torch.autograd.grad", "torch.nn.utils.get_total_norm", "torch.nn.utils.clip_grads_with_norm_",
                 "torch.optim.SGD.step"],
    "environment": ["play"],
}  # fmt: skip
COLUMNS = {  # of the terminal: key of a row, format
    "case": ("case", ""), "net": ("net", ""), "ms": ("ms", ".1f"), "upd/s": ("updates_per_s", ".2f"),
    "sample": ("sampling", ".1f"), "network": ("network", ".1f"), "tree": ("tree", ".1f"),
    "transfer": ("transfers", ".1f"), "encode": ("encoding", ".1f"), "train": ("training", ".1f"),
    "env": ("environment", ".1f"), "other": ("other", ".1f"), "eval": ("evaluation", ".2f"),
    "RAM GB": ("ram_gb", ".1f"), "GPU GB": ("gpu_gb", ".1f"), "floor": ("of_floor", ".0%"),
    "TFLOP/s": ("tflop_per_s", ".3g"), "hours": ("hours_per_100k", ".1f"),
}  # fmt: skip


# --- in the process of a case ---
CHILD = "import json, sys, speed; print(json.dumps(speed.measure(*json.loads(sys.argv[1]))))"


class Clock:
    """Seconds by category; what a timed function spends in another timed function counts there only."""

    def __init__(self, script):
        self.torch, self.on, self.cuda, self.spent, self.inner = script.torch, False, False, defaultdict(float), []
        for category, path in [(category, path) for category, paths in TIMED.items() for path in paths]:
            *owners, name = path.split(".")
            owner = functools.reduce(lambda found, part: getattr(found, part, None), owners, script)
            if hasattr(owner, name):
                setattr(owner, name, self.timed(getattr(owner, name), category, *owners[-1:]))

    def now(self):
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, category, owner=None):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            # This first: torch.compile then sees nothing of the clock, and it must stand still while a GPU records.
            compiling = self.torch.compiler.is_compiling()
            if compiling or not self.on or self.cuda and self.torch.cuda.is_current_stream_capturing():
                return function(*args, **kwargs)
            if owner == "EfficientZeroNet" and args[0].training or owner == "Recorded" and self.inner:
                return function(*args, **kwargs)  # part of what calls it
            start = self.now()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = self.now() - start
                self.spent[category] += elapsed - self.inner.pop()
                if self.inner:
                    self.inner[-1] += elapsed

        return wrapper


class Measured(Exception):
    """Leaves the main loop."""


def run_blocks(script, clock, plan):
    """Runs the main block of a script, whose variables stay in its module -> blocks (timed, seconds of an update,
    those by category), evaluate's arguments at update 0."""
    blocks, skipped = [], []

    def skip(*settings):  # network, game, number of games, ...
        skipped.append(settings)
        return np.zeros(settings[2]), np.zeros(settings[2], np.int64)

    class Bar(tqdm):
        calls, start = 0, 0.0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n=1):
            Bar.calls += 1
            if Bar.calls == 1:
                script.updates, clock.cuda = plan.stored_steps - plan.warm_up, script.device.type == "cuda"
                skipped.append(None)
            done = Bar.calls - 1 - plan.warm_up
            if done < 0 or done % plan.block:
                return
            if done > 0:
                seconds = (clock.now() - Bar.start) / plan.block
                spent = {category: clock.spent[category] / plan.block for category in TIMED}
                blocks.append((clock.on, seconds, spent | {"other": seconds - sum(spent.values())}))
            if len(blocks) == plan.repeats * (1 + clock.cuda):
                raise Measured
            if plan.block < 200:  # too short for the cache of searches to settle: nothing is in it
                for replay in script.replays:
                    replay.policy_version[:] = replay.value_version[:] = 0
            clock.on = not clock.cuda or len(blocks) % 2 == 1
            clock.spent.clear()
            Bar.start = clock.now()

    evaluate, script.evaluate, script.tqdm = script.evaluate, skip, Bar
    main = ast.Module(ast.parse(Path(script.__file__).read_text()).body[-1].body, [])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Measured):
        exec(compile(main, script.__file__, "exec"), vars(script))
        raise SystemExit(f"error: --flags end {script.__name__}.py at update {Bar.calls}, before it is measured")
    script.evaluate, clock.on = evaluate, False
    return blocks, skipped[: skipped.index(None)]


def evaluation_step(script, settings, steps):
    """Median seconds of an environment step of 32 games side by side; settings: the arguments of evaluate."""
    stamps, run_search = [], script.run_search

    def search(*args, **kwargs):  # waits for its results, on a GPU too
        stamps.append(time.perf_counter())
        return run_search(*args, **kwargs)

    script.run_search = search
    script.evaluate(*settings[:2], 32, 4 * steps, *settings[4:])
    return float(np.median(np.diff(stamps)))


def measure(name, flags, plan):
    """Runs a case in this process, which is to be a new one -> its row, times in ms per update."""
    plan = Plan(*plan)
    script = importlib.import_module(CASES[name][0])
    clock = Clock(script)
    sys.argv = [f"{script.__name__}.py", *flags]
    blocks, evaluations = run_blocks(script, clock, plan)
    ordered = {timed: sorted((x for x in blocks if x[0] == timed), key=lambda x: x[1]) for timed in (False, True)}
    split = ordered[True][(plan.repeats - 1) // 2]
    plain = ordered[False][(plan.repeats - 1) // 2] if clock.cuda else split
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # KiB; getrusage's is the parent's too
    gpu = {"gpu_gb": script.torch.cuda.max_memory_reserved() / 1e9} if clock.cuda else {}
    step = evaluation_step(script, evaluations[0], plan.eval_steps)
    config, args = script.net.config, script.args
    row = {"case": name, "net": f"{config.blocks}x{config.channels}", "batch_size": args.batch_size}
    row |= {"ms": 1e3 * plain[1], "updates_per_s": 1 / plain[1], "split_ms": 1e3 * split[1]}
    row |= {category: 1e3 * seconds for category, seconds in split[2].items()}
    row |= {"evaluation_step": 1e3 * step, "evaluation": 1e3 * step * len(evaluations) * 1_000 / 10_000}
    row |= {"hours_per_100k": (row["ms"] + row["evaluation"]) * 1e5 / 3.6e6, "ram_gb": int(peak[1]) * 1024 / 1e9} | gpu
    return row


# --- in the parent ---
def script_flags(script, words):
    """Those of the flags `words` that the script has. Exits with one line if no script has one, or not that value."""
    scripts = {name: importlib.import_module(name).Args for name, _ in CASES.values()}
    kept, keep = [], False
    for word in words:
        if word.startswith("--"):
            flag = word[2:].split("=")[0].replace("-", "_")
            having = [name for name, x in scripts.items() if {flag, flag.removeprefix("no_")} & set(x.__annotations__)]
            if not having:
                raise SystemExit(f"error: --flags has {word}, expected flags of the scripts")
            keep = script in having
        kept += [word] * keep
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tyro.cli(scripts[script], args=kept)
    except SystemExit:
        raise SystemExit(f"error: --flags {' '.join(words)}: {script}.py does not take that") from None
    return kept


def make_teacher(folder, game, steps, seed):
    """The dataset of a random player, and the run folder of a teacher who knows nothing: data-GAME and teacher-GAME."""
    import finetune
    import model

    env_id, rng, taken = f"{game}NoFrameskip-v4", np.random.default_rng(seed), 0
    ids = np.flatnonzero(finetune.legal_actions(env_id))
    envs, replay = finetune.make_envs(env_id, 8, life_loss_ends=True), finetune.Replay(steps * 9 // 8 + 16, 8, "cpu")
    games = finetune.start_games(envs, replay, seed)
    while taken < steps:
        taken = finetune.play(envs, replay, games, rng.choice(ids, 8), taken, steps, True)
    envs.close()
    settings = {"frame": [96, 96, 3], "frameskip": 4, "sticky_actions": 0.0, "num_envs": 8}
    finetune.save_dataset(f"{folder}/data-{game}", replay, {"env_id": env_id, "seed": seed, "settings": settings})
    teacher, rows, simulations = f"{folder}/teacher-{game}", replay.size, 50
    os.mkdir(teacher)
    net, counters = model.EfficientZeroNet(model.ModelConfig.of_width(2, 1)), {"updates": 0, "scores": {env_id: 0.0}}
    model.save_model(f"{teacher}/model.pt", net, {}, [env_id], counters)
    visits = np.bincount(np.resize(ids, simulations), minlength=18)  # [A] uniform
    arrays = {"visits": np.tile(visits, (rows, 1)).astype(np.uint16), "value": np.zeros(rows, np.float32)}
    np.savez(f"{teacher}/targets.npz", **arrays)
    fields = {"dataset": f"../data-{game}", "rows": rows, "num_simulations": simulations}
    files = ["model.pt", "targets.npz", f"../data-{game}/meta.json"]
    model.write_manifest(f"{teacher}/targets.json", "xtra-targets-1", fields, files)


def machine():
    """What the numbers were taken on."""
    import torch

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = {"cpu": cpu[1] if cpu else "unknown CPU", "cores": len(os.sched_getaffinity(0)), "gpu": gpu}
    return found | {"torch": torch.__version__, "date": date.today().isoformat()}


def print_table(rows):
    table = [list(COLUMNS)]
    for row in rows:
        cells = [(row.get(key), form) for key, form in COLUMNS.values()]
        table.append(["-" if value is None else format(value, form) for value, form in cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for i, line in enumerate(table):
        texts = [x.ljust(n) if k < 2 else x.rjust(n) for k, (x, n) in enumerate(zip(line, widths, strict=True))]
        print(("\n" if i == 0 else "") + "  ".join(texts))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    cases = args.cases or tuple(name for name in CASES if not (args.quick and name == "efficientzero-l"))
    for name in set(cases) - set(CASES):
        raise SystemExit(f"error: --cases has {name}, expected some of {', '.join(CASES)}")
    if args.quick:  # as in quickstart.sh
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in cases:  # before anything is collected
        script_flags(CASES[name][0], args.flags.split())
    found = machine()
    plan = PLANS["quick" if args.quick else "cpu" if found["gpu"] == "no GPU" else "gpu"]
    asked = {"stored_steps": args.stored_steps, "repeats": args.repeats, "tasks": args.offline_games}
    plan = plan._replace(**{key: value for key, value in asked.items() if value is not None})
    if plan.stored_steps % 200 or not 400 <= plan.stored_steps <= 90_000:
        raise SystemExit(f"error: --stored-steps is {plan.stored_steps}, expected a multiple of 200 from 400 to 90000")
    if not 1 <= plan.tasks <= len(GAMES):
        raise SystemExit(f"error: --offline-games is {plan.tasks}, expected 1 to {len(GAMES)}")
    if not 1 <= plan.repeats <= 20:
        raise SystemExit(f"error: --repeats is {plan.repeats}, expected 1 to 20")
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        raise SystemExit(f"error: --output {args.output} cannot be written, expected a file in a folder that exists")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the child along and clears the folder
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    rows, games = [], GAMES[: plan.tasks]
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        if set(cases) - {"efficientzero", "efficientzero-l"}:
            print(f"collecting {plan.stored_steps:,} random steps of {', '.join(games)}", flush=True)
            for game in games:
                make_teacher(folder, game, plan.stored_steps, args.seed)
        values = {
            "teachers": " ".join(f"{folder}/teacher-{game}" for game in games),
            "data": f"{folder}/data-{games[0]}",
        }
        values |= {"first": plan.stored_steps - plan.warm_up, "seed": args.seed}
        for name in cases:
            print(f"{name}: {plan.repeats} times {plan.block} updates of {CASES[name][0]}.py", flush=True)
            words = f"{FLAGS} {CASES[name][1]} {plan.flags} {args.flags}".format(run=f"{folder}/run-{name}", **values)
            flags = script_flags(CASES[name][0], words.split())
            command = [sys.executable, "-c", CHILD, json.dumps([name, flags, plan])]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
            if done.returncode < 0:
                raise SystemExit(f"error: --cases {name} was killed, perhaps for its memory; try --quick")
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
            row = json.loads(done.stdout.splitlines()[-1])
            if not (args.quick or args.flags) and name in FLOOR:
                floor, tflop = FLOOR[name]
                on_its_gpu = "H100" in found["gpu"] or "H200" in found["gpu"]
                row |= {"of_floor": floor / row["ms"]} if on_its_gpu else {"tflop_per_s": 1e3 * tflop / row["ms"]}
            settings = {"stored_steps": plan.stored_steps, "repeats": plan.repeats, "block": plan.block}
            settings["offline_games"] = plan.tasks if name in ("xtra", "student") else 0
            rows.append(row | settings | {"flags": args.flags, "seed": args.seed} | found)
    print_table(rows)
    print(
        "\nms: of an update. eval: 32 games of 1,000 steps every 10,000 updates. hours: ms and eval, 100,000 updates."
    )
    print("floor: ms on one H100, counted for an update that searches all states of its batch, / ms; TFLOP/s likewise.")
    print("The more steps are stored, the fewer searches are in the cache. RAM, GPU: peak. No checkpoint is written.")
    if plan.block < 200:
        print("Blocks this short begin with no cached search: searching costs more than in a long run.")
    if plan.block < 8:
        print("They are shorter than the 8 updates of one self-play search.")
    print("{cpu}, {cores} cores, {gpu}, torch {torch}, {date}".format(**found))
    keys = dict.fromkeys(key for row in rows for key in row)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.output}: table saved")
