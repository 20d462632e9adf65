"""Robots with several drivers: against gymnasium (always) and MaMuJoCo (where gymnasium-robotics is
installed), and hoppers whose parameters must not compound."""

import numpy as np
import pytest
import torch
from test_parity import drivers_actions, play_drivers

from envs import make
from envs.multi_agent_mujoco import FIELDS

equal, close = np.array_equal, np.testing.assert_allclose


# ---------------------------------------------------------------- parity


# ---------------------------------------------------------------- contract, start, reward


def test_starts():
    torch.manual_seed(0)
    for name, low, std in ("cheetah_dir", 0.1, 0.1), ("hopper_param", 0.005, 0.01 / 12**0.5):
        env = make(name, 3000)
        env.reset(env.all_tasks()[:1].expand(3000, -1))
        nq = env.sim.model.nq
        q, v = env.state[:, 1 : 1 + nq] - env.sim.model.qpos0, env.state[:, 1 + nq :]
        assert np.abs(q).max() <= low
        close(q.std(0), 2 * low / 12**0.5, rtol=0.05)
        close(v.std(0), std, rtol=0.05)
        assert (np.abs(v).max() > 0.3) == (name == "cheetah_dir")  # a normal has tails
    assert env.sim.model.qpos0[1] == 1.25 and env.sim.dt == 0.008


@pytest.mark.parametrize("name, scale", [("cheetah_dir", 2.0), ("two_agent_half_cheetah", 2.0)])
def test_the_two_directions_sum_to_the_control_cost(name, scale):
    """r(+1) + r(-1) = 2 ctrl: of the drivers_actions asked for (cheetah_dir), or of those clipped."""
    def run(sign):
        torch.manual_seed(0)
        env = make(name, 2)
        env.reset(torch.full((2, 1), sign))
        return play_drivers(env, 20, scale)

    right, left = run(1.0), run(-1.0)
    assert torch.equal(right[0], left[0]) and torch.equal(right[-1], left[-1])  # the task is not seen
    draw, env = torch.Generator().manual_seed(0), make(name, 2)
    for t in range(20):
        a = torch.cat(drivers_actions(env, scale, draw), 1)
        cost = -0.1 * ((a if name == "cheetah_dir" else a.clamp(-1, 1)) ** 2).sum(1)
        torch.testing.assert_close((right[1] + left[1])[t, :, 0], 2 * cost, atol=1e-5, rtol=1e-6)


def test_each_driver_moves_its_own_leg():
    def run(i):
        torch.manual_seed(0)
        env = make("cheetah_dir", 1)
        env.reset()
        env.state[:, 2] += 2.0  # in the air, so that the floor does not join in
        start = env.state.copy()
        env.step([torch.full((1, 3), float(i == j)) for j in range(2)])
        return env.state[0, 4:10] - start[0, 4:10]

    rest, back, front = run(None), run(0), run(1)
    assert np.abs(back - rest)[:3].min() > 3 * np.abs(back - rest)[3:].max()
    assert np.abs(front - rest)[3:].min() > 3 * np.abs(front - rest)[:3].max()


def test_direction_of_the_two_agent_cheetah():
    assert make("two_agent_half_cheetah", 3).all_tasks().tolist() == [[1.0]]
    env = make("two_agent_half_cheetah", 3, direction=-1)
    env.reset()
    assert env.task.tolist() == [[-1.0]] * 3
    env.reset(torch.tensor([[1.0], [-1.0], [1.0]]))
    assert env.task[:, 0].tolist() == [1, -1, 1]


# ---------------------------------------------------------------- tasks of the hopper


