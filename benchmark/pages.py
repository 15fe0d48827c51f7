"""The pages of results: docs/results.md, its part of README.md, and their figures.

    python benchmark/report.py --pages

They are made of benchmark/results/ (our runs, by `report.py --collect`) and benchmark/paper/ (the paper's numbers), and
the same to the byte each time. From top to bottom: names, statistics, claims and verdicts, reading, pages, figures.
"""

import itertools
import os
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import scipy.stats  # noqa: E402

import model  # noqa: E402
from benchmark import matrix  # noqa: E402

# method -> its name, its colour (colour-blind safe within a figure), its column in benchmark/paper/
METHODS = {
    "efficientzero": ("EfficientZero", "#0072B2", "EfficientZero"),
    "efficientzero-l": ("EfficientZero-L", "#56B4E9", "EfficientZero-L"),
    "efficientzero-l-512": ("EfficientZero-L, twice the batch", "#332288", None),
    "xtra": ("XTRA", "#D55E00", "XTRA"),
    "wo-cross-task": ("w.o. cross-task", "#009E73", "XTRA_wo_crosstask"),
    "wo-pretraining": ("w.o. pretraining", "#CC79A7", "XTRA_wo_pretraining"),
    "wo-task-weights": ("w.o. task weights", "#E69F00", "XTRA_wo_taskweights"),
    "bc": ("behaviour cloning, zero-shot", "#999933", "ZeroShot_BC"),
    "zero-shot": ("XTRA, zero-shot", "#882255", "ZeroShot_XTRA"),
    "xtra-small": ("XTRA, small h", "#AA4499", None),
    "frozen-h": ("XTRA, h frozen", "#44AA99", None),
    "xtra-other": ("XTRA, pretrained on the other category", "#117733", None),
    "transfer-h": ("only h transferred", "#88CCEE", None),
    "transfer-hg": ("only h and g transferred", "#661100", None),
    "diverse-efficientzero": ("EfficientZero, 120 % of the updates", "#0072B2", "EfficientZero"),
    "diverse-xtra": ("XTRA, diverse offline games", "#D55E00", "XTRA"),
    "teacher": ("teachers: offline RL on each game", "#6699CC", None),
    "student": ("student: distilled from the teachers", "#DDAA33", None),
    "multi-game": ("offline RL on all games at once", "#004488", None),
}
TABLE1 = ["efficientzero", "efficientzero-l", "xtra", "wo-cross-task", "wo-pretraining", "wo-task-weights"]
ZERO_SHOT = ["bc", "zero-shot"]
TABLE2 = ["diverse-efficientzero", "diverse-xtra"]
FIGURE7 = ["efficientzero", "efficientzero-l", "xtra", "xtra-small", "xtra-other", "frozen-h"]
FIGURE8 = ["efficientzero", "transfer-h", "transfer-hg", "xtra"]
FIGURE10 = ["teacher", "student", "multi-game"]
FIGURE11 = ["efficientzero", "efficientzero-l", "efficientzero-l-512", "xtra"]
SEVERAL = ["student", "small-student", "diverse-student", "cloned", "multi-game"]  # runs of several games
SCALES = {  # in the order of the pages
    "paper": ("Atari", "Atari at the paper's sizes."),
    "small": (
        "Atari, reduced",
        "Real Atari: small networks, few steps, two departures, evaluations of 8 games cut at 20,000 frames.",
    ),
    "toy": ("Toy games", "Small pixel games (tests/toy_env.py) and small networks: **nothing about Atari**."),
}
# scale: {category: the games that the methods are compared in}
TARGETS = {name: sizes["targets"] | {"diverse": sizes["diverse_targets"]} for name, sizes in matrix.SCALES.items()}
RUNS = ["scale", "method", "game", "seed", "pretrained", "env_steps", "updates", "total_updates"]
RUNS += ["mean", "std", "games", "hours", "day", "card", "commit", "settings"]  # the columns of runs.csv
WEIGHTS = ["scale", "method", "game", "seed", "offline_game", "updates", "measured", "eta", "cosine", "autocorrelation"]
RESAMPLES = 2_000  # of a bootstrap
MARGIN = 0.1  # "about the same" is within a tenth
FLOOR = 0.05  # a lower score of EfficientZero counts as this in a ratio, which would have no meaning
OFFLINE_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999933"]
PAPER = Path(__file__).resolve().parent / "paper"


# --- statistics ---
# Scores are {game: array [..., n] of n seeds}; a bootstrap puts its resamples before the seeds.


def mean(scores):
    """Mean over games of the mean over seeds -> [...]."""
    return np.mean([x.mean(-1) for x in scores.values()], axis=0) if scores else np.nan


def median(scores):
    """Median over games of the mean over seeds -> [...]."""
    return np.median([x.mean(-1) for x in scores.values()], axis=0)


def iqm(scores):
    """Interquartile mean: that of all seeds of all games without the lowest and the highest quarter (Agarwal et al.
    2021, "Deep RL at the Edge of the Statistical Precipice"). Of 1, 2, 3, 10 it is 2.5."""
    x = np.sort(np.concatenate([*scores.values()], axis=-1), axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def ratios(scores, base):
    """Of each game, the mean over seeds as a multiple of that of `base` -> {game: [..., 1]}."""
    over = {game: np.maximum(x.mean(-1, keepdims=True), FLOOR) for game, x in base.items()}
    return {game: x.mean(-1, keepdims=True) / over[game] for game, x in scores.items()}


def improvement(scores, base):
    """Table 1: mean over games of score / EfficientZero's score."""
    return mean(ratios(scores, base))


def median_improvement(scores, base):
    """Table 1: the same as a median over games."""
    return median(ratios(scores, base))


def median_of_three(scores, base):
    """`median_improvement`; nan for fewer than three games, whose median is their mean."""
    return median_improvement(scores, base) if len(scores) > 2 else np.nan


def probability(scores, base):
    """Probability of improvement: mean over games of `P(X > Y) + P(X = Y) / 2` over pairs of seeds (Agarwal et al.)."""
    pairs = [(x[..., :, None], base[game][..., None, :]) for game, x in scores.items()]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], axis=0)


def estimate(statistic, *samples):
    """A statistic of samples {game: [n]} -> (value, low, high): 95 % of a bootstrap's resamples, which draw as many
    seeds as there are, with replacement, of each sample and game (stratified; samples apart from each other, which is
    too wide for two measures of the same runs, D7). One seed has no interval: nan."""
    value = float(statistic(*samples))
    of_games = [scores for sample in samples for scores in sample.values()]
    if np.isnan(value) or min(map(len, of_games)) < 2:
        return value, np.nan, np.nan
    if all(np.ptp(scores) == 0 for scores in of_games):  # all resamples are the same
        return value, value, value

    def of_resamples(*drawn, axis):
        drawn = iter(drawn)
        return statistic(*({game: next(drawn) for game in sample} for sample in samples))

    options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
    low, high = scipy.stats.bootstrap(of_games, of_resamples, vectorized=True, **options).confidence_interval
    return value, float(low), float(high)


