"""
Meta-MAPG: the paper's numbers, tables and figures. Used by plot.py.
"""

import math
import re

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

# Kim et al. 2021, Fig., read off the vector figure: reward per step of agent i after 0..7 updates; in
# half_cheetah_dir the return of an episode after 0..2 updates.
SOURCE = "Kim et al. 2021, Fig., read off the vector figure"
PAPER = {
    ("ipd", "cooperative"): {
        "Meta-MAPG": (0.406, 1.498, 1.496, 1.472, 1.463, 1.432, 1.396, 1.353),
        "Meta-PG": (0.466, 0.262, -0.270, -0.392, -0.431, -0.452, -0.465, -0.477),
        "LOLA-DiCE": (0.925, 0.218, -0.138, -0.253, -0.304, -0.348, -0.383, -0.392),
        "REINFORCE": (0.968, -0.028, -0.319, -0.397, -0.441, -0.465, -0.474, -0.479)},
    ("ipd", "defective"): {
        "Meta-MAPG": (-0.513, 1.314, 1.233, 1.139, 1.053, 0.997, 0.928, 0.915),
        "Meta-PG": (-0.515, -0.457, -0.484, -0.488, -0.491, -0.493, -0.494, -0.494),
        "LOLA-DiCE": (-0.047, -0.428, -0.439, -0.440, -0.441, -0.442, -0.443, -0.443),
        "REINFORCE": (-0.027, -0.494, -0.495, -0.496, -0.497, -0.497, -0.497, -0.498)},
    ("rps", "all"): {
        "Meta-MAPG": (-0.027, 0.388, 0.543, 0.627, 0.673, 0.698, 0.707, 0.642),
        "Meta-PG": (0.188, 0.364, 0.235, 0.182, 0.145, 0.092, 0.046, -0.002),
        "LOLA-DiCE": (0.412, 0.267, 0.187, 0.141, 0.106, 0.083, 0.067, 0.056),
        "REINFORCE": (0.503, 0.311, 0.229, 0.168, 0.135, 0.117, 0.104, 0.096),
        "no own learning": (-0.002, 0.000, -0.003, -0.010, -0.006, 0.022, -0.008, 0.003)},
    ("half_cheetah_dir", "left"): {
        "Meta-MAPG": (200.4, 203.9, 206.9), "Meta-PG": (201.8, 205.7, 208.0),
        "LOLA-DiCE": (70.9, 72.9, 75.2), "REINFORCE": (113.6, 112.2, 112.8)},
}
# The same figure: return to the left of the pair from which the peers come, by iteration of pre-training.
PRETRAINING = {"0": -59, "25": -27, "50": 1, "75": 59, "100": 160, "125": 254, "150": 312, "175": 381,
               "200": 389, "225": 413, "250": 449, "275": 476, "300": 505, "475_499": 582}
CHEETAH = "half_cheetah_dir"
PANELS = {"ipd": ("cooperative", "defective"), "rps": ("all",), "rps3": ("all",), "rps4": ("all",),
          CHEETAH: ("left",)}
CLASSES = {"rps": ("rock", "paper", "scissors")}
METHODS = ("Meta-MAPG", "Meta-PG", "LOLA-DiCE", "REINFORCE", "no own learning", "Meta-MAPG-OM")

STYLE = {  # a colour (Okabe and Ito, safe for the colour-blind) and a marker for each method
    "Meta-MAPG": ("#0072B2", "o"), "Meta-PG": ("#D55E00", "s"), "LOLA-DiCE": ("#009E73", "^"),
    "REINFORCE": ("#CC79A7", "D"), "no own learning": ("#56B4E9", "v"), "Meta-MAPG-OM": ("#000000", "P")}


# ---------------------------------------------------------------- results
def method(result):
    if result.flags.get("method") == "no-own-learning":
        return "no own learning"
    named = {m.lower(): m for m in METHODS}[result.flags.get("method", "meta-mapg")]
    return named + ("-OM" if "opponent-model" in result.flags else "")


def pretraining(result):
    return "pretrain-peers" in result.flags


def digits(env):
    """How a value is written: rewards per step, or returns of an episode."""
    return "+.1f" if env == CHEETAH else "+.3f"


def title_of(env):
    return "HalfCheetah-dir, two agents" if env == CHEETAH else env.upper()


