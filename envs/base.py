"""What the envs share: the constructor, the checks of the contract (envs/__init__.py) and sets of tasks."""

from functools import cached_property
from math import prod

import numpy as np
import torch

STRIPES = 100  # of a task range, along its first coordinate; every fifth is held out for "test"


class Env:
    """B rows that play side by side. They are the rows `mine` of `total` rows, which `world` processes share.
    Each process draws the random numbers of all rows and keeps those of its own, so that a row's episode does
    not depend on the process that plays it."""

    default_horizon, num_agents, discrete = 100, 1, False
    soft = False  # whether a discrete env also takes (B, A_i) floats

    def __init__(self, name, num_envs, horizon=None, device="cpu", threads=1, part=(0, 1)):
        horizon, (rank, world) = self.default_horizon if horizon is None else horizon, part
        if min(num_envs, horizon, threads) < 1:
            raise ValueError(f"{name}: num_envs, horizon and threads must be at least 1, "
                             f"not {num_envs}, {horizon} and {threads}")
        if not 0 <= rank < world:
            raise ValueError(f"{name}: part must be (rank, world) with 0 <= rank < world, not {part}")
        self.name, self.num_envs, self.horizon, self.device = name, num_envs, horizon, device
        self.threads = threads
        self.total, self.mine = world * num_envs, slice(rank * num_envs, (rank + 1) * num_envs)

    def check_task(self, task):
        """The rows' tasks, (B, D); training tasks for None. ValueError for another shape."""
        if not hasattr(self, "task_dim"):
            if task is not None:
                raise ValueError(f"{self.name} has no tasks")
            return None
        if task is None:
            return self.sample_tasks(self.total)[self.mine]
        task, wanted = torch.as_tensor(task), (self.num_envs, self.task_dim)
        if task.shape != wanted:
            raise ValueError(f"{self.name}: task must be {wanted}, one a row, not {tuple(task.shape)}")
        return task

    def check_split(self, split):
        if split not in self.splits:
            raise ValueError(f"{self.name}: split must be one of {', '.join(self.splits)}, not {split!r}")

    @cached_property
    def choices(self):
        """(N, 1): how many actions each agent has, where they are numbers."""
        splits = getattr(self, "action_splits", [(A,) for A in self.action_dims])
        return np.array([[prod(split)] for split in splits], np.uint64)

    def check_action(self, action):
        """The actions of all agents: numbers as a new array (N, B), or a tuple of (B, A_i) floats.
        ValueError for anything else."""
        alone = self.num_agents == 1 and torch.is_tensor(action)
        action = (action,) if alone else tuple(action)
        numbers = self.discrete and not (self.soft and action and action[0].is_floating_point())
        wanted = [(self.num_envs,) if numbers else (self.num_envs, A) for A in self.action_dims]
        if [a.shape for a in action] != wanted:
            raise ValueError(f"{self.name}: action must be {wanted}, one for each agent, "
                             f"not {[tuple(a.shape) for a in action]}")
        if not numbers:
            return action
        number = torch.stack(action).cpu().numpy()
        # One comparison is enough: read as unsigned, a negative number is larger than all others.
        if number.dtype != np.int64 or (number.view(np.uint64) >= self.choices).any():
            most = (self.choices[:, 0] - 1).tolist()
            raise ValueError(f"{self.name}: actions must be long, in 0 .. {most}, not "
                             f"{number.min(1).tolist()} .. {number.max(1).tolist()} of {number.dtype}")
        return number

    def fresh(self, x):
        """A tensor on the env's device from an array that nobody else uses."""
        x = torch.from_numpy(x)
        return x if self.device == "cpu" else x.to(self.device)

    def clock(self):
        """terminated and truncated, (B,) each, of an env in which no row ends early."""
        over = np.zeros((2, self.num_envs), bool)
        over[1] = self.t >= self.horizon
        return self.fresh(over[0]), self.fresh(over[1])

    def tensor(self, x, dtype=torch.float32):
        """A copy of an array on the env's device: it does not change later."""
        return torch.tensor(x, dtype=dtype, device=self.device)


class FiniteTasks:
    """For an Env with a finite set of tasks: `tasks` is {split: (K, D)}."""

    @property
    def splits(self):
        return tuple(self.tasks)

    def all_tasks(self, split="train"):
        """(K, D) float32: all tasks of the split, always in the same order."""
        self.check_split(split)
        return self.tensor(self.tasks[split])

    def sample_tasks(self, n, split="train"):
        """(n, D): rows of all_tasks(split), drawn uniformly and independently."""
        self.check_split(split)
        return self.tensor(self.tasks[split][torch.randint(len(self.tasks[split]), (n,)).numpy()])


def uniform_tasks(n, low, high, split):
    """(n, len(low)) tasks on the box between `low` and `high`, from torch's global CPU stream. The box is cut
    along its first coordinate into 100 stripes, of which every fifth (2, 7, ..., 97) is "test" and the others
    "train": the splits do not overlap, and both cover the box evenly. "train" draws uniformly. "test" is
    stratified, so that a few tasks represent the box: they take the stripes in turn, alternating between the
    lower and the upper half, and along every other coordinate each of n equal slices gets one task."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    stripe = torch.arange(STRIPES)
    stripe = stripe[(stripe % 5 == 2) == (split == "test")]
    u, half = torch.rand(n, len(low)), len(stripe) // 2
    if split == "train":
        row = torch.randint(len(stripe), (n,))
    else:
        k = torch.arange(n)
        row = k // 2 % half + half * (k % 2)
        slices = torch.stack([torch.randperm(n) for _ in low], 1)  # (n, len(low))
        u[:, 1:] = (slices[:, 1:] + u[:, 1:]) / n
    # keep 1 % away from the edges of a stripe, so that rounding does not cross them
    u[:, 0] = (stripe[row] + 0.01 + 0.98 * u[:, 0]) / STRIPES
    low, high = torch.tensor(low), torch.tensor(high)
    return low + (high - low) * u
