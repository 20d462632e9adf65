"""
MG2L: what agents do before and after they have inferred the task, which they are not told, and how well their
latents tell it, beside its variants and baselines and returns of players by hand. Used by plot.py. The
paper's numbers are not known to us.
"""

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

STYLE = {"task given": "#009E73", "MG2L, own": "#0072B2", "MG2L, joint": "#56B4E9", "MG2L, kl": "#7F7F00",
         "global only": "#CC79A7", "MA-PEARL": "#E69F00", "Mix-MATE": "#8C564B", "as coded": "#D55E00",
         "none": "#000000"}
METHODS = {"task-given": "task given", "global-only": "global only", "pearl": "MA-PEARL", "mate": "Mix-MATE",
           "none": "none"}
# Players by hand, 512 episodes: random actions; without knowledge of the task; with it.
REFERENCES = {
    "spread": {"random": -284, "task-blind": -113, "oracle": -17},
    "spread_large": {"random": -528, "task-blind": -154, "oracle": -32},
    "hunting": {"random": -43.5, "after the wrong prey": -52, "oracle": 238},
    "hunting_large": {"random": -43.6, "after the wrong prey": -50, "oracle": 219}}
TOLD = ("method", "local-loss", "as-coded", "paper", "total-steps", "decay")


# ---------------------------------------------------------------- results
def method(result):
    flags = result.flags
    if "as-coded" in flags:
        return "as coded"
    usual = "own" if world(result).startswith(("spread", "hunting")) and "paper" not in flags else "joint"
    return METHODS.get(flags.get("method")) or f"MG2L, {flags.get('local-loss', usual)}"


def world(result):
    return result.flags["env"]


def title(result):
    """The method, and what else its command says."""
    more = ("paper's sizes" if "paper" in result.flags else "", other_flags(result, TOLD))
    return ", ".join([method(result), *filter(None, more)])


def in_order(results):
    worlds = [*REFERENCES]
    place = lambda r: worlds.index(world(r)) if world(r) in worlds else len(worlds)
    return sorted(results, key=lambda r: (place(r), world(r), [*STYLE].index(method(r)), r.name))


def split(result):
    """Held-out tasks, if the world has some."""
    return "test" if "eval/test/return_0" in next(iter(result.final.values())) else "train"


def number(result, tag):
    """Mean and half its interval, or None: not every method infers anything."""
    tag, runs = f"eval/{split(result)}/{tag}", [*result.final.values()]
    if tag not in runs[0]:
        return None
    mean, half = over_seeds([run[tag] for run in runs])
    return mean, runs[0].get(f"{tag}_ci95", 0) if half is None else half


def text(pair, digits=1):
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}" if pair else ""


# ---------------------------------------------------------------- tables
def table(results):
    """One line for each result, and before those of a world its references."""
    rows, seen = [], set()
    for r in in_order(results):
        if world(r) not in seen:
            rows += [[world(r), f"*{name}*", value, *[""] * 6] for name, value in
                     REFERENCES.get(world(r), {}).items()]
        seen.add(world(r))
        steps = next(iter(r.final.values()))["global_step"]
        rows.append([world(r), title(r), *(text(number(r, f"return_{s}")) for s in ("0", "8", "mean")),
                     text(number(r, "accuracy_zi_8"), 2), len(r.final), f"{steps / 1e6:.1f}", minutes(r)])
    head = ["world", "method", "return, prior", "after 8 episodes", "by means", "z^i tells the task", "seeds",
            "million steps", "minutes"]
    return markdown(head, rows)


def details(results):
    over = lambda r: f"{len(r.final)} seeds" if len(r.final) > 1 else "trials, 1 seed"
    return "\n".join(f"- {world(r)}, {title(r)}: {facts(r, over(r))}" for r in in_order(results))


# ---------------------------------------------------------------- figures
def learning(ax, result, tag):
    """A curve, its mean over the seeds, with the lowest and highest."""
    runs = [points[:: 1 + len(points) // 30] for points in result.curves.get(tag, {}).values()]
    columns = [[value for _, value in points] for points in zip(*runs)]
    x = [points[0][0] / 1e6 for points in zip(*runs)]
    ax.plot(x, [sum(c) / len(c) for c in columns], color=STYLE[method(result)], lw=1.5)
    if len(runs) > 1:
        ax.fill_between(x, [min(c) for c in columns], [max(c) for c in columns],
                        color=STYLE[method(result)], alpha=0.12, lw=0)


def adaptation(ax, result):
    """Return after s episodes of the prior, by one latent drawn from what was seen in them."""
    shots = [s for s in ("0", "1", "2", "4", "8") if number(result, f"return_{s}")]
    points = [number(result, f"return_{s}") for s in shots]
    style = dict(color=STYLE[method(result)], lw=1.5, label=f"{title(result)} ({len(result.final)} seed"
                 + "s" * (len(result.final) > 1) + ")")
    if len(points) == 1:  # nothing to infer
        return ax.axhline(points[0][0], ls="--", **style)
    ax.errorbar(range(len(shots)), *zip(*points), capsize=2, **style)


def figure(name, results):
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4.6))
    for result in results:
        learning(left, result, "charts/episodic_return")
        if number(result, "accuracy_zi_8"):
            learning(middle, result, "eval/train/accuracy_zi_8")
        adaptation(right, result)
    for label, value in REFERENCES.get(name, {}).items():
        for ax in (left, right):
            ax.axhline(value, color="0.5", ls=":", lw=0.8)
        lowest = value == min(REFERENCES[name].values())
        right.annotate(label, (right.get_xlim()[0], value), fontsize=7, va="top" if lowest else "bottom")
    left.set(xlabel="environment steps, millions", ylabel="return in training")
    middle.set(xlabel="environment steps, millions", ylim=(0, 1),
               ylabel="share of new trials whose task z^i tells")
    right.set(xlabel="episodes of the prior, of which z^i is inferred", ylabel="return", xticks=range(5),
              xticklabels=[0, 1, 2, 4, 8])
    for ax in (left, middle, right):
        ax.grid(color="0.9", lw=0.6)
    fig.suptitle(name)
    below(fig, right)
    return svg(fig)


def figures(results):
    """{file name: svg}: one for each world."""
    worlds = {}
    for result in in_order(results):
        worlds.setdefault(world(result), []).append(result)
    return {f"mg2l-{slug(name)}.svg": figure(name, group) for name, group in worlds.items()}


TABLES = {"mg2l": table, "mg2l-details": details}
