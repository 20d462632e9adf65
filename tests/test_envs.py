"""The contract (envs/__init__.py) as one table: every line of it, for every env that make() knows."""

import math
import subprocess
import sys

import pytest
import torch

import envs

B, H = 3, 4
MADE = {name: envs.make(name, 1) for name in envs.WORLDS}
WITH_TASKS, FINITE = ([name for name, env in MADE.items() if hasattr(env, member)]
                      for member in ("sample_tasks", "all_tasks"))
ENDS = ["nav2d", "uav", *(name for name, env in MADE.items() if hasattr(env, "sim"))]
every = pytest.mark.parametrize("name", envs.WORLDS)


def tupled(x):
    return (x,) if torch.is_tensor(x) else tuple(x)


def actions(env, draw, rows=None):
    """One random action an agent, of `rows` rows."""
    rows, splits = rows or env.num_envs, getattr(env, "action_splits", [(A,) for A in env.action_dims])
    if env.discrete:
        return [torch.randint(math.prod(split), (rows,), generator=draw) for split in splits]
    return [2 * torch.rand(rows, A, generator=draw) - 1 for A in env.action_dims]


def step(env, action):
    return env.step(action[0] if env.num_agents == 1 else tuple(action))


def play(env, seed, rows=slice(None), total=None, task=None):
    """[obs..., reward, terminated, truncated] of each step, the start first; actions are rows of `total`."""
    torch.manual_seed(seed)
    draw, trace = torch.Generator().manual_seed(seed), [tupled(env.reset(task))]
    for _ in range(env.horizon):
        obs, *rest, _ = step(env, [a[rows] for a in actions(env, draw, total)])
        trace.append((*tupled(obs), *rest))
    return trace


def same(one, two):
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, two, strict=True))


@every
def test_shapes_and_types(name):
    env = envs.make(name, B, horizon=H)
    assert (env.num_envs, env.horizon, env.device) == (B, H, "cpu")
    assert len(env.obs_dims) == len(env.action_dims) == env.num_agents
    start, *steps = play(env, 0)
    for t, (*obs, reward, terminated, truncated) in enumerate([(*start, *steps[0][-3:]), *steps]):
        assert [tuple(o.shape) for o in obs] == [(B, n) for n in env.obs_dims]
        assert all(o.dtype == torch.float32 for o in obs)
        assert reward.shape == (B, env.num_agents) and reward.dtype == torch.float32
        assert terminated.shape == truncated.shape == (B,)
        assert terminated.dtype == truncated.dtype == torch.bool
        assert truncated.all() == truncated.any() == (t == H)  # time is up for all rows together
    for tensor in getattr(env, "measures", dict)().values():
        assert tensor.shape == (B,)


@every
def test_the_seed_decides_and_processes_that_share_a_batch_play_what_one_would(name):
    whole, again, other = (play(envs.make(name, 6, horizon=H), seed) for seed in (1, 1, 2))
    assert same(whole, again) and not same(whole, other)
    halves = [play(envs.make(name, 3, horizon=H, part=(k, 2)), 1, slice(3 * k, 3 * k + 3), 6) for k in (0, 1)]
    assert same(whole, [[torch.cat(rows) for rows in zip(*steps)] for steps in zip(*halves)])


@every
def test_what_an_env_returns_is_the_callers(name):
    """Whoever writes into observations, rewards and flags, or keeps them, changes nothing, and no two of them
    share their numbers."""
    clean, env = play(envs.make(name, B, horizon=H), 0), envs.make(name, B, horizon=H)
    torch.manual_seed(0)
    draw, kept = torch.Generator().manual_seed(0), tupled(env.reset())
    for wanted in clean[1:]:
        for number, tensor in enumerate(kept):
            tensor.fill_(number % 2)
        assert all((tensor == number % 2).all() for number, tensor in enumerate(kept))
        obs, *rest, info = step(env, actions(env, draw))
        kept = (*tupled(obs), *rest)
        assert same([kept], [wanted])
        kept += tuple(info.values())