def test_task_sets():
    torch.manual_seed(0)
    env = make("hopper_param", 1)
    train, test = env.all_tasks("train"), env.all_tasks("test")
    assert train.shape == (50, 4) and test.shape == (10, 4) and train.dtype == torch.float32
    both = torch.cat([train, test])
    assert 0.5 <= both.min() and both.max() <= 1.5 and len(both.unique(dim=0)) == 60
    close(train.numpy(), np.random.default_rng(0).uniform(0.5, 1.5, (50, 4)), rtol=1e-6)
    close(test.numpy(), np.random.default_rng(1).uniform(0.5, 1.5, (10, 4)), rtol=1e-6)
    for split, K in ("train", 50), ("test", 10):
        drawn, tasks = env.sample_tasks(20_000, split), env.all_tasks(split)
        count = (drawn[:, None] == tasks).all(-1).float().mean(0)
        close(count.sum(), 1, rtol=1e-5)
        assert (count - 1 / K).abs().max() < 0.008 * (10 / K) ** 0.5 + 0.002
    cheetah = make("cheetah_dir", 1)
    assert cheetah.all_tasks("train").tolist() == cheetah.all_tasks("test").tolist() == [[-1.0], [1.0]]


def test_parameters_never_compound():
    """A thousand random tasks leave base * scale, and a task that comes again its trajectory, bit by bit."""
    torch.manual_seed(0)
    env = make("hopper_param", 2)
    base = {field: getattr(env.sim.model, field).copy() for field in FIELDS}
    tasks = env.all_tasks()

    def run(k):
        torch.manual_seed(1)
        env.reset(tasks[[k, k]])
        return play_drivers(env, 15, scale=0.3)

    first, other = run(0), run(1)
    for _ in range(1000):
        env.reset(env.sample_tasks(2))
    for b in range(2):
        for field, scale in zip(FIELDS, env.task[b]):
            assert equal(getattr(env.sim.models[b], field), base[field] * scale), field
            assert equal(getattr(env.sim.model, field), base[field])
    again = run(0)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[-1], other[-1])


def test_derived_numbers_follow_the_task():
    """What MuJoCo makes of mass and inertia when it compiles a model is made anew (mj_setConst)."""
    env = make("hopper_param", 2)
    env.reset(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.5, 1.0, 1.0, 1.5]]))
    plain, heavy = env.sim.models
    base = env.sim.model
    close(plain.dof_invweight0, base.dof_invweight0, rtol=1e-12)
    close(heavy.body_subtreemass, 1.5 * base.body_subtreemass, rtol=1e-12)
    assert (heavy.dof_invweight0[:2] < 0.7 * base.dof_invweight0[:2]).all()
    assert not equal(heavy.body_invweight0, base.body_invweight0)


@pytest.mark.parametrize("i", range(4))
def test_each_multiplier_matters_where_it_should(i):
    task = torch.ones(2, 4)
    task[1, i] = 1.4
    torch.manual_seed(0)
    env = make("hopper_param", 2)
    env.reset(task)
    changed = {f for f in FIELDS if not equal(getattr(env.sim.models[0], f), getattr(env.sim.models[1], f))}
    assert changed == {FIELDS[i]}
    env.state[1] = env.state[0]
    for _ in range(5):
        env.step([torch.tensor([[0.5], [0.5]])] * 3)
    if FIELDS[i] != "geom_friction":  # friction needs a slide; others show at once
        assert not equal(env.state[0], env.state[1])


def test_rows_with_one_task_share_a_model_and_rows_do_not_touch():
    torch.manual_seed(0)
    env, tasks = make("hopper_param", 6, threads=2), make("hopper_param", 1).all_tasks()
    env.reset(tasks[[3, 1, 3, 0, 1, 3]])
    assert len({id(m) for m in env.sim.models}) == 3
    start, together = env.state.copy(), play_drivers(env, 40, scale=0.3)
    for b, k in enumerate([3, 1, 3, 0, 1, 3]):
        solo, draw = make("hopper_param", 1), torch.Generator().manual_seed(0)
        solo.reset(tasks[[k]])
        solo.state[:] = start[b]
        for t in range(40):
            action = [0.3 * torch.randn(6, 1, generator=draw)[b : b + 1] for _ in range(3)]
            obs, reward, terminated, *_ = solo.step(action)
            assert equal(solo.state[0], together[-1][t, b].numpy())
            assert torch.equal(reward[0], together[1][t, b]) and terminated[0] == together[2][t, b]


# ---------------------------------------------------------------- ends
