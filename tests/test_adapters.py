"""The adapters against the interfaces they bridge: PettingZoo's API test, gymnasium itself, native envs."""

import gymnasium
import numpy as np
import pettingzoo.test
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from envs import make
from envs.adapters import from_gymnasium, from_pettingzoo, to_pettingzoo

B = 3
cartpole = lambda: gymnasium.make("CartPole-v1")
pendulum = lambda: gymnasium.make("Pendulum-v1")


class Walk:
    """One agent, Box actions, random start and steps; terminates outside [-3, 3]. A task shifts the start."""

    num_agents, obs_dims, action_dims, discrete, device = 1, (2,), (2,), False, "cpu"

    def __init__(self, num_envs=1, horizon=8):
        self.num_envs, self.horizon = num_envs, horizon

    def reset(self, task=None):
        self.t, self.x = 0, torch.rand(self.num_envs, 2) + (0 if task is None else task)
        return self.x

    def step(self, action):
        self.t, self.x = self.t + 1, self.x + action + 0.1 * torch.randn(self.num_envs, 2)
        truncated = torch.full((self.num_envs,), self.t >= self.horizon)
        return self.x, self.x[:, :1], self.x.abs().amax(1) > 3, truncated, {}


class Leavers(ParallelEnv):
    """Agent i leaves at step ends[i][0] with the flags ends[i][1:]. The reward is 1, the observation t."""

    metadata, max_cycles = {"name": "leavers"}, 9

    def __init__(self, ends, action_spaces=None, obs_space=None):
        self.ends, self.possible_agents = ends, list(range(len(ends)))
        self.spaces = action_spaces or [spaces.Discrete(2, start=5)] * len(ends)
        self.obs_space = obs_space or spaces.Box(-np.inf, np.inf, (1, 2))

    def observation_space(self, agent):
        return self.obs_space

    def action_space(self, agent):
        return self.spaces[agent]

    def reset(self, seed=None, options=None):
        self.t, self.agents, self.seen = 0, list(self.possible_agents), []
        return {i: np.zeros((1, 2)) for i in self.agents}, {i: {} for i in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents)  # those who left must not act
        self.t, acted = self.t + 1, self.agents
        self.seen.append(actions)
        self.agents = [i for i in acted if self.t < self.ends[i][0]]
        flag = lambda k: {i: i not in self.agents and self.ends[i][k] for i in acted}
        return {i: np.full((1, 2), self.t) for i in acted}, dict.fromkeys(acted, 1.0), flag(1), flag(2), {}


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------- to_pettingzoo
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("env", [lambda: make("ipd", 1, horizon=7), lambda: make("rps3", 1, horizon=7), Walk])
def test_pettingzoo_accepts_our_envs(env):
    pettingzoo.test.parallel_api_test(to_pettingzoo(env()), num_cycles=20)


@pytest.mark.parametrize("name", ["ipd", "rps3"])
def test_there_and_back_is_the_native_env(name):
    """Through both adapters: what to_pettingzoo gives is what the env gives. Matrix games draw nothing."""
    env = from_pettingzoo(lambda: to_pettingzoo(make(name, 1, horizon=5)), B)
    native = make(name, B, horizon=5)
    for member in ("num_envs", "horizon", "num_agents", "obs_dims", "action_dims", "discrete"):
        assert getattr(env, member) == getattr(native, member), member
    for _ in range(2):  # two episodes: the second starts afresh
        first = env.reset()
        assert equal(first, native.reset())
        kept = [o.clone() for o in first]
        for _ in range(native.horizon):
            action = tuple(torch.randint(A, (B,)) for A in native.action_dims)
            (obs, *rest, _), (nobs, *nrest, _) = env.step(action), native.step(action)
            assert equal(obs, nobs) and equal(rest, nrest)
        assert equal(first, kept)  # what was handed out does not change afterwards
    assert env.envs[0].agents == [] and env.envs[0].step({}) == ({}, {}, {}, {}, {})
    both = to_pettingzoo(make("simple_reference", 1)).action_space("agent_0")
    assert both.n == 50  # every move with every word


def walk(env, seed, steps=4):
    """(steps + 1, 2): the observations of one episode in which the agent never pushes."""
    seen = [env.reset(seed=seed)[0]["agent_0"]]
    for _ in range(steps):
        seen.append(env.step({"agent_0": np.zeros(2, np.float32)})[0]["agent_0"])
    return np.stack(seen)