def verdict(low, high, bounds, seeds):
    """Of a claim that a number lies within bounds, when its 95 % interval is low to high."""
    if bounds is None:
        return "no verdict"
    if seeds < 3:
        return "too few seeds"
    if bounds[0] < low and high < bounds[1]:
        return "reproduced"
    if high <= bounds[0] or bounds[1] <= low:
        return "not reproduced"
    return "undecided"


# --- claims: their statistics, and what they want of them ---
def difference(x, y):
    return mean(x) - mean(y)


def median_difference(x, y):
    """Needs three games, as `median_of_three`."""
    return median(x) - median(y) if len(x) > 2 else np.nan


def more_than_half(x, y, base):
    """Positive if x has more than half of the gain that y has over `base`."""
    return difference(x, base) - 0.5 * difference(y, base)


def more_than_half_improvement(x, y, base):
    return improvement(x, base) - 1 - 0.5 * (improvement(y, base) - 1)


def more_improvement(x, y, base):
    return improvement(x, base) - improvement(y, base)


def more_median_improvement(x, y, base):
    """Needs three games: of fewer, mean and median are the same."""
    return median_improvement(x, base) - median_improvement(y, base) if len(x) > 2 else np.nan


def largest_gain(x, base):
    return np.max([ratio.mean(-1) for ratio in ratios(x, base).values()], axis=0) - 1


def by_category(x, base):
    targets = TARGETS["paper"]
    shooters, mazes = ({game: x[game] for game in targets[name] if game in x} for name in ("shooters", "mazes"))
    return improvement(shooters, base) - improvement(mazes, base)


def smaller_gain_of_two(x, base):
    """The improvement in that of DemonAttack and Phoenix in which it is smaller; nan without both."""
    found = ratios({game: x[game] for game in ("DemonAttack", "Phoenix") if game in x}, base)
    return np.min([ratio.mean(-1) for ratio in found.values()], axis=0) if len(found) == 2 else np.nan


def share_above(x, others):
    return np.mean([x[game].mean(-1) > others[game].mean(-1) for game in x], axis=0)


def fades(early, early_base, late, late_base):
    return improvement(early, early_base) - improvement(late, late_base)


def smallest_difference(x, y):
    return np.min([x[game].mean(-1) - y[game].mean(-1) for game in x], axis=0)


def share_below_random(x):
    """Needs three games, as it is about most of them."""
    return np.mean([scores.mean(-1) < 0 for scores in x.values()], axis=0) if len(x) > 2 else np.nan


def share_no_worse(x, y):
    """The share of games in which the mean of x is at most a tenth below that of y: 0 is no worse than 0."""
    means = [(x[game].mean(-1), y[game].mean(-1)) for game in x]
    return np.mean([a >= b - MARGIN * np.abs(b) for a, b in means], axis=0)


INF = float("inf")
POSITIVE, NEGATIVE = (0, INF), (-INF, 0)
HIGHER, LOWER, SAME, NO_HARM = (1, INF), (-INF, 1), (1 - MARGIN, 1 + MARGIN), (1 - MARGIN, INF)  # of an improvement
# A claim (its words and the paper's number are in benchmark/paper/claims.csv) -> the parts that must all hold. A part:
# its samples, each a method and a measure of `read_samples`; a statistic of them; the bounds that it must lie between.
CLAIMS = {
    "A1": [("xtra.amount efficientzero.amount", improvement, HIGHER)],
    "A2": [("xtra.amount efficientzero.amount", median_of_three, HIGHER)],
    "A3": [("xtra.amount efficientzero.amount", largest_gain, None)],
    "A5": [("xtra.amount efficientzero.amount", by_category, POSITIVE)],
    "A6": [("diverse-xtra.final diverse-efficientzero.final", difference, POSITIVE)],
    "A7": [("diverse-xtra.final diverse-efficientzero.final", median_difference, POSITIVE)],
    "A8": [("diverse-xtra.amount others.amount", share_above, (0.5, INF))],
    "A9": [
        ("xtra.final efficientzero.final", difference, POSITIVE),
        ("xtra.final efficientzero.final", median_difference, POSITIVE),
    ],
    "B1": [
        ("xtra.amount efficientzero.amount", improvement, HIGHER),
        ("wo-cross-task.amount xtra.amount efficientzero.amount", more_than_half_improvement, NEGATIVE),
        ("wo-cross-task.amount efficientzero.amount", improvement, NO_HARM),
    ],
    "B2": [("wo-pretraining.amount efficientzero.amount", median_improvement, LOWER)],
    "B3": [
        ("wo-task-weights.amount xtra.amount efficientzero.amount", more_improvement, POSITIVE),
        ("wo-task-weights.amount xtra.amount efficientzero.amount", more_median_improvement, NEGATIVE),
    ],
    "B4": [("wo-task-weights.amount efficientzero.amount", smaller_gain_of_two, (2, INF))],
    "B5": [("wo-cross-task.amount efficientzero.amount", improvement, (-INF, 1 + MARGIN))],
    "B6": [("efficientzero-l.amount efficientzero.amount", improvement, LOWER)],
    "C1": [("zero-shot.amount bc.amount efficientzero.amount", more_improvement, POSITIVE)],
    "C3": [("zero-shot.final", share_below_random, (0.5, INF))],
    "D1": [("xtra.area efficientzero.area", difference, POSITIVE)],
    "D2": [("xtra.eta_variance", mean, POSITIVE)],
    "D3": [
        ("xtra.area xtra-other.area", difference, POSITIVE),
        ("xtra-other.area_amount efficientzero.area_amount", improvement, SAME),
    ],
    "D4": [("xtra-other.amount efficientzero.amount", improvement, NO_HARM), ("xtra-other.eta", mean, (-INF, 0.5))],
    "D5": [
        ("frozen-h.early efficientzero.early", difference, POSITIVE),
        ("frozen-h.final xtra.final", difference, NEGATIVE),
    ],
    "D6": [
        ("xtra.amount xtra-small.amount efficientzero.amount", more_improvement, POSITIVE),
        ("efficientzero-l.amount efficientzero.amount", improvement, LOWER),
    ],
    "D7": [
        ("xtra.early_amount efficientzero.early_amount", improvement, HIGHER),
        ("xtra.early_amount efficientzero.early_amount xtra.amount efficientzero.amount", fades, POSITIVE),
    ],
    "D8": [
        ("xtra.area efficientzero.area", difference, POSITIVE),
        ("transfer-h.area efficientzero.area", difference, POSITIVE),
        ("transfer-h.area xtra.area efficientzero.area", more_than_half, NEGATIVE),
    ],
    "D9": [
        ("xtra.area efficientzero.area", difference, POSITIVE),
        ("transfer-hg.area efficientzero.area", difference, POSITIVE),
        ("transfer-hg.area xtra.area efficientzero.area", more_than_half, POSITIVE),
    ],
    "D10": [("xtra.area_amount transfer-hg.area_amount", improvement, SAME)],
    "D11": [("xtra.autocorrelation", mean, (0.5, INF))],
    "E1": [("student.amount teacher.amount", share_no_worse, (0.7, INF))],
    "E2": [("student.final multi-game.final", smallest_difference, POSITIVE)],
    "E4": [("efficientzero-l-512.amount efficientzero-l.amount", improvement, SAME)],
}
NOT_ASKED = {
    "A4": "its numbers are in A1, A2 and A5",
    "A10": "is a setting",
    "C2": "needs a student whose f is drawn anew",
    "D12": "is about time: see docs/performance.md",
    "E3": "needs students of one to eight games",
    "E5": "is a setting, which the tests check",
}


