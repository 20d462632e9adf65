"""
coded_maddpg.py beside a public PyTorch port of MADDPG: the return after equally many steps.

  git clone https://github.com/Git-123-Hub/maddpg-pettingzoo-pytorch    and put it on PYTHONPATH
  python benchmark/beside_port.py --seeds 1 2 3      some minutes a seed, nearly all of them the port's

Both learn mpe2's simple_spread, M = 3, for 100,000 steps with B = 1024, lr = 0.01, gamma = 0.95, tau = 0.01
and an update every 100 steps after the first 25,600. Ours plays its own envs, the port mpe2's. Then both play
400 episodes in mpe2, greedily: the action with the largest logit. Seeds that have been done are kept in
runs/benchmark/port. Writes benchmark/results/coded_maddpg-beside-port.csv.
"""

import argparse
import datetime
import importlib
import json
import logging
import math
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from mpe2 import simple_spread_v3
from run import ROOT, commit, machine, write_result

sys.path.insert(0, str(ROOT))

import coded_maddpg as c  # noqa: E402

STEPS, EVERY, START, HORIZON = 100_000, 100, 25_600, 25
FOLDER = ROOT / "runs" / "benchmark" / "port"


def make(seed):
    env = simple_spread_v3.parallel_env(N=3, max_cycles=HORIZON)
    env.reset(seed=seed)
    return env


def ours(seed, args):
    """{agent's name: its actor, obs (1, O) -> logits (1, A)}"""
    c.train(args)
    actor = c.load(args.run_dir)["nets"]["actor"]
    layers = [*map(c.layers, actor, c.make_spec(args, c.make_env(args, 1)).actor)]
    return {f"agent_{i}": (lambda obs, i=i: c.mlp(layers[i], obs)) for i in range(3)}


def port(seed, args):
    """The same of the port, trained by its own loop."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    env, sizes = make(seed), {f"agent_{i}": [18, 5] for i in range(3)}
    maddpg = importlib.import_module("MADDPG").MADDPG(
        sizes, STEPS, args.batch_size, args.lr, args.lr, tempfile.mkdtemp())
    logging.getLogger().setLevel(logging.WARNING)  # it logs every action
    for step in range(STEPS):
        if step % HORIZON == 0:
            obs, _ = env.reset()
        # until the first update it plays its first policy, as ours does
        action = maddpg.select_action(obs)
        after, reward, ended, _, _ = env.step(action)
        maddpg.add(obs, action, reward, after, ended)
        obs = after
        if step >= START and step % EVERY == 0:
            maddpg.learn(args.batch_size, args.gamma)
            maddpg.update_target(args.tau)
    return {name: agent.actor for name, agent in maddpg.agents.items()}


@torch.no_grad()
def play(actors, episodes=400):
    """Returns of greedy episodes in mpe2, summed over the agents; None: random actions."""
    env, returns = make(10_000), []
    draw = np.random.default_rng(1)
    for _ in range(episodes):
        obs, _ = env.reset()
        returns.append(0.0)
        while env.agents:
            action = {name: int(actors[name](torch.from_numpy(x).float()[None]).argmax()) if actors
                      else int(draw.integers(5)) for name, x in obs.items()}
            obs, reward, *_ = env.step(action)
            returns[-1] += sum(reward.values())
    return returns


def compare(seed):
    """{tag: value} of a seed."""
    args = c.Args(seed=seed, total_steps=STEPS, update_every=EVERY, learning_starts=START, batch_size=1024,
                  eval_every=0, run_dir=str(FOLDER / f"seed_{seed}"))
    torch.set_num_threads(1)
    values, random = {"global_step": STEPS}, statistics.mean(play(None))
    for name, train in ("ours", ours), ("port", port):
        begin = time.process_time()
        actors = train(seed, args)
        values[f"{name}/minutes"] = (time.process_time() - begin) / 60
        returns = play(actors)
        values |= {f"{name}/return": statistics.mean(returns), f"{name}/random/return": random,
                   f"{name}/return_ci95": 1.96 * statistics.stdev(returns) / math.sqrt(len(returns))}
        print(f"seed {seed}, {name}: {values[f'{name}/return']:.2f}", flush=True)
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    seeds = parser.parse_args().seeds
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [["seed", "step", "tag", "value"]]
    for seed in seeds:
        file = FOLDER / f"seed_{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(compare(seed)))
        values = json.loads(file.read_text())
        rows += [[seed, "final", tag, f"{value:.6g}"] for tag, value in values.items()]
    minutes = [value for _, _, tag, value in rows if tag == "port/minutes"]
    write_result(ROOT / "benchmark" / "results" / "coded_maddpg-beside-port.csv", {
        "command": f"python benchmark/beside_port.py {' '.join(sys.argv[1:])}",
        "seeds": " ".join(map(str, seeds)), "machine": machine(), "minutes": " ".join(minutes),
        "note": "minutes: processor time of the port", "commit": commit(),
        "date": datetime.date.today()}, rows)
