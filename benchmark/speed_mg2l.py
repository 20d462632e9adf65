"""
How fast mg2l.py and its worlds are: spread, hunting and the warehouse step by step, the last beside rware;
and training on spread, updates included, beside tests/oracles/mg2l.py and the arithmetic's floor. Used by
speed.py.
"""

import importlib.util
from pathlib import Path

from speed import timed

WORLDS = (1, 32, 1024)
HEAD = ["what", "sizes", "worlds", "threads", "seconds", "cpu_seconds", "steps_per_s", "times_peer",
        "times_floor"]


def cases(quick, all_threads):
    """In the order in which they take turns."""
    out = [dict(what="world", sizes=name, worlds=B, threads=1, steps=100 if quick else 1000)
           for name in ("spread", "hunting") for B in WORLDS]
    out += [dict(what=name, sizes="4 robots", worlds=64, threads=1, steps=steps if quick else 10 * steps)
            for name, steps in (("rware", 10), ("warehouse", 100))]  # rware: a millisecond for each step
    out.append(dict(what="naive training", sizes="spread", worlds=1, threads=1, steps=1))
    out += [dict(what="training", sizes="spread", worlds=1, threads=n, steps=3 if quick else 10)
            for n in all_threads]
    return [*out, *(dict(what="matmul", threads=threads) for threads in all_threads)]


def measure_world(case):
    import torch

    import envs

    env = envs.make(case["sizes"], case["worlds"])
    acts = [torch.randn(env.num_agents, case["worlds"], 2) for _ in range(100)]

    def play():
        for _ in range(case["steps"] // 100):
            env.reset()
            for a in acts:
                env.step(a)

    return timed(play, 2)


def measure_warehouse(case):
    import worlds_mg2l

    make = worlds_mg2l.ours if case["what"] == "warehouse" else worlds_mg2l.rware
    return timed(make(case["worlds"], case["steps"]), 2)


def build(case):
    """args, and what mg2l.iterate() needs, after an iteration that fills the rings."""
    import torch

    import mg2l as m

    args = m.Args(num_threads=case["threads"], warm_up=0)
    torch.set_num_threads(args.num_threads)
    env = m.make_env(args, args.num_envs + args.context_envs)
    learner, tasks = m.build(args, env), env.all_tasks("train")
    m.iterate(env, learner, tasks, 0, args)
    return args, env, learner, tasks


def measure_training(case):
    import mg2l as m

    args, env, learner, tasks = build(case)
    return timed(lambda: [m.iterate(env, learner, tasks, 1, args) for _ in range(case["steps"])], 1)


def measure_naive(case):
    import mg2l as m

    path = Path(__file__).parents[1] / "tests" / "oracles" / "mg2l.py"
    spec = importlib.util.spec_from_file_location("oracle", path)
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    args, _, learner, tasks = build(case)
    env, moments = m.make_env(args, 1), oracle.Moments(2)
    play = lambda: oracle.iterate(env, learner, moments, tasks, args)
    return timed(lambda: [play() for _ in range(case["steps"])], 1)


MEASURES = {"world": measure_world, "rware": measure_warehouse, "warehouse": measure_warehouse,
            "training": measure_training, "naive training": measure_naive}


def measure(case):
    """Wall and processor seconds of a case."""
    return MEASURES[case["what"]](case)


def gflop():
    """Arithmetic of the products in one iteration, forward and twice that backward, and transitions in it."""
    import mg2l as m

    args = m.Args()
    n, O, A, C, H, U, B = 2, 10, 2, args.latent_dim, args.hidden, m.UNITS, args.context_size
    rows = args.num_envs + args.context_envs
    mlp = lambda inputs, out: inputs * H + H * H + H * out
    nets = n * rows * args.horizon * (mlp(O + C, A) + mlp(n * O + C, 1))
    tran = (2 * O + A + 1) * U + 3 * U * U  # E, and Wv of the pool
    contexts = args.ppo_epochs * args.num_envs + args.encoder_updates * (args.num_envs + 3 * args.keys)
    return 6e-9 * (args.ppo_epochs * nets + contexts * n * B * tran), rows * args.horizon


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    rows, peers = [HEAD], {}
    for case, run in zip(plan, best):
        if case["what"] == "matmul":
            continue
        trains = "training" in case["what"]
        work, transitions = gflop() if trains else (0, case["worlds"])
        speed = case["steps"] * transitions / run["wall"]
        if case["what"] in ("naive training", "rware"):
            peers[case["sizes"]] = run["cpu"] / case["steps"]
        ours = case["what"] in ("training", "warehouse")
        floor = work / rates[case["threads"]] * case["steps"] if trains else 0
        rows.append([case["what"], case["sizes"], "" if trains else case["worlds"], case["threads"],
                     f"{run['wall']:.3g}", f"{run['cpu']:.3g}", f"{speed:,.0f}".replace(",", " "),
                     f"{peers[case['sizes']] / (run['cpu'] / case['steps']):.1f}" if ours else "",
                     f"{run['wall'] / floor:.1f}" if case["what"] == "training" else ""])
    return rows, {"matrix products": ", ".join(f"{n} threads {r:.0f} GFLOP/s" for n, r in rates.items()),
                  "times peer": "by processor seconds"}
