"""How long an update takes, and where its time goes: a table in the terminal, and a CSV.

    python benchmark/speed.py                     # every stage at full size; some 15 minutes on two cores
    python benchmark/speed.py --quick             # toy networks, for a CPU: two minutes
    python benchmark/speed.py --cases xtra --flags="--num-simulations 25"
    python benchmark/speed.py --plan H100         # what it would be on a GPU that is not here: counted, not measured

Each case runs the main loop of its script in a process of its own. The update counter starts near --stored-steps; the
steps until there are random, and all are searched in the warm-up. On a GPU, blocks of updates without timers, which
give the time of an update, alternate with blocks whose timers wait for the GPU, which give its split; on a CPU each
block gives both. Reported is the block with the median time. XTRA on a GPU measures eta in 10 % of its updates, as
every run does from update 10,000 on (--flags="--similarity-start 90000": in none).

--plan runs the scripts on a simulated GPU (benchmark/simulated_gpu.py), which counts the kernels, bytes, FLOPs, waits
and memory of an update and adds up what they take under the assumptions of the last group of flags.
"""

import ast
import csv
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simulated_gpu

import distill
import finetune
import mcts
import model
import pretrain_teacher


@dataclass
class Args:
    quick: bool = False  # toy networks
    cases: tuple[Literal["efficientzero", "efficientzero-l", "xtra", "teacher", "student"], ...] = ()  # default: all
    flags: str = ""  # more flags for the scripts; each gets those that it has
    stored_steps: int | None = None  # steps in each replay; default: 20000 on a GPU, 2000 on a CPU, 400 with --quick
    offline_games: Literal[1, 2, 3, 4] | None = None  # of xtra and student; default: 4 on a GPU, 2 on a CPU
    repeats: int | None = None  # blocks to take the median of; default: 5, on a CPU at full size 3
    seed: int = 1  # seed of the runs
    profile: bool = False  # whether PyTorch's profiler lists what takes longest in one more block, 15 lines a case
    output: str = "speed.csv"  # the table to write
    plan: Literal["H100", "H200", "A100", "RTX4090"] | None = None  # the card to simulate
    assumptions: simulated_gpu.Assumptions = field(default_factory=simulated_gpu.Assumptions)


# Updates: of a block, and of the warm-up before the first. total: updates of the run that each case is the start of.
Plan = namedtuple("Plan", "stored_steps repeats block warm_up offline_games total size")
PLANS = {
    "gpu": Plan(20_000, 5, 200, 200, 4, 100_000, "--similarity-start 0 --similarity-interval 200 "
                "--similarity-updates 20"),
    "plan": Plan(20_000, 1, 40, 40, 4, 100_000, "--similarity-start 0 --similarity-interval 40 --similarity-updates 4"),
    "cpu": Plan(2_000, 3, 1, 1, 2, 10_000, "--num-envs 1 --cycle 1"),  # an update takes up to a minute
    "quick": Plan(400, 5, 40, 16, 2, 10_000, "--channels 16 --blocks 1 --batch-size 8 --offline-batch-size 8 "
                  "--num-simulations 8 --unroll-steps 3"),
}  # fmt: skip
CASES = {  # name: script, its flags
    "efficientzero": (finetune, "--blocks 1"),
    "efficientzero-l": (finetune, "--blocks 4"),
    "xtra": (finetune, "--blocks 4 --teachers {teachers}"),
    "teacher": (pretrain_teacher, "--datasets {dataset}"),
    "student": (distill, "--teachers {teachers}"),
}
GAMES = ["Phoenix", "DemonAttack", "Alien", "Amidar"]  # offline
FLOOR = {"efficientzero": 4.2, "xtra": 18.0}  # counted ms of an update on one H100, with 4 offline games
# A call of one of these counts for its part, until it calls another. A name that a script does not have is skipped.
PARTS = {
    "draw": ["stalest", "sample", "make_targets"],
    "training": ["take_samples", "update_batch", "measure_batch", "store_priorities"],
    "network": ["mcts.NodeStates.evaluate", "model.EfficientZeroNet.search_root"],
    "tree": ["mcts.make_tree", "mcts.run_step"],
    "transfers": ["mcts.NodeStates.outputs", "reanalyze"],
    "self-play": [],  # all of its searches; the other searches are the three parts above
    "environment": ["play_step"],
    "other": [],
}
COLUMNS = {"case": "", "net": "", "ms": ".1f", "updates/s": ".2f"} | dict.fromkeys(PARTS, ".1f")
COLUMNS |= {"RAM GB": ".2f", "GPU GB": ".2f", "of floor": ".0%", "eval": ".2f", "hours": ".1f"}


