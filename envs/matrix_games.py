"""
Iterated matrix games: prisoner's dilemma ("ipd") and rock-paper-scissors for 2, 3 and 4 players ("rps",
"rps3", "rps4"), with the initial opponents ("personas") of Kim et al., 2021 (arXiv:2011.00382, Sec. 5).

State     0 before the first move; afterwards 1 + the last joint action read as a number in base A, agent 0's
          action first. ALL agents see the same index: the opponent's view is not mirrored.
Actions   ipd: 0 = Defect, 1 = Cooperate (states 1..4 are DD, DC, CD, CC); rps: 0 Rock, 1 Paper, 2 Scissors.
Task      agent 0's opponents: (N-1, S, A) logits, one table for each. The payoffs are the same in every
          task. The script plays these tables and lets them learn.
"""

import numpy as np
import torch

from .base import Env

# payoff[own action][other's action]
PAYOFF = {"ipd": [[-0.5, 1.5], [-1.5, 0.5]], "rps": [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]}
CLASSES = {"ipd": ("defective", "cooperative"), "rps": ("rock", "paper", "scissors")}  # by preferred action
SPLITS = {"train": 200, "val": 20, "test": 20}  # personas of each class


class MatrixGame(Env):
    """B games of H steps. With index_obs, obs[i] is the state as (B,) long instead of one-hot (B, S)
    float32."""

    discrete, default_horizon, splits = True, 150, tuple(SPLITS)

    def __init__(self, name, num_envs, index_obs=False, personas=None, ood=False, **common):
        super().__init__(name, num_envs, **common)
        game, self.num_agents, self.index_obs = name[:3], int(name[3:] or 2), index_obs
        self.actions, N = len(PAYOFF[game]), self.num_agents
        self.states = S = 1 + self.actions**N
        self.obs_dims, self.action_dims = (S,) * N, (self.actions,) * N
        # The state holds the whole last joint action, so the reward is a table look-up by the next state.
        # With more than two players, each meets every other and the payoffs of the pairs are averaged. The
        # paper does not say how.
        joint = torch.cartesian_prod(*[torch.arange(self.actions)] * N)  # (S-1, N), row order = state order
        pay = torch.tensor(PAYOFF[game])[joint[:, :, None], joint[:, None, :]]  # (S-1, N, N)
        pay = (pay.sum(2) - pay.diagonal(dim1=1, dim2=2)) / (N - 1)
        self.reward_table = torch.cat([torch.zeros(1, N), pay]).to(self.device)  # (S, N)
        self.shapes = [(num_envs,)] * N
        self.pay, self.rows = self.reward_table.cpu().numpy(), np.eye(S, dtype=np.float32)
        classes = CLASSES[game]
        if personas is None:
            self.personas = draw_personas(classes, S, self.actions, 0, ood)
        else:
            self.personas = load_personas(personas, classes, S, self.actions)

    def reset(self, task=None):
        """Games at state 0. `task`, (B, N-1, S, A), changes the opponents, not the game."""
        wanted = (self.num_envs, self.num_agents - 1, self.states, self.actions)
        if task is not None and tuple(task.shape) != wanted:
            raise ValueError(f"{self.name}: task must be {wanted}, not {tuple(task.shape)}")
        self.t = 0
        return self._obs(np.zeros(self.num_envs, np.int64))

    def step(self, action):
        try:  # one call reads the joint action as a number in base A and checks its range
            joint = np.ravel_multi_index([a.cpu().numpy() for a in action], self.action_dims)
        except (TypeError, ValueError):
            joint = None
        if joint is None or [a.shape for a in action] != self.shapes:
            self.check_action(action)  # slower, but says what is wrong
        joint += 1
        self.t += 1
        return self._obs(joint), self.fresh(self.pay.take(joint, 0)), *self.clock(), {}

    def _obs(self, state):
        seen = state if self.index_obs else self.rows.take(state, 0)  # (B,) or (B, S)
        return tuple(map(self.fresh, [seen, *[seen.copy() for _ in range(self.num_agents - 1)]]))

    def sample_tasks(self, n, split="train"):
        """(n, N-1, S, A) logits: every opponent drawn from the whole split, uniformly, with replacement."""
        self.check_split(split)
        pool = torch.cat(list(self.personas[split].values()))
        return pool[torch.randint(len(pool), (n, self.num_agents - 1))].to(self.device)

    def tasks_by_class(self, split):
        """{class: (n, N-1, S, A)}: each persona of the split once as first opponent. Further opponents (N >
        2) come from the whole split in a fixed order, so that two calls give the same tasks."""
        self.check_split(split)
        pool, out = torch.cat(list(self.personas[split].values())), {}
        order = torch.Generator().manual_seed(0)
        for name, first in self.personas[split].items():
            rest = pool[torch.randint(len(pool), (len(first), self.num_agents - 2), generator=order)]
            out[name] = torch.cat([first[:, None], rest], dim=1).to(self.device)
        return out


def draw_personas(classes, S, A, seed, ood=False):
    """{split: {class: (n, S, A) logits}}. In every state, independently, the class's own action has
    probability U(1/A, 1) and the others share the rest. With `ood` the test split is the 20 most extreme of
    each class (largest mean logit of the preferred action) instead of a random 20, so that it lies outside
    what training has seen."""
    rng, out = np.random.default_rng(seed), {split: {} for split in SPLITS}
    for preferred, name in enumerate(classes):
        n = sum(SPLITS.values())
        p = rng.uniform(1 / A, 1, (n, S, 1))
        probs = np.repeat((1 - p) / (A - 1), A, axis=2)
        probs[:, :, preferred] = p[:, :, 0]
        if ood:
            order, test = np.log(p / (1 - p)).mean((1, 2)).argsort(), SPLITS["test"]  # ascending
            probs = probs[np.concatenate([rng.permutation(order[:-test]), order[-test:]])]
        logits, start = torch.tensor(np.log(probs), dtype=torch.float32), 0
        for split, size in SPLITS.items():
            out[split][name] = logits[start : start + size]
            start += size
    return out


def load_personas(path, classes, S, A):
    """The same from an .npz with arrays "<class>_<split>" of (n, S, A) log-probabilities. Raises
    ValueError."""
    try:
        with np.load(path) as data:
            out = {split: {name: torch.tensor(data[f"{name}_{split}"]).float() for name in classes}
                   for split in SPLITS}
    except Exception as error:  # missing, not an .npz, truncated, pickled, without an array
        raise ValueError(f"personas {path}: wanted an .npz of <class>_<split> for {', '.join(classes)} and "
                         f"{', '.join(SPLITS)} ({error})") from None
    for split, pools in out.items():
        for name, pool in pools.items():
            if pool.shape[1:] != (S, A) or not len(pool) or not pool.isfinite().all():
                raise ValueError(f"personas {path}: {name}_{split} must be finite, (n, {S}, {A}), "
                                 f"not {tuple(pool.shape)}")
    return out