# --- reading ---
def read_csv(path, columns):
    """A table of --results, empty if there is none yet."""
    if not os.path.isfile(path):
        return pd.DataFrame(columns=columns)
    texts = {"pretrained", "day", "card", "commit", "settings"} & set(columns)  # a commit may look like a number
    text = dict.fromkeys(texts, str)
    return pd.read_csv(path, dtype=text).fillna(dict.fromkeys(text, ""))[columns]


def read_paper(folder):
    """benchmark/paper/ -> scores of tables 1 and 2 {game: {column: score}}, claims {identifier: {column: text}}, and
    random and human scores {game: score}."""
    tables = [pd.read_csv(folder / f"table{i}.csv") for i in (1, 2)]
    tables = [scores[scores.kind == "score"].set_index("row").to_dict("index") for scores in tables]
    levels = pd.read_csv(folder / "atari100k.csv").pivot(index="game", columns="method", values="score")
    paper = SimpleNamespace(table1=tables[0], table2=tables[1])
    paper.claims = pd.read_csv(folder / "claims.csv", dtype=str).set_index("id").to_dict("index")
    paper.random = levels["Random"].dropna().to_dict()
    paper.human = levels["Human"].dropna().to_dict()
    return paper


def read_scale(scale, runs, weights, paper):
    """The results of a scale: finals (the last evaluations of the runs that ended, and the zero-shot ones), unfinished,
    curves (the evaluations after the same environment steps in all runs of a game), weights, samples (`read_samples`).

    An evaluation has a score, `(mean - random) / (reference - random)`, the reference being a human in Atari games and
    perfect play in others, and an amount, of which improvements are made: the mean return in Atari games, or the score.
    """
    data = SimpleNamespace(scale=scale, atari=scale != "toy", printed=scale == "paper", paper=paper)
    data.all = runs[runs.scale == scale]
    levels = [data.all[data.all.method == name].set_index("game")["mean"].to_dict() for name in ("random", "perfect")]
    data.low = paper.random if data.atari else levels[0]  # a human-normalised score is made with the published ones
    data.random = data.low | levels[0]
    data.reference = paper.human if data.atari else levels[1]
    data.best = "human" if data.atari else "perfect play"
    key = ["method", "game", "seed", "pretrained"]
    rows = data.all[data.all.method.isin(METHODS)].sort_values([*key, "env_steps", "updates"])
    low, high = (rows.game.map(level).astype(float) for level in (data.low, data.reference))
    rows = rows.assign(score=(rows["mean"] - low) / (high - low))
    rows["amount"] = rows["mean"] if data.atari else rows.score
    last = rows.groupby(key).tail(1)
    ended = last.updates >= last.total_updates
    data.unfinished = last[~ended]
    trained = last[ended & (last.method != "bc")]
    first = rows[(rows.method == "xtra") & (rows.updates == 0)].merge(trained[key]).assign(method="zero-shot")
    zero_shot = pd.concat([last[ended & (last.method == "bc")], first])
    student = ["method", "game", "pretrained"]  # which counts once
    numbers = zero_shot.groupby(student)[["mean", "score", "amount"]].mean().reset_index()
    zero_shot = zero_shot.drop_duplicates(student).drop(columns=["mean", "score", "amount"]).merge(numbers)
    data.finals = pd.concat([trained, zero_shot])
    online = rows.merge(trained.loc[~trained.method.isin(FIGURE10), key])
    online = online.drop_duplicates([*key, "env_steps"], keep="last")
    online = online.assign(run=online.method + online.seed.astype(str) + online.pretrained)
    online["diverse"] = online.method.isin(TABLE2)  # they have other updates, after the last environment step
    have = online.groupby(["game", "diverse", "env_steps"]).run.transform("nunique")
    data.curves = online[have == online.groupby(["game", "diverse"]).run.transform("nunique")]
    data.curves["minutes"] = data.curves.hours * 60
    data.hours = data.curves.hours.notna().all()
    data.weights = weights[weights.scale == scale].merge(trained[["method", "game", "seed"]])
    data.untrained = rows[(rows.updates == 0) & (rows.pretrained == "")].groupby("game")["mean"].mean().to_dict()
    data.samples = read_samples(data)
    return data


def read_samples(data):
    """-> {"method.measure": {game: of each seed [n]}}. Measures: final (score) and amount; along a curve area (mean
    score over the environment steps, trapezoidal), early and early_amount (at the evaluation nearest to a fifth of the
    steps), area_amount; of a run with offline games the means of eta and autocorrelation, and eta_variance: that of eta
    over its measurements, less what chance alone would give."""
    values = []
    for row in data.finals.itertuples():
        values += [(row.method, row.game, "final", row.score), (row.method, row.game, "amount", row.amount)]
    for (method, game, *_), curve in data.curves.groupby(["method", "game", "seed", "pretrained"]):
        steps = curve.env_steps.to_numpy()
        if len(steps) > 1:
            early = curve.iloc[1 + np.abs(steps[1:] - steps[-1] / 5).argmin()]
            for column, suffix in (("score", ""), ("amount", "_amount")):
                area = np.trapezoid(curve[column], steps) / (steps[-1] - steps[0])
                values += [(method, game, f"area{suffix}", area), (method, game, f"early{suffix}", early[column])]
    for (method, game, _), run in data.weights.groupby(["method", "game", "seed"]):
        noise = run.eta * (1 - run.eta) / (run.measured - 1)  # variance of a share of `measured` independent updates
        # Rounded: two equal variances may differ in floats, and a claim asks whether the difference is above 0.
        moved = [round(x.eta.var() - noise[x.index].mean(), 9) for _, x in run.groupby("offline_game") if len(x) > 1]
        values.append((method, game, "eta_variance", np.mean(moved) if moved else np.nan))
        values += [(method, game, "eta", run.eta.mean()), (method, game, "autocorrelation", run.autocorrelation.mean())]
    targets = {game for games in TARGETS[data.scale].values() for game in games}
    samples = defaultdict(lambda: defaultdict(list))
    for method, game, measure, value in values:
        if not np.isnan(value) and (game in targets or method in FIGURE10):
            samples[f"{method}.{measure}"][game].append(value)
    for game, scores in data.paper.table2.items() if data.printed else ():
        best = max(score for name, score in scores.items() if name not in ("kind", "XTRA", "Random", "Human"))
        samples["others.amount"][game] = [best] * 3  # a published mean: it counts as seeds that all have it
    return {name: {game: np.array(x) for game, x in games.items()} for name, games in samples.items()}


