"""
Run the commands of a script's docstring with several seeds and collect what they logged.

  python benchmark/run.py --list                                          the Run commands of all scripts
  python benchmark/run.py meta_mapg --match "--env ipd$" --seeds 1 2 3    those that match (a regex)
  python benchmark/run.py meta_mapg --match "--env rps$" -- --horizon 150     with further flags
  python benchmark/run.py --collect runs/a runs/b [--name NAME]           finished runs, started by hand

Each seed is a process with a folder of its own, runs/benchmark/<name>/seed_<n>. Their metrics.csv and
eval.json become benchmark/results/<name>.csv: columns seed, step, tag, value; at most 40 steps of each tag;
step "final" is the evaluation in eval.json. What was run, where and when stands on top as "# key: value".
Nothing that exists is overwritten without --force, and a result is written only when every seed ended well.
"""

import argparse
import ast
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
NOT_IN_NAMES = ("num_threads", "device", "eval_every", "save_every", "seed", "run_dir")


def fail(message):
    print(f"run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------- what to run
def scripts():
    return sorted(p.stem for p in ROOT.glob("*.py"))


def run_commands(script):
    """[(command, remark)] of the docstring: lines `python <script>.py ... [# remark]` or `torchrun ...`."""
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())) or ""
    line = r"(?:Run\s+)?((?:python|torchrun)\s+\S.*?)(?:\s+#\s*(.*))?"
    found = [re.fullmatch(line, text.strip()) for text in doc.splitlines()]
    return [(m[1], m[2] or "") for m in found if m]


def trains(command):
    return not re.search(r"--(evaluate|resume)\b", command)


def name_of(script, flags):
    """Script, world and the flags that make a difference, as a file name; flags: ["--env", "ipd", ...]."""
    kept, skip = [], False
    for word in flags:
        if word.startswith("--"):
            skip = word[2:].replace("-", "_") in NOT_IN_NAMES
        if not skip and word != "--env":
            kept.append(word)
    return re.sub(r"[^a-z0-9_.]+", "-", f"{script} {' '.join(kept)}".lower()).strip("-")


def run_seed(command, seed, folder):
    """One process; its output goes to output.txt in its folder. Returns None, or what went wrong."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return f"{folder} is already there; --collect it, or remove it"
    program, *words = shlex.split(command)
    launcher = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else [])]
    with (folder / "output.txt").open("w") as out:
        call = [*launcher, *words, "--seed", str(seed), "--run-dir", str(folder)]
        call_env = FAST | dict(os.environ)
        code = subprocess.run(call, cwd=ROOT, env=call_env, stdout=out, stderr=subprocess.STDOUT).returncode
    if code or not (folder / "eval.json").exists():
        last = ((folder / "output.txt").read_text().strip().splitlines() or ["no output"])[-1]
        return f"exit code {code}: {last}"


def run_all(command, script, args, extra):
    """All seeds of one command, then its result. Returns whether all went well."""
    command = " ".join([command, *map(shlex.quote, extra)])
    flags = shlex.split(command)
    name = args.name or name_of(script, flags[flags.index(f"{script}.py") + 1 :])
    target_of(name, args.force)  # refuse before the work, not after it
    folders = [ROOT / "runs" / "benchmark" / name / f"seed_{seed}" for seed in args.seeds]
    print(f"{command}\n  seeds {args.seeds} -> {folders[0].parent.relative_to(ROOT)}", flush=True)
    with ThreadPoolExecutor(args.processes) as pool:
        errors = [*pool.map(lambda seed, folder: run_seed(command, seed, folder), args.seeds, folders)]
    for seed, error in zip(args.seeds, errors):
        print(f"  seed {seed}: {error or 'done'}", file=sys.stderr if error else sys.stdout)
    if any(errors):
        good = " ".join(str(f.relative_to(ROOT)) for f, e in zip(folders, errors) if not e)
        print("  no result written" + (f"; for the others: --collect {good} --name {name}" if good else ""))
        return False
    collect(folders, name, command, args)
    return True


# ---------------------------------------------------------------- what came out
def machine():
    """Cores and model name of the processor."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # not Linux, or not on every architecture
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {model}"


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit(before=None):
    """The last commit before the time `before` (seconds), and whether the tree differs from HEAD today."""
    found = git("rev-list", "-1", *([f"--before={int(before)}"] if before else []), "HEAD")
    dirty = git("status", "--porcelain", "--", "*.py", "envs")
    missing = "before the first commit" if git("rev-parse", "HEAD") else "unknown"
    return (found[:12] or missing) + (" and uncommitted changes" if dirty else "")


