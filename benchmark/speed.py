"""
How fast each script is beside its oracle in tests/oracles/, and beside live peers that do the same work.

  python benchmark/speed.py                   all cases: some minutes of a core
  python benchmark/speed.py spread Ant        the cases whose names hold one of these words
  python benchmark/speed.py --quick           tiny sizes: does everything still work
  python benchmark/speed.py --save            all cases, and write benchmark/results/speed.csv

What counts is processor time for a unit of work, on one thread. Ours and the others take turns, and the
fastest round of each counts, because whatever else the machine does can only add time. A ratio above 1 says
that ours is faster. The oracles are plain Python, which flatters us; the peers do not. mpe2, rware and
gymnasium come with requirements.txt. These are left out where they are not installed:
  pip install vmas envpool
  git clone https://github.com/Git-123-Hub/maddpg-pettingzoo-pytorch    and put it on PYTHONPATH
"""

import argparse
import datetime
import importlib
import itertools
import logging
import math
import os
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch
from run import ROOT, commit, machine, write_result

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import envs  # noqa: E402


# ---------------------------------------------------------------- the scripts
# Each function sets up one work for ours and the others, and yields (who, units, play): play() does so many
# units of it. Where play() returns a float, that is the processor time of the part that counts.
def oracle(name):
    """tests/oracles/<name>.py, which has the name of the script."""
    return importlib.import_module(f"oracles.{name}")


def meta_mapg(**sizes):
    import meta_mapg as m

    sizes |= dict(env="ipd", policy="lstm", grow_chains=False, link_clip=math.inf)
    args = m.Args(**m.preset(m.Args(**sizes)) | sizes)
    env = m.make_env(args, args.num_chains * args.num_episodes)
    params, moments = m.build(args, env)
    yield "ours", args.num_chains, lambda: m.outer_update(env, params, moments, args, 0, 0.5)

    one = envs.make("ipd", args.num_episodes, horizon=args.horizon)  # one-hot observations
    eta, nets = params["step_sizes"].clone().requires_grad_(), []
    for group, shapes in zip(("actor", "critic"), m.networks(args, one)):
        parts = m.Player(params[group][None], shapes).parts()
        nets.append({name: x[0].detach().clone().requires_grad_() for name, x in parts.items()})
    peers = [{"table": logits.requires_grad_()} for logits in one.sample_tasks(1)[0]]
    naive = oracle("meta_mapg")
    yield "oracle", 1, lambda: naive.gradients(one, nets[0], eta, nets[1], peers, args)


def maml_rl(**sizes):
    import maml_rl as m

    args = m.Args(env="nav2d", fisher_every=1, **sizes)
    env = m.make_env(args, args.num_tasks * args.num_episodes)
    net, x, optimizer = m.build(args, env)
    yield "ours", 1, lambda: m.meta_update(env, net, x, optimizer, args)

    naive, one = oracle("maml_rl"), m.make_env(args, args.num_episodes)
    policy = naive.Policy(one.obs_dims[0], one.action_dims[0], args.hidden)
    yield "oracle", 1, lambda: naive.meta_iteration(one, policy, one.sample_tasks(args.num_tasks))


def tesp(**sizes):
    import tesp as m

    args = m.Args(env="wheeled", **sizes)
    env = m.make_env(args, args.num_tasks * args.num_episodes)
    net, x, optimizer = m.build(args, env)
    yield "ours", args.num_tasks, lambda: m.meta_update(env, net, x, optimizer, args)

    naive = oracle("tesp")
    parts = zip(net.split(x), (net.encoder, net.encoder, net.policy))
    groups = [{k: v.clone().requires_grad_() for k, v in m.unflatten(*part).items()} for part in parts]
    one = m.make_env(args, args.num_episodes)
    noise = lambda task, phase: torch.randn(args.horizon, args.num_episodes, env.action_dims[0])
    yield "oracle", 1, lambda: naive.meta_update(one, *groups, env.sample_tasks(1), noise, args)


