"""
How fast a meta-iteration of tesp.py is, with its split, beside tests/oracles/tesp.py (one task after the
other, one MjData an episode, a GRU cell a time step) and the floors: raw physics, and the arithmetic at the
rate of this machine's matrix products. Used by speed.py.
"""

import importlib.util
import time
from pathlib import Path

HEAD = ["what", "tasks", "threads", "seconds", "cpu_seconds", "steps_per_s", "s_per_task", "times_naive"]
PARTS = ("physics", "encoder", "policy", "optimiser")


def cases(quick, all_threads):
    """In the order in which they take turns. The twin plays one task: its time is proportional to them."""
    out, size = [], dict(quick=quick)
    for n in all_threads:
        out.append(size | dict(what="naive", tasks=1, threads=n))
        out.append(size | dict(what="batched", tasks=2 if quick else 20, threads=n))
        out += [size | dict(what=f"batched, {part}", tasks=2 if quick else 20, threads=n) for part in PARTS]
        out.append(size | dict(what="raw physics", tasks=2 if quick else 20, threads=n))
    return [*out, *(dict(what="matmul", threads=n) for n in all_threads)]


def settings(case):
    import torch

    import tesp

    more = dict(num_episodes=4, horizon=40, hidden=32, gru_units=32) if case["quick"] else {}
    sizes = tesp.preset(tesp.Args(env="wheeled", paper=True)) | more
    args = tesp.Args(**sizes | dict(num_tasks=case["tasks"], num_threads=case["threads"]))
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    env = tesp.make_env(args, args.num_tasks * args.num_episodes)
    return tesp, args, env, tesp.build(args, env)


class Clock:
    """Wall and processor seconds spent inside the calls that it wraps; calls within calls count once."""

    def __init__(self):
        self.wall = self.cpu = self.depth = 0

    def __call__(self, function):
        def timed(*args, **kwargs):
            if self.depth:
                return function(*args, **kwargs)
            self.depth, wall, cpu = 1, time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu
                self.depth = 0

        return timed


def measure_batched(case):
    """A meta-iteration, or what one of its parts takes in it."""
    tesp, args, env, (net, x, optimizer) = settings(case)
    part, clock = case["what"].partition(", ")[2], Clock()
    if part == "physics":
        env.sim.step = clock(env.sim.step)
    if part == "encoder":
        tesp.encode = clock(tesp.encode)  # forwards; its backward pass is part of autograd's
    if part == "policy":
        tesp.policy = clock(tesp.policy)
    if part == "optimiser":
        optimizer.step = clock(optimizer.step)
    whole = Clock()
    whole(tesp.meta_update)(env, net, x, optimizer, args)
    return (clock.wall, clock.cpu) if part else (whole.wall, whole.cpu)


def oracle():
    """tests/oracles/tesp.py, which has the name of the script."""
    path = Path(__file__).parents[1] / "tests" / "oracles" / "tesp.py"
    spec = importlib.util.spec_from_file_location("tesp_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_naive(case):
    """The same meta-iteration of one task, one MjData an episode."""
    import torch

    from envs.goal_robots import TEXTS

    tesp, args, env, (net, x, _) = settings(case)
    naive = oracle()
    parts = zip(net.split(x), (net.encoder, net.encoder, net.policy))
    groups = [{k: v.clone().requires_grad_() for k, v in tesp.unflatten(*part).items()} for part in parts]
    world = naive.SerialWheeled(args.num_episodes, args.horizon, TEXTS["wheeled"]())
    noise = lambda task, phase: torch.randn(args.horizon, args.num_episodes, env.action_dims[0])
    clock = Clock()
    clock(naive.meta_update)(world, *groups, env.sample_tasks(1), noise, args)
    return clock.wall, clock.cpu


def measure_physics(case):
    """MuJoCo's own time for the steps of a meta-iteration: whole episodes in one call of its thread pool."""
    import mujoco
    import mujoco.rollout
    import numpy as np

    _, args, env, _ = settings(case)
    env.reset()
    model, B, H = env.sim.model, env.num_envs, args.horizon
    datas = [mujoco.MjData(model) for _ in range(max(case["threads"], 1))]
    state = np.ascontiguousarray(env.state)
    ctrl = np.repeat(50 * np.random.default_rng(0).uniform(-1, 1, (B, H, model.nu)), env.sim.out.shape[1], 1)
    clock = Clock()
    with mujoco.rollout.Rollout(nthread=case["threads"] if case["threads"] > 1 else 0) as pool:
        for _ in range(args.inner_steps + 2):
            clock(pool.rollout)([model] * B, datas, state, ctrl)
    return clock.wall, clock.cpu


def measure(case):
    """Wall and processor seconds of a case."""
    return {"naive": measure_naive, "raw physics": measure_physics}.get(case["what"], measure_batched)(case)


def gflop(args, obs, actions):
    """(encoder's, policy's) arithmetic of a meta-iteration, all episodes of full length."""
    U, W, J = args.gru_units, args.hidden, args.inner_steps
    inputs = U + obs + 2 * actions + 2  # [h, x, 1]
    rows = args.num_tasks * args.buffer_size * args.horizon
    forward, weights, back = 3 * U * inputs, 3 * U * inputs, 3 * U * U
    encoder = rows * ((J + 1 + args.epochs) * forward + (J + args.epochs - 1) * (weights + back))
    rows = args.num_tasks * args.num_episodes * args.horizon
    forward, back = W * (obs + W + 2 * actions), W * (W + 2 * actions)
    passes = (J + 2 + J + args.epochs) * forward + (J + args.epochs - 1) * back + (args.epochs - 1) * forward
    return 2e-9 * encoder, 2e-9 * rows * passes


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    timed = [(case, run) for case, run in zip(plan, best) if case["what"] != "matmul"]
    at = {(c["what"], c["threads"]): run for c, run in timed}
    naive, rows, facts = min(run["wall"] for (what, _), run in at.items() if what == "naive"), [HEAD], {}
    for case, run in timed:
        _, args, env, _ = settings(case)
        steps = args.horizon * args.num_episodes * (args.inner_steps + 2) * case["tasks"]
        whole = case["what"] in ("naive", "batched")
        each = run["wall"] / case["tasks"]
        rate, ratio = f"{steps / run['wall']:,.0f}".replace(",", " "), f"{naive / each:.1f}"
        rows.append([case["what"], case["tasks"], case["threads"], f"{run['wall']:.3g}", f"{run['cpu']:.3g}",
                     rate if whole else "", f"{each:.3g}" if whole else "",
                     ratio if case["what"] == "batched" else ""])
        if case["what"] == "batched":
            n = case["threads"]
            floors = [at["raw physics", n]["wall"],
                      *(work / rates[n] for work in gflop(args, env.obs_dims[0], env.action_dims[0]))]
            parts = [f"{part} {at[f'batched, {part}', n]['wall']:.1f} s ({floor:.1f})"
                     for part, floor in zip(PARTS, floors)]
            facts[f"parts (floors), {n} thread{'s' * (n > 1)}"] = ", ".join(
                [*parts, f"optimiser {at['batched, optimiser', n]['wall']:.2f} s"])
    facts["matrix products"] = ", ".join(f"{n} threads {rate:.0f} GFLOP/s" for n, rate in rates.items())
    return rows, facts
