"""
A pursuit on a grid of 3 x 3 ("uav"), an env that LeMOL's authors were developing. It follows their code.

Players   Agent 0 is the target (the adversary): stay, N, S, E, W, NE, SE, SW, NW. Agent 1 is the UAV: stay,
          N, S, E, W. Both move at once. A move out of the grid ends at its edge. Changing places is no catch.
Start     The UAV is in the first column and the target in the last one, in random rows.
Reward    Same cell after the move: 1 for the UAV, -1 for the target, and the episode terminates (its row then
          rests, with reward 0). Time is up: 1 for the target, -1 for the UAV. Otherwise 0.
Obs       The agent's own row and column, one-hot, then the other's, (12,). The other's are right with
          probability 1 - nu, else both are wrong. nu is 0.45 for the target and 0.3 for the UAV, and 0.1
          less after a "stay" (one listens). In the original the first half held the OTHER's true place,
          so that the noise did not matter; here it is the agent's own place.
"""

import torch
import torch.nn.functional as F

from .base import Env

SIZE, NU, LISTENING = 3, (0.45, 0.3), 0.1
# row, column
MOVES = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, 1], [0, -1], [-1, 1], [1, 1], [1, -1], [-1, -1]])


class Pursuit(Env):
    """B grids, H steps. action[i]: (B,) long, or (B, A_i) floats of which the largest counts."""

    discrete, soft, num_agents, num_adversaries, default_horizon = True, True, 2, 1, 25
    obs_dims, action_dims, action_splits = (4 * SIZE,) * 2, (9, 5), ((9,), (5,))

    def reset(self, task=None):
        self.check_task(task)
        self.t, B = 0, self.num_envs
        row = (torch.rand(2, self.total)[:, self.mine].to(self.device) * SIZE).long()
        column = torch.stack([torch.full_like(row[0], SIZE - 1), torch.zeros_like(row[0])])
        self.place = torch.stack([row, column], -1)  # (2, B, 2)
        self.terminated = torch.zeros(B, dtype=torch.bool, device=self.device)
        return self._obs(torch.zeros(2, B, dtype=torch.bool, device=self.device))

    def step(self, action):
        action = self.check_action(action)
        if isinstance(action, tuple):  # soft
            action = torch.stack([a.argmax(1) for a in action])
        action = torch.as_tensor(action, device=self.device)  # (2, B)
        moved = (self.place + MOVES.to(self.device)[action]).clamp(0, SIZE - 1)
        alive = ~self.terminated
        self.place = torch.where(alive[:, None], moved, self.place)
        self.t += 1
        caught = alive & (self.place[0] == self.place[1]).all(-1)
        escaped = alive & ~caught & (self.t >= self.horizon)
        self.terminated = self.terminated | caught
        target = escaped.float() - caught.float()
        truncated = torch.full_like(caught, self.t >= self.horizon)
        reward = torch.stack([target, -target], 1)  # (B, 2)
        return self._obs(action == 0), reward, self.terminated.clone(), truncated, {}

    def _obs(self, stayed):
        out = []
        for i in range(2):
            other = self.place[1 - i]
            shift = (torch.rand(self.total, 2)[self.mine].to(self.device) * (SIZE - 1)).long()
            wrong = (other + 1 + shift) % SIZE
            nu = NU[i] - LISTENING * stayed[i].float()
            lies = torch.rand(self.total)[self.mine].to(self.device) < nu
            seen = torch.where(lies[:, None], wrong, other)
            numbers = torch.cat([self.place[i], seen], -1)  # (B, 4): own row and column, the other's
            out.append(F.one_hot(numbers, SIZE).flatten(1).float())
        return tuple(out)

    def render(self, row=0, size=240):
        """(size, size, 3) uint8: the grid with the UAV (blue) and the target (red) of one row."""
        frame = torch.full((size, size, 3), 235, dtype=torch.uint8)
        pixel = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), -1)
        cell = size / SIZE
        frame[(pixel % cell < 2).any(-1)] = 160  # lines between the cells
        for i, (share, colour) in enumerate([(0.35, [200, 40, 40]), (0.2, [30, 60, 200])]):
            centre = (self.place[i, row].cpu() + 0.5) * cell
            frame[((pixel - centre) / cell).norm(dim=-1) < share] = torch.tensor(colour, dtype=torch.uint8)
        return frame.numpy()
