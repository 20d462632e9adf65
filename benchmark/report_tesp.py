"""
TESP: return before and after the fast updates on goals trained on, held out and farther away, its variants,
and the paper's readings of the ant. Used by plot.py.
"""

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

# The supplement's figure of the ant without noise, read off: iterations -> after 3 updates on D, D', D''
PAPER = {"small_ant": {100: (-29, -31, -82), 200: (-16.5, -18, -55), 600: (-13, -14.5, -42)}}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F00", "#999999")
RUN = ("env", "num-threads", "eval-every", "total-steps")


# ---------------------------------------------------------------- results
def variant(result):
    return other_flags(result, RUN).replace("--", "") or "as specified"


def world(result):
    return result.flags["env"] + (", the paper's size" if "paper" in result.flags else "")


def in_order(results):
    key = lambda r: (world(r) != "wheeled", world(r), variant(r) != "as specified", r.name)
    return sorted(results, key=key)


def names(result, split="test"):
    """The phases that an evaluation has: warmup, 0, 1, ..."""
    run = next(iter(result.final.values()))
    return [n for n in ("warmup", *map(str, range(10))) if f"eval/{split}/return_{n}" in run]


def number(result, tag):
    runs = [*result.final.values()]
    if tag not in runs[0]:
        return None
    mean, half = over_seeds([run[tag] for run in runs])
    return mean, runs[0].get(f"{tag}_ci95", 0) if half is None else half


def text(pair):
    return f"{pair[0]:.1f} ± {pair[1]:.1f}" if pair else ""


# ---------------------------------------------------------------- tables
def table(results):
    rows = []
    for r in in_order(results):
        train, test2 = (text(number(r, f"eval/{s}/return_{names(r)[-1]}")) for s in ("train", "test2"))
        steps = next(iter(r.final.values()))["global_step"]
        rows.append([world(r), variant(r).replace("paper ", ""),
                     *(text(number(r, f"eval/test/return_{n}")) for n in ("warmup", "0", "1", "2", "3")),
                     train, test2, len(r.final), f"{steps / 1e6:.1f}", minutes(r)])
    head = ["world", "variant", "D': warm-up", "0 updates", "1", "2", "3", "D, last", "D'', last", "seeds",
            "million steps", "minutes"]
    return markdown(head, rows)


def details(results):
    over = lambda r: f"{len(r.final)} seeds" if len(r.final) > 1 else "goals, 1 seed"
    return "\n".join(f"- {world(r)}, {variant(r)}: {facts(r, over(r))}" for r in in_order(results))


# ---------------------------------------------------------------- figures
def phases(ax, results):
    """Return in the warm-up and after 0, 1, ... updates on held-out goals."""
    for color, r in zip(COLORS, results):
        points = [number(r, f"eval/test/return_{n}") for n in names(r)]
        ax.errorbar(range(-1, len(points) - 1), *zip(*points), color=color, lw=1.8, capsize=2,
                    label=f"{variant(r)} ({len(r.final)} seed{'s' * (len(r.final) > 1)})")
    ax.set(xticks=range(-1, 4), xticklabels=["warm-up", *"0123"], xlabel="fast updates",
           ylabel="return on held-out goals (D')")


def learning(ax, results):
    """Training tasks: the last phase, and thin the warm-up of the first result."""
    for k, (color, r) in enumerate(zip(COLORS, results)):
        last = max(t for t in r.curves if t.startswith("adapt/return_") and t != "adapt/return_warmup")
        for tag, lw in ((last, 1.5), ("adapt/return_warmup", 0.6))[: 2 if k == 0 else 1]:
            curves = [*r.curves[tag].values()]
            columns = list(zip(*([y for _, y in curve] for curve in curves)))
            x = [step / 1e6 for step, _ in curves[0]][: len(columns)]
            ax.plot(x, [sum(c) / len(c) for c in columns], color=color, lw=lw)
            if len(curves) > 1 and lw > 1:
                ax.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color,
                                alpha=0.12, lw=0)
    ax.set(xlabel="environment steps, millions", ylabel="return after the last update (thin: warm-up)")


def figures(results):
    """{file name: svg}: one for each world."""
    worlds, out = {}, {}
    for result in in_order(results):
        worlds.setdefault(world(result), []).append(result)
    for name, group in worlds.items():
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.6))
        learning(left, group)
        phases(right, group)
        for updates, readings in PAPER.get(name, {}).items():
            left.axhline(readings[1], color="k", ls=":", lw=0.8)
            left.annotate(f"paper, D', {updates} iterations", (left.get_xlim()[0], readings[1]), fontsize=7)
        for ax in (left, right):
            ax.grid(color="0.9", lw=0.6)
        fig.suptitle(name)
        below(fig, right)
        out[f"tesp-{slug(name)}.svg"] = svg(fig)
    return out


TABLES = {"tesp": table, "tesp-details": details}
