"""
How fast coded_maddpg.py and its particle worlds are: simple_spread beside mpe2, and training, updates
included, beside tests/oracles/coded_maddpg.py and the arithmetic's floor. Used by speed.py.
"""

import numpy as np
from speed import timed

WORLDS = (1, 4, 256, 4096)
GFLOP = {3: 0.54, 8: 3.8}  # arithmetic of one update of all agents, batch 1024, 64 units
HEAD = ["what", "agents", "worlds", "threads", "seconds", "cpu_seconds", "steps_per_s", "times_peer",
        "times_floor"]


def cases(quick, all_threads):
    """In the order in which they take turns."""
    out = []
    for agents in (3, 8):
        one = dict(agents=agents, worlds=1, threads=1)
        out.append(one | dict(what="mpe2", steps=250 if quick else 2500))
        out += [dict(what="world", agents=agents, worlds=B, threads=1, steps=25 if quick else 250)
                for B in WORLDS[: 3 if quick else 4]]
        out.append(one | dict(what="naive training", steps=100 if quick else 500))
        out += [dict(what="training", agents=agents, worlds=4, threads=n, steps=100 if quick else 2000)
                for n in all_threads]
    return [*out, *(dict(what="matmul", threads=threads) for threads in all_threads)]


def measure_mpe2(case):
    """Steps of one world with numbers as actions; observations and rewards to torch, as ours give them."""
    import torch
    from mpe2 import simple_spread_v3

    world = simple_spread_v3.parallel_env(N=case["agents"], max_cycles=25)
    acts = np.random.default_rng(1).integers(5, size=(25, case["agents"])).tolist()

    def play():
        for _ in range(case["steps"] // 25):
            world.reset()
            for row in acts:
                obs, reward, *_ = world.step(dict(zip(world.possible_agents, row)))
                [torch.from_numpy(o) for o in obs.values()], torch.tensor([*reward.values()])

    return timed(play, 2)


def measure_world(case):
    import torch

    import envs

    env = envs.make("simple_spread", case["worlds"], num_agents=case["agents"])
    acts = [tuple(torch.randint(5, (case["worlds"],)) for _ in range(case["agents"])) for _ in range(25)]

    def play():
        for _ in range(case["steps"] // 25):
            env.reset()
            for a in acts:
                env.step(a)

    return timed(play, 2)


def measure_training(case):
    """Iterations of 4 episodes and one update of all agents, the replay filled."""
    import torch

    import coded_maddpg as m

    args = m.Args(num_agents=case["agents"], num_envs=case["worlds"], num_threads=case["threads"])
    torch.set_num_threads(args.num_threads)
    env = m.make_env(args, args.num_envs)
    spec = m.make_spec(args, env)
    nets, replay, t = m.make_nets(spec, args.device), m.Replay(args, spec), 0
    engine, played = m.make_engine(args, spec), args.num_envs * args.horizon

    def iterations(n):
        nonlocal t
        for _ in range(n):
            t += 1
            m.iterate(env, spec, nets, replay, engine, args, t)

    iterations(args.learning_starts // played)
    return timed(lambda: iterations(case["steps"] // played), 3)


def measure_naive(case):
    import torch

    from tests.oracles import coded_maddpg as naive

    torch.set_num_threads(case["threads"])
    twin = naive.Maddpg(case["agents"])
    while twin.stored < 1024:
        twin.episode()

    def train():
        for _ in range(case["steps"] // 100):
            for _ in range(4):
                twin.episode()
            twin.update()

    return timed(train, 1)


MEASURES = {"mpe2": measure_mpe2, "world": measure_world, "training": measure_training,
            "naive training": measure_naive}


def measure(case):
    """Wall and processor seconds of a case."""
    return MEASURES[case["what"]](case)


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    timed_cases = [(case, run) for case, run in zip(plan, best) if case["what"] != "matmul"]
    speed = lambda case, run: case["steps"] * case["worlds"] / run["wall"]
    peers = {(c["what"], c["agents"]): speed(c, run) for c, run in timed_cases}
    rows = [HEAD]
    for case, run in timed_cases:
        steps = case["steps"] if "training" in case["what"] else case["steps"] * case["worlds"]
        peer = {"world": "mpe2", "training": "naive training"}.get(case["what"])
        floor = GFLOP[case["agents"]] / rates[case["threads"]] * steps / 100
        rows.append([case["what"], case["agents"], case["worlds"], case["threads"], f"{run['wall']:.3g}",
                     f"{run['cpu']:.3g}", f"{steps / run['wall']:,.0f}".replace(",", " "),
                     f"{steps / run['wall'] / peers[peer, case['agents']]:.1f}" if peer else "",
                     f"{run['wall'] / floor:.1f}" if case["what"] == "training" else ""])
    facts = {"matrix products": ", ".join(f"{n} threads {rate:.0f} GFLOP/s" for n, rate in rates.items())}
    return rows, facts