def in_common(samples, names):
    """The samples of these names, in the games that all of them have -> [{game: [n]}, ...], or None if none has."""
    found = [samples.get(name, {}) for name in names]
    games = [game for game in (found or [{}])[0] if all(game in sample for sample in found)]
    return [{game: sample[game] for game in games} for sample in found] if games else None


def answer(parts, samples):
    """A claim -> (verdict, (value, low, high) of each part, fewest seeds, games), or None if no runs answer it."""
    said, numbers, seeds, games = [], [], [], set()
    for names, statistic, bounds in parts:
        common = in_common(samples, names.split())
        numbers.append((np.nan,) * 3 if common is None else estimate(statistic, *common))
        if np.isnan(numbers[-1][0]):
            return None
        seeds.append(min(len(x) for sample in common for x in sample.values()))
        games |= common[0].keys()
        said.append(verdict(*numbers[-1][1:], bounds, seeds[-1]))
    order = ["no verdict", "too few seeds", "not reproduced", "undecided", "reproduced"]  # all parts must hold
    return min(said, key=order.index), numbers, min(seeds), len(games)


# --- pages: functions that return Markdown ---
def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def number(value, low=np.nan, high=np.nan, digits=2):
    """1.234, 1.1, 1.4 -> "1.23 [1.10, 1.40]"; nan -> "-"."""
    if np.isnan(value):
        return "-"
    text = f"{value:z,.{digits}f}"
    return text if np.isnan(low) else f"{text} [{low:z,.{digits}f}, {high:z,.{digits}f}]"


def cell(values, digits=1):
    """Mean over seeds, its interval, the number of seeds, and a mark if they are fewer than three."""
    return f"{number(*estimate(mean, {'': values}), digits)} ({len(values)}){'†' if len(values) < 3 else ''}"


def shown(data, methods):
    """Those of the methods that a run of ended, in their order."""
    return [method for method in methods if method in set(data.finals.method)]


def categories(data, methods):
    """{category: games} in which the methods were evaluated: targets, or the offline games of Figure 10."""
    games = sorted(data.finals.game[data.finals.method.isin(methods)].unique())
    if methods[0] in FIGURE10:
        return {"": games}
    targets = TARGETS[data.scale]
    names = ["diverse"] if methods[0] in TABLE2 and data.atari else [name for name in targets if name != "diverse"]
    found = {name: [game for game in targets[name] if game in games] for name in names}
    return {name: listed for name, listed in found.items() if listed}


def paper_score(data, method, game):
    """The paper's score, or nan."""
    scores = data.paper.table2 if method in TABLE2 else data.paper.table1
    return scores.get(game, {}).get(METHODS[method][2], np.nan) if data.printed else np.nan


def scores_table(data, methods):
    """A line for each game: the methods' mean returns, on Atari with the paper's, and random play beside zero-shot.
    The level that a network has before it learns stands there too: it may be far above random play."""
    columns = shown(data, methods)
    after = len([method for method in columns if method not in ZERO_SHOT])
    rows = []
    for category, games in categories(data, methods).items():
        for game in games:
            cells = []
            for method in columns:
                values = data.finals.loc[(data.finals.method == method) & (data.finals.game == game), "mean"].to_numpy()
                paper = paper_score(data, method, game)
                text = cell(values) + "‡" * (data.scale == "small") if len(values) else "-"
                if len(values) and not np.isnan(paper):
                    text += f"<br>paper: {paper:,.1f}" + (f", ratio {values.mean() / paper:.2f}" if paper else "")
                cells.append(text)
            levels = [data.untrained, data.random, data.reference]
            levels = [number(level.get(game, np.nan), digits=1) for level in levels]
            rows.append([category, game, *cells[:after], *levels[:2], *cells[after:], levels[2]])
    names = [METHODS[method][0] for method in columns]
    return table(["", "game", *names[:after], "untrained", "random play", *names[after:], data.best], rows)


def aggregates_table(data, methods):
    """A line for each method: normalised scores of all games, and the improvement over the first, EfficientZero; on
    Atari with what the paper's scores of the same games give."""
    base = methods[0]
    rows = []
    for method in shown(data, methods):
        scores = data.samples.get(f"{method}.final", {})
        seeds = sorted({len(x) for x in scores.values()})
        line = [METHODS[method][0], len(scores), "-".join(map(str, seeds[:1] + seeds[1:][-1:]))]
        paper = {}
        for game in scores:
            normalised = (paper_score(data, method, game) - data.low[game]) / (data.reference[game] - data.low[game])
            paper[game] = np.array([normalised])
        for statistic in (mean, median, iqm):
            known = statistic is not iqm and scores  # of the paper's seeds there are only means
            text = number(*estimate(statistic, scores)) if scores else "-"
            line.append(text + beside(statistic(paper) if known else np.nan))
        common = in_common(data.samples, [f"{method}.amount", f"{base}.amount"]) if method != base else None
        for statistic in (improvement, median_improvement, probability):
            text = number(*estimate(statistic, *common)) if common else "-"
            if common and statistic is not probability:
                printed = [{game: np.array([paper_score(data, x, game)]) for game in common[0]} for x in (method, base)]
                text += beside(statistic(*printed))
            line.append(text)
        rows.append(line)
    header = ["", "games", "seeds", "mean score", "median score", "IQM", "mean improvement", "median improvement"]
    return table([*header, "P(above)"], rows)


def beside(paper):
    """What stands below a number of ours: the paper's, if it has one."""
    return "" if np.isnan(paper) else f"<br>paper: {paper:.2f}"


def curves_table(data, methods):
    """A line for each method: mean normalised scores of the games that all of them have."""
    methods = shown(data, methods)
    rows = [[METHODS[method][0]] for method in methods]
    for measure in ("early", "area", "final"):
        common = in_common(data.samples, [f"{method}.{measure}" for method in methods])
        for row, scores in zip(rows, common or [{}] * len(rows), strict=True):
            seeds = min(map(len, scores.values()), default=0)
            row.append(f"{number(*estimate(mean, scores))} ({seeds}){'†' * (seeds < 3)}" if scores else "-")
    return table(["", "score early", "area", "final score"], rows)


def weights_table(data, methods):
    """A line for each target and offline game: means over a run, then over seeds."""
    rows = []
    for (method, game, offline), part in data.weights.groupby(["method", "game", "offline_game"]):
        if method in methods:
            of_seed = part.groupby("seed")[["eta", "cosine", "autocorrelation"]]
            means = [cell(values.dropna().to_numpy(), 2) for _, values in of_seed.mean().items()]
            spread = cell((of_seed.max() - of_seed.min()).eta.to_numpy(), 2)
            rows.append([METHODS[method][0], game, offline, means[0], spread, *means[1:]])
    return table(["", "target", "offline game", "eta", "highest - lowest eta", "cosine", "autocorrelation"], rows)