def flags_of(script, stored):
    """The command line that leads to the arguments in args.json: what differs from the world's preset."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    stored = {k: v for k, v in stored.items() if k not in OF_THE_RUN}
    try:
        usual = vars(module.Args(**module.preset(module.Args(**stored))))
    except TypeError:
        fail(f"{script}.py has other arguments now than when this was run; say the command with --command")
    words = ["--env", stored["env"]]
    for key, value in stored.items():
        if key not in ("env", "num_threads") and value != usual[key]:
            option = ("no-" if value is False else "") + key.replace("_", "-")
            words += [f"--{option}", *([] if isinstance(value, bool) else [str(value)])]
    return words


def read_run(folder):
    """(args, rows of metrics.csv, eval, started, minutes) of a finished run."""
    try:
        args = json.loads((folder / "args.json").read_text())
        final = json.loads((folder / "eval.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        # The first event file's name holds the time of the first start, also if the run was resumed since.
        started = min(int(p.name.split(".")[3]) for p in folder.glob("events.out.tfevents.*"))
        return args, rows, final, started, ((folder / "metrics.csv").stat().st_mtime - started) / 60
    except (OSError, ValueError) as e:
        fail(f"{folder} is not a finished run ({e})")


def script_of(folder):
    import torch

    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["script"]
    except Exception as e:
        fail(f"{folder}/checkpoint.pt cannot be read ({type(e).__name__})")


def thin(rows):
    """At most MAX_POINTS of a tag's rows, evenly spaced, the first and the last among them."""
    if len(rows) <= MAX_POINTS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def target_of(name, force):
    path = RESULTS / f"{name}.csv"
    if path.exists() and not force:
        fail(f"{path.relative_to(ROOT)} is already there; choose another --name, or --force to replace it")
    return path


def write_result(path, meta, rows):
    """Lines "# key: value", then the rows of a csv; written whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as f:
        f.writelines(f"# {key}: {' '.join(str(value).split())}\n" for key, value in meta.items() if value)
        csv.writer(f, lineterminator="\n").writerows(rows)
    temporary.replace(path)
    print(f"wrote {path.relative_to(ROOT)}: {len(rows) - 1} rows, {path.stat().st_size / 1e3:.0f} kB")


def collect(folders, name, command, args):
    runs = sorted((read_run(Path(f)) for f in folders), key=lambda run: run[0]["seed"])
    seeds = [run[0]["seed"] for run in runs]
    settings = [{k: v for k, v in run[0].items() if k not in OF_THE_RUN} for run in runs]
    if len({*seeds}) < len(seeds) or any(s != settings[0] for s in settings):
        fail("the runs of one result must differ in their seeds and in nothing else")
    if not (name and command):
        script = script_of(Path(folders[0]))
        flags = [] if command else flags_of(script, runs[0][0])
        command = command or " ".join([f"python {script}.py", *map(shlex.quote, flags)])
        name = name or name_of(script, command.split(".py", 1)[1].split())
    path, rows = target_of(name, args.force), [["seed", "step", "tag", "value"]]
    for seed, (_, metrics, final, *_) in zip(seeds, runs):
        tags = {}
        for row in metrics:
            if not re.search(ONLY_FINAL, row["tag"]):
                tags.setdefault(row["tag"], []).append(row)
        for tag, points in sorted(tags.items()):
            rows += [[seed, p["step"], tag, f"{float(p['value']):.5g}"] for p in thin(points)]
        rows += [[seed, "final", tag, f"{v:.6g}"] for tag, v in sorted(final.items()) if tag != "seed"]
    started = min(run[3] for run in runs)
    write_result(path, {
        "command": command, "seeds": " ".join(map(str, seeds)), "machine": machine(),
        "minutes": " ".join(f"{run[4]:.1f}" for run in runs), "commit": args.commit or commit(started + 1),
        "date": datetime.date.fromtimestamp(started), "note": args.note}, rows)


def main():
    argv, extra = sys.argv[1:], []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("script", nargs="?", choices=scripts())
    parser.add_argument("--list", action="store_true", help="show the Run commands and end")
    parser.add_argument("--match", default="", help="regular expression for the commands to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=1, help="seeds that run at the same time")
    parser.add_argument("--collect", nargs="+", metavar="RUN_DIR", help="finished runs, one for each seed")
    parser.add_argument("--name", help="of the result; default: from the command")
    parser.add_argument("--command", help="with --collect: the command, if it cannot be told from args.json")
    parser.add_argument("--commit", help="of the runs; default: the last one before they began")
    parser.add_argument("--note", help="a remark to keep with the result")
    parser.add_argument("--force", action="store_true", help="replace a result of the same name")
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.collect, args.name, args.command, args)
    commands = {s: run_commands(s) for s in ([args.script] if args.script else scripts())}
    if args.list:
        for found in commands.values():
            print("\n".join(f"{c}" + (f"    # {remark}" if remark else "") for c, remark in found))
        return
    if not args.script:
        parser.error("name a script, or --list, or --collect")
    chosen = [c for c, _ in commands[args.script] if trains(c) and re.search(args.match, c)]
    if not chosen:
        fail(f"no Run command of {args.script}.py that trains matches {args.match!r}; see --list")
    if args.name and len(chosen) > 1:
        fail(f"--name is for one command, but {len(chosen)} match")
    if not all([run_all(command, args.script, args, extra) for command in chosen]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
