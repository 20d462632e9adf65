"""
How fast a script is, beside a twin written the obvious way (naive_meta_mapg.py) and the arithmetic's floor.

  python benchmark/speed.py meta_mapg            the paper's sizes: about ten minutes on two quiet cores
  python benchmark/speed.py meta_mapg --quick    small sizes: does it all work
  python benchmark/speed.py meta_mapg --save     also write benchmark/results/speed_meta_mapg.csv

Every measurement is a process of its own, so that its peak memory is its own. Batched and naive ones take
turns in each round, and the fastest round counts, because whatever else the machine does can only add time.
First the twin's gradients are compared with the script's on the same actions.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time

from run import ROOT, commit, machine, target_of, write_result

sys.path.insert(0, str(ROOT))
GFLOP = 28  # arithmetic of one IPD chain at L=7, K=64, H=150, table look-ups instead of the input products
FULL = dict(chain_length=7, num_episodes=64, horizon={"ipd": 150, "rps": 50}, chains=(8, 16), rounds=3)
QUICK = dict(chain_length=2, num_episodes=16, horizon={"ipd": 20, "rps": 10}, chains=(2, 4), rounds=1)
HEAD = ["game", "what", "chains", "threads", "s_per_iteration", "s_per_chain", "cpu_s_per_chain",
        "steps_per_s", "MiB_per_chain", "times_naive", "times_floor"]


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


# ---------------------------------------------------------------- one measurement, in its own process
def settings(case):
    """Args of meta_mapg for a case, and its world, parameters and optimisers."""
    import meta_mapg

    sizes = {k: case[k] for k in ("chain_length", "num_episodes", "horizon") if k in case}
    args = meta_mapg.resolve(meta_mapg.Args(env=case["game"], policy=case.get("policy", "lstm"), **sizes,
                                            num_chains=case["chains"], num_threads=case["threads"]))
    meta_mapg.set_up(args)
    env = meta_mapg.make_env(args, args.num_chains * (1 if args.gradient == "exact" else args.num_episodes))
    return meta_mapg, args, env, *meta_mapg.build(args, env)


def measure_batched(case):
    meta_mapg, args, env, params, optimizers = settings(case)
    return timed(lambda: meta_mapg.outer_update(env, params, optimizers, args), 2)


def measure_naive(case):
    import naive_meta_mapg as naive

    import envs

    meta_mapg, args, _, params, _ = settings(case)
    world = envs.make(args.env, args.num_episodes, horizon=args.horizon)  # one-hot observations

    def chain():
        theta, psi, eta = (meta_mapg.leaves(params[group]) for group in ("theta", "psi", "eta"))
        peers = [meta_mapg.leaves({"logits": logits}) for logits in world.sample_tasks(1)[0]]
        naive.gradients(world, theta, eta["eta"], psi, peers, args)

    return timed(chain, 1 if case["horizon"] > 100 else 2)


def measure_world(case):
    """A batch of worlds with index observations, or as many games in a Python loop, on the same actions."""
    import naive_meta_mapg as naive
    import torch

    import envs
    from envs.matrix_games import PAYOFF

    H, B = case["horizon"], case["chains"] * case["num_episodes"]
    torch.set_num_threads(case["threads"])
    env = envs.make(case["game"], B, horizon=H, index_obs=True)
    actions = torch.randint(env.actions, (H, 2, B))
    if case["what"] == "world":
        def play():
            env.reset()
            for both in actions:
                env.step(list(both))
    else:
        numbers = actions.tolist()

        def play():
            games = [naive.PythonGame(PAYOFF[case["game"]]) for _ in range(B)]
            for mine, other in numbers:
                for game, a, b in zip(games, mine, other):
                    game.step(a, b)

    return timed(play, 3)


def measure_matmul(case):
    """Seconds of one product of 1024 x 1024 matrices in float32, sustained over 20."""
    import torch

    torch.set_num_threads(case["threads"])
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    wall, cpu = timed(lambda: [a @ b for _ in range(20)], 5)
    return wall / 20, cpu / 20


def check_twin(case):
    """The twin computes what the script computes: the same gradients of theta, eta and psi of each chain."""
    import naive_meta_mapg as naive
    import torch

    import envs

    meta_mapg, args, env, params, _ = settings(case)
    C = args.num_chains
    theta, psi, eta = (meta_mapg.leaves(params[group], C) for group in ("theta", "psi", "eta"))
    tasks = env.sample_tasks(C)
    loss, critic_loss, batches = meta_mapg.sampled_chain(env, theta, eta["eta"], psi, tasks, args, (0, C))
    *by_theta, by_eta = torch.autograd.grad(loss.sum(), [*theta.values(), eta["eta"]])
    by_psi = torch.autograd.grad(critic_loss.sum(), [*psi.values()])
    world, worst = envs.make(args.env, args.num_episodes, horizon=args.horizon), 0.0
    for c in range(C):
        own = [meta_mapg.leaves({k: v[c] for k, v in group.items()}) for group in (theta, eta, psi)]
        peers = [meta_mapg.leaves({"logits": logits}) for logits in tasks[c]]
        recorded = [batch.action[c] for batch in batches]
        naive_theta, naive_eta, naive_psi = naive.gradients(world, own[0], own[1]["eta"], own[2], peers, args,
                                                            recorded)
        for ours, theirs in zip([*by_theta, by_eta, *by_psi], [*naive_theta, naive_eta, *naive_psi]):
            worst = max(worst, float((ours[c] - theirs).norm() / ours[c].norm().clamp(min=1e-6)))
    assert worst < 1e-3, f"{case['game']}: the twin's gradients differ by {worst:.1e} of their norm"
    return worst, 0.0


MEASURES = {"batched": measure_batched, "naive": measure_naive, "exact tables": measure_batched,
            "world": measure_world, "world, Python loop": measure_world, "matmul": measure_matmul,
            "check": check_twin}


def measure_here(case):
    import torch  # noqa: F401  (before the baseline of the memory)

    import meta_mapg  # noqa: F401

    before = peak_mib()
    wall, cpu = MEASURES[case["what"]](case)
    print(json.dumps(dict(wall=wall, cpu=cpu, mib=peak_mib() - before)))


def measure(case):
    """The same in a new process."""
    call = [sys.executable, __file__, "--one", json.dumps(case)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"speed.py: {case} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- all of them
def cases(sizes, all_threads):
    """In the order in which they take turns."""
    out = []
    for threads in all_threads:
        out.append(dict(game="", what="matmul", chains=1, threads=threads))
        for game, horizon in sizes["horizon"].items():
            size = dict(game=game, horizon=horizon, threads=threads)
            size |= {k: sizes[k] for k in ("chain_length", "num_episodes")}
            out.append(size | dict(what="naive", chains=1))
            out += [size | dict(what="batched", chains=chains) for chains in sizes["chains"]]
    chain_length, horizon = sizes["chain_length"], sizes["horizon"]["ipd"]
    out.append(dict(game="ipd", what="exact tables", policy="table", chains=24, threads=1, horizon=horizon,
                    chain_length=chain_length))
    return out + [dict(game="ipd", what=what, chains=sizes["chains"][1], num_episodes=sizes["num_episodes"],
                       threads=1, horizon=horizon) for what in ("world", "world, Python loop")]


def row_of(case, best, naive, rates):
    """One line of the table. Steps count as in global_step: (L+1) K H for each chain, K = 1 where exact."""
    chains, world = case["chains"], case["what"].startswith("world")
    steps = chains * case["horizon"] * (case.get("chain_length", 0) + 1) * case.get("num_episodes", 1)
    each = best["wall"] / chains
    ratio = naive["wall"] / each if naive and not world else naive["wall"] / best["wall"] if naive else ""
    floor = GFLOP * steps / chains / (8 * 64 * 150) / rates[case["threads"]]
    lstm = case["what"] in ("batched", "naive")
    return [case["game"], case["what"], chains, case["threads"], f"{best['wall']:.4g}",
            "" if world else f"{each:.3g}", "" if world else f"{best['cpu'] / chains:.3g}",
            f"{steps / best['wall']:,.0f}".replace(",", " "), f"{best['mib'] / chains:.0f}" if lstm else "",
            f"{ratio:.1f}" if ratio else "", f"{each / floor:.1f}" if lstm else ""]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("script", nargs="?", choices=["meta_mapg"])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--save", action="store_true", help="write the result (with --quick: refused)")
    parser.add_argument("--force", action="store_true", help="with --save: replace the one there is")
    parser.add_argument("--rounds", type=int, help="of which the fastest counts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on a busy machine: 1")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure_here(json.loads(options.one))
    if not options.script or options.save and options.quick:
        parser.error("name a script; --save is for the full sizes")
    path = target_of(f"speed_{options.script}", options.force) if options.save else None
    sizes, load = QUICK if options.quick else FULL, os.getloadavg()[0]
    for game in sizes["horizon"]:
        tiny = dict(game=game, what="check", chains=2, threads=1, chain_length=2, num_episodes=8, horizon=12)
        print(f"{game}: the twin's gradients differ by {measure(tiny)['wall']:.0e} of their norm", flush=True)
    plan, measured = cases(sizes, options.threads), {}
    for number in range(options.rounds or sizes["rounds"]):
        for i, case in enumerate(plan):
            print(f"round {number + 1}: {case['game']} {case['what']}, {case['chains']} chains, "
                  f"{case['threads']} threads", file=sys.stderr)
            measured.setdefault(i, []).append(measure(case))
    best = {i: dict(min(runs, key=lambda r: r["wall"]), mib=max(r["mib"] for r in runs))
            for i, runs in measured.items()}
    rates = {case["threads"]: 2 * 1.024**3 / best[i]["wall"]  # GFLOP/s
             for i, case in enumerate(plan) if case["what"] == "matmul"}
    yardstick = {(c["game"], c["threads"], c["what"]): best[i] for i, c in enumerate(plan)}
    rows = [HEAD]
    for i, case in enumerate(plan):
        twin = {"batched": "naive", "world": "world, Python loop"}.get(case["what"])
        naive = yardstick.get((case["game"], case["threads"], twin))
        if case["what"] != "matmul":
            rows.append(row_of(case, best[i], naive, rates))
    for row in rows:
        print("  ".join(f"{str(value):>{max(len(str(r[k])) for r in rows)}}" for k, value in enumerate(row)))
    for game in sizes["horizon"]:  # whatever number of chains and threads is best for each
        wall = {what: min(best[i]["wall"] / c["chains"] for i, c in enumerate(plan)
                          if (c["game"], c["what"]) == (game, what)) for what in ("naive", "batched")}
        print(f"{game}, best per chain: naive {wall['naive']:.3g} s, batched {wall['batched']:.3g} s; "
              f"ratio {wall['naive'] / wall['batched']:.1f}")
    floors = ", ".join(f"{n} thread{'s' * (n > 1)} {GFLOP / rate:.2f} s ({rate:.0f} GFLOP/s)"
                       for n, rate in rates.items())
    print(f"floor of an IPD chain at the paper's sizes, {GFLOP} GFLOP: {floors}")
    if path:
        write_result(path, {
            "command": f"python benchmark/speed.py {' '.join(sys.argv[1:])}", "machine": machine(),
            "commit": commit(), "date": datetime.date.today(), "load before": f"{load:.1f}",
            "sizes": "L=7, K=64, H=150 (ipd), 50 (rps)", "floor of an IPD chain": floors}, rows)


if __name__ == "__main__":
    main()