def end_one(env, action):
    """Makes row 1 end in this step: a robot diverges, the others are where they should be."""
    if hasattr(env, "sim"):
        action[0][1] = torch.nan
    elif env.name == "uav":
        env.place[0, 1] = env.place[1, 1]
        action[0][1] = action[1][1] = 0
    else:
        env.x[1] = env.task[1]
        action[0][1] = 0


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_final(name):
    """Who has ended rests: the flag stays up, no reward comes, nobody else notices."""

    def run(broken):
        torch.manual_seed(0)
        env, draw, trace = envs.make(name, B, horizon=8), torch.Generator().manual_seed(0), []
        env.reset()
        for t in range(8):
            action = actions(env, draw)
            if broken and t == 3:
                end_one(env, action)
            obs, reward, terminated, _, info = step(env, action)
            diverged = info.get("diverged", torch.zeros(B, dtype=torch.bool))
            trace.append((torch.cat(tupled(obs), 1), reward, terminated, diverged))
        return [torch.stack(x) for x in zip(*trace)]

    clean, (obs, reward, terminated, diverged) = run(False), run(True)
    assert terminated[3:, 1].all() and (reward[4:, 1] == 0).all()
    assert diverged[:, 1].tolist() == [t > 2 and hasattr(MADE[name], "sim") for t in range(8)]
    assert name == "uav" or (obs[4:, 1] == obs[3, 1]).all()  # what one sees of the other there is noisy
    broken = obs, reward, terminated, diverged
    assert all(torch.equal(x[:, [0, 2]], y[:, [0, 2]]) for x, y in zip(clean, broken))


@every
def test_bad_actions(name):
    env, draw = envs.make(name, B, horizon=H), torch.Generator()
    env.reset()
    good = actions(env, draw)
    bad = [[a[:2] for a in good], [a[:1] for a in good], [a[:, None, None] for a in good]]
    bad += [[torch.zeros(B, 77)] * env.num_agents]
    if env.num_agents > 1:
        bad += [good[:-1], [*good, good[0]], good[0], [good[0][:1], *good[1:]]]  # missing, too many, alone
    if env.discrete:
        bad += [[torch.full_like(a, n) for a in good] for n in (-1, 999)] + [[a.float() for a in good]]
        bad += [[*good[:-1], torch.full_like(good[-1], n)] for n in (-1, 999)]
    else:
        bad += [[a[:, 0] for a in good]]
    for action in bad:
        with pytest.raises(ValueError) as error:
            env.step(action[0] if env.num_agents == 1 else action)
        assert "\n" not in str(error.value) and "action" in str(error.value)
    kept = [a.clone() for a in good]
    step(env, good)
    assert all(map(torch.equal, kept, good))  # and the caller's actions stay as they were


@every
def test_bad_options(name):
    for options in dict(horizon=0), dict(num_envs=0), dict(threads=0), dict(part=(2, 2)), dict(foo=1):
        with pytest.raises(ValueError) as error:
            envs.make(name, **dict(num_envs=2) | options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options, message", [
    ("chess", {}, "chess.*known: ipd"), ("two_agent_half_cheetah", dict(direction=0), "-1 or 1"),
    ("half_cheetah_peers", dict(direction=-1), "no option direction"),
    ("rware", dict(num_agents=0), "1 to 100"),
    ("simple", dict(num_agents=2), "1 agents, 0 of them"),
    ("simple_crypto", dict(num_agents=4), "3 agents, 1 of them"),
    ("simple_reference", dict(num_adversaries=1), "0 of them adversaries, not 2 and 1"),
    ("simple_tag", dict(num_agents=3, num_adversaries=3), "not 3 of 3 agents"),
    ("simple_push", dict(num_adversaries=0), "not 0 of 2 agents"),
    ("simple_spread", dict(num_adversaries=1), "no adversaries, not 1 of 3"),
    ("simple_spread", dict(num_agents=0), "needs an agent"),
    ("simple", dict(dialect="mpe3"), "'mpe2' or 'mpe', not 'mpe3'")])
