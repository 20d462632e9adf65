"""
Figures and tables from benchmark/results/*.csv: curves/*.svg, and in README.md and benchmark/README.md what
stands between <!-- results:NAME --> and <!-- /results -->.

  python benchmark/plot.py            write them
  python benchmark/plot.py --check    write nothing; exit code 1 and one line if one of them is out of date
"""

import argparse
import io
import math
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import PANELS, PAPER, ROOT, adaptation, block, read_results

CURVES = ROOT / "benchmark" / "curves"
READMES = (ROOT / "README.md", ROOT / "benchmark" / "README.md")
MAX_SVG = 60_000  # bytes

STYLE = {  # a colour (Okabe and Ito, safe for the colour-blind) and a marker for each method
    "Meta-MAPG": ("#0072B2", "o"), "Meta-PG": ("#D55E00", "s"), "LOLA-DiCE": ("#009E73", "^"),
    "REINFORCE": ("#CC79A7", "D"), "no own learning": ("#56B4E9", "v"), "Meta-MAPG-OM": ("#000000", "P")}
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.size": 9,
                     "axes.spines.top": False, "axes.spines.right": False})


# ---------------------------------------------------------------- figures
def svg(fig):
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def adaptation_figure(env, policy, results):
    """Ours as lines with a band, the paper's as hollow markers of the same colour; a panel for each class."""
    panels = PANELS[env]
    size = (max(8.4, 3.8 * len(panels) + 2.2), 4.6)  # the legend wants 8.4
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        for method, points in PAPER.get((env, panel), {}).items():
            color, marker = STYLE[method]
            ax.plot(points, color=color, marker=marker, ls=":", lw=0.8, mfc="white", ms=5,
                    label=f"paper: {method}", zorder=2)
        drawn = {}
        for result in results:
            mean, half, over = adaptation(result, panel)
            same = drawn[result.method] = drawn.get(result.method, 0) + 1
            label = f"ours: {result.method} {result.others}".strip() + f" (95 % over {over})"
            color, x = STYLE[result.method][0], range(len(mean))
            ax.plot(x, mean, color=color, lw=2, ls=("-", "--", "-.")[(same - 1) % 3], label=label, zorder=3)
            ax.fill_between(x, [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)],
                            color=color, alpha=0.2, lw=0)
        ax.set_title({"all": "all personas"}.get(panel, f"{panel} peer"))
        ax.set_xlabel("l, updates of every agent")
        ax.grid(color="0.9", lw=0.6)
    values = [y for ax in axes[0] for line in ax.lines for y in line.get_ydata()]
    margin = 0.15 * (max(values) - min(values))  # a band over few seeds may leave the figure
    axes[0, 0].set_ylim(min(values) - margin, max(values) + margin)
    axes[0, 0].set_ylabel("reward per step of agent i under φ_l")
    fig.suptitle(f"{env.upper()}, ours with {policy}; paper with LSTM")
    below(fig, axes[0, 0])
    return svg(fig)


