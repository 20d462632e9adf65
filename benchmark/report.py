"""
The results as text: what benchmark/results/*.csv hold, the paper's numbers, and the Markdown tables of both.
Used by plot.py, which writes them into README.md and benchmark/README.md.
"""

import csv
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"

# Kim et al. 2021, Fig., read off the vector figure: reward per step of agent i after 0..7 updates.
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
}
PANELS = {"ipd": ("cooperative", "defective"), "rps": ("all",), "rps3": ("all",), "rps4": ("all",)}
CLASSES = {"rps": ("rock", "paper", "scissors")}
METHODS = ("Meta-MAPG", "Meta-PG", "LOLA-DiCE", "REINFORCE", "no own learning", "Meta-MAPG-OM")
# 97.5 % point of Student's t by degrees of freedom: with two or three seeds 1.96 would promise too much.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


# ---------------------------------------------------------------- results
class Result(NamedTuple):
    name: str
    meta: dict  # command, seeds, machine, minutes, commit, date
    flags: dict  # {"env": "ipd", "policy": "lstm", ...} of the command
    curves: dict  # {tag: {seed: [(step, value)]}}
    final: dict  # {seed: {tag: value}}, the last evaluation

    @property
    def method(self):
        if "no-own-learning" in self.flags:
            return "no own learning"
        if "no-peer-learning" in self.flags:
            return "Meta-PG"
        named = {m.lower(): m for m in METHODS}[self.flags.get("method", "meta-mapg")]
        return named + ("-OM" if "opponent-model" in self.flags else "")

    @property
    def policy(self):
        exact = self.flags["env"] == "ipd" and self.flags.get("gradient") != "sampled"
        table = f"table, {'exact' if exact else 'sampled'} gradient"
        return "LSTM" if self.flags.get("policy") == "lstm" else table

    @property
    def others(self):
        """The flags that are not said by world, policy and method."""
        said = ("env", "policy", "method", "gradient", "no-own-learning", "no-peer-learning",
                "opponent-model", "num-threads", "device", "eval-every", "save-every")  # no numbers change
        return " ".join(f"--{k} {v}".strip() for k, v in self.flags.items() if k not in said)


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
    flags.setdefault("env", "ipd")
    return script[:-3], Result(path.stem, meta, flags, curves, final)


def read_results():
    """{script: [Result]} and {name: (meta, rows)} of the timings."""
    results, speeds = {}, {}
    for path in sorted(RESULTS.glob("*.csv")):
        try:
            if path.stem.startswith("speed_"):
                speeds[path.stem] = read_table(path)
            else:
                script, result = read_result(path)
                results.setdefault(script, []).append(result)
        except (KeyError, ValueError, StopIteration) as e:
            raise SystemExit(f"plot.py: {path} cannot be read ({type(e).__name__} {e})") from None
    order = lambda r: (r.flags["env"], r.policy != "LSTM", METHODS.index(r.method), r.name)
    return {script: sorted(found, key=order) for script, found in results.items()}, speeds


def adaptation(result, panel):
    """Reward per step of agent i after 0..L updates, half its 95 % interval, what the interval is over."""
    env, runs = result.flags["env"], list(result.final.values())
    prefix = "eval/return_" if panel == "all" else f"eval/{panel}/return_"
    length = sum(re.fullmatch(rf"{prefix}\d+", tag) is not None for tag in runs[0])
    values = [[run[f"{prefix}{l}"] for l in range(length)] for run in runs]
    mean, n = [sum(column) / len(runs) for column in zip(*values)], len(runs)
    if n > 1:
        t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.2
        return mean, [t * statistics.stdev(column) / math.sqrt(n) for column in zip(*values)], f"{n} seeds"
    classes = CLASSES[env[:3]] if panel == "all" else (panel,)  # equally many personas in each class
    half = [[runs[0][f"eval/{c}/return_{l}_ci95"] for c in classes] for l in range(length)]
    return mean, [math.sqrt(sum(h * h for h in row)) / len(classes) for row in half], "personas, 1 seed"


# ---------------------------------------------------------------- tables
def markdown(head, rows):
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def paper_row(result, panel):
    """The paper's numbers for the same world, peers and method, or None."""
    same_length = result.flags.get("chain-length", "7") == "7"
    return PAPER.get((result.flags["env"], panel), {}).get(result.method) if same_length else None


def meta_mapg(results):
    """One line for each result and class of peers, for README.md."""
    rows = []
    for result in results:
        for panel in PANELS[result.flags["env"]]:
            mean, _, _ = adaptation(result, panel)
            paper, setting = paper_row(result, panel), f"{result.method}, {result.policy} {result.others}"
            rows.append([f"{result.flags['env'].upper()}, {panel} peers", setting.strip(),
                         f"{mean[0]:+.2f}", f"{mean[1]:+.2f}", f"{mean[-1]:+.2f}",
                         f"**{sum(mean[1:]):+.2f}**", f"{sum(paper[1:]):+.2f}" if paper else "",
                         len(result.final), minutes(result)])
    head = ["game", "method, policy of agent i", "φ_0", "φ_1", "last φ", "**sum from φ_1**",
            "sum, paper (LSTM)", "seeds", "minutes"]
    return markdown(head, rows)


def minutes(result):
    mean = statistics.mean(float(x) for x in result.meta["minutes"].split())
    return f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"


def meta_mapg_details(results):
    """A section for each result: how it was made, its interval, and the paper's row under ours."""
    text = [f"Paper: {SOURCE}. Reward per step of agent i; the last column is the sum without φ_0."]
    for result in results:
        meta, rows = result.meta, []
        for panel in PANELS[result.flags["env"]]:
            mean, half, over = adaptation(result, panel)
            rows.append([panel, "ours", *(f"{m:+.3f}" for m in mean), f"{sum(mean[1:]):+.2f}"])
            rows.append(["", "±", *(f"{h:.3f}" for h in half), ""])
            if paper := paper_row(result, panel):
                rows.append(["", "paper", *(f"{x:+.3f}" for x in paper), f"{sum(paper[1:]):+.2f}"])
        steps = next(iter(result.final.values()))["global_step"]
        title = f"{result.flags['env'].upper()}: {result.method}, {result.policy} {result.others}".strip()
        facts = [f"`{meta['command']}`", f"seeds {meta['seeds']}", f"± is the 95 % interval over {over}",
                 f"{steps / 1e6:.1f} million steps", f"{meta['minutes']} minutes on {meta['machine']}",
                 f"commit {meta['commit']}, {meta['date']}", *([meta["note"]] if "note" in meta else [])]
        head = ["peers", "", *(f"φ_{l}" for l in range(len(mean))), "sum"]
        text.append(f"### {title}\n\n" + "; ".join(facts) + f".\n\n{markdown(head, rows)}\n\n"
                    f"![learning curve](curves/{result.name}-learning.svg)")
    return "\n\n".join(text)


def speed(meta, rows):
    """The table of speed.py, and how it was made."""
    facts = "; ".join(f"{key}: {value}" for key, value in meta.items())
    head = [name.replace("_", " ") for name in rows[0]]
    return markdown(head, [row.values() for row in rows]) + f"\n\n{facts}."


def block(name, results, speeds):
    """The text between <!-- results:NAME --> and <!-- /results -->."""
    script = name.removesuffix("-details")
    if name in speeds:
        return speed(*speeds[name])
    if script not in results:
        return "No results yet."
    return {"meta_mapg": meta_mapg, "meta_mapg-details": meta_mapg_details}[name](results[script])