def policy(result):
    exact = result.flags["env"] == "ipd" and result.flags.get("gradient") != "sampled"
    table = f"table, {'exact' if exact else 'sampled'} gradient"
    return "LSTM" if "lstm" == result.flags.get("policy") or result.flags["env"] == CHEETAH else table


def others(result):
    """The flags that are not said by world, policy and method."""
    said = ("policy", "method", "gradient", "opponent-model",
            "pretrain-peers", *(["personas"] if result.flags["env"] == CHEETAH else []))
    return other_flags(result, said)


def in_order(results):
    key = lambda r: (r.flags["env"], policy(r) != "LSTM", METHODS.index(method(r)), r.name)
    return sorted(results, key=key)


def adaptation(result, panel):
    """Reward per step of agent i after 0..L updates, half its 95 % interval, what the interval is over."""
    env, runs = result.flags["env"], list(result.final.values())
    prefix = "eval/return_" if panel == "all" else f"eval/{panel}/return_"
    length = sum(re.fullmatch(rf"{prefix}\d+", tag) is not None for tag in runs[0])
    values = [[run[f"{prefix}{l}"] for l in range(length)] for run in runs]
    mean, half = zip(*(over_seeds(column) for column in zip(*values)))
    if len(runs) > 1:
        return mean, half, f"{len(runs)} seeds"
    classes = CLASSES[env[:3]] if panel == "all" else (panel,)  # equally many personas in each class
    half = [[runs[0][f"eval/{c}/return_{l}_ci95"] for c in classes] for l in range(length)]
    return mean, [math.sqrt(sum(h * h for h in row)) / len(classes) for row in half], "personas, 1 seed"


# ---------------------------------------------------------------- tables
def paper_row(result, panel):
    """The paper's numbers for the same world, peers and method, or None."""
    usual = "2" if result.flags["env"] == CHEETAH else "7"
    same_length = result.flags.get("chain-length", usual) == usual
    return PAPER.get((result.flags["env"], panel), {}).get(method(result)) if same_length else None


def table(results):
    """One line for each result and class of peers, for README.md."""
    rows = []
    for result in in_order(r for r in results if not pretraining(r) and r.flags["env"] != CHEETAH):
        for panel in PANELS[result.flags["env"]]:
            mean, _, _ = adaptation(result, panel)
            paper, setting = paper_row(result, panel), f"{method(result)}, {policy(result)} {others(result)}"
            rows.append([f"{result.flags['env'].upper()}, {panel} peers", setting.strip(),
                         f"{mean[0]:+.2f}", f"{mean[1]:+.2f}", f"{mean[-1]:+.2f}",
                         f"**{sum(mean[1:]):+.2f}**", f"{sum(paper[1:]):+.2f}" if paper else "",
                         len(result.final), minutes(result)])
    head = ["game", "method, policy of agent i", "φ_0", "φ_1", "last φ", "**sum from φ_1**",
            "sum, paper (LSTM)", "seeds", "minutes"]
    return markdown(head, rows)


def cheetah_table(results):
    """One line for each method in the two-agent HalfCheetah: return of an episode, the paper's beside it."""
    rows = []
    for result in in_order(r for r in results if not pretraining(r) and r.flags["env"] == CHEETAH):
        mean, half, over = adaptation(result, "left")
        paper = paper_row(result, "left")
        cells = [f"{m:.0f} ± {h:.0f}" + (f" ({p:.0f})" if p else "")
                 for m, h, p in zip(mean, half, paper or [None] * len(mean))]
        steps = next(iter(result.final.values()))["global_step"]
        last = ", ".join(f"{run[f'eval/left/return_{len(mean) - 1}']:.0f}" for run in result.final.values())
        rows.append([f"{method(result)} {others(result)}".strip(), *cells, over, last, f"{steps / 1e6:.1f}",
                     minutes(result)])
    if not rows:
        return "No results yet."
    wide = max(len(row) for row in rows) - 5
    head = ["method", *(f"φ_{l} (paper)" for l in range(wide)), "± over", "last φ, each seed",
            "million steps", "minutes"]
    return markdown(head, rows)


