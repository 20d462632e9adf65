"""The worlds with hidden targets: against the rules written out body by body for one world in plain Python,
and by hand."""


import numpy as np
import pytest
import torch
from test_parity import TARGETS

import envs
from envs.targets import walls

close = np.testing.assert_allclose


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


@pytest.mark.parametrize("name", TARGETS)
def test_nobody_sees_the_task_but_the_reward_tells(name):
    env = envs.make(name, 2)
    env.reset(env.all_tasks()[:2])
    state = env.state()
    for key in "pos", "vel":
        state[key][1] = state[key][0]
    assert all(torch.equal(o[0], o[1]) for o in env.set_state(state))
    gain = env.reward()
    assert not np.allclose(gain[:, 0], gain[:, 1])
