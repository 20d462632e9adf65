"""
How fast meta_mapg.py is, beside tests/oracles/meta_mapg.py and the arithmetic's floor, and in half_cheetah
beside gymnasium, which only steps. Used by speed.py.
"""

import importlib.util
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from run import ROOT
from speed import timed

sys.path.insert(0, str(ROOT))
GFLOP = 28  # arithmetic of one IPD chain at L=7, K=64, H=150, table look-ups instead of the input products
FULL = dict(chain_length=7, num_episodes=64, horizon={"ipd": 150, "rps": 50}, chains=(8, 16))
CHEETAH = dict(game="half_cheetah", chain_length=2, num_episodes=64, horizon=200)
QUICK = dict(chain_length=2, num_episodes=16, horizon={"ipd": 20, "rps": 10}, chains=(2, 4))
HEAD = ["game", "what", "chains", "threads", "s_per_iteration", "s_per_chain", "cpu_s_per_chain",
        "steps_per_s", "MiB_per_chain", "times_naive", "times_floor"]


# ---------------------------------------------------------------- one measurement
def settings(case):
    """Args of meta_mapg for a case, and its world, parameters and moments."""
    import torch

    import meta_mapg

    sizes = {k: case[k] for k in ("chain_length", "num_episodes", "horizon") if k in case}
    game = {"half_cheetah": "half_cheetah_dir"}.get(case["game"], case["game"])
    sizes |= dict(env=game, policy=case.get("policy", "lstm"), num_chains=case["chains"],
                  num_threads=case["threads"], grow_chains=False, link_clip=math.inf)
    args = meta_mapg.Args(**meta_mapg.preset(meta_mapg.Args(**sizes)) | sizes)
    torch.manual_seed(1)
    torch.set_num_threads(args.num_threads)
    episodes = 1 if args.gradient == "exact" else args.num_episodes
    env = meta_mapg.make_env(args, args.num_chains * episodes)
    return meta_mapg, args, env, *meta_mapg.build(args, env)


def oracle():
    """tests/oracles/meta_mapg.py"""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "oracles" / "meta_mapg.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_chain(meta_mapg, args, env, params):
    """Actor, step sizes and critic of one chain, as the oracle wants them."""
    nets = []
    for group, shapes in zip(("actor", "critic"), meta_mapg.networks(args, env)):
        parts = meta_mapg.Player(params[group][None], shapes).parts()
        nets.append({name: x[0].detach().clone().requires_grad_() for name, x in parts.items()})
    return nets[0], params["step_sizes"].clone().requires_grad_(), nets[1]


def measure_batched(case):
    meta_mapg, args, env, params, moments = settings(case)
    return timed(lambda: meta_mapg.outer_update(env, params, moments, args, 0, 0.5), 2)


def measure_naive(case):
    import envs

    naive = oracle()
    meta_mapg, args, _, params, _ = settings(case)
    world = envs.make(args.env, args.num_episodes, horizon=args.horizon)  # one-hot observations

    def chain():
        players = one_chain(meta_mapg, args, world, params)
        peers = [{"table": logits.requires_grad_()} for logits in world.sample_tasks(1)[0]]
        naive.gradients(world, *players, peers, args)

    return timed(chain, 1 if case["horizon"] > 100 else 2)


def measure_world(case):
    """A batch of worlds with index observations, or as many games in a Python loop, on the same actions."""
    naive = oracle()
    import torch

    import envs
    from envs.matrix_games import PAYOFF

    H, B = case["horizon"], case["chains"] * case["num_episodes"]
    torch.set_num_threads(case["threads"])
    env = envs.make(case["game"], B, horizon=H, index_obs=True)
    actions = torch.randint(env.action_dims[0], (H, 2, B))
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


def step_gymnasium(steps):
    """Processor seconds of so many steps of one gymnasium world: no policy, no resets, no wrappers."""
    import gymnasium

    world = gymnasium.make("HalfCheetah-v5").unwrapped
    world.reset(seed=1)
    actions, before = [world.action_space.sample() for _ in range(100)], time.process_time()
    for n in range(steps):
        world.step(actions[n % 100])
    return time.process_time() - before


