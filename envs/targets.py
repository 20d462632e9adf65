"""
Particle envs with hidden targets (Zhao et al., 2025, IEEE TNNLS, DOI 10.1109/TNNLS.2025.3540758, Sec. V). The
task says which landmarks or which prey count. No agent can see it; only the rewards tell.

Env             Agents   Besides                    Task
spread          2        3 landmarks                which 2 of them count: 0/1 vector (3,), 3 tasks
spread_large    3        4 landmarks                which 3 of them count: 0/1 vector (4,), 4 tasks
hunting         3        2 preys                    which of them counts: one-hot (2,), 2 tasks
hunting_large   3        3 preys, 2 obstacles       the same: one-hot (3,), 3 tasks

State     positions and velocities. One step: v <- 0.75 v + 0.1 force, then x <- x + 0.1 v; no masses.
Actions   (B, 2), nominally in [-1, 1]^2, not clipped; the force is 5 (spread) or 3 (hunting) times that.
Walls     soft ramps along each axis, 100 times a softplus. They begin where |x| + radius = 1 and push inwards
          up to |x| = 1.2; beyond that they push outwards, as in the authors' code.
Start     agents and preys in [-1, 1]^2, landmarks and obstacles in [-0.9, 0.9]^2, v = 0.
End       never before the horizon, 100.

Spread    Observed: own position, the way to each landmark, the way to each other agent. Reward: minus the
          sum, over the landmarks that count, of the distance to the nearest agent, times the number of
          agents; the same for all. Radius 0.15; bodies pass through each other.
Hunting   Observed: own position; the way to each other predator, each prey, each obstacle; then the lengths
          of these ways; zeros where a length is 1.414 or more. Reward: -0.1 times the sum of the predators'
          distances to the prey that counts, plus 10 for a predator that touches it. This prey flees from its
          nearest predator; the others wander: forces uniform in [-1, 1]^2 (the authors' are in [0, 1]^2 and
          drift into a corner). Predators: radius 0.1, speed up to 1; preys: 0.05 and 1.2. All bodies push
          each other away, as in envs.particle.

The set of tasks is finite and the same in "train" and "test": there is nothing to hold out. The paper's code
has spread and hunting. The larger ones are ours, after the authors' animations; the obstacles' size, 0.2, is
that of an earlier public prototype, and it is our choice that predators see them.
"""

from itertools import combinations

import numpy as np
import torch

from .base import Env, FiniteTasks
from .particle import BLUE, GOALS, GREY, MARGIN, RED, STIFFNESS, contact, disc, integrate, relate

WALL, REACH, SIGHT = 1.2, 0.2, 1.414  # of the walls: where, and how far inwards; how far predators see


def walls(pos, radii):
    """Forces (2, M, B) of the four walls on bodies at pos (2, M, B) with radii (M,)."""
    force = np.zeros_like(pos)
    if np.abs(pos).max() > WALL - REACH - radii.max() - 50 * MARGIN:  # elsewhere they are below 1e-22
        for wall in (WALL, -WALL):
            gap = pos - wall
            overlap = (radii[:, None] + REACH - np.abs(gap)) / MARGIN
            force += STIFFNESS * MARGIN * np.sign(gap) * np.logaddexp(0, overlap)
    return force


