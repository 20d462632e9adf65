"""
TESP: return before and after the fast updates on goals trained on, held out and farther away, its variants,
the paper's readings of the ant, and its baselines, maml_rl.py --family fo-ppo, beside it at equal numbers of
episodes. Used by plot.py.
"""

import matplotlib.pyplot as plt
from report import below, facts, markdown, minutes, other_flags, over_seeds, slug, svg

# The supplement's figure of the ant without noise, read off: iterations -> after 3 updates on D, D', D''
PAPER = {"small_ant": {100: (-29, -31, -82), 200: (-16.5, -18, -55), 600: (-13, -14.5, -42)}}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F00", "#999999")
BASELINES = {"maml": "MAML", "meta-sgd": "Meta-SGD", "maesn": "MAESN"}
RUN = ("env", "paper", "num-threads", "eval-every", "save-every", "total-steps")


# ---------------------------------------------------------------- results
def variant(result):
    if "family" in result.flags:
        return BASELINES[result.flags.get("method", "maml")]
    return other_flags(result, RUN).replace("--", "") or "as specified"


def world(result):
    return result.flags["env"] + (", the paper's size" if "paper" in result.flags else "")


def in_order(results):
    key = lambda r: (world(r) != "wheeled", world(r), variant(r) != "as specified", r.name)
    return sorted(results, key=key)


def names(result, split="test"):
    """The phases that an evaluation has: warmup, 0, 1, ... In each one more batch of episodes has been seen:
    by TESP's encoder, or, as they have no warm-up, by as many updates of a baseline."""
    run = next(iter(result.final.values()))
    return [n for n in ("warmup", *map(str, range(10))) if tag(result, n, split) in run]


def tag(result, name, split="test"):
    return f"eval/return_{name}" if "family" in result.flags else f"eval/{split}/return_{name}"


def is_tesp(result):
    return "family" not in result.flags


def number(result, key):
    runs = [*result.final.values()]
    if key not in runs[0]:
        return None
    mean, half = over_seeds([run[key] for run in runs])
    return mean, runs[0].get(f"{key}_ci95", 0) if half is None else half


def text(pair):
    return f"{pair[0]:.1f} ± {pair[1]:.1f}" if pair else ""


# ---------------------------------------------------------------- tables
def table(results):
    rows = []
    for r in filter(is_tesp, in_order(results)):
        train, test2 = (text(number(r, f"eval/{s}/return_{names(r)[-1]}")) for s in ("train", "test2"))
        steps = next(iter(r.final.values()))["global_step"]
        rows.append([world(r), variant(r),
                     *(text(number(r, f"eval/test/return_{n}")) for n in ("warmup", "0", "1", "2", "3")),
                     train, test2, len(r.final), f"{steps / 1e6:.1f}", minutes(r)])
    head = ["world", "variant", "D': warm-up", "0 updates", "1", "2", "3", "D, last", "D'', last", "seeds",
            "million steps", "minutes"]
    return markdown(head, rows)


def equal_episodes(results):
    """TESP and its baselines on held-out goals, by the episodes of a goal that have been seen before."""
    rows, group = [], [r for r in in_order(results) if not is_tesp(r)]
    worlds = {world(r) for r in group}
    for r in in_order(results):
        if world(r) in worlds and (r in group or variant(r) == "as specified"):
            numbers = [text(number(r, tag(r, n))) for n in names(r)]
            steps = next(iter(r.final.values()))["global_step"]
            rows.append([world(r), "TESP" if is_tesp(r) else variant(r), *numbers, *[""] * (5 - len(numbers)),
                         len(r.final), f"{steps / 1e6:.1f}", minutes(r)])
    head = ["world", "method", *(f"{20 * k} episodes" for k in range(5)), "seeds", "million steps", "minutes"]
    return markdown(head, rows)


def details(results):
    over = lambda r: f"{len(r.final)} seeds" if len(r.final) > 1 else "goals, 1 seed"
    return "\n".join(f"- {world(r)}, {variant(r)}: {facts(r, over(r))}" for r in in_order(results))


# ---------------------------------------------------------------- figures
def phases(ax, results):
    """Return on held-out goals by what has been seen of them."""
    for color, r in zip(COLORS, results):
        points, many = [number(r, tag(r, n)) for n in names(r)], "s" * (len(r.final) > 1)
        ax.errorbar(range(len(points)), *zip(*points), color=color, lw=1.8, capsize=2,
                    ls="-" if is_tesp(r) else "--",
                    label=f"{'TESP, ' * is_tesp(r)}{variant(r)} ({len(r.final)} seed{many})")
    ax.set(xticks=range(5), xlabel="batches of episodes seen before (TESP: updates + 1)",
           ylabel="return on held-out goals (D')")


def learning(ax, results):
    """Training tasks: the last phase, and thin the warm-up of the first result."""
    for k, (color, r) in enumerate(zip(COLORS, results)):
        last = max(t for t in r.curves if t.startswith("adapt/return_") and t != "adapt/return_warmup")
        for name, lw in ((last, 1.5), ("adapt/return_warmup", 0.6))[: 2 if k == 0 else 1]:
            curves = [*r.curves[name].values()]
            columns = list(zip(*([y for _, y in curve] for curve in curves)))
            x = [step / 1e6 for step, _ in curves[0]][: len(columns)]
            ax.plot(x, [sum(c) / len(c) for c in columns], color=color, lw=lw, ls="-" if is_tesp(r) else "--")
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
        for k, (updates, readings) in enumerate(PAPER.get(name, {}).items()):  # side by side: some are close
            left.axhline(readings[1], color="k", ls=":", lw=0.8)
            left.text(0.02 + 0.33 * k, readings[1], f"paper, D', {updates} iterations", fontsize=7,
                      transform=left.get_yaxis_transform(), va=("bottom", "top")[k % 2])
        for ax in (left, right):
            ax.grid(color="0.9", lw=0.6)
        fig.suptitle(name)
        below(fig, right)
        out[f"tesp-{slug(name)}.svg"] = svg(fig)
    return out


TABLES = {"tesp": table, "tesp-equal": equal_episodes, "tesp-details": details}