def peers_table(results):
    """The return to the left of the pre-training pair by iteration, the paper's beside it."""
    rows = []
    for result in filter(pretraining, results):
        values = pretraining_curve(result)
        keys = [n for n in PRETRAINING if n in values]
        rows = [["paper", *(f"{PRETRAINING[n]:+d}" for n in keys)]]
        for seed in result.final:
            own = pretraining_curve(result, [seed])
            rows.append([f"ours, seed {seed}", *(f"{own[n]:+.0f}" for n in keys)])
        head = ["iteration", *(n.replace("_", "-") for n in keys)]
        made = f"`{result.meta['command']}`; {result.meta['minutes']} minutes on {result.meta['machine']}."
        return f"{markdown(head, rows)}\n\n{made}\n\n![curve](curves/{result.name}-learning.svg)"
    return "No results yet."


def pretraining_curve(result, seeds=None):
    """{iteration: return}, mean over the seeds."""
    runs = [run for seed, run in result.final.items() if not seeds or seed in seeds]
    prefix = "eval/pretraining/return_"
    return {tag.removeprefix(prefix): sum(run[tag] for run in runs) / len(runs)
            for tag in runs[0] if tag.startswith(prefix)}


def details(results):
    """A section for each result: how it was made, its interval, and the paper's row under ours."""
    cheetah = any(r.flags["env"] == CHEETAH for r in results)
    kind = ", in HalfCheetah the return of an episode" if cheetah else ""
    text = [f"Paper: {SOURCE}. Reward per step of agent i{kind}; the last column is the sum without φ_0."]
    for result in in_order(r for r in results if not pretraining(r)):
        form = digits(result.flags["env"])
        rows = []
        for panel in PANELS[result.flags["env"]]:
            mean, half, over = adaptation(result, panel)
            rows.append([panel, "ours", *(f"{m:{form}}" for m in mean), f"{sum(mean[1:]):+.2f}"])
            rows.append(["", "±", *(f"{h:{form[1:]}}" for h in half), ""])
            if paper := paper_row(result, panel):
                rows.append(["", "paper", *(f"{x:{form}}" for x in paper), f"{sum(paper[1:]):+.2f}"])
        title = f"{title_of(result.flags['env'])}: {method(result)}, {policy(result)} {others(result)}"
        head = ["peers", "", *(f"φ_{l}" for l in range(len(mean))), "sum"]
        text.append(f"### {title.strip()}\n\n" + facts(result, over) + f"\n\n{markdown(head, rows)}\n\n"
                    f"![learning curve](curves/{result.name}-learning.svg)")
    return "\n\n".join(text)


# ---------------------------------------------------------------- figures
def adaptation_figure(env, kind, results):
    """Ours as lines with a band, the paper's as hollow markers of the same colour; a panel for each class."""
    panels = PANELS[env]
    size = (max(8.4, 3.8 * len(panels) + 2.2), 4.6)  # the legend wants 8.4
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        for name, points in PAPER.get((env, panel), {}).items():
            color, marker = STYLE[name]
            ax.plot(points, color=color, marker=marker, ls=":", lw=0.8, mfc="white", ms=5,
                    label=f"paper: {name}", zorder=2)
        drawn = {}
        for result in results:
            mean, half, over = adaptation(result, panel)
            same = drawn[method(result)] = drawn.get(method(result), 0) + 1
            label = f"ours: {method(result)} {others(result)}".strip() + f" (95 % over {over})"
            color, x = STYLE[method(result)][0], range(len(mean))
            ax.plot(x, mean, color=color, lw=2, ls=("-", "--", "-.")[(same - 1) % 3], label=label, zorder=3)
            ax.fill_between(x, [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)],
                            color=color, alpha=0.2, lw=0)
        ax.set_title("all personas" if panel == "all" else f"{panel} peer")
        ax.set_xlabel("l, updates of every agent")
        ax.grid(color="0.9", lw=0.6)
    values = [y for ax in axes[0] for line in ax.lines for y in line.get_ydata()]
    margin = 0.15 * (max(values) - min(values))  # a band over few seeds may leave the figure
    axes[0, 0].set_ylim(min(values) - margin, max(values) + margin)
    axes[0, 0].set_ylabel("reward per step of agent i under φ_l")
    fig.suptitle(f"{title_of(env)}, ours with {kind}; paper with LSTM")
    below(fig, axes[0, 0])
    return svg(fig)


