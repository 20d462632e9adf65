"""
2-D navigation ("nav2d"): a point walks to a goal that it cannot see (Finn et al., 2017, arXiv:1703.03400,
Sec. 5.3).

State     the position in the plane, start (0, 0), which is also the observation.
Actions   the displacement: action_scale * a, each component clipped to [-0.1, 0.1].
Reward    minus the Euclidean distance to the goal, after the step.
End       both components closer than 0.01 to the goal. The row then rests where it is, with reward 0.
Task      the goal, (2,), uniform on [-0.5, 0.5]^2.

action_scale=1 hands the policy's action to the point as it is, as a common PyTorch implementation of MAML-RL
does: a policy of standard deviation 1 then begins almost bang-bang. 0.1 is the MAML authors' own code, which
maps [-1, 1] to the range of a step. Numbers under the two must not be compared.
"""

import torch

STRIPES = 100  # of a task range, along its first coordinate; every fifth is held out for "test"


class Navigation:
    """B points, H steps. reset(task) takes the goals, (B, 2), one a row; without them it draws training
    goals."""

    discrete, num_agents, obs_dims, action_dims, task_dim = False, 1, (2,), (2,), 2

    def __init__(self, name, num_envs, horizon=100, device="cpu", action_scale=1.0):
        if horizon < 1 or not action_scale > 0:
            raise ValueError(f"{name}: horizon must be at least 1 and action_scale positive, "
                             f"not {horizon} and {action_scale}")
        self.num_envs, self.horizon, self.device = num_envs, horizon, device
        self.action_scale = action_scale

    def reset(self, task=None, part=None):  # part: see envs.mujoco; here no start is random
        self.task = check_task(task, self).to(self.device, torch.float32)  # (B, 2)
        self.t, self.x = 0, torch.zeros(self.num_envs, 2, device=self.device)
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return self.x

    def step(self, action):
        if action.shape != self.x.shape:
            raise ValueError(f"action must be {tuple(self.x.shape)}, not {tuple(action.shape)}")
        alive = ~self.terminated[:, None]  # (B, 1)
        move = (self.action_scale * action).clamp(-0.1, 0.1)
        self.x, self.t = torch.where(alive, self.x + move, self.x), self.t + 1
        gap = self.x - self.task
        reward = torch.where(alive, -gap.norm(dim=1, keepdim=True), 0)  # (B, 1)
        self.terminated = (gap.abs() < 0.01).all(1)  # for good: who has arrived rests
        truncated = torch.full_like(self.terminated, self.t >= self.horizon)
        return self.x, reward, self.terminated, truncated, {}

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


def check_task(task, env):
    """The rows' tasks, (B, D); fresh training tasks for None. Raises ValueError for another shape."""
    if task is None:
        return env.sample_tasks(env.num_envs)
    task, wanted = torch.as_tensor(task), (env.num_envs, env.task_dim)
    if task.shape != wanted:
        raise ValueError(f"task must be {wanted}, one task a row, not {tuple(task.shape)}")
    return task


def uniform_tasks(n, low, high, split):
    """(n, len(low)) tasks on the box between `low` and `high`, from torch's global CPU stream. The box is cut
    along its first coordinate into 100 stripes, of which every fifth (2, 7, ..., 97) is "test" and the others
    "train": the splits do not overlap, and both cover the box evenly. "train" draws uniformly. "test" is
    stratified, so that few tasks stand for the box: they go round the stripes, now in the lower half, now in
    the upper one, and along every other coordinate each n-th part of the box gets one."""
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
    # 1 % off the edges of a stripe, so that rounding does not carry a task over them
    u[:, 0] = (stripe[row] + 0.01 + 0.98 * u[:, 0]) / STRIPES
    low, high = torch.tensor(low), torch.tensor(high)
    return low + (high - low) * u
