"""
How fast maml_rl.py and its robots are: batched MuJoCo beside gymnasium's SyncVectorEnv and the bare physics,
a meta-iteration beside naive_maml_rl.py. Used by speed.py.
"""

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


def settings(case):
    import maml_rl

    args = maml_rl.resolve(maml_rl.Args(**ITERATIONS[case["size"]], num_threads=case["threads"]))
    maml_rl.set_up(args)
    return maml_rl, args


def measure_iteration(case):
    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_tasks * args.num_episodes)
    net, x, mask, optimizer = maml_rl.build(args, env)
    return timed(lambda: maml_rl.meta_update(env, net, x, mask, optimizer, args), 3)


def measure_sampling(case):
    """The two rollouts of an iteration alone."""
    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_tasks * args.num_episodes)
    net, x, *_ = maml_rl.build(args, env)
    phi, tasks = x.chunk(2)[0].expand(args.num_tasks, -1), env.sample_tasks(args.num_tasks)
    return timed(lambda: [maml_rl.rollout(env, net, phi, tasks) for _ in range(2)], 3)


def check():
    """The twin computes what the script computes: the same loss and meta-gradient on the same episodes."""
    import naive_maml_rl as naive
    import torch

    import maml_rl

    args = maml_rl.resolve(maml_rl.Args(num_tasks=3, num_episodes=4, horizon=20, hidden=16,
                                        inner_grad="loglik", num_threads=1))
    maml_rl.set_up(args)
    env = maml_rl.make_env(args, 12)
    net, x, *_ = maml_rl.build(args, env)
    theta = x.chunk(2)[0]
    tasks = env.sample_tasks(3)
    source = lambda k, phi: maml_rl.process(net, phi, maml_rl.rollout(env, net, phi, tasks), args)
    chain = maml_rl.adapt(net, x.expand(3, -1), source, 1, args, True)
    loss, _, g = maml_rl.meta_gradient(net, chain, x, None, args)
    policy, p = naive.Policy(2, 2, 16), maml_rl.unflatten(theta, net.shapes)
    weights = {f"net.{2 * l}.weight": p[f"w{l}"].T for l in range(3)}
    biases = {f"net.{2 * l}.bias": p[f"b{l}"] for l in range(3)}
    policy.load_state_dict(weights | biases | {"log_std": p["log_std"]})
    params = dict(policy.named_parameters())
    trains, tests = ([(b.obs[i], b.action[i], b.adv[i], (b.weight[i] > 0).float()) for i in range(3)]
                     for b in chain.batches)
    with torch.no_grad():
        olds = [naive.Independent(naive.Normal(m, s.exp()), 1)
                for m, s in zip(chain.batches[1].mean, chain.batches[1].log_std)]
    naive_loss, _ = naive.surrogate(policy, params, trains, tests, olds, args.inner_lr, True)
    grads = dict(zip(params, torch.autograd.grad(naive_loss, [*params.values()])))
    ours = maml_rl.unflatten(g[: len(theta)], net.shapes)
    gaps = [(grads[f"net.{2 * l}.weight"].T - ours[f"w{l}"]).norm() / ours[f"w{l}"].norm() for l in range(3)]
    worst = float(max([*gaps, (naive_loss - loss[0]).abs()]))
    assert worst < 1e-4, f"the twin differs by {worst:.1e}"
    return f"the twin's loss and gradients differ by {worst:.0e} or less"


def measure_naive(case):
    import naive_maml_rl as naive

    maml_rl, args = settings(case)
    env = maml_rl.make_env(args, args.num_episodes)
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
