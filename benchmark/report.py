"""What runs did: a table in the terminal and one figure, or the pages of the paper's experiments.

    python benchmark/report.py runs/teacher-phoenix runs/student runs/xtra-phoenix-1 runs/xtra-phoenix-2
    python benchmark/report.py --collect runs/toy/*
    python benchmark/report.py --pages

Reads what the three scripts write into their run folders: evaluations.csv, the flags in model.pt, TensorBoard's events.
Runs whose flags differ in nothing but the seed are one line of the table, a mean, and one colour of the figure; where
others differ too, the method's name has them. Random play is played here; so is perfect play, where a game has
`best_actions` (tests/toy_env.py).

--collect puts the runs whose --exp-name is a scale and a method, as in toy-wo-cross-task, into benchmark/results/, and
goes on as --pages, which needs no runs: it writes docs/results.md, its part of README.md and the figures of both from
benchmark/results/ and benchmark/paper/.
"""

import csv
import glob
import hashlib
import itertools
import logging
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import tyro  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "tests"))  # the toy games
import finetune  # noqa: E402
import model  # noqa: E402
from benchmark import matrix, pages  # noqa: E402

COLOURS = ["tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive"]
EXPLAINED = {
    "XTRA": "XTRA: pretrained on other games, which it goes on training on",
    "w.o. cross-task": "w.o. cross-task: pretrained, finetuned alone",
    "EfficientZero": "EfficientZero from scratch",
}


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders, in the order of the table
    game: str | None = None  # the game of the figure, as the table calls it; default: that of the last run
    threshold: float | None = None  # a mean return: the table says after how many environment steps it was reached
    output: str = "report.png"  # the figure to write
    collect: bool = False  # whether to put the runs into --results, and to write the pages
    pages: bool = False  # whether to write the pages from --results
    results: str = "benchmark/results"  # the folder of runs.csv and weights.csv


def method_of(flags):
    """What the paper calls a run with these flags (Table 1)."""
    if "num_updates" in flags:
        return "student" if "teachers" in flags else "teacher"
    if flags["total_timesteps"] == 0:
        return "zero-shot"
    if flags["pretrained"] is None:
        return "w.o. pretraining" if flags["teachers"] else "EfficientZero"
    if not flags["cross_task"]:
        return "w.o. cross-task"
    return "XTRA" if flags["task_weights"] else "w.o. task weights"


def name_what_differs(runs):
    """Appends to the methods of runs those flags that runs of the same method and games have different values of."""
    unimportant = {*vars(finetune.Run()), "seed", "save_dataset", "capture_video", "datasets", "teachers"}
    names = []
    for run in runs:
        alike = [x.flags for x in runs if x.method == run.method and x.curves.keys() == run.curves.keys()]
        differ = [key for key in run.flags if len({str(flags.get(key)) for flags in alike}) > 1]
        words = [f"--{key.replace('_', '-')} {run.flags[key]}" for key in differ if key not in unimportant]
        names.append(" ".join([run.method, *words]))
    for run, name in zip(runs, names, strict=True):
        run.method = name