def measure_gymnasium(case):
    """The environment steps of one chain, divided among as many processes as the case has threads."""
    n, steps = case["threads"], (case["chain_length"] + 1) * case["num_episodes"] * case["horizon"]
    with ProcessPoolExecutor(n) as pool:
        list(pool.map(step_gymnasium, [100] * n))  # all have imported what they need
        wall = time.perf_counter()
        cpu = sum(pool.map(step_gymnasium, [steps // n] * n))
        return time.perf_counter() - wall, cpu


def check():
    """Before anything is timed; returns what was found."""
    return "tests/test_meta_mapg.py compares the gradients of script and oracle"


MEASURES = {"batched": measure_batched, "naive": measure_naive, "exact tables": measure_batched,
            "world": measure_world, "world, Python loop": measure_world, "gymnasium": measure_gymnasium}


def measure(case):
    """Wall and processor seconds of a case."""
    return MEASURES[case["what"]](case)


def cases(quick, all_threads):
    """In the order in which they take turns."""
    sizes, out = QUICK if quick else FULL, []
    for threads in all_threads:
        out.append(dict(what="matmul", threads=threads))
        for game, horizon in sizes["horizon"].items():
            size = dict(game=game, horizon=horizon, threads=threads)
            size |= {k: sizes[k] for k in ("chain_length", "num_episodes")}
            out.append(size | dict(what="naive", chains=1))
            out += [size | dict(what="batched", chains=chains) for chains in sizes["chains"]]
        size = CHEETAH | dict(threads=threads) | (dict(horizon=20) if quick else {})
        out.append(size | dict(what="gymnasium", chains=1))  # only the steps, a process for each thread
        out += [size | dict(what="batched", chains=chains) for chains in (1, 4)]
    chain_length, horizon = sizes["chain_length"], sizes["horizon"]["ipd"]
    out.append(dict(game="ipd", what="exact tables", policy="table", chains=24, threads=1, horizon=horizon,
                    chain_length=chain_length))
    return out + [dict(game="ipd", what=what, chains=sizes["chains"][1], num_episodes=sizes["num_episodes"],
                       threads=1, horizon=horizon) for what in ("world", "world, Python loop")]


def gflop(case):
    """Arithmetic for each environment step of a chain, without the physics."""
    return 47 / (3 * 64 * 200) if case["game"] == "half_cheetah" else GFLOP / (8 * 64 * 150)


def row_of(case, best, naive, rates):
    """One line of the table. Steps count as in global_step: (L+1) K H for each chain, K = 1 where exact."""
    chains, world = case["chains"], case["what"].startswith("world")
    steps = chains * case["horizon"] * (case.get("chain_length", 0) + 1) * case.get("num_episodes", 1)
    each = best["wall"] / chains
    ratio = naive["wall"] / each if naive and not world else naive["wall"] / best["wall"] if naive else ""
    floor = gflop(case) * steps / chains / rates[case["threads"]]
    lstm = case["what"] in ("batched", "naive")
    return [case["game"], case["what"], chains, case["threads"], f"{best['wall']:.4g}",
            "" if world else f"{each:.3g}", "" if world else f"{best['cpu'] / chains:.3g}",
            f"{steps / best['wall']:,.0f}".replace(",", " "), f"{best['mib'] / chains:.0f}" if lstm else "",
            f"{ratio:.1f}" if ratio else "", f"{each / floor:.1f}" if lstm else ""]


def summary(plan, best, rates):
    """The rows of the table, and what else there is to say; rates: {threads: GFLOP/s}."""
    timed_cases = [(case, run) for case, run in zip(plan, best) if case["what"] != "matmul"]
    yardstick = {(c["game"], c["threads"], c["what"]): run for c, run in timed_cases}
    rows, facts = [HEAD], {"sizes": "L=7, K=64, H=150 (ipd), 50 (rps); L=2, K=64, H=200 (half_cheetah)"}
    for case, run in timed_cases:
        twin = {"batched": "naive", "world": "world, Python loop"}.get(case["what"])
        twin = "gymnasium" if case["game"] == "half_cheetah" and twin else twin
        naive = yardstick.get((case["game"], case["threads"], twin))
        rows.append(row_of(case, run, naive, rates))
    for game in ("ipd", "rps"):  # whatever number of chains and threads is best for each
        wall = {what: min(run["wall"] / c["chains"] for c, run in timed_cases
                          if (c["game"], c["what"]) == (game, what)) for what in ("naive", "batched")}
        facts[f"{game}, best per chain"] = (f"naive {wall['naive']:.3g} s, batched {wall['batched']:.3g} s, "
                                            f"ratio {wall['naive'] / wall['batched']:.1f}")
    wall = {what: {c["threads"]: run["wall"] / c["chains"] for c, run in timed_cases if (
        c["game"], c["what"]) == ("half_cheetah", what)} for what in ("gymnasium", "batched")}
    facts["half_cheetah, a chain"] = "; ".join(
        f"{n} thread{'s' * (n > 1)}: gymnasium's steps {wall['gymnasium'][n]:.3g} s, the whole iteration "
        f"{s:.3g} s, ratio {wall['gymnasium'][n] / s:.1f}" for n, s in wall["batched"].items())
    facts["floor of an IPD chain"] = ", ".join(
        f"{n} thread{'s' * (n > 1)} {GFLOP / rate:.2f} s ({rate:.0f} GFLOP/s)" for n, rate in rates.items())
    return rows, facts