# What --plan counts: the function whose calls belong to each part of a GPU's work. "script" is the one that runs.
PLAN_PARTS = {
    "gather, augment": ["script.take_batch"],
    "forward": ["script.unroll_loss"],
    "backward": ["torch.Tensor.backward"],
    "similarity": ["script.gradient_cosines"],
    "clip": ["torch.nn.utils.clip_grad_norm_"],
    "step": ["torch.optim.SGD.step"],
    "search": ["mcts.Search.__call__"],  # all but the two parts below: transfers and waits
    "roots": ["model.EfficientZeroNet.search_root"],
    "leaves": ["mcts.NodeStates.evaluate_rows"],
    "copies": ["model.refresh"],
    "other": [],
}
# Columns: what is counted, factor, format.
COUNTED = {"ms": ("seconds", 1e3, ".3f"), "kernels": ("kernels", 1, ".1f"), "GB": ("bytes", 1e-9, ".3f")}
COUNTED |= {"TFLOP": ("flops", 1e-12, ".4f")}
COUNTED |= {name: (name, 1, ".1f") for name in ("launches", "transfers", "waits")}
ON_THE_HOST = ["script.stalest", "script.sample", "script.make_targets", "mcts.make_tree", "model.AtariGames.step"]


# --- in the process of a case ---
host_time = time.perf_counter  # s; --plan has a clock of its own


class Clock:
    """Seconds by part, as long as it is on; before, all is "other"."""

    def __init__(self, script):
        self.script, self.on, self.part, self.since, self.spent = script, False, "other", 0.0, Counter()
        # Only what the main loop and the search call is wrapped, never what they record: a recording must not wait.
        for part, path in [(part, path) for part, paths in PARTS.items() for path in paths]:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, script)
            if hasattr(owner, name):
                setattr(owner, name, self.timed(getattr(owner, name), part))

    def switch(self, part):
        """What passed since the last switch is of the part that was on; now it is another's turn."""
        if self.script.args.cuda:
            torch.cuda.synchronize()
        now = host_time()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def timed(self, function, part):
        def wrapper(*args, **kwargs):
            caller = self.part
            if not self.on or caller == "self-play":
                return function(*args, **kwargs)
            self.switch("self-play" if args and args[0] is vars(self.script).get("player", self) else part)
            result = function(*args, **kwargs)
            self.switch(caller)
            return result

        return wrapper


def prepare(script, gpu):
    """Makes a script run on a simulated GPU, and its functions count for the parts of an update."""
    global host_time
    host_time = lambda: gpu.now  # noqa: E731
    choose_device = script.choose_device
    script.choose_device = lambda *args: choose_device(*args) and simulated_gpu.DEVICE
    os.cpu_count = lambda: 1  # what is run in parallel is compiled for half a minute
    modules = {"script": script, "torch": torch, "model": model, "mcts": mcts}

    def owner_of(path):
        first, *others, name = path.split(".")
        return functools.reduce(getattr, others, modules[first]), name

    for part, path in [(part, path) for part, paths in PLAN_PARTS.items() for path in paths]:
        owner, name = owner_of(path)
        if hasattr(owner, name):
            simulated_gpu.labelled(owner, name, part)
    for path in ON_THE_HOST:
        owner, name = owner_of(path)
        if hasattr(owner, name):
            simulated_gpu.hosted(owner, name)

    def tree_seconds(tree, *_):
        threads = gpu.assumed.tree_threads if len(tree.roots) >= mcts.PARALLEL_MIN_ROOTS else 1
        return 1e-9 * gpu.assumed.tree_ns * len(tree.roots) / threads

    simulated_gpu.hosted(mcts, "run_step", tree_seconds)


def run_blocks(script, plan, gpu, profile):
    """Runs the main block of a script to the end of its loop -> blocks (timed, seconds of an update, those by part, and
    what a simulated GPU did)."""
    blocks = []

    def cycles(cycles, **_):  # in place of the progress bar: yields a cycle's first update when the one before is over
        clock, updates, cuda = Clock(script), plan.stored_steps - plan.warm_up, script.args.cuda
        for i in range(1 + plan.repeats * (1 + cuda)):  # block 0 is the warm-up
            clock.switch("other")
            clock.on, clock.spent, first = i > 0 and not (cuda and i % 2), Counter(), updates
            if gpu:
                gpu.counts.clear()
            while updates < first + (plan.block if i else plan.warm_up):
                yield updates
                updates += cycles.step
            clock.switch("other")
            spent = {part: clock.spent[part] / (updates - first) for part in PARTS}
            counts = {part: dict(count) for part, count in gpu.counts.items()} if gpu else {}
            blocks.append((clock.on, sum(spent.values()), spent, counts))
        clock.on = False
        if profile:
            with torch.profiler.profile() as profiler:
                start, first = time.perf_counter(), updates
                while updates < first + plan.block:
                    yield updates
                    updates += cycles.step
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            show_profile(profiler, seconds, updates - first, "device" if cuda else "cpu")

    progress, model.Progress = model.Progress, cycles
    main = ast.parse(Path(script.__file__).read_text()).body[-1].body
    loop = [ast.unparse(statement).startswith("for updates in bar") for statement in main].index(True)
    exec(compile(ast.Module(main[: loop + 1], []), script.__file__, "exec"), vars(script))  # variables stay there
    model.Progress = progress
    return blocks[1:]


