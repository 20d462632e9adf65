"""TESP on a pendulum that shall stand at a hidden angle: python own_tasks.py --env pendulum --horizon 200"""
import gymnasium
import numpy as np

import tesp
from envs.adapters import from_gymnasium


class Target(gymnasium.Wrapper):
    def reset(self, seed=None, options=None):
        self.goal = options["task"][0]  # a row of `tasks`
        return self.env.reset(seed=seed)

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, -abs(np.arctan2(obs[1], obs[0]) - self.goal), *rest


tasks = {"train": np.linspace(-2, 2, 40)[:, None], "test": np.linspace(-1.9, 1.9, 20)[:, None]}
pendulum = lambda: Target(gymnasium.make("Pendulum-v1"))
tesp.make_env = lambda args, n, **part: from_gymnasium(pendulum, n, horizon=args.horizon, tasks=tasks, **part)
tesp.train(tesp.parse())