def learning_figure(result):
    """Validation sum of rewards over phi_1..phi_L against environment steps: each seed, and their mean."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    runs, color = result.curves["eval/sum_after_phi_0"], STYLE[method(result)][0]
    for seed, points in runs.items():
        x, y = [step / 1e6 for step, _ in points], [value for _, value in points]
        ax.plot(x, y, color=color, lw=2 if len(runs) == 1 else 0.8, alpha=1 if len(runs) == 1 else 0.5,
                marker="." if len(x) < 30 else None, label="a seed" if seed == min(runs) else None)
    if len(runs) > 1 and len({tuple(step for step, _ in points) for points in runs.values()}) == 1:
        mean = [sum(value for _, value in column) / len(runs) for column in zip(*runs.values())]
        ax.plot(x, mean, color=color, lw=2, label=f"mean of {len(runs)} seeds")
    paper = [PAPER.get((result.flags["env"], p), {}).get(method(result)) for p in PANELS[result.flags["env"]]]
    if all(paper):
        level = sum(sum(points[1:]) for points in paper) / len(paper)
        ax.axhline(level, color="0.4", ls=":", lw=1, label=f"paper, meta-test: {level:.2f}")
    ax.set_xlabel("environment steps, millions")
    what = "returns" if result.flags["env"] == CHEETAH else "rewards"
    ax.set_ylabel(f"validation: sum of {what} φ_1 to φ_L")
    ax.set_title(f"{title_of(result.flags['env'])}, {method(result)}, {policy(result)}", fontsize=10)
    ax.grid(color="0.9", lw=0.6)
    below(fig, ax)
    return svg(fig)


def cheetah_figure(results):
    """Return of an episode in training, averaged over the batches of an iteration, for the runs at the preset
    of half_cheetah_dir: a line for each seed."""
    fig, ax = plt.subplots(figsize=(8.4, 4.6))
    for result in results:
        runs, color = result.curves["charts/episodic_return"].values(), STYLE[method(result)][0]
        for n, points in enumerate(runs):
            x, y = zip(*((step / 1e6, value) for step, value in points))
            ax.plot(x, y, color=color, lw=1.2, label=None if n else f"{method(result)} ({len(runs)} seed"
                    + "s" * (len(runs) > 1) + ")")
    ax.set_xlabel("environment steps, millions")
    ax.set_ylabel("return of an episode in training")
    ax.set_title(title_of(CHEETAH), fontsize=10)
    ax.grid(color="0.9", lw=0.6)
    below(fig, ax)
    return svg(fig)


def peers_figure(result):
    """Return to the left during pre-training, each seed, and the paper's."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    at = lambda n: 487 if n == "475_499" else int(n)
    ax.plot([at(n) for n in PRETRAINING], [*PRETRAINING.values()], color="0.3", marker="o", mfc="white",
            ls=":", lw=0.8, ms=5, label="paper")
    for seed in result.final:
        own = sorted((at(n), value) for n, value in pretraining_curve(result, [seed]).items())
        ax.plot(*zip(*own), color=STYLE["Meta-MAPG"][0], lw=1.5, label=f"ours, seed {seed}")
    ax.set_xlabel("iteration of pre-training, 12,800 steps each")
    ax.set_ylabel("return of an episode to the left")
    ax.set_title(f"{title_of(CHEETAH)}: where the peers come from", fontsize=10)
    ax.grid(color="0.9", lw=0.6)
    below(fig, ax)
    return svg(fig)


def groups(results):
    """{(env, policy): [Result]}: what goes into one figure."""
    out = {}
    for result in results:
        out.setdefault((result.flags["env"], policy(result)), []).append(result)
    return out


def figures(results):
    """{file name: svg}."""
    out = {f"{r.name}-learning.svg": peers_figure(r) for r in results if pretraining(r)}
    for (env, kind), group in groups(in_order(r for r in results if not pretraining(r))).items():
        name = f"meta_mapg-{slug(env, kind)}.svg"
        if env == CHEETAH:
            out[name] = cheetah_figure([r for r in group if not others(r)])
        else:
            out[name] = adaptation_figure(env, kind, group)
        out |= {f"{r.name}-learning.svg": learning_figure(r) for r in group}
    return out


TABLES = {"meta_mapg": table, "meta_mapg-cheetah": cheetah_table, "meta_mapg-peers": peers_table,
          "meta_mapg-details": details}
