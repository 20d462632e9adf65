"""
How fast the worlds of mg2l.py step, beside the packages they come from.

    python benchmark/worlds_mg2l.py --rows 64 --seconds 5

Both play the same kind of random actions in one thread, alternate in time, and are counted in CPU seconds of
this process; a step is one step of one warehouse, all robots, observations included. rware (pip install
rware) is asked for one warehouse after the other, a fresh one where an episode ends.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import envs  # noqa: E402

HORIZON = 100


def rate(play, seconds):
    """Steps a CPU second of `play`, which returns how many it has done."""
    steps, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        steps += play()
    return steps / spent


def our_warehouse(rows):
    env = envs.make("rware", rows, horizon=HORIZON)
    tasks, draw = env.all_tasks()[torch.arange(rows) % 5], torch.Generator().manual_seed(0)

    def play():  # an episode, its reset included
        env.reset(tasks)
        for _ in range(HORIZON):
            env.step(torch.randint(5, (env.num_agents, rows), generator=draw))
        return HORIZON * rows

    return play


def rware_warehouse(rows):
    from rware.warehouse import RewardType, Warehouse

    ours = envs.make("rware", 5)
    ours.reset(ours.all_tasks())
    worlds = []
    for b in range(rows):
        grid = ours.highway[b % 5].reshape(-1)[:-1].reshape(14, 14)[2:-2, 2:-2]
        lines = ["".join(".x"[not free] for free in line) for line in grid]
        lines[9] = "....gg...."
        world = Warehouse(3, 8, 1, 4, 0, 2, 4, None, None, RewardType.INDIVIDUAL, layout="\n".join(lines))
        world.reset(seed=b)
        worlds.append(world)
    draw, clock = np.random.default_rng(0), [0]

    def play():  # a step of every world: an episode of all would take long
        for world, action in zip(worlds, draw.integers(5, size=(rows, 4))):
            world.step(action)
        clock[0] += 1
        if clock[0] % HORIZON == 0:
            for world in worlds:
                world.reset()
        return rows

    return play


def warehouse(rows, seconds):
    """(ours, rware): steps a CPU second of `rows` warehouses; `seconds` in all, in five turns of each."""
    plays, rates = (our_warehouse(rows), rware_warehouse(rows)), ([], [])
    for play in plays:
        play()
    for _ in range(5):
        for play, rate_ in zip(plays, rates):
            rate_.append(rate(play, seconds / 10))
    return tuple(float(np.median(r)) for r in rates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = warehouse(given.rows, given.seconds)
    print(f"warehouse, {given.rows} at once: {ours:,.0f} steps a CPU second, rware {theirs:,.0f}: "
          f"{ours / theirs:.0f} times")
