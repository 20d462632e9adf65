"""
Bridges between the batched contract (envs/__init__.py) and the two usual interfaces.

    to_pettingzoo(make("ipd", 1))                              one of our envs as a PettingZoo ParallelEnv
    from_pettingzoo(simple_spread_v3.parallel_env, 16)         16 copies of a ParallelEnv as a batched env
    from_gymnasium(lambda: gymnasium.make("CartPole-v1"), 16)  the same for a gymnasium Env: N = 1, no tuple,
                                                               or N agents where its spaces are Tuples
    from_gymnasium(make, 16, tasks={"train": (K, D), "test": (K, D)}, options=lambda task: {"goal": task})
                                                               the same with tasks: reset(options=) gets them

Copies are stepped one after another in Python: this is for trying a foreign env, not for speed.
Importing this file needs torch and numpy; gymnasium and pettingzoo are imported when a function needs them.
"""

from math import prod

import numpy as np
import torch

from .base import Env, FiniteTasks


def to_pettingzoo(env):
    """A batched env with num_envs = 1 as a PettingZoo ParallelEnv with agents "agent_0", "agent_1", ...

    Observations are float32 Boxes (O_i,); actions are Discrete(A_i), or Boxes (A_i,) without bounds, because
    the contract has none. reset(options={"task": task}), of shape (D,), chooses the task. All agents leave
    together at the first step on which either flag is up; the two flags are passed on as they are.

    Our envs draw from torch's global CPU stream. Here reset and step use a stream of their own and leave the
    caller's untouched. reset(seed=s) restarts it as torch.manual_seed(s) would, so that an episode depends on
    seed and actions alone. reset() continues it; the first reset() seeds it from the global stream.

    Raises ValueError if num_envs is not 1 or the env observes indices.
    """
    from gymnasium import spaces
    from pettingzoo import ParallelEnv

    if env.num_envs != 1:
        raise ValueError(f"to_pettingzoo wraps an env with num_envs=1, not {env.num_envs}")
    if getattr(env, "index_obs", False):
        raise ValueError("to_pettingzoo needs observations (1, O): make the env without index_obs")
    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float32)

    class World(ParallelEnv):
        metadata = {"name": type(env).__name__, "render_modes": []}

        def __init__(self):
            self.max_cycles, self.render_mode, self._stream, self.agents = env.horizon, None, None, []
            self.possible_agents = names = [f"agent_{i}" for i in range(env.num_agents)]
            self.observation_spaces = {name: box(O) for name, O in zip(names, env.obs_dims)}
            # an agent that moves and speaks has one number for each pair: the product of its blocks
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
            task = (options or {}).get("task")
            obs = self._run(env.reset, None if task is None else torch.as_tensor(task)[None])
            self.agents = list(self.possible_agents)
            return self._obs(obs), {name: {} for name in self.agents}

        def step(self, actions):
            if not self.agents:  # the episode is over
                return {}, {}, {}, {}, {}
            dtype, names = torch.long if env.discrete else torch.float32, self.agents
            action = [np.asarray(actions[name])[None] for name in names]  # each (1,) or (1, A)
            action = tuple(torch.as_tensor(a, dtype=dtype, device=env.device) for a in action)
            action = action if env.num_agents > 1 else action[0]
            obs, reward, terminated, truncated, info = self._run(env.step, action)
            if terminated[0] or truncated[0]:
                self.agents = []
            ends = [dict.fromkeys(names, bool(flag[0])) for flag in (terminated, truncated)]
            return self._obs(obs), dict(zip(names, reward[0].tolist())), *ends, {n: dict(info) for n in names}

        def _obs(self, obs):
            obs = obs if env.num_agents > 1 else (obs,)
            return {name: o[0].cpu().numpy().copy() for name, o in zip(self.possible_agents, obs)}

        def _run(self, call, argument):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._stream)
                out = call(argument)
                self._stream = torch.get_rng_state()
            return out

    return World()


