"""
Particle envs: discs on a plane that cover, push, chase, hide and talk (Mordatch and Abbeel, 2018,
arXiv:1703.04908; Lowe et al., 2017, arXiv:1706.02275). Nine scenarios share one physics step.

    env = make("simple_tag", 256, num_agents=8, num_adversaries=4, dialect="mpe")

State     positions and velocities; landmarks stand still. The first agents are the adversaries.
Actions   A mover has five: 0 stay, then a push along -x, +x, -y, +y. A speaker has W words. Actions are (B,)
          long, or (B, A_i) floats that are used as they are: the soft vectors of MADDPG. All agents use the
          same kind. env.action_splits[i] holds the sizes of agent i's blocks: (5,), (3,), or (5, 10) for an
          agent that moves and speaks, whose (B,) long is move + 5 * word.
Reward    and observation: see each scenario below.
End       at the horizon, 25 steps.

  scenario                  agents (adversaries)  landmarks
  simple                    1                     1                         go to it
  simple_spread             3, or N               N                         cover them all, without collisions
  simple_tag                4 (3), or N (K)       2, or more for many       chase; landmarks are obstacles
  simple_adversary          3 (1), or N (K)       N - 1, one the goal       reach it, hide which one it is
  simple_push               2 (1), or N (K)       2, one the goal           keep the good agents away from it
  simple_speaker_listener   2                     3, one the goal           one knows it, the other moves
  simple_reference          2                     3, a goal for each        each knows where the other must go
  simple_crypto             3 (1)                 2                         a message, a key, and Eve listens
  simple_world_comm         6 (4), or N (K)       obstacle, 2 food, 2 forests   tag with hiding and a leader

N and K are num_agents and num_adversaries, 1 <= K < N. If only N is given and is not the standard number, K
is half of it, rounded up (simple_adversary: 1). Tag has max(N // 4, min(N // 2, 2)) obstacles.

Dialects  "mpe2" (default) is the maintained package of that name. "mpe" is the original of 2017, from which
          most papers' numbers come. They are different games: do not compare their scores.
                                    mpe2                                    mpe
          a step                    x moves by the old v, then v changes    v changes, then x moves by it
          push 1, 2, 3, 4           -x, +x, -y, +y                          +x, -x, +y, -y
          simple_spread             (shared distances + own collisions)/2   both summed over agents, shared;
                                                                            each also collides with itself
          simple_adversary          adversary: -distance                    -distance^2
          simple_speaker_listener   -distance^2                             twice that: summed over agents
          simple_reference          -distance; (own + mean) / 2             -distance^2 summed over agents
          simple_world_comm         -0.05 distance to the nearest food      +0.05, a sign error

Why it is fast: everything that can be observed (velocities, positions, relative positions, words, colours) is
a row of one array, `sheet` (R, B). An observation is a list of row numbers, made once; observing is a gather.
NumPy works in float64: float32 gained 0 to 40 % from 256 envs on, and nothing below.
"""

from math import prod
from types import SimpleNamespace

import numpy as np
import torch

from .base import Env

DT, DAMPING, STIFFNESS, MARGIN = 0.1, 0.25, 100.0, 1e-3
GREY, RED, BLUE, GOALS = (90, 90, 90), (215, 80, 80), (80, 100, 215), [(40, 170, 40), (240, 160, 30)]


# ---------------------------------------------------------------- physics
# Index order: x or y, entities, agents, envs. Envs come last, so that numpy's inner loop runs along them.
def relate(pos, rel, dist):
    """From positions (2, E, B): fill rel (2, E, N, B), the way from each agent to each entity, and its length
    dist."""
    np.subtract(pos[:, :, None], pos[:, None, : rel.shape[2]], out=rel)
    np.multiply(rel[0], rel[0], out=dist)
    dist += rel[1] * rel[1]
    np.sqrt(dist, out=dist)


