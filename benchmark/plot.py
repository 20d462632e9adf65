"""
Tables and figures from benchmark/results/*.csv, as benchmark/shown.py lists them.

  python benchmark/plot.py            write curves/*.svg, and in benchmark/README.md what stands between
                                      <!-- results:SCRIPT --> and <!-- /results -->
  python benchmark/plot.py --check    write nothing; exit code 1 and one line if one of them is out of date
"""

import csv
import io
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from shown import FIGURES, TABLES

HERE = Path(__file__).resolve().parent
# 97.5 % point of Student's t by degrees of freedom: with two or three seeds 1.96 would promise too much
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F00")
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.size": 9,
                     "axes.spines.top": False, "axes.spines.right": False})


# ---------------------------------------------------------------- results
class Result:
    """results/<name>.csv: `meta`, the lines "# key: value"; `final` {seed: {tag: value}}, the evaluation at
    the end; `curves` {tag: {seed: [(step, value)]}}."""

    def __init__(self, name):
        lines = (HERE / "results" / f"{name}.csv").read_text().splitlines()
        self.meta = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        self.final, self.curves = {}, {}
        for row in csv.DictReader(line for line in lines if not line.startswith("# ")):
            seed, tag, value = int(row["seed"]), row["tag"], float(row["value"])
            if row["step"] == "final":
                self.final.setdefault(seed, {})[tag] = value
            else:
                self.curves.setdefault(tag, {}).setdefault(seed, []).append((int(row["step"]), value))

    def number(self, tag):
        """Mean over the seeds and half its 95 % interval, that over tasks if there is one seed; or None."""
        runs = [*self.final.values()]
        values = [run[tag] for run in runs if tag in run]
        if not values:
            return None
        if len(values) == 1:
            return values[0], runs[0].get(f"{tag}_ci95")
        t = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
        return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


# ---------------------------------------------------------------- tables
def write(number, digits):
    """"1.2 ± 0.3" """
    if number is None:
        return ""
    mean, half = number
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def table(columns, digits, rows):
    """A Markdown table, a row for each (setting, method, result, tag prefix, the paper's numbers)."""
    head = ["setting", "method", *columns, "paper", "seeds", "million steps", "minutes", "commit"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for setting, method, name, prefix, paper in rows:
        result = Result(name)
        minutes = statistics.mean(map(float, result.meta["minutes"].split()))
        steps = next(iter(result.final.values()))["global_step"] / 1e6
        around = prefix if "{}" in prefix else prefix + "{}"
        numbers = [write(result.number(around.format(tag)), digits) for tag in columns.values()]
        source = f"[{result.meta['commit'].split()[0][:7]}](results/{name}.csv)"
        lines.append([setting, method, *numbers, paper, len(result.final), f"{steps:.1f}", f"{minutes:.1f}",
                      source])
    return markdown(lines)


def speed_table():
    """results/speed.csv, a row for each case."""
    text, lines = (HERE / "results" / "speed.csv").read_text().splitlines(), {}
    for row in csv.DictReader(line for line in text if not line.startswith("# ")):
        if row["who"] == "ours":
            lines[row["case"]] = [row["case"], row["unit"], row["milliseconds"], ""]
        else:
            peer = f"{row['who']} {row['version']}".strip()
            lines[row["case"]][3] += f"{', ' * bool(lines[row['case']][3])}{peer}: {row['times']}"
    head = ["work", "unit", "ours, ms", "times as long"]
    return markdown([head, ["---", "---", "---:", "---"], *lines.values()])


def markdown(lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---------------------------------------------------------------- figures
def curve(ax, result, tag, label, colour):
    """Mean over the seeds against millions of steps, and the band from the lowest to the highest."""
    runs = [*result.curves.get(tag, {}).values()]
    if not runs:
        return
    points = [*zip(*runs)]
    x = [point[0][0] / 1e6 for point in points]
    y = [[value for _, value in point] for point in points]
    seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    ax.plot(x, [statistics.mean(v) for v in y], color=colour, label=f"{label} ({seeds})", lw=1.8)
    ax.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.15, lw=0)


def profile(ax, result, tags, label, colour):
    """The numbers of the last evaluation, one a tag, with their intervals."""
    numbers = [result.number(tag) for tag in tags]
    mean, half = zip(*[(m, h or 0) for m, h in numbers])
    ax.errorbar(range(len(tags)), mean, half, color=colour, capsize=2, lw=1.8, label=label)
    ax.set_xticks(range(len(tags)))


def figure(panels):
    """Panels side by side, each (title, x label, y label, lines, papers). A line is (result, tag or tags,
    label); papers are {label: numbers, or {x: number}}, dotted in the colour of the line of that label."""
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), squeeze=False)
    for ax, (title, x_label, y_label, lines, papers) in zip(axes[0], panels):
        colours = {}
        for (name, tags, label), colour in zip(lines, COLOURS):
            colours[label] = colour
            draw = curve if isinstance(tags, str) else profile
            draw(ax, Result(name), tags, label, colour)
        for label, numbers in papers.items():
            points = numbers if isinstance(numbers, dict) else dict(enumerate(numbers))
            ax.plot(*zip(*points.items()), color=colours[label], ls=":", marker="o", ms=3, mfc="white", lw=1,
                    label=f"{label}, paper")
        ax.set(title=title, xlabel=x_label, ylabel=y_label)
        ax.legend(fontsize=7, frameon=False)
    fig.tight_layout()
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


# ---------------------------------------------------------------- files
def same(a, b):
    """Whether two texts agree up to the last digit of coordinates and matplotlib's own labels of shapes,
    which differ from one processor to the next."""
    number = r"-?\d+\.\d+"
    a, b = (re.sub(r"\b[a-z][0-9a-f]{10}\b", "label", x) for x in (a, b))
    pairs = zip(re.findall(number, a), re.findall(number, b))
    return re.sub(number, "", a) == re.sub(number, "", b) and all(
        abs(float(x) - float(y)) < 0.02 for x, y in pairs)


def main():
    wanted = {HERE / "curves" / f"{name}.svg": figure(panels) for name, panels in FIGURES.items()}
    readme = HERE / "README.md"

    def fill(found):
        begin, name, end = found.groups()
        return f"{begin}\n{speed_table() if name == 'speed' else table(*TABLES[name])}\n{end}"

    pattern = r"(<!-- results:(\S+) -->)\n.*?(<!-- /results -->)"
    wanted[readme] = re.sub(pattern, fill, readme.read_text(), flags=re.DOTALL)
    stale = [path for path in (HERE / "curves").glob("*.svg") if path not in wanted]
    for path, text in wanted.items():
        if path.exists() and same(path.read_text(), text):
            continue
        if "--check" in sys.argv:
            raise SystemExit(f"plot.py: {path.name} is not what results/ hold; run python benchmark/plot.py")
        path.write_text(text)
        print(f"wrote {path.name}")
    for path in stale:
        if "--check" in sys.argv:
            raise SystemExit(f"plot.py: {path.name} belongs to no result")
        path.unlink()


if __name__ == "__main__":
    main()
