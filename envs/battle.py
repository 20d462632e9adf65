"""
Gathering ("gather"): 48 agents in a square ring around food that is laid out as a letter, on the engine of
MAgent2 (Zheng et al., 2018, arXiv:1712.00600; the package magent2, an optional one). A world of MG2L (Zhao et
al., 2025), of which only a film was published: the rules are those of magent2's gather_v5, while the numbers
marked * are ours.

Grid      40 x 40 *, a wall around it. Agents start 3 cells apart on the square from (2, 2) to (38, 38) *.
Task      the letter, one-hot: A, B, C, D. It is 15 wide and 21 high *, in the middle, of 162, 180, 117 and
          162 pieces of food. All four belong to both splits.
Actions   0 .. 28: go to one of the cells within a distance of 3, row by row; 14 is one's own.
          29 .. 32: attack what is above, left, right, below. A piece of food is eaten at the fifth attack, an
          agent dies at the first one.
Reward    each agent its own: -0.01 a step; attack -0.1; hitting food +0.5, eating it +5 instead; dying -1 and
          nothing else in that step.
Observed  (1125): env.obs_shape = (15, 15, 5), flattened: rows and columns about oneself, of which those
          within a distance of 7 are seen; wall, agent there, its health, food there, its health.
End       of a row: all is eaten. Dead agents see zeros, are paid zero, and their actions are ignored;
          info["alive"] is (B, 48) bool, info["food"] (B,) counts what is left.
Time      H = 100 *.
Random    the order of simultaneous attacks, in the engine; its seeds come from torch's global CPU stream.

The agents are alike, so that one network may serve all of them. Every row is an engine of its own, stepped in
turn.
"""

import numpy as np
import torch

from .navigation import check_task

SIZE = 40
LETTERS = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "B": ("####.", "#...#", "#...#", "####.", "#...#", "#...#", "####."),
    "C": (".###.", "#...#", "#....", "#....", "#....", "#...#", ".###."),
    "D": ("####.", "#...#", "#...#", "#...#", "#...#", "#...#", "####."),
}
RING = [at for k in range(12) for at in ((2 + 3 * k, 2), (38, 2 + 3 * k), (38 - 3 * k, 38), (2, 38 - 3 * k))]