def read_run(folder):
    """A run folder -> its flags, method, origin, env_ids {game: id}, returns of its evaluations {(game, environment
    steps, updates): [...]}, curves {game: [(environment steps, updates, mean return), ...]}, and the scalars {key:
    (steps, values)} of its TensorBoard events."""
    path = os.path.join(folder, "evaluations.csv")
    if not os.path.isfile(path):
        raise SystemExit(f"error: {folder} holds no evaluations.csv; expected a run folder of the three scripts")
    returns = defaultdict(list)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark before it
            for row in csv.DictReader(file):
                place = finetune.short_name(row["env_id"]), int(row["env_steps"]), int(row["updates"])
                returns[place].append(float(row["return"]))
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise SystemExit(f"error: {path} is not as the scripts write it ({error!r}); restore it") from None
    if not returns:
        raise SystemExit(f"error: {path} has no evaluation; leave this run out")
    curves = defaultdict(list)
    for (game, env_steps, updates), scores in returns.items():
        curves[game].append((env_steps, updates, float(np.mean(scores))))
    info = model.load_model(os.path.join(folder, "model.pt"))[1]
    if not {"args", "env_ids"} <= info.keys():
        raise SystemExit(f"error: {folder}/model.pt has no flags and games; expected one of the three scripts")
    env_ids = {finetune.short_name(env_id): env_id for env_id in info["env_ids"]}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a resumed run logged some steps twice is known
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    logged = {key: events.Scalars(key) for key in events.Tags()["scalars"]}
    scalars = {key: ([e.step for e in series], [e.value for e in series]) for key, series in logged.items()}
    # Runs from before these flags have none: they are no others than those with their defaults.
    defaults = {"steps_per_update": 1, "one_hot_actions": False}
    flags = {name: value for name, value in info["args"].items() if defaults.get(name, ...) != value}
    run = SimpleNamespace(flags=flags, method=method_of(flags))
    run.origin = info.get("origin", {})
    run.env_ids = env_ids
    run.returns = dict(returns)
    run.curves = dict(curves)
    run.scalars = scalars
    run.times = read_times(folder, logged)
    return run


def read_times(folder, logged):
    """When the evaluations of a run were -> {updates: (hours, day)}. Hours are those since the run began, without its
    interruptions, but with what it did again after them: a process counts from its first event to its last.

    logged: {key: events of TensorBoard}, without those that were logged again after an interruption.
    """
    processes = []  # first and last second of each
    for path in glob.glob(f"{glob.escape(folder)}/events.*"):
        seconds = [event.wall_time for event in EventFileLoader(path).Load()]
        processes += [(min(seconds), max(seconds))] if seconds else []
    times = {}
    evaluations = [series for key, series in logged.items() if key.startswith("eval/episodic_return")]
    for event in itertools.chain(*evaluations):
        taken = sum(min(end, event.wall_time) - start for start, end in processes if start <= event.wall_time)
        times[event.step] = taken / 3600, time.strftime("%Y-%m-%d", time.gmtime(event.wall_time))
    return times


def random_play(env_id, max_frames):
    """Returns of uniformly random legal actions, in games that are cut where those of an evaluation are."""
    games = 16 if finetune.atari_rom(env_id) else 100  # an emulator takes a while to start
    envs = finetune.make_envs(env_id, games)
    legal = np.flatnonzero(finetune.legal_actions(env_id))
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    returns = np.zeros(games)
    active = np.ones(games, bool)
    for _ in range(max_frames // 4):
        _, reward, terminated, truncated, _ = envs.step(rng.choice(legal, games))
        returns += reward * active
        active &= ~(terminated | truncated)
        if not active.any():
            break
    envs.close()
    return returns


def perfect_play(env_id, games=100):
    """Returns of the best actions, or None if the game does not say which they are."""
    if finetune.atari_rom(env_id) or not hasattr(gym.make(env_id).unwrapped, "best_actions"):
        return None
    env = gym.make(env_id)
    returns = np.zeros(games)
    for seed in range(games):
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.unwrapped.best_actions()[0])
            returns[seed] += reward
            over = terminated or truncated
    return returns


def steps_to(curve, threshold):
    """Environment steps of the first evaluation at the threshold or above, or None."""
    return next((env_steps for env_steps, _, value in curve if value >= threshold), None)