def coded_maddpg(num_agents, batch_size):
    """An update of all agents, and the four episodes of 25 steps before it."""
    from mpe2 import simple_spread_v3

    import coded_maddpg as m

    args = m.Args(num_agents=num_agents, batch_size=batch_size, learning_starts=batch_size, num_envs=4)
    env = m.make_env(args, args.num_envs)
    spec, t = m.make_spec(args, env), itertools.count(1)
    nets, replay, engine = m.make_nets(spec, "cpu"), m.Replay(args, spec), m.make_engine(args, spec)
    for _ in range(batch_size // 100 + 1):  # until there is a batch to learn from
        m.iterate(env, spec, nets, replay, engine, args, next(t))
    yield "ours", 1, lambda: m.iterate(env, spec, nets, replay, engine, args, next(t))

    twin = oracle("coded_maddpg").Maddpg(num_agents)
    yield "oracle", 1, alternate(twin.episode, lambda: twin.update(batch_size), batch_size)

    if find_spec("MADDPG"):  # the clone's training loop on mpe2's env
        one = simple_spread_v3.parallel_env(N=num_agents, max_cycles=25)
        sizes = {agent: [6 * num_agents, 5] for agent in one.possible_agents}
        port = importlib.import_module("MADDPG").MADDPG(
            sizes, 100_000, batch_size, args.lr, args.lr, tempfile.mkdtemp())
        logging.getLogger().setLevel(logging.WARNING)  # it logs every action

        def episode():
            obs, _ = one.reset()
            while one.agents:
                action = port.select_action(obs)
                after, reward, ended, _, _ = one.step(action)
                port.add(obs, action, reward, after, ended)
                obs = after

        learn = lambda: (port.learn(batch_size, args.gamma), port.update_target(args.tau))
        yield "maddpg-pettingzoo-pytorch", 1, alternate(episode, learn, batch_size)


def alternate(episode, learn, batch_size):
    """A function that plays four episodes and learns; before it, enough of them for a batch."""
    for _ in range(batch_size // 25 + 1):
        episode()
    return lambda: ([episode() for _ in range(4)], learn())


def lemol(batch_size, segment):
    import lemol as m

    args = m.Args(batch_size=batch_size, segment=segment)
    args.stored_guesses = True  # as the oracle has it
    match = m.Match(args, m.make_env(args, 1))
    env = m.make_env(args, match.runs)
    m.iterate(match, env, args)  # the exploration
    yield "ours", match.runs * segment, lambda: m.iterate(match, env, args)

    naive, one = oracle("lemol"), envs.make("simple_push", 1, horizon=25, dialect="mpe")

    def play():
        at = {}  # processor time at the end of each episode
        clock = lambda episode: at.update({episode: time.process_time()})
        naive.play(one, naive.OpponentModel(8, 20, 5), batch_size + segment, batch_size, clock)
        return at[batch_size + segment - 1] - at[batch_size - 1]  # without the exploration

    yield "oracle", segment, play


def mg2l(**sizes):
    import mg2l as m

    args = m.Args(warm_up=0, **sizes)
    env, one = m.make_env(args, args.num_envs + args.context_envs), m.make_env(args, 1)
    learner, tasks = m.build(args, env), env.all_tasks("train")
    while not learner.ring.length[:, 0].all():  # until there are contexts for every task
        m.iterate(env, learner, tasks, 0, args)
    yield "ours", 1, lambda: m.iterate(env, learner, tasks, 1, args)

    naive = oracle("mg2l")
    moments = naive.Moments(env.num_agents)
    yield "oracle", 1, lambda: naive.iterate(one, learner, moments, tasks, args)


# ---------------------------------------------------------------- the envs
def episode(env, actions, **task):
    """A function that plays an episode of these actions."""
    return lambda: (env.reset(**task), [env.step(action) for action in actions])


def spread(num_envs):
    from mpe2 import simple_spread_v3

    number = torch.randint(5, (25, 3, num_envs))
    yield "ours", 25 * num_envs, episode(envs.make("simple_spread", num_envs, horizon=25), number)
    one = simple_spread_v3.parallel_env(N=3, max_cycles=25)
    names = [dict(zip(one.possible_agents, row)) for row in number[..., 0].tolist()]
    yield "mpe2", 25, episode(one, names)
    if find_spec("vmas"):
        make = importlib.import_module("vmas").make_env
        env = make("simple_spread", num_envs, continuous_actions=False, n_agents=3)
        yield "vmas", 25 * num_envs, episode(env, [list(row[..., None]) for row in number])


def rware(num_envs, steps):
    """Ours beside five of the package's warehouses, one for each layout, one after the other."""
    from rware.warehouse import RewardType, Warehouse

    env, five = envs.make("rware", num_envs, horizon=steps), envs.make("rware", 5)
    number, tasks = torch.randint(5, (steps, 4, num_envs)), env.all_tasks()
    yield "ours", steps * num_envs, episode(env, number, task=tasks[torch.arange(num_envs) % 5])
    five.reset(tasks)
    plays = []
    for b in range(5):
        grid = five.highway[b].reshape(-1)[:-1].reshape(14, 14)[2:-2, 2:-2]
        lines = ["".join(".x"[not free] for free in line) for line in grid]
        lines[9] = "....gg...."
        warehouse = Warehouse(3, 8, 1, 4, 0, 2, 4, None, None, RewardType.INDIVIDUAL, layout="\n".join(lines))
        plays.append(episode(warehouse, number[..., b].tolist()))
    yield "rware", steps * 5, lambda: [play() for play in plays]


def robot(name, num_envs, steps):
    import gymnasium

    ours = {"HalfCheetah-v5": "half_cheetah_dir", "Ant-v5": "ant_dir"}[name]
    env = envs.make(ours, num_envs, horizon=steps)
    draw = np.random.default_rng(1)  # small actions, at which no ant falls: that would end its row's work
    action = draw.uniform(-0.3, 0.3, (steps, num_envs, env.action_dims[0])).astype(np.float32)
    yield "ours", steps * num_envs, episode(env, torch.from_numpy(action))
    sync = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(name)] * num_envs)
    yield "gymnasium", steps * num_envs, episode(sync, action)
    if find_spec("envpool"):
        make = importlib.import_module("envpool").make
        pool = make(name, env_type="gymnasium", num_envs=num_envs, num_threads=1)
        yield "envpool", steps * num_envs, episode(pool, action)


