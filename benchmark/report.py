"""
What benchmark/results/*.csv hold, and the means to show it: tables in Markdown, figures in SVG. Each script
has a module report_<script>.py with its paper's numbers, its TABLES {block name: function of the results} and
figures(results). plot.py calls them all.
"""

import csv
import io
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"

# 97.5 % point of Student's t by degrees of freedom: with two or three seeds 1.96 would promise too much.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NO_NUMBERS_CHANGE = ("env", "num-threads", "device", "eval-every", "save-every")
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.size": 9,
                     "axes.spines.top": False, "axes.spines.right": False})


# ---------------------------------------------------------------- results
class Result(NamedTuple):
    name: str
    meta: dict  # command, seeds, machine, minutes, commit, date
    flags: dict  # {"env": "ipd", "policy": "lstm", ...} of the command
    curves: dict  # {tag: {seed: [(step, value)]}}
    final: dict  # {seed: {tag: value}}, the last evaluation


def read_table(path):
    """({key: value} of the lines "# key: value", the rows as dicts)."""
    lines = path.read_text().splitlines()
    meta = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return meta, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def read_result(path):
    meta, rows = read_table(path)
    words, flags = shlex.split(meta["command"]), {}
    script = next(w for w in words if w.endswith(".py"))
    words = words[words.index(script) + 1 :]
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            flags[word[2:]] = "" if following.startswith("--") else following
    curves, final = {}, {}
    for row in rows:
        seed, value = int(row["seed"]), float(row["value"])
        if row["step"] == "final":
            final.setdefault(seed, {})[row["tag"]] = value
        else:
            curves.setdefault(row["tag"], {}).setdefault(seed, []).append((int(row["step"]), value))
    return script[:-3], Result(path.stem, meta, flags, curves, final)


def read_results():
    """{script: [Result]}, and {name: (meta, rows)} of the other tables: timings."""
    results, speeds = {}, {}
    for path in sorted(RESULTS.glob("*.csv")):
        try:
            if "seed" not in read_table(path)[1][0]:
                speeds[path.stem] = read_table(path)
            else:
                script, result = read_result(path)
                script = "tesp" if "family" in result.flags else script  # its baseline in maml_rl.py
                results.setdefault(script, []).append(result)
        except (KeyError, ValueError, StopIteration) as e:
            raise SystemExit(f"plot.py: {path} cannot be read ({type(e).__name__} {e})") from None
    return results, speeds


def other_flags(result, said):
    """The flags of the command without those named in `said` and those that change no number."""
    kept = (f"--{k} {v}".strip() for k, v in result.flags.items() if k not in (*said, *NO_NUMBERS_CHANGE))
    return " ".join(kept)


def over_seeds(values):
    """Mean and half its 95 % interval (Student's t) of numbers, one a seed; None for a single seed."""
    n = len(values)
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.2
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


# ---------------------------------------------------------------- tables
def markdown(head, rows):
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def minutes(result):
    mean = statistics.mean(float(x) for x in result.meta["minutes"].split())
    return f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"


def facts(result, over):
    """How a result was made, as one sentence."""
    meta, steps = result.meta, next(iter(result.final.values()))["global_step"]
    parts = [f"`{meta['command']}`", f"seeds {meta['seeds']}", f"± is the 95 % interval over {over}",
             f"{steps / 1e6:.1f} million steps", f"{meta['minutes']} minutes on {meta['machine']}",
             f"commit {meta['commit']}, {meta['date']}", *([meta["note"]] if "note" in meta else [])]
    return "; ".join(parts) + "."


def speed(meta, rows):
    """The table of speed.py, and how it was made."""
    facts = "; ".join(f"{key}: {value}" for key, value in meta.items())
    head = [name.replace("_", " ") for name in rows[0]]
    return markdown(head, [row.values() for row in rows]) + f"\n\n{facts}."


# ---------------------------------------------------------------- figures
def svg(fig):
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def below(fig, ax):
    """A legend under the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    rows = math.ceil(len(labels) / 2)
    fig.tight_layout(rect=(0, (0.18 * rows + 0.1) / fig.get_figheight(), 1, 1))
    fig.legend(handles, labels, loc="lower center", ncols=2, fontsize=7.5, frameon=False)
    assert fig.get_figheight() > 0.18 * rows + 2, "too many lines for one figure"


def slug(*words):
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