def print_table(runs, random, perfect, threshold):
    """One line for each game and method: means over its seeds. threshold: {game: mean return}, where there is one."""
    lines = defaultdict(list)
    for run in runs:
        for game, curve in run.curves.items():
            lines[game, run.method].append(curve)
    width = 2 + max(len(method) for _, method in lines)
    reach = "steps to " + " ".join(f"{level:g}" for level in threshold.values()) if threshold else ""
    columns = f"{'game':<16}{'method':<{width}}{'seeds':>5}{'zero-shot':>11}{reach:>18}{'final':>8}{'updates':>9}"
    print(f"\n{columns}{'random':>9}{'perfect':>9}")
    for (game, method), curves in lines.items():
        zero_shot = np.mean([curve[0][2] for curve in curves])
        final = np.mean([curve[-1][2] for curve in curves])
        steps = ""
        if game in threshold and curves[0][-1][0] > 0:  # environment steps: teachers and students take none
            reached = [(steps_to(curve, threshold[game]), curve[-1][0]) for curve in curves]
            steps = " ".join(f">{last}" if first is None else str(first) for first, last in reached)  # of each seed
        by_chance, best = ("" if x[game] is None else f"{x[game]:.1f}" for x in (random, perfect))
        updates = max(curve[-1][1] for curve in curves)
        line = f"{game:<16}{method:<{width}}{len(curves):>5}{zero_shot:>11.1f}{steps:>18}{final:>8.1f}{updates:>9,}"
        print(f"{line}{by_chance:>9}{best:>9}")
    print("zero-shot, final: mean return of the first evaluation, before any update, and of the last")


def draw(runs, game, random, perfect, threshold, output):
    """Returns over environment steps, a thin line for each seed and a thick one for their mean; below, the weights of
    the offline games and the gradient cosines that they come from."""
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[2, 1])
    returns = figure.add_subplot(grid[0, :])
    weights = figure.add_subplot(grid[1, 0])
    cosines = figure.add_subplot(grid[1, 1], sharex=weights)
    returns.set(title=f"Learning {game}", ylabel="mean return of an evaluation")
    weights.set(title="XTRA: weight eta of each offline game", ylabel="share of cosines above threshold")
    weights.set_ylim(-0.05, 1.05)
    cosines.set(title="XTRA: cosine of the gradients", ylabel="offline game and target game")
    played = [run for run in runs if game in run.curves]
    online = [run for run in played if "num_updates" not in run.flags]
    x = 0 if online else 1  # environment steps; where there are only teachers and students, updates
    online = online or played
    for method, colour in zip(dict.fromkeys(run.method for run in online), itertools.cycle(COLOURS), strict=False):
        curves = [np.array(run.curves[game]) for run in online if run.method == method]
        values = [dict(zip(curve[:, x], curve[:, 2], strict=True)) for curve in curves]
        steps = sorted(set.intersection(*map(set, values)))
        mean = [np.mean([value[step] for value in values]) for step in steps]
        for curve in curves:
            returns.plot(curve[:, x], curve[:, 2], color=colour, linewidth=0.8, alpha=0.5)
        label = f"{EXPLAINED.get(method, method)} ({'1 seed' if len(curves) == 1 else f'mean of {len(curves)} seeds'})"
        returns.plot(steps, mean, color=colour, linewidth=2.5, marker="o", markersize=4, label=label)
    levels = {"perfect play": perfect[game], "random play": random[game], "threshold": threshold.get(game)}
    for name, level in levels.items():
        if level is not None:
            style = (
                {"linestyle": ":", "color": "gray"} if name == "threshold" else {"linestyle": "--", "color": "black"}
            )
            returns.axhline(level, linewidth=1, **style)
            returns.text(1.01, level, name, transform=returns.get_yaxis_transform(), va="center")
    offline = dict.fromkeys(key.split("/")[-1] for run in online for key in run.scalars if "/task_weight/" in key)
    for source, colour in zip(offline, itertools.cycle(COLOURS[3:] + COLOURS[:3]), strict=False):
        for run in online:
            label = source if source not in weights.get_legend_handles_labels()[1] else None
            if f"transfer/task_weight/{source}" in run.scalars:
                steps, values = run.scalars[f"transfer/task_weight/{source}"]
                weights.plot(steps, values, color=colour, drawstyle="steps-post", label=label)
            if f"transfer/grad_cosine/{source}" in run.scalars:
                steps, values = run.scalars[f"transfer/grad_cosine/{source}"]
                cosines.plot(steps, values, ".", color=colour, alpha=0.4)
    for axes in (returns, weights, cosines):
        axes.set_xlabel("environment steps" if axes is returns and x == 0 else "updates")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        elif not axes.lines:
            axes.text(0.5, 0.5, "not logged by these runs", transform=axes.transAxes, ha="center")
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def windows(steps, cosines, weights):
    """The measurements of eta that were brought to an end: yields the first update after it, how many updates were
    measured, eta from then on, and the mean and the autocorrelation of the cosines.

    steps, cosines: of all updates that were measured. weights: (updates, values) of eta as they were logged.
    The autocorrelation is that of a series with itself one update later, `sum (c_t - c)(c_t+1 - c) / sum (c_t - c)^2`.
    """
    breaks = np.flatnonzero(np.diff(steps) > 1) + 1
    for measured, values in zip(np.split(steps, breaks), np.split(cosines, breaks), strict=True):
        after = int(measured[-1]) + 1
        eta = next((value for step, value in zip(*weights, strict=True) if step > after), None)  # logged after a cycle
        centred = values - values.mean()
        spread = (centred**2).sum()
        if eta is not None:
            lag = (centred[:-1] * centred[1:]).sum() / spread if spread > 0 else None
            yield after, len(values), *(None if x is None else round(float(x), 6) for x in (eta, values.mean(), lag))