def probes_table(data):
    """A line for each game and seed of each probe: what it changes, and its scores beside random play."""
    rows = []
    for name, flags in matrix.PROBES.items():
        probes = data.all[data.all.method == f"probe-{name}"].sort_values("updates")
        for (game, seed), evaluations in probes.groupby(["game", "seed"]):
            last = evaluations.iloc[-1]
            ended = last.updates >= last.total_updates
            done = f"{last.updates:,}" if ended else f"{last.updates:,} of {last.total_updates:,}"
            scores = ", ".join(number(score, digits=1) for score in evaluations["mean"])
            scores += f" ± {number(last['std'], digits=1)} ({last.games})"
            by_chance = number(data.random.get(game, np.nan), digits=1)
            line = [f"`{flags}`" if flags else "-", game, seed, f"{last.env_steps:,}", done, scores, by_chance]
            rows.append([*line, number(last.hours), last.day, last.card, last.commit, last.settings])
    header = ["changed", "game", "seed", "environment steps", "updates", "scores ± deviation of the last (games)"]
    return table([*header, "random play", "hours of a core", "day", "card", "commit", "settings"], rows)


def claims_table(data, claims):
    """-> the table, {verdict: identifiers}, identifiers of claims that no runs answer. claims: of claims.csv."""
    rows, verdicts, unanswered = [], defaultdict(list), []
    for name, parts in CLAIMS.items():
        answered = answer(parts, data.samples)
        if answered is None:
            unanswered.append(name)
            continue
        said, numbers, seeds, games = answered
        verdicts[said].append(name)
        wanted = [bounds_text(bounds) for *_, bounds in parts]
        ours = "; ".join(number(*three, digits=2 if abs(three[0]) > 0.1 else 3) for three in numbers)
        rows.append([name, claims[name]["claim"], claims[name]["paper"], "; ".join(wanted), ours, games, seeds, said])
    header = ["", "claim", "the paper, on Atari", "wanted", "ours", "games", "seeds", "verdict"]
    return table(header, rows), verdicts, unanswered


def bounds_text(bounds):
    if bounds is None:
        return "-"
    low, high = bounds
    return f"> {low:g}" if high == INF else f"< {high:g}" if low == -INF else f"{low:g} to {high:g}"


def last_lines(data):
    """The last line of each run and game, and those of them that count a run once, also one of several games."""
    apart = ["random", "perfect", *matrix.EXPERIMENTS["probes"]]
    rows = data.all[~data.all.method.isin(apart)].sort_values(["updates", "env_steps"])
    key = ["method", "game", "seed", "pretrained"]
    last = rows.groupby(key).tail(1).sort_values(key)
    which = last.game.where(~last.method.isin(SEVERAL), "")
    return last, last[~last.assign(which=which).duplicated(["method", "seed", "pretrained", "which"])]


def scale_section(data, claims, drawn):
    """The part of docs/results.md about a scale. drawn: the names of the figures that there are."""
    last, runs = last_lines(data)
    students = runs[runs.method == "xtra"].groupby("game").pretrained.nunique()
    counts = "-".join(map(str, sorted({students.min(), students.max()}))) if len(students) else "none"
    days = sorted({*runs.day} - {""})
    when = f", {days[0]} to {days[-1]}" if days else ""
    told = f"{len(runs)} runs, {runs.hours.sum():.1f} hours in all{when}. Different students of a target: {counts}."
    parts = [f"## {SCALES[data.scale][0]}", f"{SCALES[data.scale][1]} {told}" if len(runs) else SCALES[data.scale][1]]
    for title, methods, makers, names in BLOCKS:
        pictures = [name for name in drawn if name.startswith(tuple(f"{data.scale}-{x}" for x in names))]
        if pictures:
            parts += [f"### {title} ({SCALES[data.scale][0]})", *[make(data, methods) for make in makers]]
            parts += [f"![{name}](images/results/{name}.png)" for name in pictures]
    if data.all.method.isin(matrix.EXPERIMENTS["probes"]).any():
        parts += [f"### Probes ({SCALES[data.scale][0]})", PROBES_TOLD, probes_table(data)]
    if not len(last):  # only probes
        return "\n\n".join(parts)
    text, verdicts, unanswered = claims_table(data, claims)
    parts += [f"### Claims ({SCALES[data.scale][0]})", text, count_verdicts(data, verdicts)]
    parts.append(f"No runs here answer {', '.join(unanswered) or 'none of the others'}.")
    parts.append("Not asked: " + ", ".join(f"{name} ({why})" for name, why in NOT_ASKED.items()) + ".")
    kinds = runs[runs.settings != ""].groupby("method").settings.nunique()
    if (kinds > 1).any():
        parts.insert(2, f"**Runs of {', '.join(kinds.index[kinds > 1])} differ in their flags** (the column settings).")
    rows = []
    for row in last.itertuples():
        done = f"{row.updates:,}" if row.updates >= row.total_updates else f"{row.updates:,} of {row.total_updates:,}"
        line = [row.method, row.game, row.seed, row.pretrained or "-", number(row.mean, digits=1), done]
        rows.append([*line, number(row.hours), row.card or "-", row.commit or "-", row.settings or "-"])
    header = ["method", "game", "seed", "student", "last score", "updates", "hours", "card", "commit", "settings"]
    parts += [f"### Every run ({SCALES[data.scale][0]})", table(header, rows)]
    if len(data.unfinished):
        names = [f"{row.method} {row.game} {row.seed}" for row in data.unfinished.itertuples()]
        parts.append(f"Not ended, and counted nowhere above: {', '.join(names)}.")
    return "\n\n".join(parts)


def count_verdicts(data, verdicts):
    """{verdict: identifiers} -> one line, with the targets in which XTRA was run."""
    order = ("reproduced", "not reproduced", "undecided", "too few seeds", "no verdict")
    order = [x for x in order if verdicts[x]]
    counts = "; ".join(f"{len(verdicts[x])} {x} ({', '.join(verdicts[x])})" for x in order)
    games = data.samples.get("xtra.final", {})
    where = f" (targets: {', '.join(games)})" if games else ""
    return f"Of the paper's claims{where}: {counts or 'none can be answered yet'}."


