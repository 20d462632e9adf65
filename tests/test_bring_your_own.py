"""Envs from elsewhere in the scripts that can play them, and one clear line from those that cannot."""

import importlib
import runpy
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_house_style import ROOT
from test_scripts import call, tiny, words

from envs.adapters import from_gymnasium, from_pettingzoo

EXAMPLES = Path(__file__).parent / "examples"
TASKS = {"train": np.arange(8.0).reshape(4, 2), "test": np.arange(4.0).reshape(2, 2)}


def script(name):
    """The script and the arguments of its smallest run, of two iterations."""
    module, args, steps = tiny(name)
    return module, args | dict(total_steps=2 * steps)


def mpe(name):
    pytest.importorskip("mpe2")
    return importlib.import_module(f"mpe2.{name}_v3").parallel_env


class Own(gymnasium.Env):
    """A point per agent that drifts. reset's options hold a task if there are any."""

    def __init__(self, agents=1, act=None, obs=3):
        one = act or spaces.Box(-1, 1, (2,)), spaces.Box(-9, 9, (obs,))
        self.action_space, self.observation_space = (
            [x, spaces.Tuple([x] * agents)][agents > 1] for x in one)
        self.agents, self.obs = agents, obs

    def look(self):
        x = np.full(self.obs, self.t, np.float32)
        return x if self.agents == 1 else (x,) * self.agents

    def reset(self, seed=None, options=None):
        self.t, self.task = 0, (options or {}).get("task")
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(action if self.agents == 1 else tuple(action)), action
        self.t += 1
        return self.look(), 1.0 if self.agents == 1 else [1.0] * self.agents, False, False, {}


def own(tasks=None, **kind):
    return lambda n, horizon: from_gymnasium(lambda: Own(**kind), n, horizon=horizon, tasks=tasks)


def zoo(name, **options):
    return lambda n, horizon: from_pettingzoo(lambda: mpe(name)(max_cycles=horizon, **options), n)


def warehouse(n, horizon):
    rware = pytest.importorskip("rware.warehouse")
    make = lambda: rware.Warehouse(3, 2, 1, 2, 0, 1, 2, None, horizon, rware.RewardType.INDIVIDUAL)
    return from_gymnasium(make, n, horizon=horizon, tasks=TASKS)


five, three = spaces.Discrete(5), spaces.Discrete(3)


def play(name, env, monkeypatch, folder):
    """The smallest run of a script on another env -> exit code."""
    module, args = script(name)
    horizon = args.get("horizon") or args.get("max_episode_len") or 5
    monkeypatch.setattr(module, "make_env", lambda args, n, *rest, **more: env(n, horizon))
    return call(name, *words(**args | dict(env="mine", run_dir=folder)))


@pytest.mark.parametrize("name, env", [
    ("coded_maddpg", zoo("simple_spread")), ("coded_maddpg", own(agents=3, act=five)),
    ("lemol", zoo("simple_push")), ("lemol", own(agents=2, act=three)),
    ("mg2l", warehouse), ("mg2l", own(tasks=TASKS, agents=2)), ("mg2l", own(tasks=TASKS, agents=3, act=five)),
    ("tesp", own(tasks=TASKS)), ("maml_rl", own(tasks=TASKS)),
])
def test_a_script_trains_on_what_it_can_play(name, env, monkeypatch, tmp_path):
    assert play(name, env, monkeypatch, tmp_path / "r") == 0
    assert (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name, env", [
    ("coded_maddpg", own(agents=2)), ("coded_maddpg", zoo("simple_spread", continuous_actions=True)),
    ("lemol", own(agents=2)), ("lemol", zoo("simple_spread")),
    ("mg2l", zoo("simple_spread")), ("mg2l", zoo("simple_push")), ("mg2l", own(agents=2, act=five)),
    ("tesp", own()), ("tesp", own(tasks=TASKS, act=five)), ("tesp", own(tasks=TASKS, agents=2)),
    ("maml_rl", own()), ("maml_rl", own(tasks=TASKS, act=five)), ("maml_rl", own(tasks=TASKS, agents=2)),
    ("meta_mapg", zoo("simple_spread")), ("meta_mapg", own(agents=2)),
])
def test_a_script_refuses_what_it_cannot_play_in_one_line(name, env, monkeypatch, tmp_path, capsys):
    assert play(name, env, monkeypatch, tmp_path / "r") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name, example", [("maml_rl", "own_tasks"), ("coded_maddpg", "own_env")])
def test_the_examples_of_readme(name, example, monkeypatch, tmp_path):
    module, args = script(name)
    monkeypatch.setattr(module, "make_env", module.make_env)  # the example changes it
    args = args | dict(env="mine", run_dir=tmp_path / "r", horizon=5)
    monkeypatch.setattr(sys, "argv", ["own.py", *words(**args)])
    torch.optim.Adam([torch.zeros(1)])  # loads what does not load below runpy's frames
    runpy.run_path(EXAMPLES / f"{example}.py")
    assert (EXAMPLES / f"{example}.py").read_text().strip() in (ROOT / "README.md").read_text()
    assert (tmp_path / "r" / "checkpoint.pt").exists()
