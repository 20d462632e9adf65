"""
MAML-RL: the papers' numbers, tables and figures. Used by plot.py.
"""

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

# The MAML authors' own result files: 40 tasks, mean return after 0, 1, 2, 3 inner steps.
SOURCE = "Finn et al. 2017, the result files published with the code"
PAPER = {
    "nav2d": {"MAML": (-40.4, -11.7, -3.3, -3.2), "random start": (-82.7, -58.0, -53.8, -46.8)},
    "half_cheetah_vel": {
        "MAML": (-129.5, -78.6, -66.6, -60.8), "random start": (-254.8, -254.3, -246.8, -230.8),
        "pretrained": (-158.0, -135.4, -128.5, -133.6)},
    "half_cheetah_dir": {
        "MAML": (-50.7, 293.2, 313.5, 315.7), "random start": (-35.7, 21.8, 62.3, 86.2),
        "pretrained": (-43.0, -24.7, -12.8, 19.6)}}
WORLD = {"nav2d": "2-D navigation", "half_cheetah_vel": "HalfCheetahVel",
         "half_cheetah_dir": "HalfCheetahDir"}
STYLE = {"MAML": "#0072B2", "FOMAML": "#56B4E9", "E-MAML": "#009E73", "ProMP": "#E69F00",
         "Meta-SGD": "#D55E00", "MAESN": "#CC79A7", "pretrained": "#999999", "random start": "#000000"}


# ---------------------------------------------------------------- results
def method(result):
    flags = result.flags
    if flags.get("method", "maml") != "maml":
        return {"meta-sgd": "Meta-SGD", "maesn": "MAESN", "pretrained": "pretrained"}[flags["method"]]
    if flags.get("outer") == "promp":
        return "ProMP"
    return "FOMAML" if "first-order" in flags else "E-MAML" if "e-maml" in flags else "MAML"


def others(result):
    said = ("method", "outer", "first-order", "e-maml", "total-steps")
    return other_flags(result, said)


def world(result):
    """The world's name; nav2d as the MAML authors set it up is another one."""
    return WORLD[result.flags["env"]] + (", the authors' actions" if "action-scale" in result.flags else "")


def in_order(results):
    key = lambda r: (r.flags["env"] != "nav2d", world(r), [*STYLE].index(method(r)), r.name)
    return sorted(results, key=key)


def adaptation(result, row="eval"):
    """Mean return after 0..3 inner steps, half its 95 % interval, and what the interval is over."""
    runs, steps = list(result.final.values()), range(4)
    mean, half = zip(*(over_seeds([run[f"{row}/return_{k}"] for run in runs]) for k in steps))
    if len(runs) > 1:
        return mean, half, f"{len(runs)} seeds"
    return mean, [runs[0][f"{row}/return_{k}_ci95"] for k in steps], "tasks, 1 seed"


def by_task(result):
    """The rows of single tasks, where there are few: eval/task_-1, eval/task_1."""
    final = next(iter(result.final.values()))
    return sorted({tag.rpartition("/")[0] for tag in final if tag.startswith("eval/task_")})


def paper_row(result, row="eval"):
    """The authors' numbers, if they are of the same method and a world of the same scale, or None."""
    if result.flags["env"] == "nav2d" and "action-scale" not in result.flags or row.startswith("eval/task_"):
        return None
    return PAPER.get(result.flags["env"], {}).get("random start" if row == "eval/random" else method(result))


# ---------------------------------------------------------------- tables
def table(results):
    """One line for each result and one for each world's random start, for README.md."""
    rows, seen = [], set()
    for result in in_order(results):
        name = f"{method(result)} {others(result)}".strip()
        lines = [("eval", name), *((row, f"{name}, {row[5:]}") for row in by_task(result))]
        if world(result) not in seen:
            lines.append(("eval/random", "random start"))
        seen.add(world(result))
        for row, name in lines:
            (mean, half, _), paper = adaptation(result, row), paper_row(result, row)
            steps = next(iter(result.final.values()))["global_step"] / 1e6 if row == "eval" else 0
            rows.append([world(result), name, *(f"{m:.1f} ± {h:.1f}" for m, h in zip(mean, half)),
                         " / ".join(f"{x:.0f}" for x in paper) if paper else "", len(result.final),
                         f"{steps:.1f}", minutes(result) if row == "eval" else ""])
    head = ["world", "method", "before", "1 step", "2 steps", "3 steps", "authors", "seeds", "million steps",
            "minutes"]
    return markdown(head, rows)


def details(results):
    """How each result was made."""
    lines = [f"- {world(r)}, {method(r)} {others(r)}".rstrip() + f": {facts(r, adaptation(r)[2])}"
             for r in in_order(results)]
    return f"Authors: {SOURCE}.\n\n" + "\n".join(lines)


# ---------------------------------------------------------------- figures
def mean_curve(result, tag):
    """Steps in millions, mean over the seeds, lowest, highest."""
    runs = [*result.curves[tag].values()]
    length = min(map(len, runs))
    columns = [[run[i][1] for run in runs] for i in range(length)]
    x = [step / 1e6 for step, _ in runs[0][:length]]
    return x, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def figure(title, results):
    """Left: return before (thin) and after an inner step on the training tasks, as training goes on. Right:
    held-out tasks at the end, ours and the authors'."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.9))
    for result in results:
        color, (mean, half, over) = STYLE[method(result)], adaptation(result)
        for tag, lw in ("adapt/return_0", 0.8), ("adapt/return_1", 2):
            if tag in result.curves:
                x, y, low, high = mean_curve(result, tag)
                left.plot(x, y, color=color, lw=lw)
                if lw > 1 and low != high:
                    left.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        right.errorbar(range(4), mean, half, color=color, lw=2, capsize=2, label=f"{method(result)} ({over})")
        if paper := paper_row(result):
            right.plot(paper, color=color, marker="o", ls=":", lw=0.8, mfc="white",
                       label=f"authors: {method(result)}")
    mean, half, over = adaptation(results[0], "eval/random")
    low, high = right.get_ylim()
    if 2 * low - high < min(mean):  # not so far below that it flattens the rest; the table has it in any case
        right.errorbar(range(4), mean, half, color="k", lw=1, capsize=2, label=f"random start ({over})")
    start = sorted(y for line in left.lines for y in line.get_ydata())
    if start[-1] - start[0] > 2 * (start[-1] - start[len(start) // 12]):
        left.set_ylim(start[len(start) // 12], None)  # the first iterations would flatten the rest
    left.set_xlabel("environment steps, millions")
    left.set_ylabel("return, training tasks: before (thin), after 1 step")
    right.set_xlabel("inner steps")
    right.set_ylabel("return, held-out tasks")
    right.set_xticks(range(4))
    for ax in (left, right):
        ax.grid(color="0.9", lw=0.6)
    fig.suptitle(title)
    below(fig, right)
    return svg(fig)


def figures(results):
    """{file name: svg}: one for each world."""
    groups = {}
    for result in in_order(results):
        groups.setdefault(world(result), []).append(result)
    return {f"maml_rl-{slug(name)}.svg": figure(name, group) for name, group in groups.items()}


TABLES = {"maml_rl": table, "maml_rl-details": details}