HOW_TO_READ = f"""# Results

Written by `python benchmark/report.py --pages` from benchmark/results/ and benchmark/paper/: change those, not this
page.

- **Score**: the mean return of the games of a run's last evaluation. Runs that have not ended count nowhere but in the
  list of every run.
- **Normalised score**: (score - random) / (reference - random), the reference being a human in Atari games and perfect
  play in toy games: 0 is random play, 1 the reference. On Atari both are the published ones, also where the tables show
  random play of our own. Carnival has no published human score, so none of these either.
- **Improvement**: score / EfficientZero's score in each game, then the mean or the median over games, as in Table 1. Of
  raw scores in Atari games; of normalised ones in toy games, whose returns may be negative. A score of EfficientZero
  below {FLOOR:g} counts as {FLOOR:g}.
- **IQM**: the mean of the middle half of all seeds of all games; of three or fewer, of all. **P(above)**: the mean
  over games of the share of pairs of seeds in which a method is above EfficientZero, a tie being half (both: Agarwal et
  al., 2021).
- **[a, b]**: 95 % interval of a stratified percentile bootstrap, {RESAMPLES:,} resamples of the seeds of each game. Of
  few seeds it is too narrow. Seeds that begin with the same student tell nothing of others: how
  many a target has stands at the top of each part. **(n)**: seeds. **†**: fewer than three. **‡**: reduced scale.
- **Untrained**: the evaluation of new networks before any update. **Zero-shot**: that of XTRA. A student counts once,
  however many runs begin with it.
- **Area**: the mean normalised score over the environment steps, by the trapezoidal rule. **Early**: at a fifth of the
  steps, or the evaluation nearest to that.
- **Verdicts**: a claim is that a number lies within bounds. *Reproduced*: the interval lies within them; *not
  reproduced*: it lies outside; *undecided*: it has a bound inside; *too few seeds*: fewer than three of a method in a
  game. "About the same" and "no harm" leave a tenth: a mean improvement from {1 - MARGIN:g} to {1 + MARGIN:g}, or above
  {1 - MARGIN:g}. Of a claim with several parts all must hold: it has the worst of their verdicts. A game counts if all
  methods of a part were run in it. A median needs three games, and so do "most games". A maximum over games is above 0
  by chance alone: it has no verdict.
"""
PROBES_TOLD = f"""EfficientZero from scratch on a CPU: the runs that were made to find settings for it, also those that
failed. All have `--eval-episodes 8 --eval-max-frames 20000` and these flags, and those of the first column instead of
the same ones here; the commands are those of
`python benchmark/matrix.py --scale small --experiments probes --list`, one thread each, two at a time:
`{" ".join(matrix.PROBE.split())}`"""
BLOCKS = [  # of the page of a scale: title, methods, tables, figures
    ("Similar games: Table 1", [*TABLE1, *ZERO_SHOT], [scores_table, aggregates_table], ["table1", "curves", "hours"]),
    ("Diverse offline games: Table 2", TABLE2, [scores_table, aggregates_table], ["table2"]),
    ("Ablations: Figure 7", FIGURE7, [curves_table], ["figure7"]),
    ("Which networks are transferred: Figure 8", FIGURE8, [curves_table], ["figure8"]),
    ("Weights of the offline games: Figures 5b and 9", FIGURE7, [weights_table], ["weights"]),
    ("Pretraining: Figure 10", FIGURE10, [scores_table], ["figure10"]),
    ("Batch size: Figure 11", FIGURE11, [curves_table], ["figure11"]),
]


def results_page(scales, claims, drawn):
    """docs/results.md. scales: of `read_scale`."""
    return "\n\n".join([HOW_TO_READ.strip(), *(scale_section(data, claims, drawn) for data in scales)]) + "\n"


def untrained_score(data):
    """Mean normalised score of untrained networks in the games of EfficientZero; nan without one."""
    scores = []
    for game in data.samples.get("efficientzero.final", {}):
        low = data.low[game]
        scores.append((data.untrained.get(game, np.nan) - low) / (data.reference[game] - low))
    return np.mean(scores) if scores else np.nan


def readme_section(scales, claims, drawn):
    """What stands in README.md between the two lines of `MARKERS`."""
    scales = [data for data in scales if len(data.finals)]  # of the others no run has ended
    if not scales:
        return "No run of the paper's experiments has ended yet: [docs/results.md](docs/results.md)."
    methods = [method for method in [*TABLE1, *ZERO_SHOT] if any(shown(data, [method]) for data in scales)]
    rows = []
    for method in methods:
        found = [data.samples.get(f"{method}.final", {}) for data in scales]
        seeds = [sum(map(len, scores.values())) for scores in found]
        cells = [
            f"{number(*estimate(iqm, x))} ({n} in {len(x)})" if x else "-" for x, n in zip(found, seeds, strict=True)
        ]
        rows.append([METHODS[method][0], *cells])
    rows.append(["networks before any update", *(number(untrained_score(data)) for data in scales)])
    parts = [table(["IQM of normalised scores", *(SCALES[data.scale][0] for data in scales)], rows)]
    told = "0 is random play, 1 a human (Atari) or perfect play (toy games). [95 % interval] (runs in games). Tables,\n"
    parts.append(told + "curves, every claim and every run: [docs/results.md](docs/results.md).")
    for data in scales:
        runs = last_lines(data)[1]
        ran = [", ".join(sorted({*runs[column].dropna()} - {""})) for column in ("day", "card", "commit")]
        origin = f"`benchmark/matrix.py --scale {data.scale}`, {ran[0]}, {ran[1]}, commits {ran[2]}"
        parts.append(f"{SCALES[data.scale][1]} {origin}. {count_verdicts(data, claims_table(data, claims)[1])}")
    scores = {data.scale: data.samples.get("xtra.final", {}) for data in scales}
    compared = [name for name, x in scores.items() if x and min(map(len, x.values())) >= 3]  # no matrix just begun
    if compared and f"{compared[0]}-table1" in drawn:
        path = f"docs/images/results/{compared[0]}-table1.png"
        parts.append(f"![{SCALES[compared[0]][0]}: scores of each method]({path})")
    return "\n\n".join(parts)