CASES = [  # name, unit, function, its arguments
    ("meta_mapg, ipd, LSTM, 8 chains", "chain", meta_mapg,
     dict(num_chains=8, chain_length=3, num_episodes=64, horizon=50)),
    ("maml_rl, nav2d", "iteration", maml_rl, dict(num_tasks=10)),
    ("tesp, wheeled, 5 tasks", "task", tesp, dict(num_tasks=5, num_episodes=10, horizon=50, epochs=5)),
    ("coded_maddpg, spread, M = 3", "update", coded_maddpg, dict(num_agents=3, batch_size=1024)),
    ("coded_maddpg, spread, M = 8", "update", coded_maddpg, dict(num_agents=8, batch_size=1024)),
    ("lemol, simple_push, 8 runs", "episode", lemol, dict(batch_size=128, segment=10)),
    ("mg2l, spread, 16 rows", "iteration", mg2l,
     dict(num_envs=12, context_envs=4, ppo_epochs=2, encoder_updates=2)),
    ("simple_spread, 1 env", "step", spread, dict(num_envs=1)),
    ("simple_spread, 256 envs", "step", spread, dict(num_envs=256)),
    ("rware, 64 envs", "step", rware, dict(num_envs=64, steps=100)),
    ("HalfCheetah, 64 envs", "step", robot, dict(name="HalfCheetah-v5", num_envs=64, steps=50)),
    ("Ant, 64 envs", "step", robot, dict(name="Ant-v5", num_envs=64, steps=50))]
QUICK = {  # what --quick changes
    meta_mapg: dict(num_chains=2, chain_length=1, num_episodes=4, horizon=5),
    maml_rl: dict(num_tasks=2, num_episodes=2, horizon=5),
    tesp: dict(num_tasks=2, num_episodes=2, horizon=5, epochs=2),
    coded_maddpg: dict(batch_size=32), lemol: dict(batch_size=4, segment=2),
    mg2l: dict(num_envs=4, horizon=10, context_size=5, encoder_updates=1, ppo_epochs=1),
    spread: dict(num_envs=2), rware: dict(num_envs=5, steps=5), robot: dict(num_envs=2, steps=2)}


def measure(works, rounds=3, least=0.5):
    """{who: processor seconds for a unit}, the fastest of some rounds, each of `least` seconds or more."""
    works, best = [*works], {}
    for who, units, play in works * (rounds + 1):
        spent = count = 0
        while not count or spent < least and who in best:  # once to warm up
            start = time.process_time()
            own = play()
            spent += own if isinstance(own, float) else time.process_time() - start
            count += units
        best[who] = min(spent / count, best[who]) if who in best else math.inf
    return best


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of cases; none: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--save", action="store_true", help="write benchmark/results/speed.csv")
    args = parser.parse_args(words)
    if args.save and (args.quick or args.words):
        parser.error("--save is for all cases at their full sizes")
    return args


def main(args):
    torch.set_num_threads(1)
    load, rows = os.getloadavg()[0], [["case", "unit", "who", "version", "milliseconds", "times"]]
    for name, unit, function, sizes in CASES:
        if args.words and not any(word in name for word in args.words):
            continue
        torch.manual_seed(1)
        works = function(**(sizes | QUICK[function] if args.quick else sizes))
        seconds = measure(works, 1, 0) if args.quick else measure(works)
        for who, each in seconds.items():
            number = version(who) if who not in ("ours", "oracle", "maddpg-pettingzoo-pytorch") else ""
            rows.append([name, unit, who, number, f"{1e3 * each:.4g}", f"{each / seconds['ours']:.2f}"])
            print(f"{name:32s}{who:28s}{rows[-1][4]:>12s} ms each {unit:12s}{rows[-1][5]:>8s}", flush=True)
    if args.save:
        write_result(ROOT / "benchmark" / "results" / "speed.csv", {
            "command": "python benchmark/speed.py --save", "machine": machine(), "commit": commit(),
            "date": datetime.date.today(), "load before": f"{load:.1f}"}, rows)


if __name__ == "__main__":
    main(parse())
