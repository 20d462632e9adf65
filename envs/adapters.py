"""
Bridges between the batched contract (envs/__init__.py) and the two usual interfaces.

    to_pettingzoo(make("ipd", 1))                              one of our worlds as a PettingZoo ParallelEnv
    from_pettingzoo(simple_spread_v3.parallel_env, 16)         16 copies of a ParallelEnv as a batched world
    from_gymnasium(lambda: gymnasium.make("CartPole-v1"), 16)  the same for a gymnasium Env: N = 1, no tuple

Copies are stepped one after another in Python: this is for trying a foreign world, not for speed.
Importing this file needs torch and numpy; gymnasium and pettingzoo are imported when a function needs them.
"""

from math import prod

import numpy as np
import torch


def to_pettingzoo(env, render_mode=None):
    """A batched world with num_envs = 1 as a PettingZoo ParallelEnv with agents "agent_0", "agent_1", ...

    Observations are float32 Boxes (O_i,); actions are Discrete(A_i), or Boxes (A_i,) without bounds, as the
    contract states none. reset(options={"task": task}) hands `task` to env.reset. All agents leave together
    at the first step on which either flag is up; the two flags are passed on as they are.

    Our worlds draw from torch's global CPU stream. Here reset and step run on a stream of this env's own and
    leave the caller's as it was. reset(seed=s) restarts it as torch.manual_seed(s) would, so that an episode
    depends on seed and actions alone; reset() goes on with it, and starts it from the global stream at first.

    ValueError: num_envs is not 1; the world observes indices; a render_mode that it does not have.
    """
    from gymnasium import spaces
    from pettingzoo import ParallelEnv

    modes = ["rgb_array"] if hasattr(env, "render") else []
    if env.num_envs != 1:
        raise ValueError(f"to_pettingzoo wraps a world with num_envs=1, not {env.num_envs}")
    if getattr(env, "index_obs", False):
        raise ValueError("to_pettingzoo needs observations (1, O): make the world without index_obs")
    if render_mode not in [None, *modes]:
        raise ValueError(f"render_mode must be one of {[None, *modes]}, not {render_mode!r}")
    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float32)

    class World(ParallelEnv):
        metadata = {"name": type(env).__name__, "render_modes": modes}

        def __init__(self):
            self.render_mode, self.max_cycles, self._stream, self.agents = render_mode, env.horizon, None, []
            self.possible_agents = names = [f"agent_{i}" for i in range(env.num_agents)]
            self.observation_spaces = {name: box(O) for name, O in zip(names, env.obs_dims)}
            # who moves and speaks at once numbers the pairs: the product of its blocks
            sizes = map(prod, env.action_splits) if hasattr(env, "action_splits") else env.action_dims
            act = spaces.Discrete if env.discrete else box
            self.action_spaces = {name: act(A) for name, A in zip(names, sizes)}

        def observation_space(self, agent):
            return self.observation_spaces[agent]

        def action_space(self, agent):
            return self.action_spaces[agent]

        def reset(self, seed=None, options=None):
            if seed is None and self._stream is None:
                seed = int(torch.randint(2**31 - 1, ()))
            if seed is not None:
                self._stream = torch.Generator().manual_seed(seed).get_state()
            obs = self._run(env.reset, (options or {}).get("task"))
            self.agents = list(self.possible_agents)
            return self._obs(obs), {name: {} for name in self.agents}

        def step(self, actions):
            if not self.agents:  # the episode is over: nobody is left to answer
                return {}, {}, {}, {}, {}
            dtype, names = torch.long if env.discrete else torch.float32, self.agents
            action = [np.asarray(actions[name])[None] for name in names]  # each (1,) or (1, A)
            action = tuple(torch.as_tensor(a, dtype=dtype, device=self._device) for a in action)
            action = action if env.num_agents > 1 else action[0]
            obs, reward, terminated, truncated, info = self._run(env.step, action)
            if terminated[0] or truncated[0]:
                self.agents = []
            ends = [dict.fromkeys(names, bool(flag[0])) for flag in (terminated, truncated)]
            return self._obs(obs), dict(zip(names, reward[0].tolist())), *ends, {n: dict(info) for n in names}

        def render(self):
            return env.render() if self.render_mode else None

        def _obs(self, obs):
            obs = obs if env.num_agents > 1 else (obs,)
            self._device = obs[0].device
            return {name: o[0].cpu().numpy().copy() for name, o in zip(self.possible_agents, obs)}

        def _run(self, call, argument):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._stream)
                out = call(argument)
                self._stream = torch.get_rng_state()
            return out

    return World()


def from_pettingzoo(make_parallel_env, num_envs, horizon=None, device="cpu"):
    """B = num_envs independent copies, one call of `make_parallel_env` each, as a batched world on `device`.

    horizon=None takes metadata["max_cycles"], else unwrapped.max_cycles. _Copies says how the copies behave.
    Raises ValueError if there is no horizon, if num_envs < 1, and for spaces that cannot be batched.
    """
    envs = [make_parallel_env() for _ in range(num_envs)]
    if horizon is None and envs:
        horizon = envs[0].metadata.get("max_cycles") or getattr(envs[0].unwrapped, "max_cycles", None)
    return _Copies(envs, horizon, device)


