"""What the runs of a pipeline did: a table in the terminal, and one figure.

    python benchmark/report.py runs/teacher-phoenix runs/student runs/xtra-assault --output report.png

Reads what the three scripts write into their run folders: evaluations.csv and the TensorBoard events.
"""

import csv
import os
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import tyro  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, in the order of the table
    output: str = "report.png"  # the figure to write


def game(env_id):
    """Short name of a game: "Phoenix" for PhoenixNoFrameskip-v4, "Catch-v0" for toy_env:Catch-v0."""
    return env_id.removesuffix("NoFrameskip-v4").split(":")[-1]


def read_evaluations(run):
    """evaluations.csv -> {game: {updates: (environment steps, mean return)}}, in the order of the file."""
    games = defaultdict(lambda: defaultdict(list))
    with open(os.path.join(run, "evaluations.csv")) as file:
        for row in csv.DictReader(file):
            games[game(row["env_id"])][int(row["updates"])].append((int(row["env_steps"]), float(row["return"])))
    return {
        name: {updates: tuple(np.mean(played, axis=0)) for updates, played in points.items()}
        for name, points in games.items()
    }


def read_events(run):
    """TensorBoard events -> {key: (steps, values)}, and the minutes between the first and the last of them."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    scalars = {key: events.Scalars(key) for key in events.Tags()["scalars"]}
    times = [event.wall_time for series in scalars.values() for event in series]
    minutes = (max(times) - events.FirstEventTimestamp()) / 60
    return {key: ([e.step for e in series], [e.value for e in series]) for key, series in scalars.items()}, minutes


def print_table(names, evaluations, minutes):
    """One line per run and game: mean return of the first and of the last evaluation."""
    width = max(map(len, names))
    print(f"\n{'run':<{width}}  {'game':<14}{'return before':>14}{'after':>9}{'env steps':>11}{'updates':>9}{'min':>6}")
    for name, games, spent in zip(names, evaluations, minutes, strict=True):
        for env, points in games.items():
            before, (env_steps, after), updates = next(iter(points.values()))[1], list(points.values())[-1], max(points)
            print(
                f"{name:<{width}}  {env:<14}{before:>14.1f}{after:>9.1f}{env_steps:>11,.0f}{updates:>9,}{spent:>6.1f}"
            )


def draw(names, evaluations, scalars, output):
    """Four panels: returns, losses, the task weights of XTRA, and the gradient cosines that they come from."""
    figure, panels = plt.subplots(2, 2, figsize=(16, 8), layout="constrained")
    (returns, losses), (weights, cosines) = panels
    returns.set(title="Evaluation: mean raw score", ylabel="points")
    losses.set(title="Training loss: the weighted sum of its four terms", ylabel="loss")
    weights.set(title="XTRA: weight of each offline game", ylabel="eta (share of cosines above the threshold)")
    cosines.set(title="XTRA: agreement of each offline game with the target game", ylabel="cosine of the gradients")
    weights.set_ylim(-0.05, 1.05)
    cosines.sharex(weights)
    for name, games, series in zip(names, evaluations, scalars, strict=True):
        for env, points in games.items():
            label = name if len(games) == 1 else f"{name}: {env}"
            returns.plot(list(points), [value for _, value in points.values()], marker="o", label=label)
        if "losses/loss" in series:
            losses.plot(*series["losses/loss"], label=name)
        for key, (steps, values) in series.items():
            if key.startswith("transfer/task_weight/"):
                weights.plot(steps, values, drawstyle="steps-post", label=game(key.split("/", 2)[2]))
            if key.startswith("transfer/grad_cosine/"):
                cosines.plot(steps, values, ".", label=game(key.split("/", 2)[2]))
    for axes in panels.flat:
        axes.set_xlabel("updates (in finetune.py one per environment step, which is 4 frames)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axes.text(0.5, 0.5, "not logged by these runs", transform=axes.transAxes, ha="center")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args)
    for run in args.runs:
        if not os.path.isfile(os.path.join(run, "evaluations.csv")):
            raise SystemExit(f"error: {run} holds no evaluations.csv; expected a run folder of the three scripts")
    names = [os.path.basename(os.path.normpath(run)) for run in args.runs]
    evaluations = [read_evaluations(run) for run in args.runs]
    scalars, minutes = zip(*[read_events(run) for run in args.runs], strict=True)
    print_table(names, evaluations, minutes)
    draw(names, evaluations, scalars, args.output)
    print("\nAt toy scale these numbers show that the machinery runs, not the paper's result: 100,000 steps make that.")
    print(f"{args.output}: figure saved")