def hash_settings(flags):
    """Seven digits that are the same for runs which differ in nothing but game, seed and folders."""
    places = "seed env_id datasets teachers pretrained save_dataset capture_video".split()
    places += vars(finetune.Run())
    settings = sorted((name, str(value)) for name, value in flags.items() if name not in places)
    return hashlib.sha256(str(settings).encode()).hexdigest()[:7]


def collect_run(folder, run):
    """A run -> its lines of runs.csv and of weights.csv. A run of several games is its own student: those of one seed
    for different targets share games."""
    scale, _, method = run.flags["exp_name"].partition("-")
    seed = run.flags["seed"]
    pretrained = folder if len(run.curves) > 1 else run.flags.get("pretrained")
    pretrained = os.path.basename(os.path.abspath(pretrained)) if pretrained else ""
    total = run.flags.get("num_updates")
    if total is None:
        online = run.flags["total_timesteps"] // run.flags.get("steps_per_update", 1)
        total = online + run.flags.get("extra_updates", 0)
    origin = run.origin.get("card", ""), run.origin.get("commit", ""), hash_settings(run.flags)
    rows = []
    for (game, env_steps, updates), scores in run.returns.items():
        place = scale, method, game, seed, pretrained, env_steps, updates, total
        hours, day = run.times.get(updates, (np.nan, ""))
        rows.append((*place, np.mean(scores), np.std(scores), len(scores), round(hours, 4), day, *origin))
    lines = []
    for key, (steps, cosines) in run.scalars.items():
        if key.startswith("transfer/grad_cosine/"):
            weights = run.scalars.get(key.replace("grad_cosine", "task_weight"), ((), ()))
            place = scale, method, next(iter(run.curves)), seed, key.split("/")[-1]
            lines += [(*place, *window) for window in windows(np.array(steps), np.array(cosines), weights)]
    return rows, lines


def merge(path, new, replaced, columns):
    """Writes the lines `new` into a table, in place of those that begin as one of `replaced`."""
    old = pages.read_csv(path, columns)
    kept = [row for row in old.itertuples(index=False, name=None) if not {row[:4], row[:5]} & replaced]
    table = pd.DataFrame([*kept, *new], columns=columns).sort_values(columns[:7])
    with model.whole_file(path) as file:
        table.to_csv(file, index=False, float_format="%.10g", lineterminator="\n")


