"""
Coded MADDPG: tables and figures of what was learned, and of the time that stragglers cost. Used by plot.py.
"""

import matplotlib.pyplot as plt
from report import RESULTS, below, facts, markdown, minutes, over_seeds, read_table, slug, svg

STANDARD = {"simple_spread": 3}  # agents where the command does not say
STYLE = {"uncoded": "#000000", "replication": "#E69F00", "ldpc": "#009E73", "random": "#56B4E9",
         "mds": "#D55E00", "sparse-mds": "#0072B2"}  # safe for the colour-blind
TAGS = ("collisions", "caught", "landmark_distance", "goal_distance_adversary", "goal_distance_good")


# ---------------------------------------------------------------- results
def agents(result):
    return int(result.flags.get("num-agents", STANDARD.get(result.flags["env"], 0)))


def coded(result):
    return "num-learners" in result.flags


def title(result):
    flags = result.flags
    learners = f", {flags.get('num-learners')} learners, {flags.get('num-stragglers', 0)} stragglers"
    return f"{flags['env']}, M = {agents(result)}" + learners * coded(result)


def in_order(results):
    key = lambda r: (agents(r), r.flags["env"] != "simple_spread", r.flags["env"], coded(r))
    return sorted(results, key=key)


def number(result, tag):
    """Mean over the seeds ± half the 95 % interval (of the seeds, or of the episodes of the only one)."""
    runs = [*result.final.values()]
    mean, half = over_seeds([run[tag] for run in runs])
    half = runs[0].get(f"{tag}_ci95") if half is None else half
    return f"{mean:.1f}" + (f" ± {half:.1f}" if half is not None else "")


# ---------------------------------------------------------------- tables
def table(results):
    rows = []
    for r in in_order(results):
        runs = [*r.final.values()]
        shown = [f"{tag.replace('_', ' ')} {sum(run['eval/' + tag] for run in runs) / len(runs):.2f} "
                 f"({sum(run['eval/random/' + tag] for run in runs) / len(runs):.2f})"
                 for tag in TAGS if f"eval/{tag}" in runs[0]]
        rows.append([title(r), "; ".join(shown), number(r, "eval/return"), number(r, "eval/random/return"),
                     len(runs), f"{runs[0]['global_step'] / 1e6:.1f}", minutes(r)])
    head = ["world", "measures (random policy)", "return, sum over agents", "random policy", "seeds",
            "million steps", "minutes"]
    return markdown(head, rows)


def details(results):
    over = lambda r: f"{len(r.final)} seeds" if len(r.final) > 1 else "episodes, 1 seed"
    return "\n".join(f"- {title(r)}: {facts(r, over(r))}" for r in in_order(results))


def stragglers_table(results):
    """Seconds of an iteration by scheme and k: processes, and in brackets the formula."""
    path = RESULTS / "stragglers.csv"
    if not path.exists():
        return "No results yet."
    meta, rows = read_table(path)
    at = {(r["part"], r["agents"], r["scheme"], int(r["stragglers"])): f"{float(r['seconds']) * 1e3:.0f}"
          for r in rows}
    ms = lambda scheme, k: f"{at.get(('process', '8', scheme, k), '')} ({at['formula', '8', scheme, k]})"
    lines = [[scheme, 8, *(ms(scheme, k) for k in (0, 2, 4, 7))] for scheme in STYLE]
    over = [float(r["seconds"]) for r in rows if r["world"].startswith("overhead")]
    text = f"\n\nOverhead of the engine at 1 MiB a learner, median: {over[0] * 1e3:.0f} ms." if over else ""
    facts_of_it = "; ".join(f"{key}: {value}" for key, value in meta.items())
    head = ["scheme", "M", *(f"k = {k}" for k in (0, 2, 4, 7))]
    return markdown(head, lines) + text + f"\n\n{facts_of_it}."


# ---------------------------------------------------------------- figures
def learning_figure(env, results):
    """Return of the episodes played in training: a line for each number of agents, and their random policy.
    A coded run is drawn over its centralised one: they are the same numbers."""
    fig, axes = plt.subplots(1, len(results), figsize=(max(5.0, 4.2 * len(results)), 3.9), squeeze=False)
    for ax, group in zip(axes[0], results):
        for result in group:
            curves, dots = result.curves["charts/episodic_return"], coded(result)
            for seed, points in curves.items():
                x, y = [step / 1e6 for step, _ in points], [value for _, value in points]
                label = ("coded, a seed" if dots else "a seed") if seed == min(curves) else None
                ax.plot(x, y, "." if dots else "-", color="#D55E00" if dots else "#0072B2", lw=0.9, ms=4,
                        label=label)
        random = over_seeds([run["eval/random/return"] for run in group[0].final.values()])[0]
        ax.axhline(random, color="0.4", ls=":", lw=1, label="random policy")
        ax.set_title(f"{env}, M = {agents(group[0])}", fontsize=10)
        ax.set_xlabel("environment steps, millions")
        ax.grid(color="0.9", lw=0.6)
    axes[0, 0].set_ylabel("return, sum over agents")
    below(fig, axes[0, 0])
    return svg(fig)


def stragglers_figure():
    """Left: seconds of an iteration against k, formula as lines, processes as dots. Right: the paper's bars
    against the formula, all worlds: the shape, since the unit of the bars is not known."""
    _, rows = read_table(RESULTS / "stragglers.csv")
    fig, axes = plt.subplots(1, 3, figsize=(11, 4.4))
    for ax, M in zip(axes, (8, 10)):
        for scheme, color in STYLE.items():
            for part, mark in ("formula", "-"), ("process", "o"):
                points = sorted((int(r["stragglers"]), 1e3 * float(r["seconds"])) for r in rows if
                                (r["part"], r["scheme"], int(r["agents"])) == (part, scheme, M)
                                and not r["world"].startswith("overhead"))
                if points:
                    label = scheme if part == "formula" else None
                    ax.plot(*zip(*points), mark, color=color, lw=1.5, ms=5, mfc="white", label=label)
        ax.set(title=f"15 learners, M = {M}", xlabel="k, stragglers of 250 ms", ylabel="ms an iteration")
    for scheme, color in STYLE.items():
        pairs = [(float(r["seconds"]), float(r["paper"])) for r in rows
                 if r["part"] == "paper" and r["scheme"] == scheme and not r["paper"].endswith("*")]
        if pairs:
            axes[2].plot(*zip(*pairs), "o", color=color, ms=4, mfc="white")
    axes[2].plot([2, 13], [2, 13], color="0.7", lw=0.8)
    axes[2].set(title="bars of the paper's figures", xlabel="formula, its unit fitted", ylabel="paper")
    for ax in axes:
        ax.grid(color="0.9", lw=0.6)
    below(fig, axes[0])
    return svg(fig)


def figures(results):
    """{file name: svg}."""
    worlds = {}
    for result in in_order(results):
        worlds.setdefault(result.flags["env"], {}).setdefault(agents(result), []).append(result)
    out = {f"coded_maddpg-{slug(env)}.svg": learning_figure(env, [*by_agents.values()])
           for env, by_agents in worlds.items()}
    if (RESULTS / "stragglers.csv").exists():
        out["coded_maddpg-stragglers.svg"] = stragglers_figure()
    return out


TABLES = {"coded_maddpg": table, "coded_maddpg-details": details, "coded_maddpg-stragglers": stragglers_table}