def from_gymnasium(make_env, num_envs, horizon=None, device="cpu"):
    """The same for gymnasium: obs (B, O) and action (B,) or (B, A) without the tuple, reward (B, 1).

    horizon=None takes env.spec.max_episode_steps. Raises ValueError as from_pettingzoo does.
    """
    envs = [_OneAgent(make_env()) for _ in range(num_envs)]
    if horizon is None and envs:
        horizon = getattr(envs[0].env.spec, "max_episode_steps", None)
    return _Copies(envs, horizon, device)


class _OneAgent:
    """A gymnasium Env in the dicts of a ParallelEnv, with the single agent 0."""

    def __init__(self, env):
        self.env, self.unwrapped, self.possible_agents, self.agents = env, env.unwrapped, [0], []
        self.observation_space = lambda agent: env.observation_space
        self.action_space = lambda agent: env.action_space

    def reset(self, seed=None, options=None):
        self.agents = [0]
        return tuple({0: x} for x in self.env.reset(seed=seed, options=options))  # obs, info

    def step(self, actions):
        out = self.env.step(actions[0])  # obs, reward, terminated, truncated, info
        self.agents = [] if out[2] or out[3] else [0]
        return tuple({0: x} for x in out)


class _Copies:
    """B single envs behind the batched contract.

    Observations are flattened to (B, O_i) float32, a Discrete one to one-hot. Actions are all Discrete, (B,)
    long from 0 whatever the space starts at, or all Box, (B, A_i), neither rescaled nor clipped.

    An agent that leaves keeps its last observation and gets reward 0. A copy is over when its last agent
    leaves and stays so until reset(): `truncated` if the env cut any agent short, `terminated` if all came to
    an end of their own (both, if they did so as time ran out). At the horizon `truncated` is up for all B.
    """

    def __init__(self, envs, horizon, device):
        from gymnasium import spaces

        if not envs:
            raise ValueError("num_envs must be at least 1")
        if horizon is None or horizon < 1:
            raise ValueError(f"no usable episode length ({horizon}): pass horizon=, at least 1")
        if len({id(env.unwrapped) for env in envs}) < len(envs):
            raise ValueError("the copies must be independent: make a new env at each call")
        self.envs, self.num_envs, self.horizon, self.device = envs, len(envs), horizon, device
        self.names, self.num_agents = list(envs[0].possible_agents), len(envs[0].possible_agents)
        self.obs_spaces = [envs[0].observation_space(name) for name in self.names]
        self.action_spaces = [envs[0].action_space(name) for name in self.names]
        if not all(space.is_np_flattenable for space in self.obs_spaces):
            raise ValueError(f"observations must be Box, or flatten to one, not {self.obs_spaces}")
        kinds = {type(space) for space in self.action_spaces}
        if kinds not in ({spaces.Discrete}, {spaces.Box}):
            raise ValueError(f"actions must be all Discrete or all Box, not {self.action_spaces}")
        self.discrete, self.flatten = kinds == {spaces.Discrete}, spaces.flatten
        self.obs_dims = tuple(spaces.flatdim(space) for space in self.obs_spaces)
        self.action_dims = tuple(int(spaces.flatdim(space)) for space in self.action_spaces)

    def reset(self, task=None):
        """Each copy is seeded from torch's global stream. `task`: None, or B dicts, each copy's options."""
        options = [None] * self.num_envs if task is None else task
        if len(options) != self.num_envs:
            raise ValueError(f"task must be {self.num_envs} dicts of options, one a copy, not {len(options)}")
        self.t, self.obs = 0, [np.zeros((self.num_envs, O), np.float32) for O in self.obs_dims]
        self.terminated, self.truncated, self.cut, self.survived = np.zeros((4, self.num_envs), bool)
        for b, seed in enumerate(torch.randint(2**31 - 1, (self.num_envs,)).tolist()):
            self._keep(b, self.envs[b].reset(seed=seed, options=options[b])[0])
        return self._obs()

    def step(self, action):
        action = [a.detach().cpu().numpy() for a in ((action,) if self.num_agents == 1 else action)]
        reward, self.t = np.zeros((self.num_envs, self.num_agents), np.float32), self.t + 1
        for b, env in enumerate(self.envs):
            if not env.agents:  # over: the last observation and the flags stay, the reward is 0
                continue
            moves = {n: self._move(i, action[i][b]) for i, n in enumerate(self.names) if n in env.agents}
            obs, gain, terminated, truncated, _ = env.step(moves)
            self._keep(b, obs)
            reward[b] = [gain.get(name, 0) for name in self.names]
            self.cut[b] |= any(truncated.values())
            self.survived[b] |= any(truncated[name] and not terminated[name] for name in truncated)
            if not env.agents:
                self.terminated[b], self.truncated[b] = not self.survived[b], self.cut[b]
        flags = self.terminated, self.truncated | (self.t >= self.horizon)
        return self._obs(), *(torch.tensor(x, device=self.device) for x in (reward, *flags)), {}

    def _move(self, i, a):
        space = self.action_spaces[i]
        return int(a + space.start) if self.discrete else a.reshape(space.shape).astype(space.dtype)

    def _keep(self, b, obs):
        for i, name in enumerate(self.names):
            if name in obs:
                self.obs[i][b] = self.flatten(self.obs_spaces[i], obs[name])

    def _obs(self):
        obs = tuple(torch.tensor(o, device=self.device) for o in self.obs)  # copied, for steps to come
        return obs if self.num_agents > 1 else obs[0]
