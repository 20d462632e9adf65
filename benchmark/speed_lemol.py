"""
How fast lemol.py learns, updates included, beside tests/oracles/lemol.py, which plays one run after another,
and the arithmetic's floor. Used by speed.py. tests/test_lemol.py shows that both compute the same.
"""

import time

HEAD = ["what", "minibatch", "runs", "threads", "ms_per_episode", "cpu_ms_per_episode", "steps_per_s",
        "times_naive", "times_floor"]
SIZES = {"paper": 1024, "quick": 128}  # profile: minibatch
MACS = 2 * (11_000 + 6_500 + 19_500 + 17_000 + 13_000)  # of a sample: both agents' target actors, target
# critic, critic's loss and its gradient, actor's, and the critic's gradient for the actor


def cases(quick, all_threads):
    """In the order in which they take turns."""
    out, episodes = [], 10 if quick else 60
    for profile in SIZES:
        one = dict(profile=profile, episodes=episodes)
        out += [one | dict(what="naive", runs=1, threads=n) for n in all_threads]
        out += [one | dict(what="batched", runs=R, threads=n) for R in (3, 8) for n in all_threads]
    out += [dict(what="models", profile="paper", runs=8, threads=n, episodes=64) for n in all_threads]
    return [*out, *(dict(what="matmul", threads=threads) for threads in all_threads)]


def settings(case, **more):
    import torch

    import lemol

    sizes = lemol.PAPER if case["profile"] == "paper" else {}
    args = lemol.Args(**(sizes | dict(traj_per_iter=case["runs"]) | more))
    torch.manual_seed(args.seed)
    torch.set_num_threads(case["threads"])
    return lemol, args, lemol.Match(args, lemol.make_env(args, 1))


def measure_batched(case):
    """Episodes after the exploration: 25 steps in each run and an update of both agents."""
    lemol, args, match = settings(case, segment=case["episodes"])
    env = lemol.make_env(args, match.runs)
    lemol.iterate(match, env, args)  # the exploration
    lemol.iterate(match, env, args)
    return clocked(lambda: lemol.iterate(match, env, args))


def measure_models(case):
    """The training of both models on the chunk of 64 episodes of 8 recorded runs: the batched one's alone."""
    import torch

    lemol, args, match = settings(case)
    args.om_training_iters = 1
    event = match.act_dims[1] + match.obs_dims[0] + match.act_dims[0] + 3
    match.pool = [torch.rand(8, case["episodes"] * args.max_episode_len, event)]
    lemol.train_models(match, args)
    return clocked(lambda: lemol.train_models(match, args))


def measure_naive(case):
    import sys
    from pathlib import Path

    import torch

    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import oracles.lemol as naive

    import envs

    torch.set_num_threads(case["threads"])
    env, clock, first = envs.make("simple_push", 1, horizon=25, dialect="mpe"), [], SIZES[case["profile"]]

    def on_episode(number):
        if number in (first + 1, first + 1 + case["episodes"]):
            clock.append((time.perf_counter(), time.process_time()))

    naive.play(env, naive.OpponentModel(8, 20, 5), first + case["episodes"] + 2, first, on_episode)
    return tuple(b - a for a, b in zip(*clock))


def clocked(call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


MEASURES = {"batched": measure_batched, "naive": measure_naive, "models": measure_models}


def measure(case):
    """Wall and processor seconds of a case."""
    return MEASURES[case["what"]](case)


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    import lemol

    timed = [(case, run) for case, run in zip(plan, best) if case["what"] != "matmul"]
    key = lambda case: tuple(case[k] for k in ("what", "profile", "runs", "threads"))
    each = {key(case): run["wall"] / case["episodes"] for case, run in timed}
    naive = {p: min(v for (what, profile, *_), v in each.items() if (what, profile) == ("naive", p))
             for p in SIZES}
    rows = [HEAD]
    for case, run in timed:
        wall, R, batch = run["wall"] / case["episodes"], case["runs"], SIZES[case["profile"]]
        floor = 2 * MACS * batch * R / rates[case["threads"]] / 1e9
        ours = case["what"] == "batched"
        rows.append([case["what"], batch, R, case["threads"], f"{wall * 1e3:.3g}",
                     f"{run['cpu'] / case['episodes'] * 1e3:.3g}",
                     "" if case["what"] == "models" else f"{25 * R / wall:,.0f}".replace(",", " "),
                     f"{naive[case['profile']] * R / wall:.1f}" if ours else "",
                     f"{wall / floor:.1f}" if ours else ""])
    paper = lemol.PAPER
    E, C = paper["num_episodes"] - paper["batch_size"], paper["n_opp_cycles"]
    threads = {c["threads"] for c, _ in timed}
    play, fit = (min(each[what, "paper", R, n] for n in threads)
                 for what, R in (("batched", 3), ("models", 8)))
    hours = C * E * play / 3600, (C - 1) * paper["om_training_iters"] * E * fit / 3600
    facts = {"the paper's scale": f"{hours[0]:.2f} h of play and {hours[1]:.2f} h of the models' training, "
                                  f"projected from {E} episodes, {C} cycles, 3 runs",
             "matrix products": ", ".join(f"{n} threads {rate:.0f} GFLOP/s" for n, rate in rates.items())}
    return rows, facts
