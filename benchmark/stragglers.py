"""
Coded MADDPG: the time of an iteration against the number of stragglers, for each scheme.

  python benchmark/stragglers.py                  formula beside the paper's bars, virtual clock: 10 s
  python benchmark/stragglers.py --processes 30   also real learner processes, 30 updates in each cell: 3 min
  python benchmark/stragglers.py --disturbed 20   20 short trainings whose learners are killed, hang or are
                                                  slow: do they end with the weights of training without?
  --ray 2                                         the last two with actors on Ray, here two nodes of it on
                                                  this machine; of the cells only two schemes, k = 0 and 4

Without --disturbed and --ray it writes benchmark/results/stragglers.csv: part, world, agents, scheme,
stragglers, seconds, paper.

paper    seconds per 5 iterations: eq. (13), mean of 400 draws of the stragglers, N = 15 learners, beside the
         bars of the authors' figures. Their unit and t_s are stated nowhere: both are inferred from the jump
         of the uncoded bars. T_0 and c are fitted to the bars "uncoded, k = 0" and "mds, k = 0" of each
         world and M. Bars with a * are copies of another world's in the authors' script.
formula  seconds per iteration for c = 20 ms, t_s = 250 ms.
process  the same, measured with processes that sleep out their 20 ms, so that they stand for 15 nodes and not
         for the cores of this machine.
"""

import argparse
import contextlib
import datetime
import os
import signal
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


def measure(scheme, M, updates, ks):
    """{k stragglers: mean seconds of so many updates}; the nets are small: time is what learners sleep."""
    args = c.Args(num_agents=M, num_learners=N, scheme=scheme, seed=30, num_units=8, batch_size=8,
                  agent_seconds=WORK, straggler_delay=DELAY, replay_size=1000)
    torch.set_num_threads(1)
    env = c.make_env(args, args.num_envs)
    spec = c.make_spec(args, env)
    nets, replay = c.make_nets(spec, "cpu"), c.Replay(args, spec)
    replay.append(c.rollout(env, spec, nets["actor"], (1, 1, c.PLAY))[0])
    engine, times, t = c.make_engine(args, spec), {}, 0
    for k in (0, *ks):  # the first time learners start
        engine.args, times[k] = replace(args, num_stragglers=k), []
        for _ in range(updates):
            t += 1
            job = c.make_job(spec, nets, replay.sample(1, t, args.batch_size), t)
            begin = time.perf_counter()
            engine.solve(t, job)
            times[k].append(time.perf_counter() - begin)
    engine.close()
    return {k: float(np.mean(found)) for k, found in times.items()}


def process_rows(updates, schemes=(*SCHEMES, "sparse-mds"), ks=(0, 2, 4, 7)):
    for scheme in schemes:
        for k, seconds in measure(scheme, 8, updates, ks).items():
            yield "process", "any", 8, scheme, k, seconds, ""


# ---------------------------------------------------------------- Ray, and disturbances
def use_ray(nodes):
    """From now on learners are actors on a Ray with so many nodes, all on this machine."""
    import ray
    from ray.cluster_utils import Cluster
    from ray_engine import RayLearners

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False)
    c.Learners = RayLearners


def hit(engine, learners, number):
    """Send a signal to learners. Returns the pids of those that it reached."""
    reached = []
    for j in learners:
        with contextlib.suppress(Exception):  # it is just starting, or has hung since the run before
            remote = hasattr(engine, "ray")
            reached.append(engine.ray.get(engine.process[j].pid.remote(), timeout=2) if remote
                           else engine.process[j].pid)
            os.kill(reached[-1], number)
    return reached


def disturbed(runs, updates=6):
    """Trainings with other weights and episodes each; the learners and their updates' numbers go on."""
    args = c.Args(num_learners=5, num_units=8, batch_size=32, horizon=5, num_envs=4, update_every=20,
                  replay_size=2000, learning_starts=20, straggler_delay=5.0)
    torch.set_num_threads(1)
    spec = c.make_spec(args, c.make_env(args, 1))
    engine = c.make_engine(args, spec)
    for run in range(1, runs + 1):
        kind, ends = ("one killed", "two hung", "two late", "all killed")[run % 4], []
        for who in c.Central(np.eye(3), spec, replace(args, num_learners=0)), engine:
            torch.manual_seed(run)
            env, nets, replay = c.make_env(args, 4), c.make_nets(spec, "cpu"), c.Replay(args, spec)
            replay.append(c.rollout(env, spec, nets["actor"], (run, 1, c.PLAY))[0])
            engine.args = replace(args, num_stragglers=2 * (kind == "two late"))
            for k in range(updates):
                if who is engine and k == 2:  # learners 0 and 1, 1 and 2, ...
                    two, hung = (run % 5, (run + 1) % 5), []
                    if "killed" in kind:
                        hit(engine, range(5) if kind == "all killed" else two[:1], signal.SIGKILL)
                    if kind == "two hung":
                        hung = hit(engine, two, signal.SIGSTOP)
                c.iterate(env, spec, nets, replay, who, args, run * updates + k + 1)
            ends.append([*nets.values(), replay.rows[: replay.stored]])
        for pid in hung:  # they answer to an old update now
            os.kill(pid, signal.SIGCONT)
        same = all(map(torch.equal, *ends))
        print(f"run {run:3d}: {kind:10s}  {'the same bits' if same else 'OTHER BITS'}  "
              f"{engine.restarts} restarts so far", flush=True)
        if not same:
            raise SystemExit(1)
    engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=0, metavar="UPDATES", help="also measure processes")
    parser.add_argument("--disturbed", type=int, default=0, metavar="RUNS", help="trainings with accidents")
    parser.add_argument("--ray", type=int, default=0, metavar="NODES", help="actors on Ray, not processes")
    options = parser.parse_args()
    updates = options.processes
    if options.ray:
        use_ray(options.ray)
    if options.disturbed:
        disturbed(options.disturbed)
    if options.ray and updates:
        for *row, seconds, _ in process_rows(updates, ("uncoded", "sparse-mds"), (0, 4)):
            print(f"Ray, {' '.join(map(str, row[1:])):46s} {seconds:8.3f}", flush=True)
    if options.ray or options.disturbed:
        raise SystemExit(0)
    rows = [["part", "world", "agents", "scheme", "stragglers", "seconds", "paper"]]
    for part in paper_rows(), formula_rows(), process_rows(updates) if updates else ():
        for *row, seconds, paper in part:
            rows.append([*row, f"{seconds:.4f}", paper])
            print(f"{' '.join(map(str, row)):46s} {seconds:8.3f} {paper}", flush=True)
    write_result(ROOT / "benchmark" / "results" / "stragglers.csv", {
        "command": f"python benchmark/stragglers.py {' '.join(sys.argv[1:])}".strip(), "machine": machine(),
        "commit": commit(), "date": datetime.date.today(),
        "note": f"load average {os.getloadavg()[0]:.1f}; without other jobs it is about 1"}, rows)