def collect(folders, results):
    """Puts the runs of a matrix into runs.csv and weights.csv, and random and perfect play of games that have none."""
    os.makedirs(results, exist_ok=True)
    path = os.path.join(results, "runs.csv")
    known = {(row.scale, row.game) for row in pages.read_csv(path, pages.RUNS).itertuples() if row.method == "random"}
    rows, lines, played, replaced = [], [], [], set()
    for folder in dict.fromkeys(map(os.path.realpath, folders)):
        evaluations = Path(folder, "evaluations.csv")
        if not evaluations.is_file() or len(evaluations.read_text(encoding="utf-8-sig").splitlines()) < 2:
            continue  # a run that has just begun
        try:
            run = read_run(folder)
        except SystemExit as stop:
            print(f"{folder}: left out; {stop.code}")
            continue
        scale, _, method = run.flags.get("exp_name", "").partition("-")
        if scale not in pages.SCALES or not method:
            print(f"{folder}: left out; its --exp-name is not a scale and a method, as in toy-xtra")
            continue
        if method not in {*pages.METHODS, *matrix.PIECES, *matrix.EXPERIMENTS["probes"]}:
            print(f"{folder}: collected, but on no page; METHODS of benchmark/pages.py lacks {method}")
        found = collect_run(folder, run)
        which = {row[: 5 if len(run.curves) > 1 else 4] for row in found[0]}  # scale, method, game, seed, student
        if which & replaced:
            print(f"{folder}: left out; a run before it is of the same method, game and seed")
            continue
        rows += found[0]
        lines += found[1]
        replaced |= which
        for game, env_id in run.env_ids.items():
            if game in run.curves and (scale, game) not in known:
                known.add((scale, game))
                played += play(scale, game, env_id, run.flags["eval_max_frames"])
    merge(path, [*rows, *played], replaced, pages.RUNS)
    merge(os.path.join(results, "weights.csv"), lines, replaced, pages.WEIGHTS)
    print(f"{path}: {len(rows)} evaluations collected")


def play(scale, game, env_id, max_frames):
    """Lines of runs.csv of random play and, where a game has it, perfect play."""
    try:
        levels = {"random": random_play(env_id, max_frames), "perfect": perfect_play(env_id)}
    except SystemExit as stop:
        print(f"{game}: random play is left out; {stop.code}")
        return []
    numbers = {name: (np.mean(x), np.std(x), len(x)) for name, x in levels.items() if x is not None}
    return [(scale, name, game, 0, "", 0, 0, 0, *three, None, "", "", "", "") for name, three in numbers.items()]


if __name__ == "__main__":
    args = model.read_flags(Args, __doc__)
    if not args.output.endswith((".png", ".svg", ".pdf")) or os.path.isdir(args.output):
        raise SystemExit(f"error: --output is {args.output}, expected a name that ends in .png, .svg or .pdf")
    if not args.runs and not args.pages:
        raise SystemExit("error: no run folders; give some, as in python benchmark/report.py runs/*")
    if args.collect:
        collect(args.runs, args.results)
    if args.collect or args.pages:
        pages.publish(args.results)
        sys.exit()
    model.check_writable("--output", args.output)
    folders = [*{os.path.realpath(folder): folder for folder in args.runs}.values()]  # each counts once
    runs = [read_run(folder) for folder in folders]
    name_what_differs(runs)
    told = {}  # one run of each method, games and seed
    for folder, run in zip(folders, runs, strict=True):
        other = told.setdefault((run.method, *run.curves, run.flags["seed"]), folder)
        if other != folder:
            print(f"warning: {other} and {folder} have the same flags and seed; they count as two", file=sys.stderr)
    env_ids = {game: env_id for run in runs for game, env_id in run.env_ids.items()}
    shown = dict.fromkeys(game for run in runs for game in run.curves)
    game = args.game or next(iter(runs[-1].curves))
    if game not in shown:
        raise SystemExit(f"error: --game {game} was not played by these runs; choose of {', '.join(shown)}")
    max_frames = {game: max(run.flags["eval_max_frames"] for run in runs if game in run.curves) for game in shown}
    random = dict.fromkeys(shown)
    perfect = dict.fromkeys(shown)
    for name in shown:
        try:
            random[name] = random_play(env_ids[name], max_frames[name]).mean()
            best = perfect_play(env_ids[name])
            perfect[name] = None if best is None else best.mean()
        except SystemExit as stop:  # the table needs no environment
            print(f"{name}: random play is left out; {stop.code}", file=sys.stderr)
    threshold = {} if args.threshold is None else {game: args.threshold}
    print_table(runs, random, perfect, threshold)
    draw(runs, game, random, perfect, threshold, args.output)
    print(f"{args.output}: figure of {game} saved")
