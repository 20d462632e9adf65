"""
LeMOL: what the opponent model knows of an opponent that learns, and what each method got for it. Used by
plot.py. The paper, an abstract of two pages, has curves without numbers.
"""

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

STYLE = {"LeMOL-EP": "#0072B2", "LeMOL, flat": "#56B4E9", "ablated": "#000000", "oracle": "#009E73",
         "uninformed": "#999999", "naive online model": "#CC79A7", "MADDPG": "#E69F00", "M3DDPG": "#D55E00",
         "DDPG": "#7F7F00"}
MODELS = {"ep": "LeMOL-EP", "flat": "LeMOL, flat", "naive_online": "naive online model"}
LEARNERS = {"maddpg": "MADDPG", "mmmaddpg": "M3DDPG", "ddpg": "DDPG"}


# ---------------------------------------------------------------- results
def method(result):
    """What agent 0 is; its opponent is MADDPG where the command says nothing else."""
    om = result.flags.get("om", "ep")
    return LEARNERS.get(result.flags.get("bad-policy")) or MODELS.get(om, om)


def world(result):
    return result.flags["env"]


def in_order(results):
    return sorted(results, key=lambda r: (world(r), [*STYLE].index(method(r)), r.name))


def cycles(result):
    """How many learning runs, one after another, the models have seen and played."""
    run = next(iter(result.final.values()))
    return sum(f"eval/cycle_{c}/return_0" in run for c in range(1, 100))


def along(result, tag, cycle=None):
    """Means over the seeds and half their 95 % intervals: in each cycle, or in each tenth of one."""
    runs = [*result.final.values()]
    names = [f"eval/cycle_{c}/{tag}" for c in range(1, cycles(result) + 1)]
    names = names if cycle is None else [f"eval/cycle_{cycle}/{tag}/{k}" for k in range(1, 11)]
    pairs = [over_seeds([run[n] for run in runs]) for n in names if n in runs[0]]
    return ([m for m, _ in pairs], [h or 0 for _, h in pairs]) if pairs else None


def number(result, tag, digits=2):
    runs = [*result.final.values()]
    if tag not in runs[0]:
        return ""
    mean, half = over_seeds([run[tag] for run in runs])
    half = runs[0].get(f"{tag}_ci95") if half is None else half
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


# ---------------------------------------------------------------- tables
def table(results):
    """Cross-entropies of the last cycle; returns of the policies at its end."""
    rows = []
    for r in in_order(results):
        last = f"eval/cycle_{cycles(r)}"
        flags = other_flags(r, ("om", "bad-policy"))
        rows.append([world(r), f"{method(r)} {flags}".strip(), number(r, "eval/return_0"),
                     number(r, "eval/return_1"), number(r, f"{last}/om_ce", 3),
                     number(r, f"{last}/ablated_ce", 3), number(r, f"{last}/floor", 3),
                     number(r, f"{last}/om_acc"), len(r.final), cycles(r), minutes(r)])
    head = ["world", "agent 0", "its return", "its opponent's", "cross-entropy", "of the ablated model",
            "floor", "accuracy", "seeds", "cycles", "minutes"]
    return markdown(head, rows)


def details(results):
    over = lambda r: f"{len(r.final)} seeds" if len(r.final) > 1 else "runs, 1 seed"
    return "\n".join(f"- {world(r)}, {method(r)}: {facts(r, over(r))}" for r in in_order(results))


# ---------------------------------------------------------------- figures
def models(axes, result):
    """Cross-entropy by cycle, and along the opponent's learning in the last one."""
    for ax, cycle in zip(axes, (None, cycles(result))):
        lines = (("om_ce", f"{method(result)}", STYLE[method(result)]), ("ablated_ce", "ablated", "k"),
                 ("floor", "floor: knows the policy, and what the other sees", "0.6"))
        for tag, label, color in lines:
            if found := along(result, tag, cycle):
                mean, half = found
                x = range(1, len(mean) + 1)
                ax.errorbar(x, mean, half, color=color, lw=1.8, capsize=2, label=label,
                            ls=":" if tag == "floor" else "-")
        ax.grid(color="0.9", lw=0.6)
    axes[0].set(xlabel="cycle", ylabel="cross-entropy of the opponent's actions",
                xticks=range(1, cycles(result) + 1))
    axes[1].set(xlabel=f"tenths of the opponent's learning, cycle {cycles(result)}")


def returns(ax, results):
    """Return of agent 0 along both sides' learning, in each method's last cycle; intervals at the end."""
    for result in results:
        found = along(result, "return_0", cycles(result))
        if not found:  # results of today's script have no tenths: metrics.csv shows the learning
            continue
        mean, half = found
        x, color = range(1, len(mean) + 1), STYLE[method(result)]
        ax.plot(x, mean, color=color, lw=1.4)
        ax.errorbar(x[-1], mean[-1], half[-1], color=color, capsize=3)
    ax.set(xlabel="tenths of the learning", ylabel="return of agent 0")
    ax.grid(color="0.9", lw=0.6)


def figures(results):
    """{file name: svg}: one for each world with an opponent model."""
    worlds, out = {}, {}
    for result in in_order(results):
        worlds.setdefault(world(result), []).append(result)
    for name, group in worlds.items():
        best = next((r for r in group if method(r).startswith("LeMOL")), None)
        if best:
            fig, axes = plt.subplots(1, 3, figsize=(11, 4.2))
            models(axes, best)
            returns(axes[2], group)
            shown = axes[0].get_legend_handles_labels()[1]
            for r in group:
                if method(r) not in shown:
                    axes[0].plot([], color=STYLE[method(r)], lw=1.4, label=method(r))
            fig.suptitle(name)
            below(fig, axes[0])
            out[f"lemol-{slug(name)}.svg"] = svg(fig)
    return out


TABLES = {"lemol": table, "lemol-details": details}