def food(letter, thick=3):
    """[(x, y)]: every dot of the letter is a square of thick x thick pieces."""
    rows = LETTERS[letter]
    left, top = SIZE // 2 - len(rows[0]) * thick // 2, SIZE // 2 - len(rows) * thick // 2
    return [(left + x, top + y) for y in range(len(rows) * thick) for x in range(len(rows[0]) * thick)
            if rows[y // thick][x // thick] == "#"]


class Gather:
    """B grids, H steps. reset(task) takes letters, (B, 4), one a row; without them it draws some."""

    discrete, num_agents, task_dim, obs_shape = True, len(RING), len(LETTERS), (15, 15, 5)
    obs_dims, action_dims = (15 * 15 * 5,) * len(RING), (33,) * len(RING)

    def __init__(self, name, num_envs, horizon=None, device="cpu"):
        try:
            from magent2 import GridWorld
            from magent2.environments.gather.gather import default_reward_args, get_config
        except (ImportError, OSError) as e:  # not there, or its library does not load
            why = " ".join(str(e).split())
            raise ValueError(f"{name} needs MAgent2: pip install magent2 ({why})") from None
        self.horizon = 100 if horizon is None else horizon
        if self.horizon < 1:
            raise ValueError(f"{name}: horizon must be at least 1, not {horizon}")
        self.num_envs, self.device = num_envs, device
        config = lambda: get_config(SIZE, False, None, **default_reward_args)  # False: no minimap
        self.engines = [GridWorld(config()) for _ in range(num_envs)]
        self.food, self.agents = self.engines[0].get_handles()

    def reset(self, task=None, part=None):
        """part: (first, total) when these B rows are rows first, first+1, ... of `total` rows that several
        processes share: each draws the seeds of all of them."""
        task, B, N = check_task(task, self).cpu().numpy(), self.num_envs, self.num_agents
        if not (((task == 0) | (task == 1)).all() and (task.sum(1) == 1).all()):
            raise ValueError(f"a task must be one-hot, a letter: {', '.join(LETTERS)}")
        self.task, self.t, self.terminated = task, 0, np.zeros(B, bool)
        first, total = part or (0, B)
        seeds = torch.randint(2**31 - 1, (total,)).tolist()[first : first + B]
        self.seen = np.zeros((N, B, *self.obs_shape), np.float32)
        self.alive, self.left = np.ones((B, N), bool), np.zeros(B, int)
        for b, (engine, seed) in enumerate(zip(self.engines, seeds)):
            engine.set_seed(seed)
            engine.reset()
            engine.add_agents(self.agents, method="custom", pos=RING)  # first: ids count all that is added
            engine.add_agents(self.food, method="custom", pos=food(list(LETTERS)[task[b].argmax()]))
            self._look(b, np.arange(N))
            self.left[b] = engine.get_num(self.food)
        return self._observe()

    def step(self, action):
        wanted, given = (self.num_agents, {(self.num_envs,)}), (len(action), {tuple(a.shape) for a in action})
        if given != wanted:
            raise ValueError(f"action must be {wanted}, that is agents and shapes, not {given}")
        action = torch.stack(list(action), dim=1).cpu().numpy().astype(np.int32)  # (B, N)
        if action.min() < 0 or action.max() >= self.action_dims[0]:  # the engine does not look
            raise ValueError(f"actions must be from 0 to {self.action_dims[0] - 1}")
        reward = np.zeros((self.num_envs, self.num_agents), np.float32)
        for b in np.flatnonzero(~self.terminated):
            engine, ids = self.engines[b], np.flatnonzero(self.alive[b])
            engine.set_action(self.agents, np.ascontiguousarray(action[b, ids]))
            self.terminated[b] = engine.step()
            reward[b, ids], self.alive[b, ids] = engine.get_reward(self.agents), engine.get_alive(self.agents)
            self._look(b, ids)
            engine.clear_dead()  # of both kinds
            self.left[b] = engine.get_num(self.food)
        self.t += 1
        flags = self.terminated, np.full(self.num_envs, self.t >= self.horizon)
        return (self._observe(), torch.tensor(reward, device=self.device),
                *(torch.tensor(flag, device=self.device) for flag in flags),
                {"alive": torch.tensor(self.alive, device=self.device),
                 "food": torch.tensor(self.left, device=self.device)})

    def _look(self, b, ids):
        """What the agents `ids` (n,) see: all that are in row b's engine, dead in the last step or not."""
        view, _ = self.engines[b].get_observation(self.agents)
        self.seen[ids, b] = np.where(self.alive[b, ids][:, None, None, None], view, 0)

    def _observe(self):
        return torch.tensor(self.seen, device=self.device).flatten(2).unbind(0)  # N times (B, 1125)

    def all_tasks(self, split="train"):
        """(4, 4): the letters, one-hot, the same for both splits."""
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return torch.eye(len(LETTERS), device=self.device)

    def sample_tasks(self, n, split="train"):
        """(n, 4): letters, drawn uniformly and independently."""
        return self.all_tasks(split)[torch.randint(len(LETTERS), (n,))]

    def render(self, row=0, size=6):
        """(40 size, 40 size, 3) uint8: one row; agents are blue, food is red, the wall grey."""
        frame = np.full((SIZE, SIZE, 3), 255, np.uint8)
        frame[[0, -1]] = frame[:, [0, -1]] = 150
        for group, colour in (self.food, [215, 60, 60]), (self.agents, [60, 90, 215]):
            if self.engines[row].get_num(group):
                x, y = self.engines[row].get_pos(group).T
                frame[y, x] = colour
        return frame.repeat(size, 0).repeat(size, 1)
