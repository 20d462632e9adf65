"""
The warehouse of mg2l.py and that of the package rware it comes from, played by the same kind of random
actions, for speed_mg2l.py. Both make the observations of all robots at every step; an episode has 100.
"""

import numpy as np
import torch

import envs

HORIZON = 100


def ours(rows, steps):
    """A function that plays so many steps of all rows, resets included."""
    env = envs.make("rware", rows, horizon=HORIZON)
    tasks, draw = env.all_tasks()[torch.arange(rows) % 5], torch.Generator().manual_seed(0)

    def play():
        for t in range(steps):
            if t % HORIZON == 0:
                env.reset(tasks)
            env.step(torch.randint(5, (env.num_agents, rows), generator=draw))

    return play


def rware(rows, steps):
    """The same with rows warehouses of the package, one after the other, in the same layouts."""
    from rware.warehouse import RewardType, Warehouse

    env, worlds, draw = envs.make("rware", 5), [], np.random.default_rng(0)
    env.reset(env.all_tasks())
    for b in range(rows):
        grid = env.highway[b % 5].reshape(-1)[:-1].reshape(14, 14)[2:-2, 2:-2]
        lines = ["".join(".x"[not free] for free in line) for line in grid]
        lines[9] = "....gg...."
        worlds.append(Warehouse(3, 8, 1, 4, 0, 2, 4, None, None, RewardType.INDIVIDUAL,
                                layout="\n".join(lines)))

    def play():
        for t in range(steps):
            for world, action in zip(worlds, draw.integers(5, size=(rows, 4))):
                if t % HORIZON == 0:
                    world.reset()
                world.step(action)

    return play
