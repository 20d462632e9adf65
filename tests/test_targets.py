"""The worlds with hidden targets: against the rules written out body by body for one world in plain Python,
and by hand."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

import envs
from envs.targets import walls

NAMES = ["spread", "spread_large", "hunting", "hunting_large"]
close = np.testing.assert_allclose


def ramp(overlap):
    """A softplus of width 1e-3, times 100."""
    k = 1e-3
    return 100 * k * (overlap / k + math.log1p(math.exp(-overlap / k)) if overlap > 0
                      else math.log1p(math.exp(overlap / k)))


class Plain:
    """One world. bodies: dicts of p, v (lists of two numbers), size, and for movers accel and max."""

    def __init__(self, name, pos, vel, task):
        self.hunting, large = "hunting" in name, name.endswith("large")
        self.n = 3 if self.hunting or large else 2
        sizes = [0.1] * 3 + [0.05] * (2 + large) + [0.2] * (2 * large) if self.hunting else \
            [0.15] * self.n + [0.05] * (self.n + 1)
        self.movers = len(vel)
        limit = lambda i: math.inf if not self.hunting else 1.0 if i < 3 else 1.2
        self.bodies = [dict(p=list(p), size=s, v=list(vel[i]) if i < len(vel) else None, max=limit(i))
                       for i, (p, s) in enumerate(zip(pos, sizes))]
        self.task = task

    def gap(self, a, b):
        return math.dist(self.bodies[a]["p"], self.bodies[b]["p"])

    def force(self, i, action):
        me = self.bodies[i]
        f = [(3.0 if self.hunting else 5.0) * u for u in action]
        for axis in (0, 1):
            for wall in (1.2, -1.2):
                d = me["p"][axis] - wall
                f[axis] += math.copysign(1, d) * ramp(me["size"] + 0.2 - abs(d)) if d else 0
        for j, other in enumerate(self.bodies if self.hunting else []):
            if j != i and (d := self.gap(i, j)) > 0:
                push = ramp(me["size"] + other["size"] - d)
                f = [f[axis] + push * (me["p"][axis] - other["p"][axis]) / d for axis in (0, 1)]
        return f

    def flee(self):
        """The action of the prey that counts."""
        prey = self.n + self.task.index(1)
        near = min(range(self.n), key=lambda a: self.gap(a, prey))
        a, b = self.bodies[near]["p"], self.bodies[prey]["p"]
        return [(y - x) / self.gap(near, prey) for x, y in zip(a, b)]

    def step(self, actions):
        forces = [self.force(i, a) for i, a in enumerate(actions)]
        for body, f in zip(self.bodies, forces):
            body["v"] = [0.75 * v + 0.1 * x for v, x in zip(body["v"], f)]
            if (speed := math.hypot(*body["v"])) > body["max"]:
                body["v"] = [v / speed * body["max"] for v in body["v"]]
        for body, _ in zip(self.bodies, forces):
            body["p"] = [p + 0.1 * v for p, v in zip(body["p"], body["v"])]

    def observe(self, i):
        me = self.bodies[i]["p"]
        way = lambda j: [self.bodies[j]["p"][x] - me[x] for x in (0, 1)]
        others = [j for j in range(len(self.bodies)) if j != i]
        if not self.hunting:
            marks = others[self.n - 1 :]
            return [*me, *(x for j in marks + others[: self.n - 1] for x in way(j))]
        sees = lambda j: self.gap(i, j) < 1.414
        ways = [x * sees(j) for j in others for x in way(j)]
        return [*me, *ways, *(self.gap(i, j) * sees(j) for j in others)]

    def rewards(self):
        n, counts = self.n, [self.n + l for l, c in enumerate(self.task) if c]
        if not self.hunting:
            return [-n * sum(min(self.gap(a, l) for a in range(n)) for l in counts)] * n
        far = [self.gap(a, counts[0]) for a in range(n)]
        return [-0.1 * sum(far) + 10 * (d < 0.15) for d in far]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_steps_as_the_rules_written_out(name, monkeypatch):
    B, rng = 5, np.random.default_rng(0)
    env, met = envs.make(name, B, horizon=200), 0
    env.reset(torch.stack([env.all_tasks()[k % len(env.all_tasks())] for k in range(B)]))
    state = env.state()
    state["pos"][0] *= 0.25  # a crowd
    worlds = zip(state["pos"], state["vel"], state["task"].astype(int).tolist())
    plain = [Plain(name, *world) for world in worlds]
    obs = env.set_state(state)
    for _ in range(60):
        for i, o in enumerate(obs):
            close(o, [world.observe(i) for world in plain], atol=1e-5)
        pushes = 1.3 * rng.normal(size=(B, env.num_agents, 2)).astype(np.float32)
        wander = 0.5 * np.ones((2, env.movers - env.num_agents, B))  # the draw 0.75 in all worlds
        monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None: torch.full(shape, 0.75, dtype=dtype))
        obs, reward, terminated, _, _ = env.step([torch.tensor(pushes[:, i]) for i in range(env.num_agents)])
        for b, world in enumerate(plain):
            others = [wander[:, j, b].tolist() for j in range(env.movers - env.num_agents)]
            if "hunting" in name:
                others[world.task.index(1)] = world.flee()
            met += any(world.gap(i, j) < world.bodies[i]["size"] + world.bodies[j]["size"]
                       for i, j in combinations(range(len(world.bodies)), 2))
            world.step([*pushes[b].tolist(), *others])
        close(env.pos.T, [[body["p"] for body in world.bodies] for world in plain], atol=1e-10)
        close(reward, [world.rewards() for world in plain], rtol=1e-5, atol=1e-5)
        assert not terminated.any()
    assert met  # bodies did touch


@pytest.mark.parametrize("name, agents, obs, tasks", [("spread", 2, 10, 3), ("spread_large", 3, 14, 4),
                                                      ("hunting", 3, 14, 2), ("hunting_large", 3, 23, 3)])
def test_sizes_and_the_set_of_tasks(name, agents, obs, tasks):
    env = envs.make(name, 2)
    assert (env.num_agents, env.obs_dims, env.horizon) == (agents, (obs,) * agents, 100)
    every = env.all_tasks()
    assert len(every) == len(set(map(tuple, every.tolist()))) == tasks
    assert (every.sum(1) == (agents if "spread" in name else 1)).all()
    assert torch.equal(every, env.all_tasks("test")) and torch.equal(every, envs.make(name, 1).all_tasks())
    drawn = env.sample_tasks(900)
    assert drawn.shape == (900, env.task_dim)
    assert abs((drawn == every[0]).all(1).float().mean() - 1 / tasks) < 0.06
    with pytest.raises(ValueError, match="split"):
        env.sample_tasks(2, "validation")


def test_walls_push_inwards_up_to_them_and_outwards_beyond():
    pos = np.array([[[1.19, 1.21, -1.19, -1.21, 0.0, 0.849, 0.9]], [[0.0] * 7]])
    force = walls(pos, np.array([0.15]))[0, 0]
    assert (np.sign(force[:4]) == [-1, 1, 1, -1]).all() and force[4] == 0
    assert -0.1 < force[5] < 0 and force[6] == pytest.approx(-5, abs=1e-3)  # 5 units, 0.05 into the ramp
    assert not walls(pos, np.array([0.15]))[1].any()


def test_speed_is_limited_in_hunting_only():
    for name, speed in ("hunting", 1.0), ("spread", 2.0):
        env = envs.make(name, 1)
        env.reset()
        state = env.state()
        state["pos"][:] = 10 + 5 * np.arange(state["pos"].shape[1])[:, None]  # apart, beyond the walls
        env.set_state(state)
        for _ in range(40):
            env.step([torch.tensor([[1.0, 0.0]])] * env.num_agents)
        assert np.hypot(*env.vel[:, 0, 0]) == pytest.approx(speed, rel=1e-3)  # 5 * 0.1 / 0.25 without a limit


def test_rewards_by_hand():
    env = envs.make("spread", 3)
    env.reset(env.all_tasks())  # landmarks 0 and 1, 0 and 2, 1 and 2 count
    state = env.state()
    state["pos"][:] = [[0, 0], [0.5, 0], [0, 0], [0.5, 0], [0.5, 0.4]]
    env.set_state(state)
    close(env.reward(), [[0, -0.8, -0.8]] * 2, atol=1e-12)  # agents are on landmarks 0 and 1, 0.4 from 2
    env = envs.make("hunting", 2)
    env.reset(env.all_tasks())
    state = env.state()
    state["pos"][:] = [[0, 0], [0.5, 0], [-0.5, 0], [0.14, 0], [-0.5, 0.16]]
    env.set_state(state)
    far = 0.14 + 0.36 + 0.64
    close(env.reward()[:, 0], [10 - 0.1 * far, -0.1 * far, -0.1 * far], atol=1e-12)  # one touches: its own 10
    assert (env.reward()[:, 1] < 0).all()  # 0.16 is no touch


@pytest.mark.parametrize("name", NAMES)
def test_nobody_sees_the_task_but_the_reward_tells(name):
    env = envs.make(name, 2)
    env.reset(env.all_tasks()[:2])
    state = env.state()
    for key in "pos", "vel":
        state[key][1] = state[key][0]
    assert all(torch.equal(o[0], o[1]) for o in env.set_state(state))
    gain = env.reward()
    assert not np.allclose(gain[:, 0], gain[:, 1])


def test_worlds_of_a_batch_start_apart_and_the_seed_decides():
    first = lambda seed: (torch.manual_seed(seed), envs.make("spread", 8).reset()[0])[1]
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert len(set(map(tuple, first(0).tolist()))) == 8


@pytest.mark.parametrize("name, low, high", [("spread", -295, -273), ("hunting", -46, -41)])
def test_random_play_returns_what_the_original_does(name, low, high):
    """-284 and -43.5 were measured with the paper's own worlds."""
    torch.manual_seed(0)
    env, total = envs.make(name, 256), 0
    env.reset()
    for _ in range(100):
        total = total + env.step(torch.randn(env.num_agents, 256, 2))[1].mean(1)
    assert low < total.mean() < high


def test_a_picture_shows_what_counts():
    env = envs.make("hunting_large", 2)
    env.reset(env.all_tasks()[:2])
    frame = env.render(1)
    assert frame.shape == (240, 240, 3) and frame.dtype == np.uint8
    green = (frame[..., 1] > frame[..., 0].astype(int) + 80).any()
    assert green


@pytest.mark.parametrize("bad", ["horizon", "action", "task"])
def test_bad_input_is_a_value_error(bad):
    with pytest.raises(ValueError):
        env = envs.make("spread", 2, horizon=0 if bad == "horizon" else 5)
        env.reset(torch.zeros(2, 2) if bad == "task" else None)
        env.step([torch.zeros(2, 3)] * 2)