def from_pettingzoo(make_env, num_envs, **options):
    """B = num_envs independent copies, each from a call of `make_env`, as a batched env. `options` are those
    of _Copies. A turn-based (AEC) env is converted if it says that it is parallelizable."""
    from pettingzoo import AECEnv
    from pettingzoo.utils.conversions import aec_to_parallel

    envs = [make_env() for _ in range(num_envs)]
    if envs and isinstance(envs[0], AECEnv):
        if not envs[0].metadata.get("is_parallelizable"):
            raise ValueError(f"{envs[0]} is turn-based (AEC), and its agents cannot move at once: "
                             "a parallel_env is needed")
        envs = [aec_to_parallel(env) for env in envs]
    limits = [e.metadata.get("max_cycles") or getattr(e.unwrapped, "max_cycles", None) for e in envs[:1]]
    return _copies(envs, limits, **options)


def from_gymnasium(make_env, num_envs, **options):
    """The same for gymnasium: one agent, or as many as the Tuple of action spaces has members."""
    envs = [_Agents(make_env()) for _ in range(num_envs)]
    return _copies(envs, [getattr(env.env.spec, "max_episode_steps", None) for env in envs[:1]], **options)


def _copies(envs, limits, horizon=None, tasks=None, **options):
    """limits: the episode length that the first env states, or None, in a list."""
    if horizon is None and limits == [None]:
        raise ValueError("the env does not say how long an episode is: pass horizon=")
    horizon = limits[0] if horizon is None and limits else horizon
    if tasks is None:
        return _Copies(envs, horizon=horizon, **options)
    return _CopiesWithTasks(envs, tasks, horizon=horizon, **options)


class _Agents:
    """A gymnasium Env in the dicts of a ParallelEnv, with agents 0, 1, ..."""

    def __init__(self, env):
        from gymnasium.spaces import Tuple

        many = isinstance(env.action_space, Tuple) and isinstance(env.observation_space, Tuple)
        self.env, self.unwrapped, self.many, self.agents = env, env.unwrapped, many, []
        self.possible_agents = list(range(len(env.action_space.spaces) if many else 1))
        self.render, self.close, self.metadata = env.render, env.close, env.metadata

    def observation_space(self, agent):
        return self.env.observation_space[agent] if self.many else self.env.observation_space

    def action_space(self, agent):
        return self.env.action_space[agent] if self.many else self.env.action_space

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        obs, info = self.env.reset(seed=seed, options=options)
        return dict(enumerate(obs if self.many else [obs])), info

    def step(self, actions):
        moves = [actions[agent] for agent in self.possible_agents]
        obs, *rest, info = self.env.step(moves if self.many else moves[0])
        N = len(self.possible_agents)  # reward and flags: one for all, or one for each
        rest = [dict(enumerate(np.broadcast_to(np.asarray(x), N).tolist())) for x in rest]
        self.agents = [] if all(rest[1].values()) or any(rest[2].values()) else self.possible_agents
        return dict(enumerate(obs if self.many else [obs])), *rest, info