def learning_figure(result):
    """Validation sum of rewards over phi_1..phi_L against environment steps: each seed, and their mean."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    runs, color = result.curves["eval/sum_after_phi_0"], STYLE[result.method][0]
    for seed, points in runs.items():
        x, y = [step / 1e6 for step, _ in points], [value for _, value in points]
        ax.plot(x, y, color=color, lw=2 if len(runs) == 1 else 0.8, alpha=1 if len(runs) == 1 else 0.5,
                marker="." if len(x) < 30 else None, label="a seed" if seed == min(runs) else None)
    if len(runs) > 1 and len({tuple(step for step, _ in points) for points in runs.values()}) == 1:
        mean = [sum(value for _, value in column) / len(runs) for column in zip(*runs.values())]
        ax.plot(x, mean, color=color, lw=2, label=f"mean of {len(runs)} seeds")
    paper = [PAPER.get((result.flags["env"], p), {}).get(result.method) for p in PANELS[result.flags["env"]]]
    if all(paper):
        level = sum(sum(points[1:]) for points in paper) / len(paper)
        ax.axhline(level, color="0.4", ls=":", lw=1, label=f"paper, meta-test: {level:.2f}")
    ax.set_xlabel("environment steps, millions")
    ax.set_ylabel("validation: sum of rewards φ_1 to φ_L")
    ax.set_title(f"{result.flags['env'].upper()}, {result.method}, {result.policy}", fontsize=10)
    ax.grid(color="0.9", lw=0.6)
    below(fig, ax)
    return svg(fig)


def below(fig, ax):
    """A legend under the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    rows = math.ceil(len(labels) / 2)
    fig.tight_layout(rect=(0, (0.18 * rows + 0.1) / fig.get_figheight(), 1, 1))
    fig.legend(handles, labels, loc="lower center", ncols=2, fontsize=7.5, frameon=False)
    assert fig.get_figheight() > 0.18 * rows + 2, "too many lines for one figure"


def groups(results):
    """{(env, policy): [Result]}: what goes into one figure."""
    out = {}
    for result in results:
        out.setdefault((result.flags["env"], result.policy), []).append(result)
    return out


def slug(*words):
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def figures(results):
    """{file name: svg} of all scripts."""
    out = {}
    for (env, policy), group in groups(results.get("meta_mapg", [])).items():
        out[f"meta_mapg-{slug(env, policy)}.svg"] = adaptation_figure(env, policy, group)
        out |= {f"{r.name}-learning.svg": learning_figure(r) for r in group}
    return out


# ---------------------------------------------------------------- files
def fill(text, results, speeds):
    """A README with every block written anew."""
    def new(m):
        try:
            return f"{m[1]}\n{block(m[2], results, speeds)}\n{m[3]}"
        except KeyError as e:
            raise SystemExit(f"plot.py: no table for {m[1]}, or a tag is missing: {e}") from None

    return re.sub(r"(<!-- results:(\S+) -->)\n.*?(<!-- /results -->)", new, text, flags=re.DOTALL)


def same(a, b):
    """Whether two texts are equal up to the last digit of coordinates and matplotlib's own labels of shapes,
    which may differ from one processor or release to the next."""
    number = r"-?\d+\.\d+"
    a, b = (re.sub(r"\b[a-z][0-9a-f]{10}\b", "label", x) for x in (a, b))
    pairs = zip(re.findall(number, a), re.findall(number, b))
    return re.sub(number, "", a) == re.sub(number, "", b) and all(
        abs(float(x) - float(y)) < 0.02 for x, y in pairs)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    results, speeds = read_results()
    wanted = {CURVES / name: text for name, text in figures(results).items()}
    for path, text in wanted.items():
        assert len(text) < MAX_SVG, f"{path} has {len(text)} bytes"
    wanted |= {p: fill(p.read_text(), results, speeds) for p in READMES if p.exists()}
    stale = [path for path in CURVES.glob("*.svg") if path not in wanted]
    if check:
        for path, text in wanted.items():
            old = path.read_text() if path.exists() else None
            if old is None or not (same(old, text) if path.suffix == ".svg" else old == text):
                reason = "is not there" if old is None else "does not show what benchmark/results/ hold"
                return f"{path.relative_to(ROOT)} {reason}; run python benchmark/plot.py"
        return f"{stale[0].relative_to(ROOT)} belongs to no result" if stale else None
    CURVES.mkdir(exist_ok=True)
    for path, text in wanted.items():
        if not path.exists() or not same(path.read_text(), text) or path.suffix == ".md":
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}, {len(text) / 1e3:.1f} kB")
    for path in stale:
        path.unlink()
        print(f"removed {path.relative_to(ROOT)}, which belongs to no result")


if __name__ == "__main__":
    if reason := main():
        print(f"plot.py: {reason}", file=sys.stderr)
        raise SystemExit(1)