def test_bad_options_of_its_own(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(name, 1, **options)
    assert "\n" not in str(error.value)


@every
def test_bad_tasks(name):
    env = envs.make(name, B)
    bad = [torch.zeros(B, 9), torch.zeros(B + 1, getattr(env, "task_dim", 1))]
    bad += dict(hopper_param=[torch.zeros(B, 4), torch.full((B, 4), torch.nan)],
                rware=[torch.zeros(B, 5), torch.tensor([[2.0, -1, 0, 0, 0]] * B)]).get(name, [])
    for task in bad:
        with pytest.raises(ValueError, match="task"):
            env.reset(task)
    if name in WITH_TASKS:
        with pytest.raises(ValueError, match="split"):
            env.sample_tasks(2, "validation")


@pytest.mark.parametrize("name", WITH_TASKS)
def test_tasks(name):
    env = envs.make(name, B)
    assert env.splits[0] == "train" and "test" in env.splits
    for split in env.splits:
        drawn = []
        for seed in 0, 0, 1:
            torch.manual_seed(seed)
            drawn.append(env.sample_tasks(50, split))
        tasks, again, other = drawn
        assert tasks.dtype == torch.float32 and torch.equal(tasks, again)
        assert len(tasks.unique(dim=0)) == 1 or split == "test" or not torch.equal(tasks, other)
        if hasattr(env, "task_dim"):
            assert tasks.shape == (50, env.task_dim)
        env.reset(tasks[:B])
        if name in FINITE:
            every = env.all_tasks(split)
            assert every.dtype == torch.float32 and every.shape[1:] == tasks.shape[1:]
            assert torch.equal(every, envs.make(name, 1).all_tasks(split))  # the same in every env and run
            flat = every.flatten(1).double()
            assert len((flat @ torch.rand(flat.shape[1]).double()).unique()) == len(every)  # no task twice
            if hasattr(env, "task_dim"):  # all of them come, and nothing else
                drawn = env.sample_tasks(40 * len(every), split)
                assert torch.equal(drawn.unique(dim=0), every.unique(dim=0))


@pytest.mark.parametrize("name", ["ant_vel", "small_ant", "hopper_param"])
def test_the_number_of_threads_changes_nothing(name):
    one, *others = (play(envs.make(name, 11, horizon=15, threads=n), 0) for n in (1, 2, 5))
    assert all(same(one, other) for other in others)


@pytest.mark.parametrize("name", [name for name, env in MADE.items() if hasattr(env, "render")])
def test_a_picture(name):
    env = envs.make(name, 2)
    env.reset()
    try:
        frame = env.render(1)
    except RuntimeError as error:  # no OpenGL here
        pytest.skip(str(error))
    assert frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == "uint8" and frame.std() > 0


def test_index_observations_are_the_one_hot_ones():
    onehot, index = (play(envs.make("rps3", 5, horizon=4, index_obs=k), 0) for k in (False, True))
    for (*one, reward, _, _), (*two, gain, _, _) in zip(onehot[1:], index[1:]):
        assert all(torch.equal(x.argmax(-1), y) for x, y in zip(one, two)) and torch.equal(reward, gain)


def test_envs_of_torch_and_numpy_import_no_other_package():
    names = "ipd", "nav2d", "uav", "simple_spread", "spread", "rware"
    others = "{'mujoco', 'gymnasium', 'pettingzoo', 'mpe2', 'pygame', 'rware'}"
    code = (f"import sys, envs, envs.adapters; [envs.make(name, 2) for name in {names}]; "
            f"print({others} & set(sys.modules))")
    cwd = envs.__path__[0] + "/.."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_missing_package_is_named(monkeypatch):
    for module in [m for m in sys.modules if m.startswith("envs.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)  # importing it fails
    with pytest.raises(ValueError, match="package.*mujoco") as error:
        envs.make("wheeled", 2)
    assert "\n" not in str(error.value)


def test_an_env_without_pictures_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        envs.Camera(object())
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