class Targets(FiniteTasks, Env):
    """What the envs share. Index order inside: x or y, bodies, agents, envs. Agents come first among the
    bodies, then what else moves (M movers in all), then what stands still."""

    def __init__(self, name, num_envs, **common):
        super().__init__(name, num_envs, **common)
        self.bodies(name.endswith("_large"))  # num_agents, movers, radii, accel, limit, tasks
        N, E, B = self.num_agents, len(self.radii), num_envs
        self.pos, self.vel = np.zeros((2, E, B)), np.zeros((2, self.movers, B))
        self.rel, self.dist = np.zeros((2, E, self.movers, B)), np.zeros((E, self.movers, B))
        self.task_dim, self.action_dims = self.tasks["train"].shape[1], (2,) * N
        self.obs_dims = (self._look().shape[1],) * N

    def reset(self, task=None):
        """Start B new episodes, drawn from torch's global CPU stream."""
        self.task = self.check_task(task).cpu().double().numpy().T  # (D, B)
        self.pos[:], self.vel[:], self.t = self._uniform(len(self.radii)), 0, 0
        self.pos[:, self.movers :] *= 0.9
        return self._observe()

    def step(self, action):
        M = self.movers
        u = torch.stack(self.check_action(action)).detach().cpu().double().numpy()  # (N, B, 2)
        force = self.accel * np.concatenate([u.transpose(2, 0, 1), self.others()], 1)  # (2, M, B)
        force += walls(self.pos[:, :M], self.radii[:M])
        if self.touch is not None:
            contact(force, self.rel, self.dist, self.touch)
        integrate(self.pos[:, :M], self.vel, force, self.limit, "mpe")
        obs, self.t = self._observe(), self.t + 1
        return obs, self._tensor(self.reward().T), *self.clock(), {}

    def _uniform(self, n):
        """(2, n, B), uniform in [-1, 1]^2."""
        return 2 * torch.rand(2, n, self.total, dtype=torch.float64).numpy()[..., self.mine] - 1

    def render(self, row=0, size=240):
        """(size, size, 3) uint8: one env. Agents are blue or red, what counts is green, the rest grey."""
        N, D, span = self.num_agents, self.task_dim, max(1.2, np.abs(self.pos[:, :, row]).max() + 0.1)
        frame = np.full((size, size, 3), 255.0)
        counts = dict(zip(range(N, N + D), self.task[:, row] > 0))
        for e in reversed(range(len(self.radii))):
            colour = self.tint if e < N else GOALS[0] if counts.get(e) else GREY
            disc(frame, span, self.pos[:, e, row], self.radii[e], colour)
        return frame.astype(np.uint8)

    def others(self):
        """The actions of the movers that are not agents, (2, M - N, B)."""
        return np.empty((2, 0, self.num_envs))

    def _observe(self):
        relate(self.pos, self.rel, self.dist)
        obs = self._tensor(self._look().transpose(0, 2, 1))  # (N, B, O)
        return tuple(obs)

    def _tensor(self, x):
        return self.fresh(np.array(x, np.float32, order="C"))  # always a copy

    def _ways(self, i):
        """The ways from agent i to all other bodies, (E - 1, 2, B)."""
        return np.delete(self.rel[:, :, i], i, 1).transpose(1, 0, 2)


class Spread(Targets):
    tint, accel, limit, touch = BLUE, 5.0, None, None

    def bodies(self, large):
        self.num_agents = self.movers = N = 3 if large else 2
        self.radii = np.array([0.15] * N + [0.05] * (N + 1))
        tasks = [[float(l in chosen) for l in range(N + 1)] for chosen in combinations(range(N + 1), N)]
        self.tasks = dict.fromkeys(("train", "test"), np.array(tasks))

    def _look(self):
        N, seen = self.num_agents, []
        for i in range(N):
            ways = self._ways(i).reshape(-1, self.num_envs)  # (2 (E - 1), B), agents first
            seen.append([self.pos[:, i], ways[2 * N - 2 :], ways[: 2 * N - 2]])
        return np.stack([np.concatenate(parts) for parts in seen])  # (N, O, B)

    def reward(self):
        gain = -self.num_agents * (self.task * self.dist[self.num_agents :].min(1)).sum(0)  # (B,)
        return np.broadcast_to(gain, (self.num_agents, self.num_envs))


class Hunting(Targets):
    tint, accel = RED, 3.0

    def bodies(self, large):
        self.num_agents, preys, obstacles = 3, 2 + large, 2 * large
        self.movers, self.tasks = 3 + preys, dict.fromkeys(("train", "test"), np.eye(preys))
        self.radii = np.array([0.1] * 3 + [0.05] * preys + [0.2] * obstacles)
        self.limit = np.array([1.0] * 3 + [1.2] * preys)[:, None]
        E, M = len(self.radii), self.movers
        self.touch = np.where(np.eye(E, M), -np.inf, self.radii[:, None] + self.radii[:M])

    def others(self):
        N, M = 3, self.movers
        u = self._uniform(M - N)
        near = self.dist[:N, N:].argmin(0)[None, None]  # (1, 1, M - N, B)
        away = -np.take_along_axis(self.rel[:, :N, N:], near, 1)[:, 0]  # (2, M - N, B), from the predator
        flee = away / np.maximum(np.take_along_axis(self.dist[:N, N:], near[0], 0), 1e-12)
        return np.where(self.task > 0, flee, u)

    def _look(self):
        seen = []
        for i in range(3):
            far = np.delete(self.dist[:, i], i, 0)  # (E - 1, B)
            mask = far < SIGHT
            ways = (self._ways(i) * mask[:, None]).reshape(-1, self.num_envs)
            seen.append(np.concatenate([self.pos[:, i], ways, far * mask]))
        return np.stack(seen)  # (N, O, B)

    def reward(self):
        far = np.einsum("db,dnb->nb", self.task, self.dist[3 : self.movers, :3])  # (N, B), to the target
        return -0.1 * far.sum(0) + 10.0 * (far < self.radii[0] + self.radii[3])