def show_profile(profiler, seconds, updates, kind):
    """The 15 operations with the most time of their own on the "device" or the "cpu", and how busy that was."""
    averages = profiler.key_averages()
    busy = sum(getattr(x, f"self_{kind}_time_total") for x in averages) / 1e6
    table = averages.table(f"self_{kind}_time_total", row_limit=15, max_name_column_width=60)
    print(f"{table}\n{updates} updates in {seconds:.2f} s; kernels, or operations: {busy:.2f} s", file=sys.stderr)


def measure(name, flags, plan, gpu=None, profile=False):
    """Runs a case in this process, which is to be a new one -> its row, times in ms per update; and by part, what a
    simulated GPU did in an update."""
    script, stamps = CASES[name][0], []
    if gpu:
        prepare(script, gpu)
    read_flags = model.read_flags
    model.read_flags = lambda cls, description: read_flags(cls, description, flags)
    model.refuse_flag = lambda *_: None  # flags that only the other scripts have
    blocks = sorted(run_blocks(script, plan, gpu, profile), key=lambda block: block[1])
    middle, modes = (plan.repeats - 1) // 2, (True, not script.args.cuda)
    split, plain = [[block for block in blocks if block[0] == timed][middle] for timed in modes]
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # KiB; getrusage's is the parent's too

    def search(*args, **kwargs):  # waits for its results, on a GPU too
        stamps.append(host_time())
        return script.evaluator(*args, **kwargs)

    search.net, search.capacity = script.evaluator.net, script.evaluator.capacity
    env_ids = vars(script).get("env_ids") or [script.args.env_id]
    script.evaluate(search, env_ids[0], max_frames=4 * 10)
    evaluation = float(np.median(np.diff(stamps))) * len(env_ids) * 1_000 / 10_000
    row = {"case": name, "net": f"{script.args.blocks}x{script.args.channels}", "ms": 1e3 * plain[1]}
    row |= {"updates/s": 1 / plain[1]} | {part: 1e3 * seconds for part, seconds in split[2].items()}
    row |= {"RAM GB": int(peak[1]) * 1024 / 1e9, "GPU GB": torch.cuda.max_memory_reserved() / 1e9}
    row |= {"eval": 1e3 * evaluation, "hours": (plain[1] + evaluation) * 1e5 / 3600}
    return row, {part: {key: x / plan.block for key, x in count.items()} for part, count in plain[3].items()}


def simulate(name, flags, plan, card, assumptions):
    """As `measure`, on a simulated GPU. Raises if streams are in each other's way."""
    with simulated_gpu.simulated(card, simulated_gpu.Assumptions(**assumptions)) as gpu:
        results = measure(name, flags, plan, gpu)
        # A step is written into a row that no update reads which may still be running.
        frames = gpu.storage_of(CASES[name][0].replay.frames)
        races = [race for race in gpu.races if race != ("written while another stream reads it", frames)]
        if races:
            raise RuntimeError(f"{len(races)} races between streams: {races[0][0]}, {races[0][1].num_bytes:,} bytes")
    return results