class _Copies(Env):
    """B single envs behind the batched contract.

    Observations are flattened to (B, O_i) float32, a Discrete one to one-hot. Actions are all Discrete or all
    Box. Discrete: (B,) long that count from 0, wherever the space starts, or (B, A_i) floats of which the
    largest counts. Box: (B, A_i), clipped to it. num_adversaries: by default, the names with "adversary".

    An agent that leaves keeps its last observation and gets reward 0. A copy is over when its last agent
    leaves, and stays so until reset(). It is `truncated` if the env cut any agent short, `terminated` if all
    agents ended by themselves, and both if they did so as time ran out. At the horizon all are `truncated`.
    """

    soft = True

    def __init__(self, envs, num_adversaries=None, **common):
        from gymnasium import spaces

        name = envs and envs[0].metadata.get("name") or envs and type(envs[0].unwrapped).__name__
        super().__init__(name or "copies", len(envs), **common)
        if len({id(env.unwrapped) for env in envs}) < len(envs):
            raise ValueError("the copies must be independent: make a new env at each call")
        self.envs, self.names = envs, list(envs[0].possible_agents)
        self.num_agents = len(self.names)
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
        if self.discrete:
            self.action_splits = tuple((A,) for A in self.action_dims)
        hostile = sum("adversary" in str(name) for name in self.names)
        self.num_adversaries = hostile if num_adversaries is None else num_adversaries

    def reset(self, task=None):
        """Each copy is seeded from torch's global stream."""
        options = self._options(self.check_task(task))
        self.t, self.obs = 0, [np.zeros((self.num_envs, O), np.float32) for O in self.obs_dims]
        self.terminated, self.truncated, self.cut, self.survived = np.zeros((4, self.num_envs), bool)
        for b, seed in enumerate(torch.randint(2**31 - 1, (self.total,))[self.mine].tolist()):
            self._keep(b, self.envs[b].reset(seed=seed, options=options[b])[0])
        return self._obs()

    def step(self, action):
        action, reward = self.check_action(action), np.zeros((self.num_envs, self.num_agents), np.float32)
        if isinstance(action, tuple):  # of floats; (N, B) numbers are an array
            action = [a.detach().cpu().numpy() for a in action]
            action = [a.argmax(1) for a in action] if self.discrete else action
        self.t += 1
        for b, env in enumerate(self.envs):
            if not env.agents:  # over
                continue
            moves = {name: self._move(i, action[i][b]) for i, name in enumerate(self.names)}
            obs, gain, terminated, truncated, _ = env.step({name: moves[name] for name in env.agents})
            self._keep(b, obs)
            reward[b] = [gain.get(name, 0) for name in self.names]
            self.cut[b] |= any(truncated.values())
            self.survived[b] |= any(truncated[name] and not terminated[name] for name in truncated)
            if not env.agents:
                self.terminated[b], self.truncated[b] = not self.survived[b], self.cut[b]
        flags = self.terminated, self.truncated | (self.t >= self.horizon)
        return self._obs(), self.tensor(reward), *(self.tensor(flag, torch.bool) for flag in flags), {}

    def render(self, row=0):
        frame = self.envs[row].render()
        if not isinstance(frame, np.ndarray):
            raise ValueError(f"{self.name} gives no picture: make it with render_mode=\"rgb_array\"")
        return frame

    def close(self):
        for env in self.envs:
            env.close()

    def _options(self, task):
        return [None] * self.num_envs

    def _move(self, i, a):
        space = self.action_spaces[i]
        if self.discrete:
            return int(a + space.start)
        return a.reshape(space.shape).clip(space.low, space.high).astype(space.dtype)

    def _keep(self, b, obs):
        for i, name in enumerate(self.names):
            if name in obs:
                self.obs[i][b] = self.flatten(self.obs_spaces[i], obs[name])

    def _obs(self):
        obs = tuple(self.tensor(o) for o in self.obs)
        return obs if self.num_agents > 1 else obs[0]


class _CopiesWithTasks(FiniteTasks, _Copies):
    """tasks: {split: (K, D)}, with "train" first. options(task (D,)): the options of a copy's reset."""

    def __init__(self, envs, tasks, options=lambda task: {"task": task}, **common):
        super().__init__(envs, **common)
        self.tasks = {split: np.asarray(rows, np.float32) for split, rows in tasks.items()}
        self.options, shapes = options, {rows.shape[1:] for rows in self.tasks.values()}
        if "train" not in tasks or len(shapes) > 1 or {len(shape) for shape in shapes} != {1}:
            raise ValueError("tasks must be {split: (K, D) numbers}, of one D, with a split \"train\"")
        ((self.task_dim,),) = shapes

    def _options(self, task):
        return [self.options(row) for row in task.cpu().numpy()]
