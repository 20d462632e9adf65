"""The environment contract (envs/__init__.py), for every world that make() knows."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import envs

OPTIONAL = {"gather": "magent2"}  # world: the package without which it cannot be made
WORLDS = [name for name in envs.WORLDS if name not in OPTIONAL or find_spec(OPTIONAL[name])]


def play(env, seed):
    """Observations, rewards and flags of one episode of random actions."""
    torch.manual_seed(seed)
    obs, trace = env.reset(), []
    single = torch.is_tensor(obs)  # a world with one agent drops the tuple
    for _ in range(env.horizon):
        if env.discrete:
            action = [torch.randint(n, (env.num_envs,)) for n in env.action_dims]
        else:
            action = [2 * torch.rand(env.num_envs, n) - 1 for n in env.action_dims]
        out = env.step(action[0] if single else action)
        trace.append(((obs,) if single else tuple(obs), *out[1:4]))
        obs = out[0]
    return trace


@pytest.mark.parametrize("name", WORLDS)
def test_contract(name):
    env = envs.make(name, num_envs=3, horizon=4)
    assert (env.num_envs, env.horizon) == (3, 4)
    assert len(env.obs_dims) == len(env.action_dims) == env.num_agents
    for t, (obs, reward, terminated, truncated) in enumerate(play(env, 0)):
        assert [tuple(o.shape) for o in obs] == [(3, n) for n in env.obs_dims]
        assert all(o.dtype == torch.float32 for o in obs)
        assert reward.shape == (3, env.num_agents) and reward.dtype == torch.float32
        assert terminated.shape == truncated.shape == (3,)
        assert terminated.dtype == truncated.dtype == torch.bool
        assert truncated.all() == truncated.any() == (t == 3)  # time is up for all worlds together


@pytest.mark.parametrize("name", WORLDS)
def test_same_seed_same_episode_other_seed_another(name):
    one, two, other = (play(envs.make(name, num_envs=8, horizon=6), seed) for seed in (1, 1, 2))
    same = lambda a, b: torch.equal(a[1], b[1]) and all(map(torch.equal, a[0], b[0]))
    assert all(map(same, one, two))
    assert not all(map(same, one, other))


@pytest.mark.parametrize("name", [n for n in WORLDS if hasattr(envs.make(n, 1), "sample_tasks")])
def test_tasks_are_drawn_from_the_seed(name):
    env = envs.make(name, num_envs=2)
    draw = lambda seed, split: (torch.manual_seed(seed), torch.as_tensor(env.sample_tasks(50, split)))[1]
    train, test = (env.all_tasks(k) if hasattr(env, "all_tasks") else None for k in ("train", "test"))
    assert torch.equal(draw(0, "train"), draw(0, "train"))
    assert torch.equal(draw(0, "train"), draw(1, "train")) == (train is not None and len(train) == 1)
    if train is None or not torch.equal(train, test):  # few tasks: all of them are in both splits
        assert not torch.equal(draw(0, "train"), draw(0, "test"))


@pytest.mark.parametrize("name", [n for n in WORLDS if hasattr(envs.make(n, 1), "all_tasks")])
def test_finite_sets_of_tasks(name):
    torch.manual_seed(0)
    env = envs.make(name, num_envs=2)
    for split in "train", "test":
        tasks = env.all_tasks(split)
        assert tasks.dtype == torch.float32 and tasks.dim() == 2
        assert torch.equal(tasks, envs.make(name, 1).all_tasks(split))  # the same in every world and run
        assert len(tasks.unique(dim=0)) == len(tasks)
        drawn = env.sample_tasks(40 * len(tasks), split)
        assert torch.equal(drawn.unique(dim=0), tasks.unique(dim=0))  # all of them come, and nothing else
        env.reset(tasks[[0, -1]])


def test_index_observations_are_the_one_hot_ones():
    torch.manual_seed(0)
    actions = [[torch.randint(3, (5,)) for _ in range(3)] for _ in range(4)]
    onehot, index = envs.make("rps3", 5, horizon=4), envs.make("rps3", 5, horizon=4, index_obs=True)
    a, b = onehot.reset(), index.reset()
    for action in actions:
        assert all(torch.equal(x.argmax(-1), y) for x, y in zip(a, b))
        (a, ra, *_), (b, rb, *_) = onehot.step(action), index.step(action)
        assert torch.equal(ra, rb)


@pytest.mark.parametrize("name", ["ipd", "nav2d", "simple_spread", "rware"])
def test_a_world_of_torch_and_numpy_imports_no_other_package(name):
    others = "{'mujoco', 'gymnasium', 'pettingzoo', 'mpe2', 'pygame', 'rware'}"
    code = f"import sys, envs; envs.make({name!r}, 2); print({others} & set(sys.modules))"
    cwd = envs.__path__[0] + "/.."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("world, package", OPTIONAL.items())
def test_a_missing_package_is_named(world, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(ValueError, match=f"pip install {package}") as error:
        envs.make(world, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, num_envs", [("chess", 4), ("ipd", 0)])
def test_bad_input_is_a_value_error_of_one_line(name, num_envs):
    with pytest.raises(ValueError) as error:
        envs.make(name, num_envs)
    assert "\n" not in str(error.value)