# --- in the parent ---
def override(words):
    """The last of each flag: where one comes twice, the scripts refuse to choose."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word.split("=")[0][2:].replace("-", "_").removeprefix("no_")
            flags[name] = []
        flags.setdefault(name, []).append(word)
    return [word for flag in flags.values() for word in flag]


def make_teacher(folder, game, steps, seed):
    """The dataset of a random player, GAME.npz, and the run folder of a teacher who knows nothing, GAME."""
    env_id, rng, E = f"{game}NoFrameskip-v4", np.random.default_rng(seed), 8
    legal, length = finetune.legal_actions(env_id), -(-steps // E) + 1  # rows of one environment
    replay = finetune.Replay(E * length)
    play = finetune.start_games(env_id, replay, np.arange(0, E * length, length), seed)
    for i in range(length - 1):
        finetune.play_step(play, replay, rng.choice(np.flatnonzero(legal), E), E * i)
    finetune.save_dataset(f"{folder}/{game}.npz", replay, slice(0, E * length), env_id)
    os.mkdir(f"{folder}/{game}")
    replay.policy[:] = legal / legal.sum()
    answers = {"policy": replay.policy, "value": replay.value, "score": 0.0}
    np.savez(f"{folder}/{game}/targets.npz", **model.read_dataset(f"{folder}/{game}.npz"), **answers)


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    cases = args.cases or [name for name in CASES if not (args.quick and name == "efficientzero-l")]
    options = {"args": args.flags.split(), "config": (tyro.conf.OmitArgPrefixes,), "return_unknown_args": True}
    unknown = [{*tyro.cli(script.Args, **options)[1]} for script in (finetune, pretrain_teacher, distill)]
    for flag in [word for word in set.intersection(*unknown) if word.startswith("--")]:
        raise SystemExit(f"error: --flags has {flag}, expected flags of the scripts")
    if args.plan and args.profile:
        raise SystemExit("error: --profile is of what runs, and --plan only counts; drop one of the two")
    if "steps-per-update" in args.flags:
        raise SystemExit(
            "error: --flags has --steps-per-update, expected one step per update: the counter begins there"
        )
    if args.quick:  # as in quickstart.sh
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    plan = PLANS["quick" if args.quick else "plan" if args.plan else "gpu" if torch.cuda.is_available() else "cpu"]
    plan = plan._replace(**{name: x for name, x in vars(args).items() if name in Plan._fields and x is not None})
    if not 400 <= plan.stored_steps <= 0.9 * plan.total or not 1 <= plan.repeats <= 20:
        raise SystemExit(f"error: expected 400 to {0.9 * plan.total:.0f} --stored-steps and 1 to 20 --repeats")
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    assumptions = {name: x for name, x in vars(args).items() if name in vars(simulated_gpu.Assumptions())}
    gpu = f"{args.plan} (simulated: nothing here is measured)" if args.plan else gpu
    machine = {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "date": time.strftime("%F")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the child along and clears the folder
    games, rows, counted = GAMES[: plan.offline_games], [], {}
    with open(args.output, "w", newline="") as file, tempfile.TemporaryDirectory(prefix="speed-") as folder:
        print(f"collecting {plan.stored_steps:,} random steps of {', '.join(games)}", flush=True)
        for game in games:
            make_teacher(folder, game, plan.stored_steps, args.seed)
        inputs = {"teachers": " ".join(f"{folder}/{game}" for game in games), "dataset": f"{folder}/{games[0]}.npz"}
        # The counter jumps over the warm-up of the learning rate. Evaluations and checkpoints are never due.
        common = f"""--env-id AssaultNoFrameskip-v4 --seed {args.seed} --learning-rate 0.01
            --total-timesteps {plan.total} --num-updates {plan.total} --eval-every 1000000000
            --checkpoint-every 1000000000 --learning-starts {plan.stored_steps - plan.warm_up}"""
        for name in cases:
            print(f"{name}: {plan.repeats} times {plan.block} updates of {CASES[name][0].__name__}.py", flush=True)
            words = f"{common} --run-dir {folder}/run-{name} {CASES[name][1]} {plan.size} {args.flags}".format(**inputs)
            words = override(words.split())
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed"
            function, others = (
                ("simulate", f", {args.plan!r}, {assumptions}")
                if args.plan
                else ("measure", f", profile={args.profile}")
            )
            code += f"; print(speed.{function}({name!r}, {words}, speed.{plan}{others}))"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            if done.returncode:  # the script has said why, unless it was killed
                raise SystemExit(f"error: --cases {name} ended with {done.returncode}; -9 may be a lack of memory")
            row, counted[name] = ast.literal_eval(done.stdout.splitlines()[-1])
            row["of floor"] = FLOOR.get(name, np.nan) / row["ms"] if not (args.quick or args.flags) else np.nan
            rows.append(row | vars(args) | plan._asdict() | machine)
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = [[format(row[key], COLUMNS[key]) for key in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    for line in [COLUMNS, *lines]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for name, parts in counted.items() if args.plan else []:
        print(f"\n{name}, in an update: ms on the GPU; launches, transfers and waits of the host")
        print(" " * 20 + "".join(title.rjust(10) for title in COUNTED))
        for part in [part for part in PLAN_PARTS if part in parts]:
            cells = [format(scale * parts[part].get(key, 0), form) for key, scale, form in COUNTED.values()]
            print(part.ljust(20) + "".join(cell.rjust(10) for cell in cells))
    print("\nms of an update and its parts. of floor: ms counted for one H100 / ms. eval: 32 games of 1,000 steps in")
    print("10,000 updates. hours: of 100,000 updates with eval. {cpu}, {cores} cores, {gpu}, {date}".format(**machine))
    print(f"{args.output}: table saved")
