"""
2-D navigation ("nav2d"): a point walks to a goal that it cannot see (Finn et al., 2017, arXiv:1703.03400,
Sec. 5.3).

State     the position in the plane, which is also the observation; it starts at (0, 0).
Actions   the displacement, each component clipped to [-0.1, 0.1].
Reward    minus the Euclidean distance to the goal after the step.
End       both components closer than 0.01 to the goal. The row then rests where it is, with reward 0.
Task      the goal, (2,), uniform on [-0.5, 0.5]^2.
"""

import torch

from .base import Env, uniform_tasks


class Navigation(Env):
    """B points, H steps. reset(task) takes the goals, (B, 2), one a row; without them it draws training
    goals."""

    obs_dims, action_dims, task_dim, splits = (2,), (2,), 2, ("train", "test")

    def reset(self, task=None):
        self.task = self.check_task(task).to(self.device, torch.float32)  # (B, 2)
        self.t, self.x = 0, torch.zeros(self.num_envs, 2, device=self.device)
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self.x.clone()

    def step(self, action):
        (action,) = self.check_action(action)
        alive = ~self.terminated[:, None]  # (B, 1)
        self.x = torch.where(alive, self.x + action.clamp(-0.1, 0.1), self.x)
        self.t += 1
        gap = self.x - self.task
        reward = torch.where(alive, -gap.norm(dim=1, keepdim=True), 0)  # (B, 1)
        self.terminated = (gap.abs() < 0.01).all(1)  # and stays so: a point that has arrived rests
        truncated = torch.full_like(self.terminated, self.t >= self.horizon)
        return self.x.clone(), reward, self.terminated.clone(), truncated, {}

    def sample_tasks(self, n, split="train"):
        """(n, 2) goals."""
        return uniform_tasks(n, [-0.5, -0.5], [0.5, 0.5], split).to(self.device)

    def render(self, row=0, size=240):
        """(size, size, 3) uint8: the square [-1, 1]^2 with the goal (green) and the point (black) of one
        row."""
        axis = torch.linspace(-1, 1, size)
        pixel = torch.stack(torch.meshgrid(-axis, axis, indexing="ij")[::-1], dim=-1)  # (size, size, 2): x, y
        frame = torch.full((size, size, 3), 255, dtype=torch.uint8)
        for where, radius, colour in (self.task, 0.05, [0, 160, 0]), (self.x, 0.03, [0, 0, 0]):
            frame[(pixel - where[row].cpu()).norm(dim=-1) < radius] = torch.tensor(colour, dtype=torch.uint8)
        return frame.numpy()
