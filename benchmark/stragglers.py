"""
Coded MADDPG: the time of an iteration against the number of stragglers, for each scheme.

  python benchmark/stragglers.py                  formula beside the paper's bars, virtual clock: 10 s
  python benchmark/stragglers.py --processes 30   also real learner processes, 30 updates in each cell: 3 min

Writes benchmark/results/stragglers.csv: part, world, agents, scheme, stragglers, seconds, paper.

paper    seconds per 5 iterations: eq. (13), mean of 400 draws of the stragglers, N = 15 learners, beside the
         bars of the authors' figures. Their unit and t_s are stated nowhere: both are inferred from the jump
         of the uncoded bars. T_0 and c are fitted to the bars "uncoded, k = 0" and "mds, k = 0" of each
         world and M. Bars with a * are copies of another world's in the authors' script.
formula  seconds per iteration for c = 20 ms, t_s = 250 ms.
process  the same, measured with processes that sleep out their 20 ms, so that they stand for 15 nodes and not
         for the cores of this machine.
"""

import argparse
import datetime
import os
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from run import ROOT, commit, machine, write_result

sys.path.insert(0, str(ROOT))

import coded_maddpg as c  # noqa: E402

N, DRAWS, WORK, DELAY = 15, 400, 0.02, 0.25
SCHEMES = ["uncoded", "mds", "random", "replication", "ldpc"]
BARS = {  # (world, t_s, stragglers): {M: [centralised, three bars for each of SCHEMES]}; -v: a copied bar
    ("simple_spread", 0.25, (0, 1, 2)): {
        8: [5.64, 4.67, 5.73, 5.74, 6.28, 6.29, 6.28,
            6.09, 6.10, 6.10, 5.17, 5.20, 5.80, 4.92, 4.95, 5.30],
        10: [9.22, 7.31, 8.58, 8.60, 10.09, 10.35, 10.35,
             9.83, 9.81, 9.83, 8.39, 8.60, 9.20, 7.76, 8.03, 8.45]},
    ("simple_tag", 1.0, (0, 2, 4)): {
        8: [3.92, 3.07, 7.98, 8.01, 4.35, 4.40, 4.38,
            4.21, 4.18, 4.20, 3.51, 4.64, 6.68, 3.18, 3.71, 5.53],
        10: [5.85, 4.14, 9.07, 9.12, 6.25, 6.28, 6.30,
             5.99, 6.00, 6.15, 4.79, 7.91, 9.67, 4.26, 5.02, 7.07]},
    ("simple_adversary", 1.0, (0, 5, 8)): {
        8: [3.57, 2.52, 7.52, 7.54, 3.82, 3.80, 9.04,
            3.66, 3.73, 8.84, 2.91, 6.75, 8.16, 2.65, 6.37, 7.90],
        10: [5.26, 3.37, 8.34, 8.35, 5.48, 5.45, 10.66,
             5.07, 5.36, 10.34, 3.94, 9.12, 9.20, 3.57, 7.96, 8.85]},
    ("simple_push", 1.2, (0, 5, 8)): {
        8: [4.57, 3.52, 9.52, 9.54, 4.82, 4.80, 11.04,
            4.66, 4.73, 10.24, 3.91, -6.75, -8.16, 3.65, -6.37, 9.71],
        10: [6.56, 4.37, 10.34, 10.35, 6.87, 6.87, 12.66,
             6.43, 6.36, 12.34, 4.42, 10.12, 10.20, 4.52, -7.96, 10.85]},
}


def mean_time(C, k, work, delay):
    """eq. (13) over draws of the stragglers, k of the learners that have work."""
    args = c.Args(num_stragglers=min(k, len(C)), agent_seconds=work, straggler_delay=delay)
    return float(np.mean([c.arrivals(C, c.holds(C, t, args))[1] for t in range(DRAWS)]))


def matrix(scheme, M):
    return c.make_code(scheme, N, M, seed=30)


def paper_rows():
    for (world, delay, ks), by_agents in BARS.items():
        for M, bars in by_agents.items():
            work = (bars[4] - bars[1]) / (5 * (M - 1))  # of one agent
            fixed = bars[1] - 5 * work
            yield "paper", world, M, "centralized", 0, fixed + 5 * M * work, bars[0]
            for s, scheme in enumerate(SCHEMES):
                C = matrix(scheme, M)
                for a, k in enumerate(ks):
                    bar = bars[1 + 3 * s + a]
                    yield ("paper", world, M, scheme, k, fixed + 5 * mean_time(C, k, work, delay),
                           f"{-bar}*" if bar < 0 else bar)


def formula_rows():
    for M in (8, 10):
        for scheme in [*SCHEMES, "sparse-mds"]:
            C = matrix(scheme, M)
            for k in range(9):
                yield "formula", "any", M, scheme, k, mean_time(C, k, WORK, DELAY), ""


def measure(scheme, M, updates):
    """{stragglers: mean seconds of so many updates}; the nets are small: time is what learners sleep."""
    args = c.Args(num_agents=M, num_learners=N, scheme=scheme, seed=30, num_units=8, batch_size=8,
                  agent_seconds=WORK, straggler_delay=DELAY, replay_size=1000)
    torch.set_num_threads(1)
    env = c.make_env(args, args.num_envs)
    spec = c.make_spec(args, env)
    nets, replay = c.make_nets(spec, "cpu"), c.Replay(args, spec)
    replay.append(c.rollout(env, spec, nets["actor"], (1, 1, c.PLAY))[0])
    engine, times, t = c.make_engine(args, spec), {}, 0
    for k in (0, 0, 2, 4, 7):  # the first time learners start
        engine.args, times[k] = replace(args, num_stragglers=k), []
        for _ in range(updates):
            t += 1
            job = c.make_job(spec, nets, replay.sample(1, t, args.batch_size), t)
            begin = time.perf_counter()
            engine.solve(t, job)
            times[k].append(time.perf_counter() - begin)
    engine.close()
    return {k: float(np.mean(found)) for k, found in times.items()}


def process_rows(updates):
    for scheme in [*SCHEMES, "sparse-mds"]:
        for k, seconds in measure(scheme, 8, updates).items():
            yield "process", "any", 8, scheme, k, seconds, ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=0, metavar="UPDATES", help="also measure processes")
    updates = parser.parse_args().processes
    rows = [["part", "world", "agents", "scheme", "stragglers", "seconds", "paper"]]
    for part in paper_rows(), formula_rows(), process_rows(updates) if updates else ():
        for *row, seconds, paper in part:
            rows.append([*row, f"{seconds:.4f}", paper])
            print(f"{' '.join(map(str, row)):46s} {seconds:8.3f} {paper}", flush=True)
    write_result(ROOT / "benchmark" / "results" / "stragglers.csv", {
        "command": f"python benchmark/stragglers.py {' '.join(sys.argv[1:])}".strip(), "machine": machine(),
        "commit": commit(), "date": datetime.date.today(),
        "note": f"load average {os.getloadavg()[0]:.1f}; without other jobs it is about 1"}, rows)
