"""
How fast maml_rl.py and its robots are: batched MuJoCo beside gymnasium's SyncVectorEnv and the bare physics,
a meta-iteration beside tests/oracles/maml_rl.py. Used by speed.py.
"""

import importlib.util
from pathlib import Path

import numpy as np
from speed import timed

ROBOTS = {"half_cheetah_dir": "HalfCheetah-v5", "ant_dir": "Ant-v5"}
ITERATIONS = {  # tasks x episodes x steps: arguments of maml_rl
    "nav2d, 20 x 20 x 100": dict(env="nav2d", num_tasks=20, num_episodes=20, horizon=100),
    "cheetah_vel, 4 x 10 x 200": dict(env="half_cheetah_vel", num_tasks=4, num_episodes=10, horizon=200),
    "cheetah_vel, 20 x 20 x 200": dict(env="half_cheetah_vel", num_tasks=20, num_episodes=20, horizon=200)}
HEAD = ["what", "of", "threads", "seconds", "cpu_seconds", "steps_per_s", "times_peer"]


def cases(quick, all_threads):
    """In the order in which they take turns."""
    out, sizes = [], [*ITERATIONS][:1 if quick else 3]
    for robot in ROBOTS:
        size = dict(robot=robot, rows=32 if quick else 256, steps=20 if quick else 100)
        out.append(size | dict(what="SyncVectorEnv", threads=1))
        out += [size | dict(what=what, threads=n) for n in all_threads for what in ("batched", "physics")]
    for size in sizes:
        for threads in all_threads:
            whats = ["naive"] * ("20 x 200" not in size) + ["meta-iteration", "sampling"]
            out += [dict(what=what, size=size, threads=threads) for what in whats]
    return [*out, *(dict(what="matmul", threads=threads) for threads in all_threads)]


def actions_for(case, num):
    return np.random.default_rng(1).uniform(-1, 1, (case["steps"], case["rows"], num)).astype(np.float32)


def measure_gymnasium(case):
    import gymnasium

    options = dict(terminate_when_unhealthy=False) if case["robot"].startswith("ant") else {}
    make = lambda: gymnasium.make(ROBOTS[case["robot"]], **options)
    worlds = gymnasium.vector.SyncVectorEnv([make] * case["rows"])
    actions = actions_for(case, worlds.single_action_space.shape[0])
    worlds.reset(seed=1)
    return timed(lambda: [worlds.step(a) for a in actions], 2)


def measure_batched(case):
    import torch

    import envs

    env = envs.make(case["robot"], case["rows"], horizon=case["steps"], threads=case["threads"])
    env._fallen = lambda state: False  # rows that end cost nothing: here nobody ends, as in the peer
    actions = torch.from_numpy(actions_for(case, env.action_dims[0]))

    def play():
        env.reset()
        for a in actions:
            env.step(a)

    return timed(play, 2)


def measure_physics(case):
    """The same rows under the same actions, all of them in one call of mujoco.rollout."""
    import mujoco
    import mujoco.rollout

    import envs

    env = envs.make(case["robot"], case["rows"], threads=1)
    model, skip = env.sim.model, env.sim.out.shape[1]
    ctrl = actions_for(case, model.nu).transpose(1, 0, 2).repeat(skip, axis=1).astype(np.float64)
    data = [mujoco.MjData(model) for _ in range(case["threads"])]
    with mujoco.rollout.Rollout(nthread=case["threads"] if case["threads"] > 1 else 0) as pool:
        def play():
            env.reset()
            pool.rollout([model] * case["rows"], data, env.state, ctrl)

        return timed(play, 2)


def oracle():
    """tests/oracles/maml_rl.py, which has the name of the script."""
    path = Path(__file__).parents[1] / "tests" / "oracles" / "maml_rl.py"
    spec = importlib.util.spec_from_file_location("maml_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(case):
    import torch

    import maml_rl

    torch.manual_seed(1)
    torch.set_num_threads(case["threads"])
    return maml_rl, maml_rl.Args(**ITERATIONS[case["size"]], num_threads=case["threads"])


def measure_iteration(case):
    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_tasks * args.num_episodes)
    net, x, optimizer = maml_rl.build(args, env)
    return timed(lambda: maml_rl.meta_update(env, net, x, optimizer, args), 3)


def measure_sampling(case):
    """The two rollouts of an iteration alone."""
    import torch

    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_tasks * args.num_episodes)
    net, x, _ = maml_rl.build(args, env)
    phi, tasks = x.chunk(2)[0].expand(args.num_tasks, -1), env.sample_tasks(args.num_tasks)

    def play():
        noise = torch.randn(env.horizon, args.num_tasks, args.num_episodes, env.action_dims[0])
        maml_rl.rollout(env, net, phi, tasks, noise, args)

    return timed(lambda: [play() for _ in range(2)], 3)


def check():
    return "tests/test_maml_rl.py compares the oracle's loss and gradient with the script's"


def measure_naive(case):
    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_episodes)
    naive = oracle()
    policy = naive.Policy(env.obs_dims[0], env.action_dims[0], args.hidden)
    return timed(lambda: naive.meta_iteration(env, policy, env.sample_tasks(args.num_tasks)), 1)


MEASURES = {"SyncVectorEnv": measure_gymnasium, "batched": measure_batched, "physics": measure_physics,
            "naive": measure_naive, "meta-iteration": measure_iteration, "sampling": measure_sampling}


def measure(case):
    """Wall and processor seconds of a case."""
    return MEASURES[case["what"]](case)


def steps_of(case):
    if "robot" in case:
        return case["rows"] * case["steps"]
    size = ITERATIONS[case["size"]]
    return 2 * size["num_tasks"] * size["num_episodes"] * size["horizon"]


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    rows, peers = [HEAD], {}
    for case, run in zip(plan, best):
        if case["what"] in ("SyncVectorEnv", "naive"):  # one peer for a robot: it knows no threads
            peers[case.get("robot") or (case["size"], case["threads"])] = run["wall"]
    for case, run in zip(plan, best):
        if case["what"] == "matmul":
            continue
        peer = peers.get(case.get("robot") or (case["size"], case["threads"]))
        of = f"{ROBOTS[case['robot']]}, {case['rows']} rows" if "robot" in case else case["size"]
        rows.append([case["what"], of, case["threads"], f"{run['wall']:.3g}", f"{run['cpu']:.3g}",
                     f"{steps_of(case) / run['wall']:,.0f}".replace(",", " "),
                     f"{peer / run['wall']:.1f}" if peer and case["what"] != "sampling" else ""])
    facts = {"matrix products": ", ".join(f"{n} threads {rate:.0f} GFLOP/s" for n, rate in rates.items())}
    return rows, facts