def contact(force, rel, dist, touch):
    """Add to force (2, N, B) how the first C entities push the agents away: softplus of the overlap, times
    STIFFNESS. touch (C, N): the distance at which two bodies meet, -inf if they never do."""
    C, N, B = *touch.shape, dist.shape[2]
    near = np.flatnonzero(dist[:C] < touch[:, :, None] + 50 * MARGIN)  # beyond that the force is below 1e-22
    if near.size:
        d = dist.reshape(-1)[near]
        overlap = (touch.reshape(-1)[near // B] - d) / MARGIN
        push = STIFFNESS * MARGIN * np.logaddexp(0, overlap) / np.maximum(d, 1e-300)  # d = 0: rel is 0 too
        for axis in (0, 1):
            np.subtract.at(force[axis].reshape(-1), near % (N * B), push * rel[axis].reshape(-1)[near])


def integrate(pos, vel, force, max_speed, dialect):
    """One time step of unit masses, in place: pos, vel, force (2, N, B), max_speed (N, 1) or None."""
    if dialect == "mpe2":
        pos += DT * vel
    vel *= 1 - DAMPING
    vel += DT * force
    if max_speed is not None:
        speed = np.sqrt(vel[0] * vel[0] + vel[1] * vel[1])
        vel *= max_speed / np.maximum(speed, max_speed)
    if dialect == "mpe":
        pos += DT * vel


# ---------------------------------------------------------------- the env
class Particle(Env):
    """B envs, H steps. First come the class attributes that a scenario may change; one value stands for all
    agents. A scenario also defines observation(i, see), a list of row numbers from `see` (_lay_out), and
    reward(dist), (N, B), from the distances (E, N, B)."""

    standard, fixed, half = (1, 0), True, True  # (N, K); whether N and K are fixed; K = N / 2, else 1
    moves = solid = True  # agents move; they collide with each other and with `obstacles` landmarks
    radius, accel, max_speed, words = 0.05, 5.0, None, 0  # of agents; words: how many, 0: silent
    landmarks, landmark_radius, obstacles, tint = 1, 0.05, 0, [GREY]
    spawn = 1.0  # landmarks start in [-spawn, spawn]^2, agents in [-1, 1]^2
    goals, colour = 0, None  # landmarks drawn as goals; how agents see one: channels, base, bonus, shift
    extra = 0  # rows of the sheet for sense() to fill
    discrete, soft, default_horizon = True, True, 25

    def __init__(self, name, num_envs, num_agents=None, num_adversaries=None, dialect="mpe2", **common):
        super().__init__(name, num_envs, **common)
        if dialect not in ("mpe2", "mpe"):
            raise ValueError(f"{name}: dialect must be 'mpe2' or 'mpe', not {dialect!r}")
        self.num_agents, self.num_adversaries = N, K = self._numbers(num_agents, num_adversaries)
        self.dialect, self.adversary = dialect, np.arange(N) < K  # (N,)
        self.bodies(N, K)
        each = lambda x, n=N: np.broadcast_to(x, (n,))
        self.radii = np.append(each(self.radius), each(self.landmark_radius, self.landmarks))
        C = (N + self.obstacles) * self.solid  # entities that collide
        self.touch = np.where(np.eye(C, N), -np.inf, self.radii[:C, None] + self.radii[:N])  # (C, N)
        self.limit = None if self.max_speed is None else each(self.max_speed)[:, None]  # (N, 1)
        self._lay_out(each(self.moves), each(self.words).tolist())

    def bodies(self, N, K):
        """Set what depends on the numbers of agents and adversaries."""

    def sense(self):
        """Fill self.more, (extra, B), with what is seen but is not yet a row of the sheet."""

    # ---------------- the contract
    def reset(self, task=None):
        """Start B new episodes, drawn from torch's global CPU stream."""
        self.check_task(task)
        N, L, total = self.num_agents, self.landmarks, self.total
        u = 2 * torch.rand(2, N + L, total, dtype=torch.float64).numpy()[..., self.mine] - 1
        self.place[:, :N], self.place[:, N:] = u[:, :N], self.spawn * u[:, N:]
        self.vel[:], self.action[:], self.t = 0, 0, 0
        self._aim(torch.randint(L, (self.goals, total)).numpy()[:, self.mine])
        return self._observe()

    def step(self, action):
        self._act(action)
        force = self.sheet.take(self.plus, 0) - self.sheet.take(self.minus, 0)  # (2, N, B)
        force *= self.thrust
        contact(force, self.rel, self.dist, self.touch)
        integrate(self.pos[:, : self.num_agents], self.vel, force, self.limit, self.dialect)
        relate(self.pos, self.rel, self.dist)
        self.t, self.gain = self.t + 1, self.reward(self.dist)  # (N, B), float64
        return self._observe(), self._tensor(self.gain), *self.clock(), {}

    def measures(self):
        """{name: (B,)} of the present state: the benchmark measures of the original code."""
        N, K, out = self.num_agents, self.num_adversaries, {}
        if self.solid:  # agents collide
            hits = np.tril(np.ones((N, N)), -1)[:, :, None] * (self.dist[:N] < self.touch[:N, :, None])
            out["collisions"] = hits.sum((0, 1))
            if K:
                out["caught"] = hits[K:, :K].sum((0, 1))
        if K and self.goals == 1:
            far = self.dist[-1]  # (N, B), from the goal
            out |= {"goal_distance_adversary": far[:K].min(0), "goal_distance_good": far[K:].min(0)}
        return {name: self.tensor(x) for name, x in (out | self.count()).items()}

    def count(self):
        """What a scenario measures in addition, {name: (B,)}."""
        return {}

    def render(self, row=0, size=240):
        """(size, size, 3) uint8: one env. Agents are blue, adversaries red, landmarks grey, goals green and
        orange. An agent that has spoken has a dot in the colour of the word."""
        N, L, pos = self.num_agents, self.landmarks, self.pos[:, :, row]
        span = max(1.1, (np.abs(pos[:, : N + L]) + self.radii).max() + 0.05)
        frame = np.full((size, size, 3), 255.0)
        for j, tint in zip(range(L), self.tint * L):
            disc(frame, span, pos[:, N + j], self.radii[N + j], tint)
        for g in range(self.goals):
            disc(frame, span, pos[:, N + L + g], self.radii[N + self.goal[g, row]] * (1 - 0.4 * g), GOALS[g])
        for i in range(N):
            disc(frame, span, pos[:, i], self.radii[i] + span / size, (30, 30, 30))
            disc(frame, span, pos[:, i], self.radii[i] - span / size, RED if self.adversary[i] else BLUE)
            said = self.sheet[self.said[i], row]
            if said.any():
                hue = 2 * np.pi * (said.argmax() / len(said) + np.arange(3) / 3)
                disc(frame, span, pos[:, i], self.radii[i] / 2, 128 + 127 * np.cos(hue))
        return frame.astype(np.uint8)

    # ---------------- inside
    def _numbers(self, N, K):
        (N0, K0), name = self.standard, self.name
        N = N0 if N is None else N
        if K is None:
            K = (N + 1) // 2 if K0 and self.half and N != N0 else K0
        if self.fixed and (N, K) != (N0, K0):
            raise ValueError(f"{name} has {N0} agents, {K0} of them adversaries, not {N} and {K}")
        if K0 and not 1 <= K < N:
            raise ValueError(f"{name} needs an adversary and another agent, not {K} of {N} agents")
        if not K0 and (N < 1 or K):
            raise ValueError(f"{name} needs an agent and has no adversaries, not {K} of {N} agents")
        return N, K

    def _lay_out(self, moves, words):
        """The sheet (R, B): every number that an agent may observe is one of its rows. self.vel, self.pos,
        ... are views of their rows; see.vel, see.pos, ... are the numbers of those rows, from which
        observation() picks."""
        N, L, G, B = self.num_agents, self.landmarks, self.goals, self.num_envs
        self.action_splits = tuple((5,) * m + (w,) * (w > 0) for m, w in zip(moves.tolist(), words))
        self.action_dims = tuple(map(sum, self.action_splits))
        E = N + L + G  # a goal is one more entity, at its landmark
        D = self.colour[0] if self.colour else 0
        shapes = dict(vel=(2, N), pos=(2, E), rel=(2, E, N), shades=(D, G), action=(sum(self.action_dims),),
                      more=(self.extra,), const=(3,))
        self.sheet = np.zeros((sum(map(prod, shapes.values())), B))
        see, start = SimpleNamespace(), 0
        for part, shape in shapes.items():
            rows = np.arange(start, start + prod(shape))
            setattr(self, part, self.sheet[start : start + len(rows)].reshape(*shape, B))
            setattr(see, part, rows.reshape(shape).T)  # vel (N, 2), rel (N, E, 2), ...
            start += len(rows)
        self.const[:] = [[0.0], [0.1], [0.9]]
        self.place, self.dist = self.pos[:, : N + L], np.zeros((E, N, B))
        self.goal, self.t = np.zeros((G, B), np.int64), 0
        self._read_actions(see, moves, words)

        see.marks, see.targets = range(N, N + L), range(N + L, E)
        see.others = [[j for j in range(N) if j != i] for i in range(N)]
        seen = [np.concatenate([np.ravel(x) for x in self.observation(i, see)]) for i in range(N)]
        self.seen, self.obs_dims = np.concatenate(seen).astype(int), tuple(map(len, seen))

    def _read_actions(self, see, moves, words):
        """Which rows push which agent, and which rows are words. Agent i's action begins at row first[i],
        with the five moves if it moves, and ends with its words."""
        ends = np.cumsum(self.action_dims)
        self.first = see.action[ends - self.action_dims][:, None]  # (N, 1)
        see.words = self.said = [see.action[end - w : end] for end, w in zip(ends, words)]
        # The force on an agent is the difference of two rows, times thrust. For an agent that cannot move
        # both are the row of zeros.
        push = np.where(moves[:, None], self.first + np.arange(1, 5), see.const[0]).T  # (4, N): -x, +x, -y, y
        self.minus, self.plus = push[0::2], push[1::2]  # (2, N)
        if self.dialect == "mpe":
            self.minus, self.plus = self.plus, self.minus
        self.thrust = np.broadcast_to(self.accel, (self.num_agents,))[:, None].astype(float)
        self.talkers = [i for i, split in enumerate(self.action_splits) if len(split) > 1]

    def _aim(self, goal):
        """Set the goals, (G, B), and all that follows from goals and positions."""
        worlds, self.goal = np.arange(self.num_envs), goal
        self.pos[:, self.num_agents + self.landmarks :] = self.pos[:, self.num_agents + goal, worlds]
        if self.colour:
            _, base, bonus, shift = self.colour
            self.shades[:] = base
            self.shades[goal + shift, np.arange(self.goals)[:, None], worlds] += bonus
        relate(self.pos, self.rel, self.dist)

    def _act(self, action):
        """Write the joint action into the sheet: floats as they are, numbers as one-hot blocks."""
        action = self.check_action(action)
        if isinstance(action, tuple):
            self.action[:] = torch.cat(action, 1).detach().cpu().numpy().T
            return
        self.action[:], worlds = 0, np.arange(self.num_envs)
        for i in self.talkers:
            word, action[i] = divmod(action[i], 5)
            self.sheet[self.first[i] + 5 + word, worlds] = 1
        self.sheet[self.first + action, worlds] = 1

    def _observe(self):
        self.sense()
        obs = self._tensor(self.sheet.take(self.seen, 0))  # (B, sum O)
        return obs.split(self.obs_dims, 1) if self.num_agents > 1 else obs

    def _tensor(self, x):
        return self.fresh(np.ascontiguousarray(x.T, np.float32))  # always a copy


def disc(frame, span, centre, radius, colour):
    """Paint a disc with a soft edge on frame (S, S, 3), which shows [-span, span]^2 with y upwards."""
    S = len(frame)
    column, line = (1 + centre / span * (1, -1)) * S / 2 - 0.5
    r = radius / span * S / 2  # in pixels, like the centre
    box = tuple(slice(max(int(c - r), 0), min(int(c + r) + 2, S)) for c in (line, column))
    y, x = np.ogrid[box]
    cover = np.clip(r + 0.5 - np.hypot(x - column, y - line), 0, 1)[:, :, None]
    frame[box] += cover * (np.asarray(colour) - frame[box])


# ---------------------------------------------------------------- scenarios
# Rows for an observation: see.vel[i] and see.pos[i]; see.rel[i, j] leads from agent i to entity j. see.marks
# and see.targets are the landmarks and the goals among the entities, see.others[i] the other agents,
# see.words[i] what i says, see.shades the colours of the goals, see.const the numbers 0, 0.1, 0.9.
class Simple(Particle):
    solid = False

    def observation(self, i, see):
        return [see.vel[i], see.rel[i, see.marks]]

    def reward(self, dist):
        return -(dist[1] ** 2)


class Spread(Particle):
    standard, fixed, radius = (3, 0), False, 0.15

    def bodies(self, N, K):
        self.landmarks = N

    def observation(self, i, see):
        silence = [see.const[0]] * (2 * self.num_agents - 2)  # slots for the others' words, always 0
        return [see.vel[i], see.pos[i], see.rel[i, see.marks], see.rel[i, see.others[i]], silence]

    def reward(self, dist):
        N = self.num_agents
        cover = dist[N:].min(1).sum(0)  # (B,)
        hits = (dist[:N] < self.touch[:, :, None]).sum(0)  # (N, B)
        if self.dialect == "mpe2":
            return -0.5 * cover - 0.5 * hits
        return np.broadcast_to(-N * cover - hits.sum(0) - N, hits.shape)

    def count(self):
        nearest = self.dist[self.num_agents :].min(1)  # (L, B)
        return {"landmark_distance": nearest.mean(0), "occupied_landmarks": (nearest < 0.1).sum(0)}


class Tag(Particle):
    standard, fixed, landmark_radius, spawn = (4, 3), False, 0.2, 0.9
    prey_radius = 0.05

    def bodies(self, N, K):
        self.landmarks = self.obstacles = max(N // 4, min(N // 2, 2))
        self.radius = np.where(self.adversary, 0.075, self.prey_radius)
        self.accel, self.max_speed = np.where(self.adversary, 3.0, 4.0), np.where(self.adversary, 1.0, 1.3)

    def observation(self, i, see):
        good = [j for j in see.others[i] if not self.adversary[j]]
        return [see.vel[i], see.pos[i], see.rel[i, see.marks], see.rel[i, see.others[i]], see.vel[good]]

    def caught(self, dist):
        """(N - K, B): how many adversaries touch each good agent."""
        K = self.num_adversaries
        return (dist[:K, K:] < self.touch[:K, K:, None]).sum(0)

    def outside(self):
        """(N - K, B): what a good agent pays for leaving the square: a ramp from 0.9, then an exponential."""
        x = np.abs(self.pos[:, self.num_adversaries : self.num_agents])
        ramp, exponential = np.maximum(10 * (x - 0.9), 0), np.exp(2 * np.minimum(x, 4) - 2)
        return np.where(x < 1, ramp, np.minimum(exponential, 10)).sum(0)

    def reward(self, dist):
        K, hits = self.num_adversaries, self.caught(dist)
        gain = np.empty(dist.shape[1:])
        gain[:K], gain[K:] = 10 * hits.sum(0), -10 * hits - self.outside()
        return gain


class Adversary(Particle):
    standard, fixed, half, solid, goals = (3, 1), False, False, False, 1
    radius, landmark_radius = 0.15, 0.08

    def bodies(self, N, K):
        self.landmarks = N - 1

    def observation(self, i, see):
        goal = [] if self.adversary[i] else [see.rel[i, see.targets]]
        return [*goal, see.rel[i, see.marks], see.rel[i, see.others[i]]]

    def reward(self, dist):
        K, far = self.num_adversaries, dist[-1]  # (N, B)
        gain = np.empty(far.shape)
        gain[:K] = -far[:K] if self.dialect == "mpe2" else -(far[:K] ** 2)
        gain[K:] = far[:K].sum(0) - far[K:].min(0)
        return gain


class Push(Particle):
    standard, fixed, goals, colour = (2, 1), False, 1, (3, 0.25, 0.5, 1)
    landmarks = 2  # a third would have no colour of its own

    def observation(self, i, see):
        marks, others = see.rel[i, see.marks], see.rel[i, see.others[i]]
        if self.adversary[i]:
            return [see.vel[i], marks, others]
        paint = see.const[[1, 2, 1, 1, 1, 2]]  # of the two landmarks
        return [see.vel[i], see.rel[i, see.targets], see.shades, marks, paint, others]

    def reward(self, dist):
        K, far = self.num_adversaries, dist[-1]  # (N, B)
        gain = -far
        gain[:K] += far[K:].min(0)
        return gain


class SpeakerListener(Particle):
    standard, solid, moves, words = (2, 0), False, (False, True), (3, 0)
    radius, landmarks, landmark_radius, goals, colour = 0.075, 3, 0.04, 1, (3, 0.15, 0.5, 0)

    def observation(self, i, see):
        return [see.shades] if i == 0 else [see.vel[1], see.rel[1, see.marks], see.words[0]]

    def reward(self, dist):
        gain = -(dist[-1, 1] ** 2) if self.dialect == "mpe2" else -2 * dist[-1, 1] ** 2
        return np.stack([gain, gain])


class Reference(Particle):
    standard, solid, words, landmarks, goals, colour = (2, 0), False, 10, 3, 2, (3, 0.25, 0.5, 0)

    def observation(self, i, see):
        return [see.vel[i], see.rel[i, see.marks], see.shades[i], see.words[1 - i]]

    def reward(self, dist):
        far = dist[[-2, -1], [1, 0]]  # (2, B): goal i is where the other agent must go
        if self.dialect == "mpe2":
            return -0.5 * far - 0.5 * far.mean(0)
        return np.broadcast_to(-(far**2).sum(0), far.shape)


class Crypto(Particle):
    standard, solid, moves, words = (3, 1), False, False, 4  # Eve, Bob, Alice
    landmarks, goals, colour = 2, 2, (4, 0.0, 1.0, 0)  # the goals are message and key, as one-hot colours

    def observation(self, i, see):
        message, key = see.shades
        return [[see.words[2]], [key, see.words[2]], [message, key]][i]

    def reward(self, dist):
        said = self.action.reshape(3, 4, -1)
        miss = ((said - self.shades[:, 0]) ** 2).sum(1) * said.any(1)  # (3, B): silence costs nothing
        return np.stack([-miss[0], miss[0] - miss[1], miss[0] - miss[1]])


class WorldComm(Tag):
    """An agent in a forest is seen only from inside the same forest and by the leader, agent 0, who tells the
    other adversaries one of four words. The landmarks are an obstacle, two pieces of food, two forests."""

    standard, prey_radius, landmark_radius = (6, 4), 0.045, (0.2, 0.03, 0.03, 0.3, 0.3)
    tint = [GREY, *[(200, 150, 40)] * 2, *[(170, 225, 170)] * 2]

    def bodies(self, N, K):
        super().bodies(N, K)
        self.landmarks, self.obstacles, self.words = 5, 1, np.where(np.arange(N) == 0, 4, 0)
        self.extra = 2 * N + 2 * N * N + 2 * (N - K) * N

    def parts(self, x):
        """Cut the `extra` rows: in which forests agent n is, (2, N); what it sees of the others' positions,
        (2, N, N), and of the good agents' velocities, (2, N - K, N); n last."""
        N, K = self.num_agents, self.num_adversaries
        cuts = np.split(x, [2 * N, 2 * N + 2 * N * N])
        return [c.reshape(*shape, *x.shape[1:]) for c, shape in zip(cuts, [(2, N), (2, N, N), (2, N - K, N)])]

    def sense(self):
        N, K = self.num_agents, self.num_adversaries
        forest, rel, vel = self.parts(self.more)
        reach = self.radii[N + 3 :, None] + self.radii[:N]
        inside = self.dist[N + 3 : N + 5] < reach[:, :, None]  # (2, N, B)
        free = ~inside.any(0)
        visible = (free[:, None] & free) | (inside[:, :, None] & inside[:, None]).any(0)  # (N, N, B)
        visible[:, 0] = True  # to the leader
        forest[:] = np.where(inside, 1, -1)
        np.multiply(self.rel[:, :N], visible, out=rel)
        np.multiply(self.vel[:, K:, None], visible[K:], out=vel)

    def observation(self, i, see):
        (forest, rel, vel), K = self.parts(see.more), self.num_adversaries
        others, good = see.others[i], [j - K for j in see.others[i] if j >= K]
        me = [see.vel[i], see.pos[i], see.rel[i, see.marks], rel[:, others, i].T]
        if i < K:
            return [*me, vel[:, good, i].T, forest[:, i], see.words[0]]
        return [*me, forest[:, i], vel[:, good, i].T]

    def reward(self, dist):
        N, K, hits = self.num_agents, self.num_adversaries, self.caught(dist)
        food = dist[N + 1 : N + 3, K:]  # (2, N - K, B)
        eaten = (food < self.radii[N + 1] + self.radii[K]).sum(0)
        gain = np.empty(dist.shape[1:])
        gain[:K] = 5 * hits.sum(0) - 0.1 * dist[K:N, :K].min(0)
        gain[K:] = 2 * eaten - 5 * hits - 2 * self.outside()
        gain[K:] -= (0.05 if self.dialect == "mpe2" else -0.05) * food.min(0)
        return gain
