"""
Train a command with several seeds, and keep what was measured.

  python benchmark/run.py tesp-wheeled --seeds 1 2 3 -- tesp.py --env wheeled    train, then keep
  python benchmark/run.py tesp-wheeled runs/a runs/b                             keep runs that have ended

Each seed is a process with a folder of its own, runs/benchmark/<name>/seed_<n>. What the runs logged becomes
benchmark/results/<name>.csv: columns seed, step, tag, value; at most 40 steps of each tag; step "final" is
the evaluation in eval.json. What was run, where and when stands on top as "# key: value". A result is written
only when every seed has ended well, and it replaces another one only with --force.
"""

import argparse
import csv
import datetime
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
MAX_POINTS = 40
OF_THE_RUN = ("seed", "run_dir", "resume", "evaluate", "capture_video", "track")  # not part of what was run
ONLY_FINAL = r"_ci95$|_action_|/agent_|^grad/|^losses/|^eval/.+/return_"  # tags of which no curve is kept
# glibc keeps freed memory and torch takes large pages: 20 to 30 % faster where graphs are large
FAST = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def fail(message):
    print(f"run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------- train
def run_seed(words, seed, folder):
    """One process, whose output goes to output.txt in its folder. Returns what went wrong, or None."""
    folder.mkdir(parents=True)
    call = [sys.executable, *words, "--seed", str(seed), "--run-dir", str(folder)]
    with (folder / "output.txt").open("w") as out:
        code = subprocess.run(call, cwd=ROOT, env=FAST | dict(os.environ), stdout=out, stderr=out).returncode
    if code or not (folder / "eval.json").exists():
        last = ((folder / "output.txt").read_text().strip().splitlines() or ["no output"])[-1]
        return f"exit code {code}: {last}"


def train(name, words, seeds, processes):
    """All seeds of a command. Returns their folders."""
    folders = [ROOT / "runs" / "benchmark" / name / f"seed_{seed}" for seed in seeds]
    if there := [str(folder) for folder in folders if folder.exists()]:
        fail(f"{there[0]} is already there: keep it, or remove it")
    with ThreadPoolExecutor(processes) as pool:
        errors = [*pool.map(lambda seed, folder: run_seed(words, seed, folder), seeds, folders)]
    for seed, error in zip(seeds, errors):
        print(f"seed {seed}: {error or 'done'}")
    if any(errors):
        fail("no result written")
    return folders


# ---------------------------------------------------------------- keep
def machine():
    """Cores and model name of the processor."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # not Linux, or not on every architecture
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {model}"


def commit(before=None):
    """The last commit, or the last before a time in seconds, and whether the tree differs from it today."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    found = git("rev-list", "-1", *([f"--before={int(before)}"] if before else []), "HEAD")
    dirty = git("status", "--porcelain", "--", "*.py", "envs")
    return (found[:12] or "unknown") + (" and uncommitted changes" if dirty else "")


def command_of(folder, stored):
    """The command line that leads to the arguments in args.json: what differs from the env's preset."""
    import torch

    script = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["script"]
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    try:
        preset = module.preset(module.Args(**stored))
        usual = vars(module.Args(**preset))
        plain = vars(module.Args(env=stored["env"]))
    except TypeError as error:
        fail(f"{folder} was made by another {script}.py: {error}")
    words = ["python", f"{script}.py", "--env", stored["env"]]
    for key, value in stored.items():
        # an argument such as --policy lstm is what the preset goes by
        steers = module.preset(module.Args(**stored | {key: plain[key]})) != preset
        if key not in ("env", "num_threads") and (value != usual[key] or steers):
            option = ("no-" if value is False else "") + key.replace("_", "-")
            words += [f"--{option}", *([] if isinstance(value, bool) else [str(value)])]
    return shlex.join(words)


def read_run(folder):
    """(args, rows of metrics.csv, eval, start, minutes, folder) of a run that has ended."""
    try:
        args, final = (json.loads((folder / f"{name}.json").read_text()) for name in ("args", "eval"))
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        # The first event file's name holds the time of the first start, also if the run was resumed since.
        start = min(int(p.name.split(".")[3]) for p in folder.glob("events.out.tfevents.*"))
        return args, rows, final, start, ((folder / "metrics.csv").stat().st_mtime - start) / 60, folder
    except (OSError, ValueError) as error:
        fail(f"{folder} is not a run that has ended ({error})")


def thin(rows):
    """At most MAX_POINTS of a tag's rows, evenly spaced, the first and the last among them."""
    if len(rows) <= MAX_POINTS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def write_result(path, meta, rows):
    """Lines "# key: value", then the rows of a csv; written whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as f:
        f.writelines(f"# {key}: {' '.join(str(value).split())}\n" for key, value in meta.items() if value)
        csv.writer(f, lineterminator="\n").writerows(rows)
    temporary.replace(path)
    print(f"wrote {path}: {len(rows) - 1} rows, {path.stat().st_size / 1e3:.0f} kB")


def keep(folders, path, made_by=None, note=None):
    """Runs that differ in their seeds -> one csv."""
    runs = sorted((read_run(Path(folder)) for folder in folders), key=lambda run: run[0]["seed"])
    seeds = [run[0]["seed"] for run in runs]
    settings = [{k: v for k, v in run[0].items() if k not in OF_THE_RUN} for run in runs]
    if len({*seeds}) < len(seeds) or any(s != settings[0] for s in settings):
        fail("the runs of one result must differ in their seeds and in nothing else")
    rows = [["seed", "step", "tag", "value"]]
    for seed, (_, metrics, final, *_) in zip(seeds, runs):
        tags = {}
        for row in metrics:
            if not re.search(ONLY_FINAL, row["tag"]):
                tags.setdefault(row["tag"], []).append(row)
        for tag, points in sorted(tags.items()):
            rows += [[seed, p["step"], tag, f"{float(p['value']):.5g}"] for p in thin(points)]
        rows += [[seed, "final", tag, f"{v:.6g}"] for tag, v in sorted(final.items()) if tag != "seed"]
    start = min(run[3] for run in runs)
    write_result(path, {
        "command": command_of(runs[0][5], settings[0]), "seeds": " ".join(map(str, seeds)),
        "machine": machine(), "minutes": " ".join(f"{run[4]:.1f}" for run in runs), "note": note,
        "commit": made_by or commit(start + 1), "date": datetime.date.fromtimestamp(start)}, rows)


def parse(words=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", help="of the result")
    parser.add_argument("runs", nargs="*", help="folders of runs that have ended, one a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=1, help="seeds that train at the same time")
    parser.add_argument("--commit", help="of the runs; default: the last one before they began")
    parser.add_argument("--note", help="a remark to keep with the result")
    parser.add_argument("--force", action="store_true", help="replace a result of the same name")
    words = sys.argv[1:] if words is None else words
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.words = words[cut + 1 :]
    if bool(args.runs) == bool(args.words):
        parser.error("give either the folders of runs, or -- and a command")
    return args


def main(args):
    path = RESULTS / f"{args.name}.csv"
    if path.exists() and not args.force:  # refuse before the work, not after it
        fail(f"{path} is already there; choose another name, or --force to replace it")
    folders = args.runs or train(args.name, args.words, args.seeds, args.processes)
    keep(folders, path, args.commit, args.note)


if __name__ == "__main__":
    main(parse())
