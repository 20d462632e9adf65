"""
How fast a script is, beside a peer (gymnasium, or a twin written the obvious way) and the arithmetic's floor.

  python benchmark/speed.py meta_mapg            the papers' sizes: minutes on two quiet cores
  python benchmark/speed.py meta_mapg --quick    small sizes: does it all work
  python benchmark/speed.py meta_mapg --save     also write benchmark/results/speed_meta_mapg.csv

What is measured for a script stands in speed_<script>.py. Every measurement is a process of its own, so that
its peak memory is its own. Ours and the peer's take turns in each round, and the fastest round counts,
because whatever else the machine does can only add time.
"""

import argparse
import datetime
import importlib
import json
import os
import resource
import subprocess
import sys
import time

from run import ROOT, commit, machine, target_of, write_result

sys.path.insert(0, str(ROOT))
SCRIPTS = sorted(p.stem[6:] for p in (ROOT / "benchmark").glob("speed_*.py"))


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(call, repeats):
    """Wall and processor seconds of the fastest of `repeats` calls, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(times)


def measure_matmul(threads):
    """Seconds of one product of 1024 x 1024 matrices in float32, sustained over 20."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    wall, cpu = timed(lambda: [a @ b for _ in range(20)], 5)
    return wall / 20, cpu / 20


def measure_here(module, case):
    import torch  # noqa: F401  (before the baseline of the memory)

    importlib.import_module(module.__name__.removeprefix("speed_"))
    before = peak_mib()
    wall, cpu = measure_matmul(case["threads"]) if case["what"] == "matmul" else module.measure(case)
    print(json.dumps(dict(wall=wall, cpu=cpu, mib=peak_mib() - before)))


def measure(script, case):
    """The same in a new process."""
    call = [sys.executable, __file__, script, "--one", json.dumps(case)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"speed.py: {case} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--save", action="store_true", help="write the result (with --quick: refused)")
    parser.add_argument("--force", action="store_true", help="with --save: replace the one there is")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a busy machine: 1")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    module = importlib.import_module(f"speed_{options.script}")
    if options.one:
        return measure_here(module, json.loads(options.one))
    if options.save and options.quick:
        parser.error("--save is for the full sizes")
    path = target_of(f"speed_{options.script}", options.force) if options.save else None
    load = os.getloadavg()[0]
    if hasattr(module, "check"):
        print(module.check(), flush=True)
    plan, runs = module.cases(options.quick, options.threads), {}
    for number in range(options.rounds):
        for i, case in enumerate(plan):
            print(f"round {number + 1}: {' '.join(f'{k}={v}' for k, v in case.items())}", file=sys.stderr)
            runs.setdefault(i, []).append(measure(options.script, case))
    best = [dict(min(r, key=lambda x: x["wall"]), mib=max(x["mib"] for x in r)) for r in runs.values()]
    rates = {case["threads"]: 2 * 1.024**3 / run["wall"]  # GFLOP/s
             for case, run in zip(plan, best) if case["what"] == "matmul"}
    rows, facts = module.summary(plan, best, rates)
    for row in rows:
        print("  ".join(f"{str(value):>{max(len(str(r[k])) for r in rows)}}" for k, value in enumerate(row)))
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    if path:
        write_result(path, {
            "command": f"python benchmark/speed.py {' '.join(sys.argv[1:])}", "machine": machine(),
            "commit": commit(), "date": datetime.date.today(), "load before": f"{load:.1f}", **facts}, rows)


if __name__ == "__main__":
    main()
