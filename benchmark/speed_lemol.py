"""
How fast lemol.py learns, updates included, beside oracles.lemol.py, which plays one run after another, and the
arithmetic's floor. Used by speed.py.
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
    import lemol

    args = lemol.Args(env="simple_push", profile=case["profile"], traj_per_iter=case["runs"],
                      num_threads=case["threads"], **more)
    lemol.set_up(lemol.resolve(args))
    return lemol, args, lemol.Match(args, lemol.make_env(args, 1))


def measure_batched(case):
    """Episodes after the exploration: 25 steps in each run and an update of both agents."""
    lemol, args, match = settings(case, segment=case["episodes"])
    env = lemol.make_env(args, match.game.runs)
    lemol.iterate(match, env, args)  # the exploration
    lemol.iterate(match, env, args)
    return clocked(lambda: lemol.iterate(match, env, args))


def measure_models(case):
    """The training of both models on the chunk of 64 episodes of 8 recorded runs: the batched one's alone."""
    import torch

    lemol, args, match = settings(case)
    args.om_training_iters = 1
    match.pool = [torch.rand(8, case["episodes"] * args.max_episode_len, match.event_size)]
    lemol.train_models(match, args)
    return clocked(lambda: lemol.train_models(match, args))


def measure_naive(case):
    import oracles.lemol as naive
    import torch

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


def check():
    """The twin computes what the script computes: the same gradients of both critics and both actors, on the
    same minibatch, without noise. Returns what was found."""
    import random

    import oracles.lemol as naive
    import torch

    import envs

    lemol, args, match = settings(dict(profile="quick", runs=1, threads=1), polyak=0.0)
    where, L = match.where, 25
    env = envs.make("simple_push", 1, horizon=L, dialect="mpe")
    agents = [naive.Agent(i, env.obs_dims, env.action_dims, i == 0) for i in (0, 1)]
    with torch.no_grad():
        for i, agent in enumerate(agents):
            for name in ("actor", "critic"):
                flat = torch.cat([p.flatten() for p in getattr(agent, name).parameters()])
                match.theta[f"{name}{i}"][0] = match.theta[f"{name}{i}_target"][0] = flat
        play = lemol.rollout(lemol.make_env(args, 4), match, args, advance=False)
    now, after = play.rows[:, :-1].flatten(0, 1), play.rows[:, 1:].flatten(0, 1)
    value = lambda rows, name: rows[:, where[name]]
    for i, agent in enumerate(agents):
        columns = [value(now, f"obs{i}"), value(now, f"act{i}"), value(now, "reward")[:, i],
                   value(after, f"obs{i}"), value(now, "done")[:, 0], *[value(now, "guess")] * (i == 0)]
        for row in zip(*columns):
            agent.buffer.add(*(x.numpy() for x in row))
    found, kept, worst = [], (naive.sample, naive.step, random.randint, lemol.gumbel), 0.0
    match.replay.sample = lambda batch: [x.T[None].contiguous() for x in (now, after)]
    order = iter(list(range(len(now))) * 2)

    def step(net, adam, loss):
        adam.zero_grad()
        loss.backward()
        for p in net.parameters():
            torch.nn.utils.clip_grad_norm_(p, 0.5)
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))

    try:
        naive.sample, naive.step = lambda logits: logits.softmax(-1), step
        random.randint, lemol.gumbel = lambda a, b: next(order), lambda *shape, device: torch.zeros(shape)
        for adam in match.adam.values():
            adam.step = lambda: None
        for i in (0, 1):
            naive.update(agents, i, len(now))
            lemol.learn(match, i, args)
    finally:
        naive.sample, naive.step, random.randint, lemol.gumbel = kept
    for name, theirs in zip(("critic0", "actor0", "critic1", "actor1"), found):
        ours = match.theta[name].grad[0]
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    assert worst < 1e-3, f"the twin's gradients differ by {worst:.1e} of their norm"
    return f"the twin's gradients differ by {worst:.0e} of their norm"


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