# --- figures: functions that return one, or None if there are no runs for it ---
def panels(data, title, words, count, size, columns=3):
    """A figure with so many panels of a size in inches. words: how to read it."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = plt.figure(figsize=(max(8.0, size[0] * columns), size[1] * rows + 0.8), layout="constrained")
    figure.suptitle(f"{SCALES[data.scale][0]}: {title}", fontsize=13)
    figure.supxlabel(words, fontsize=9)
    axes = [figure.add_subplot(rows, columns, 1 + i) for i in range(count)]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_level(panel, level, name, vertical=False, upper=False):
    """A dashed line with its name; only the words where it lies far outside the panel. upper: of two levels."""
    low, high = panel.get_xlim() if vertical else panel.get_ylim()
    line = {"linestyle": "--", "color": "black", "linewidth": 1, "zorder": 1}
    if level > high + 0.7 * (high - low):
        words = f"{name}: {level:,.0f} {'→' if vertical else '↑'}"
        x, side = (1, "right") if upper else (0, "left")
        panel.text(x, 1, words, transform=panel.transAxes, ha=side, va="bottom", fontsize=8)
    elif vertical and not np.isnan(level):
        panel.axvline(level, **line)
        place = {"transform": panel.get_xaxis_transform(), "ha": "left" if upper else "right", "va": "bottom"}
        panel.text(level, 1, name, fontsize=8, **place)
    elif not np.isnan(level):
        panel.axhline(level, **line)
        place = {"transform": panel.get_yaxis_transform(), "va": "bottom" if upper else "top"}
        panel.text(1.01, level, name.replace(" ", "\n"), fontsize=8, **place)


def draw_line(panel, points, label, colour, steps=False):
    """points: (x, value, low, high) each; steps: whether a value holds until the next one."""
    x, value, low, high = np.array(points).T
    style = "steps-post" if steps else "default"
    panel.plot(x, value, color=colour, marker="o", markersize=3, drawstyle=style, label=label)
    panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, step="post" if steps else None)


def draw_bars(panel, methods, samples, papers):
    """A line for each method: its seeds, their mean over games and its interval. samples: [{game: [n]}] of each."""
    for y, (method, scores, paper) in enumerate(zip(methods, samples, papers, strict=True)):
        colour = METHODS[method][1]
        if scores:
            value, low, high = estimate(mean, scores)
            points = np.concatenate([*scores.values()])
            panel.plot(points, np.full(len(points), y), "o", color=colour, alpha=0.35, markersize=5)
            panel.plot([low, high], [y, y], color=colour, linewidth=3)
            panel.plot(value, y, "|", color=colour, markersize=16, markeredgewidth=3)
        panel.plot(paper, y, "D", markerfacecolor="none", markeredgecolor="black", markersize=7)
        seeds = min(map(len, scores.values()), default=0)
        panel.text(
            1.01,
            y,
            f"n={seeds}" if seeds else "not run",
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(methods)), [METHODS[method][0] for method in methods])
    panel.set_ylim(len(methods) - 0.5, -0.5)


def draw_scores(data, methods, title):
    """A panel for each game, and in it a line for each method."""
    methods = shown(data, methods)
    games = [game for listed in categories(data, methods).values() for game in listed] if methods else []
    if not games:
        return None
    words = "points: n seeds; bar and stroke: their 95 % interval (bootstrap) and mean"
    words += "; diamonds: the paper's means" if data.printed and METHODS[methods[0]][2] else ""
    figure, axes = panels(data, title, words, len(games), (5, 0.9 + 0.32 * len(methods)))
    for panel, game in zip(axes, games, strict=True):
        of_game = data.finals[data.finals.game == game]
        normal = of_game.score.notna().all()
        low, high = (data.low[game], data.reference[game]) if normal else (0, 1)
        values = [of_game.loc[of_game.method == method, "mean"].to_numpy() for method in methods]
        papers = [(paper_score(data, method, game) - low) / (high - low) for method in methods]
        draw_bars(panel, methods, [{"": (x - low) / (high - low)} if len(x) else {} for x in values], papers)
        draw_level(panel, 0 if normal else data.random.get(game, np.nan), "random play", vertical=True)
        draw_level(panel, 1 if normal else np.nan, data.best, vertical=True, upper=True)
        panel.set_xlabel("normalised score" if normal else "mean return")
        panel.locator_params(axis="x", nbins=5)  # more, and numbers like -0.1175 run into each other
        panel.set_title(game, pad=16)
        if panel.get_subplotspec().colspan.start > 0:
            panel.set_yticklabels([])
    return figure


def draw_curves(panel, data, methods, games, column, over="env_steps"):
    """Mean over seeds and games, and its interval, at each evaluation; over: a column whose means are the x-axis."""
    for method in methods:
        curves = data.curves[(data.curves.method == method) & data.curves.game.isin(games)]
        points = []
        for _, part in curves.groupby("env_steps"):
            samples = {game: values.to_numpy() for game, values in part.groupby("game")[column]}
            if len(samples) == len(games):
                points.append((part[over].mean(), *estimate(mean, samples)))
        if points:
            seeds = min(map(len, samples.values()))
            for _, curve in curves.groupby("seed") if seeds < 5 and len(games) == 1 else ():
                panel.plot(curve[over], curve[column], color=METHODS[method][1], linewidth=0.8, alpha=0.7)
            draw_line(panel, points, f"{METHODS[method][0]} (n={seeds})", METHODS[method][1])
    time = "minutes" if over == "minutes" else "hours"
    panel.set_xlabel("environment steps" if over == "env_steps" else f"{time} of the run, without those of pretraining")


def draw_learning(data, games, title):
    """A panel for each game: returns over environment steps."""
    games = [game for game in games if game in set(data.curves.game[data.curves.method.isin(TABLE1)])]
    if not games:
        return None
    words = (
        "lines: mean over n seeds; bands: 95 % interval (bootstrap)" + "; diamonds: the paper's means" * data.printed
    )
    figure, axes = panels(data, title, words, len(games), (4.5, 4.2))
    for panel, game in zip(axes, games, strict=True):
        draw_curves(panel, data, TABLE1, [game], "mean")
        end = data.curves.env_steps[data.curves.game == game].max()
        for method in TABLE1:
            style = {"color": METHODS[method][1], "markeredgecolor": "black", "markersize": 7, "clip_on": False}
            panel.plot(end, paper_score(data, method, game), "D", **style)
        draw_level(panel, data.random.get(game, np.nan), "random play")
        draw_level(panel, data.reference.get(game, np.nan), data.best, upper=True)
        panel.set(title=game, ylabel="mean return of an evaluation")
        panel.legend(fontsize=8, framealpha=0.6)
    return figure


def draw_together(data, parts, title):
    """A panel for each of parts [(title, methods, how)] whose methods were run: curves of the mean normalised score
    (how: the x-axis), final scores (how: "final") or the improvement over EfficientZero (how: "improvement")."""
    ready = []
    for name, methods, how in parts:
        methods = [method for method in methods if data.samples.get(f"{method}.area")]
        common = in_common(data.samples, [f"{method}.area" for method in methods])
        only_here = set(methods) - {"efficientzero", "efficientzero-l", "xtra"}
        if common and len(methods) > 1 and (only_here or how in ("improvement", "hours", "minutes")):
            ready.append((name, methods, how, [*common[0]]))
    if not ready:
        return None
    if len(ready) < len(parts):
        title += f", {len(ready)} of its {len(parts)} panels: the others were not run"
    words = "lines: mean over games and n seeds; bands: 95 % interval (bootstrap); thin lines: seeds, where n < 5"
    if all(how == "final" for *_, how, _ in ready):
        words = "points: n seeds; bar and stroke: their 95 % interval (bootstrap) and mean over games"
    figure, axes = panels(data, title, words, len(ready), (6, 4.2), columns=2)
    for panel, (name, methods, how, games) in zip(axes, ready, strict=True):
        games_text = ", ".join(games) if len(games) < 4 else f"{len(games)} games"
        panel.set_title(f"{name} ({games_text})", fontsize=10, pad=14)
        if how == "final":
            draw_bars(panel, methods, in_common(data.samples, [f"{x}.final" for x in methods]), [np.nan] * len(methods))
            panel.set_xlabel("normalised final score")
        elif how == "improvement":
            draw_improvement(panel, data, games)
        else:
            draw_curves(panel, data, methods, games, "score", how)
            panel.set_ylabel("mean normalised score")
        if how != "improvement":
            draw_level(panel, 0, "random play", vertical=how == "final")
            draw_level(panel, 1, data.best, vertical=how == "final", upper=True)
        if how != "final":
            panel.legend(fontsize=8, framealpha=0.6)
    return figure


def draw_improvement(panel, data, games):
    """Mean over games of XTRA's score / EfficientZero's, after each number of environment steps."""
    points = []
    for step, part in data.curves[data.curves.game.isin(games)].groupby("env_steps"):
        both = [part[part.method == method].groupby("game").amount for method in ("xtra", "efficientzero")]
        samples = [{game: values.to_numpy() for game, values in groups} for groups in both]
        if step > 0 and all(len(x) == len(games) for x in samples):
            points.append((step, *estimate(improvement, *samples)))
    if not points:
        return
    seeds = min(len(x) for sample in samples for x in sample.values())
    draw_line(panel, points, f"XTRA's score / EfficientZero's (n={seeds})", METHODS["xtra"][1])
    panel.set(xlabel="environment steps", ylabel="mean improvement")
    bottom, top = panel.get_ylim()
    highest = max(value for _, value, *_ in points)
    # A resample in which EfficientZero has 0 only is a ratio of thousands: such a band leaves the panel.
    panel.set_ylim(min(0.9, max(0, bottom)), min(top, 2 * highest))
    draw_level(panel, 1, "as EfficientZero")


def draw_weights(data, methods, title):
    """Two panels for each target: eta of each offline game, and the cosines that it comes from."""
    weights = data.weights[data.weights.method.isin(methods)]
    targets = [*weights.groupby(["method", "game"])]
    if not targets:
        return None
    words = "lines: mean over n seeds; bands: 95 % interval"
    figure, axes = panels(data, title, words, 2 * len(targets), (5.5, 3), columns=2)
    for i, ((method, game), of_target) in enumerate(targets):
        for panel, column in zip(axes[2 * i : 2 * i + 2], ("eta", "cosine"), strict=True):
            for (offline, part), colour in zip(of_target.groupby("offline_game"), OFFLINE_COLOURS, strict=False):
                points = [(x, *estimate(mean, {"": y.to_numpy()})) for x, y in part.groupby("updates")[column]]
                points = [(0, 1.0, 1.0, 1.0)] * (column == "eta") + points  # 1 until the first measurement
                draw_line(panel, points, f"{offline} (n={part.seed.nunique()})", colour, steps=column == "eta")
            name = "eta, weight of the offline game" if column == "eta" else "cosine of the gradients"
            panel.set(xlabel="updates", ylabel=name)
            panel.set_title(f"{METHODS[method][0]}: target {game}", fontsize=10)
            panel.legend(fontsize=8, framealpha=0.6)
        axes[2 * i].set_ylim(-0.05, 1.05)
        axes[2 * i + 1].axhline(0, color="black", linewidth=1)
        axes[2 * i + 1].set_xlim(axes[2 * i].get_xlim())
    return figure


def draw_scale(data):
    """All figures of a scale -> {name: figure}."""
    end = "at the end of training"
    figures = {"table1": draw_scores(data, [*TABLE1, *ZERO_SHOT], f"scores {end}, and zero-shot (Table 1)")}
    for category, games in TARGETS[data.scale].items():
        if category != "diverse":
            figures[f"curves-{category}"] = draw_learning(data, games, f"learning curves, category {category}")
    unit = "hours" if data.curves.hours.max() > 1 else "minutes"
    parts = [("all methods", TABLE1, unit)]
    figures["hours"] = draw_together(data, parts, f"scores over {unit}") if data.hours else None
    figures["table2"] = draw_scores(data, TABLE2, f"diverse offline games, scores {end} (Table 2)")
    parts = [
        ("a: which offline games", ["efficientzero", "xtra", "xtra-other"], "env_steps"),
        ("b: the representation h frozen", ["efficientzero", "xtra", "frozen-h"], "env_steps"),
        ("c: size of the representation h", ["efficientzero", "efficientzero-l", "xtra-small", "xtra"], "final"),
        ("d: relative to EfficientZero", ["efficientzero", "xtra"], "improvement"),
    ]
    figures["figure7"] = draw_together(data, parts, "ablations (Figure 7)")
    parts = [("parts of the pretrained model", FIGURE8, "env_steps")]
    figures["figure8"] = draw_together(data, parts, "which networks are transferred (Figure 8)")
    figures["weights"] = draw_weights(
        data, ["xtra", "xtra-other", "diverse-xtra"], "weights of the offline games (Figures 5b and 9)"
    )
    figures["figure10"] = draw_scores(data, FIGURE10, "scores after pretraining (Figure 10)")
    parts = [("batches of 256 and 512", FIGURE11, "final")]
    figures["figure11"] = draw_together(data, parts, f"scores {end} (Figure 11)")
    return {f"{data.scale}-{name}": figure for name, figure in figures.items() if figure is not None}


MARKERS = "<!-- results: begin -->", "<!-- results: end -->"


def publish(results):
    """Writes docs/results.md, its part of README.md, and docs/images/results/, all in the working directory."""
    runs = read_csv(os.path.join(results, "runs.csv"), RUNS)
    weights = read_csv(os.path.join(results, "weights.csv"), WEIGHTS)
    if not len(runs):
        raise SystemExit(f"error: {results}/runs.csv has no runs; put some in with --collect RUN ...")
    readme = Path("README.md").read_text() if os.path.isfile("README.md") else ""
    if any(readme.count(marker) != 1 for marker in MARKERS):
        raise SystemExit(f"error: README.md lacks the lines {' and '.join(MARKERS)}; put them where the results belong")
    paper = read_paper(PAPER)
    scales = [read_scale(scale, runs, weights, paper) for scale in SCALES if scale in set(runs.scale)]
    folder, new = Path("docs/images/results"), Path("docs/images/results.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    drawn = []
    for name, figure in itertools.chain.from_iterable(draw_scale(data).items() for data in scales):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once is enough
        with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # without a salt they differ each time
            figure.savefig(new / f"{name}.svg", metadata={"Date": None})
        figure.savefig(new / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
        drawn.append(name)
    before, rest = readme.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    section = f"{MARKERS[0]}\n\n{readme_section(scales, paper.claims, drawn)}\n\n{MARKERS[1]}"
    texts = {"docs/results.md": results_page(scales, paper.claims, drawn), "README.md": f"{before}{section}{after}"}
    for path, text in texts.items():  # all is known by now: nothing is left half written
        with model.whole_file(path) as file:
            file.write(text.encode())
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"docs/results.md, README.md, docs/images/results/: written, {len(drawn)} figures")