def test_a_seed_fixes_the_episode_and_the_callers_stream_is_left_alone():
    env = to_pettingzoo(Walk())
    first, second = walk(env, 1), walk(env, None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert np.array_equal(walk(env, 1), first) and np.array_equal(walk(env, None), second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(first, second) and not np.array_equal(walk(env, 2), first)
    torch.manual_seed(1)
    assert np.array_equal(Walk().reset()[0], first[0])  # reset(seed=s) is torch.manual_seed(s)
    fresh = [walk(to_pettingzoo(Walk()), None) for _ in (torch.manual_seed(5), torch.manual_seed(5))]
    assert not np.array_equal(*fresh)  # two fresh envs take their seeds from one global stream


def test_an_early_end_terminates_and_a_task_reaches_the_env():
    env = to_pettingzoo(Walk())
    assert env.action_space("agent_0") == spaces.Box(-np.inf, np.inf, (2,), np.float32)
    start = env.reset(seed=0)[0]["agent_0"]
    moved = env.reset(seed=0, options={"task": torch.tensor([2.0, 0.0])})[0]["agent_0"]
    assert np.allclose(moved - start, [2, 0])
    _, _, terminated, truncated, _ = env.step({"agent_0": np.array([9.0, 0.0])})
    assert terminated == {"agent_0": True} and truncated == {"agent_0": False} and env.agents == []


# ---------------------------------------------------------------- from_pettingzoo
@pytest.mark.parametrize("ends, terminated, truncated", [
    ([(2, True, False), (4, True, False)], True, False),  # all came to an end of their own
    ([(2, True, False), (4, False, True)], False, True),  # the second was cut short
    ([(2, False, True), (4, True, False)], False, True),  # the first was
    ([(2, True, False), (4, True, True)], True, True),  # an end of its own, as time ran out
])
def test_agents_may_leave_one_by_one(ends, terminated, truncated):
    env = from_pettingzoo(lambda: Leavers(ends), B)
    env.reset()
    for t in range(1, 10):
        obs, reward, *flags, _ = env.step((torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.long)))
        assert [o[0, 0].item() for o in obs] == [min(t, 2), min(t, 4)]
        assert reward[0].tolist() == [t <= 2, t <= 4]
        assert flags[0].tolist() == [terminated and t >= 4] * B
        assert flags[1].tolist() == [(truncated and t >= 4) or t == 9] * B
    assert env.envs[0].seen[0] == {0: 5, 1: 6}  # from the start of the space


# ---------------------------------------------------------------- from_gymnasium
def run(make_env, steps, **options):
    """(env, obs, reward, terminated, truncated, actions), time first; the actions have their own stream."""
    env, draw = from_gymnasium(make_env, B, **options), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    out, obs = [], [env.reset()]
    shape = (steps, B) if env.discrete else (steps, B, env.action_dims[0])
    actions = torch.randint(2, shape, generator=draw) if env.discrete else torch.randn(shape, generator=draw)
    for action in actions:
        out.append(env.step(action)[:4])
        obs.append(out[-1][0])
    return env, torch.stack(obs), *(torch.stack([o[k] for o in out]) for k in (1, 2, 3)), actions


@pytest.mark.parametrize("make_env, steps", [(cartpole, 80), (pendulum, 200)])
def test_copies_match_gymnasium_and_an_early_end_is_a_mask(make_env, steps):
    env, obs, reward, terminated, truncated, actions = run(make_env, steps)
    assert obs.shape == (steps + 1, B, *env.obs_dims) and reward.shape == (steps, B, 1)
    torch.manual_seed(0)
    ends = set()
    for b, seed in enumerate(torch.randint(2**31 - 1, (B,)).tolist()):
        theirs, over = make_env(), False
        held = theirs.reset(seed=seed)[0]
        assert np.array_equal(obs[0, b], held)
        for t in range(steps):
            gain = 0.0
            if not over:
                held, gain, died, late, _ = theirs.step(actions[t, b].numpy())
                over = died or late
                ends |= {t} if died else set()
            assert np.array_equal(obs[t + 1, b], held) and reward[t, b].item() == np.float32(gain)
            assert terminated[t, b] == died and truncated[t, b] == late
    if make_env is cartpole:
        assert len(ends) == B and max(ends) < steps - 2 and not truncated.any()  # each fell, at its own time
    else:
        assert truncated[-1].all() and not truncated[:-1].any() and not terminated.any()


def test_time_is_up_at_the_horizon_or_when_the_env_says_so():
    *_, terminated, truncated, _ = run(pendulum, 5, horizon=5)  # ours is the shorter
    assert truncated.tolist() == [[False] * B] * 4 + [[True] * B] and not terminated.any()
    short = lambda: gymnasium.make("Pendulum-v1", max_episode_steps=3)
    _, obs, reward, terminated, truncated, _ = run(short, 5, horizon=5)  # theirs is
    assert truncated[:, 0].tolist() == [False, False, True, True, True] and not terminated.any()
    assert torch.equal(obs[3], obs[5]) and reward[2].all() and not reward[3:].any()


def test_every_tensor_is_on_the_device():
    env = from_gymnasium(cartpole, B, device="meta")
    assert env.reset().device.type == "meta"
    assert {x.device.type for x in env.step(torch.zeros(B, dtype=torch.long))[:4]} == {"meta"}


def test_tuple_spaces_are_agents_and_tasks_reach_them():
    class Two(gymnasium.Env):
        action_space, observation_space = spaces.Tuple([two, two]), spaces.Tuple([box, box])

        def reset(self, seed=None, options=None):
            self.told = options
            return (np.zeros(2), np.ones(2)), {}

        def step(self, action):
            return (np.full(2, action[0]), np.full(2, action[1])), [1.0, 2.0], action[0] == 0, False, {}

    tasks = {"train": [[1, 2], [3, 4]], "test": [[5, 6]]}
    env = from_gymnasium(Two, 2, horizon=5, tasks=tasks, options=lambda task: {"goal": task.sum()})
    assert env.splits == ("train", "test") and env.all_tasks("test").tolist() == [[5, 6]]
    start = env.reset(torch.tensor([[5.0, 6], [1, 2]]))
    assert env.num_agents == 2 and [o[0, 0].item() for o in start] == [0, 1]
    assert [copy.env.told["goal"] for copy in env.envs] == [11, 3]
    obs, reward, terminated, *_ = env.step([torch.tensor([0, 1]), torch.tensor([1, 0])])
    assert [o[:, 0].tolist() for o in obs] == [[0, 1], [1, 0]] and reward.tolist() == [[1, 2]] * 2
    assert terminated.tolist() == [True, False]
    env.reset()  # training tasks
    assert {copy.env.told["goal"] for copy in env.envs} <= {3, 7}


# ---------------------------------------------------------------- actions, names, limits, errors
box, two, many = spaces.Box(-1, 1, (2,)), spaces.Discrete(2), spaces.MultiBinary(2)
ends, one = [(1, True, False)] * 2, cartpole()


@pytest.mark.parametrize("call, message", [
    (lambda: to_pettingzoo(make("ipd", 2)), "num_envs=1, not 2"),
    (lambda: to_pettingzoo(make("ipd", 1, index_obs=True)), "without index_obs"),
    (lambda: from_pettingzoo(lambda: Leavers(ends, [box, two]), B), "all Discrete or all Box"),
    (lambda: from_pettingzoo(lambda: Leavers(ends, [many, many]), B), "all Discrete or all Box"),
    (lambda: from_pettingzoo(lambda: Leavers(ends, None, spaces.Sequence(two)), B), "must be Box"),
    (lambda: from_gymnasium(cartpole, 0), "must be at least 1"),
    (lambda: from_gymnasium(lambda: one, B), "make a new env at each call"),
    (lambda: from_gymnasium(lambda: one.unwrapped.__class__(), B), "pass horizon="),
    (lambda: from_gymnasium(cartpole, B).reset(task=[{}]), "has no tasks"),
    *((lambda bad=bad: from_gymnasium(cartpole, B, tasks=bad), "tasks must be")
      for bad in ({"test": [[1]]}, {"train": [1, 2]}, {"train": [[1]], "test": [[1, 2]]}))])
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_where_the_horizon_comes_from(monkeypatch):
    assert from_gymnasium(cartpole, B).horizon == 500
    horizon = lambda **options: from_pettingzoo(lambda: Leavers(ends), B, **options).horizon
    assert horizon() == 9 and horizon(horizon=4) == 4
    monkeypatch.setattr(Leavers, "metadata", {"max_cycles": 6})
    assert horizon() == 6


def test_what_the_copies_do_with_actions_and_names():
    env = from_pettingzoo(lambda: Leavers(ends), B)
    env.reset()
    assert env.action_splits == ((2,), (2,)) and env.num_adversaries == 0
    env.step((torch.tensor([[0.2, 0.8]] * B), torch.tensor([[0.9, 0.1]] * B)))  # soft: the largest counts
    assert env.envs[0].seen == [{0: 6, 1: 5}]
    env = from_pettingzoo(lambda: Leavers(ends, [box, box]), B, num_adversaries=1)
    env.reset()
    env.step([torch.full((B, 2), 7.0), torch.full((B, 2), -0.5)])  # cut to the Box
    assert env.envs[0].seen[0][0].tolist() == [1, 1] and env.envs[0].seen[0][1].tolist() == [-0.5, -0.5]
    assert env.num_adversaries == 1 and not hasattr(env, "action_splits") and not hasattr(env, "sample_tasks")


def test_turn_based_envs(monkeypatch):
    mpe2 = pytest.importorskip("mpe2.simple_spread_v3")
    one, other = from_pettingzoo(mpe2.env, 1), from_pettingzoo(mpe2.parallel_env, 1)
    a, b = ((torch.manual_seed(0), env.reset())[1] for env in (one, other))
    assert equal(a, b) and one.action_dims == other.action_dims
    monkeypatch.setattr(mpe2.raw_env, "metadata", mpe2.raw_env.metadata | {"is_parallelizable": False})
    with pytest.raises(ValueError, match="turn-based"):
        from_pettingzoo(mpe2.env, 1)
