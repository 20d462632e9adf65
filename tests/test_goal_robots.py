"""Goal robots: models, task sets, closed forms, and parity with one MjData stepped in a loop."""

import mujoco
import numpy as np
import pytest
import torch
from test_parity import GOAL_ROBOTS

from envs import make
from envs.goal_robots import ANT_POSE, ARMS, fingertip, goal_sets

close = np.testing.assert_allclose


def drive(env, action, steps):
    """Rewards (steps, B) under a constant action."""
    env.reset(torch.tensor([[30.0, 30.0]] * env.num_envs))  # out of reach
    return np.array([env.step(torch.tensor([action] * env.num_envs))[1][:, 0].numpy() for _ in range(steps)])


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name, nq, nu, masses", [
    ("wheeled", 6, 2, [11.72334344869252, 6.138328275653742, 6.138328275653742]),
    ("small_ant", 15, 8,
     [5.888130620579051] + [1.1762394810591905, 1.3760892613947235, 1.975638602401322] * 4),
    ("reacher2", 2, 2, [11.157894736842106, 11.157894736842106 + 1.6842105263157896]),
    ("reacher4", 4, 4, [5.675675675675676] * 3 + [5.675675675675676 + 1.2972972972972971]),
])
def test_models(name, nq, nu, masses):
    model = make(name, 1).sim.model
    assert (model.nq, model.nu) == (nq, nu)
    close(model.body_mass[1:], masses, rtol=1e-12)
    close(model.body_mass.sum(), 24, rtol=1e-12)
    assert model.opt.timestep == 0.01 and make(name, 1).sim.dt == 0.05
    kind = mujoco.mjtIntegrator.mjINT_EULER if name == "wheeled" else mujoco.mjtIntegrator.mjINT_RK4
    assert model.opt.integrator == kind
    close(model.actuator_gainprm[:, 0], 1)
    close(model.actuator_biasprm[:, 2], -1)  # torque = command - velocity
    close(model.actuator_ctrlrange, [[-s, s] for s in [100 if name == "reacher2" else 50] * nu])


def test_wheel_spins_with_the_inertia_of_a_disc():
    model = make("wheeled", 1).sim.model
    close(np.sort(model.body_inertia[2])[-1], 0.5 * 6.138328275653742 * 0.1**2, rtol=1e-6)


def test_joints_of_the_ant():
    model = make("small_ant", 1).sim.model
    name = lambda kind, i: mujoco.mj_id2name(model, kind, i)
    joints = [name(mujoco.mjtObj.mjOBJ_JOINT, i) for i in range(1, model.njnt)]
    assert joints == [f"{part}{leg}" for leg in (1, 2, 3, 4) for part in ("hip", "ankle")]
    driven = [name(mujoco.mjtObj.mjOBJ_JOINT, i) for i in model.actuator_trnid[:, 0]]
    assert driven == ["hip4", "ankle4", "hip1", "ankle1", "hip2", "ankle2", "hip3", "ankle3"]
    degrees = np.rad2deg(model.jnt_range[1:])
    close(degrees[::2], [[-30, 30]] * 4)
    close(degrees[1::2], [[30, 70], [-70, -30], [-70, -30], [30, 70]])
    assert model.dof_armature[:6].max() == 0 and (model.dof_armature[6:] == 1).all()


def test_only_the_floor_is_touched():
    for name in GOAL_ROBOTS:
        model = make(name, 1).sim.model
        meets = (model.geom_contype[:, None] & model.geom_conaffinity[None]) != 0
        meets = meets | meets.T
        pairs = {(i, j) for i, j in np.argwhere(meets) if i < j}
        with_floor = {(0, j) for j in range(1, model.ngeom)} if name in ("wheeled", "small_ant") else set()
        assert pairs == with_floor


# ---------------------------------------------------------------- dynamics


def test_wheeled_drives_straight_and_turns_on_the_spot():
    env = make("wheeled", 1)
    drive(env, [1.0, 1.0], 20)
    _, x, y, _, yaw = env.state[0, :5]
    assert abs(x - 1.948) < 0.02 and abs(y) < 0.01 and abs(yaw) < 0.01
    drive(env, [1.0, 1.0], 200)
    assert abs(env.state[0, 1] - 46.0) < 0.1 and abs(env.state[0, 7] - 4.92) < 0.02
    drive(env, [1.0, -1.0], 20)
    assert np.abs(env.state[0, 1:3]).max() < 0.002 and abs(env.state[0, 4] - 11.66) < 0.02
    drive(env, [0.0, 0.0], 20)
    assert (env.state[0, 1:3] == 0).all()


def test_arrival_ends_an_episode_for_good():
    env = make("wheeled", 2, horizon=30)
    env.reset(torch.tensor([[0.5, 0.0], [20.0, 0.0]]))
    seen = []
    for _ in range(30):
        obs, reward, terminated, truncated, info = env.step(torch.tensor([[0.1, 0.1]] * 2))
        seen.append((obs[0, 0].item(), reward[0, 0].item(), terminated[0].item(), info["arrived"][0].item()))
    x, reward, terminated, arrived = (np.array(column) for column in zip(*seen))
    end = int(np.argmax(terminated))
    assert 0 < end < 29 and abs(x[end] - 0.5) < 0.02 and (x[end:] == x[end]).all()
    assert (np.abs(x[:end] - 0.5) >= 0.02).all() and terminated[end:].all() and (arrived == terminated).all()
    assert (reward[: end + 1] < 0).all() and (reward[end + 1 :] == 0).all()  # no prize, and nothing after it
    assert not terminated[:end].any() and truncated.all()
    assert not info["arrived"][1] and env.state[1, 1] > x[end]  # the other row went on


def test_a_fallen_ant_ends_without_having_arrived():
    env = make("small_ant", 2)
    env.reset(torch.zeros(2, 2) + 5)
    env.state[:, 3] = [0.2, 0.6]
    _, _, terminated, _, info = env.step(torch.zeros(2, 8))
    assert terminated.tolist() == [False, True] and not info["arrived"].any()
    heights = np.zeros((4, 30))
    heights[:, 3] = [0.149, 0.15, 0.45, 0.451]
    assert env._fallen(heights).tolist() == [True, False, False, True]


# ---------------------------------------------------------------- observations and positions


def test_fingertips():
    close(fingertip(np.array([0, 0]), 0.75, 0.95), [1.7, 0])
    close(fingertip(np.array([np.pi / 2, 0]), 0.75, 0.95), [0, 1.7], atol=1e-12)
    close(fingertip(np.array([0, np.pi / 2]), 0.75, 0.95), [0.75, 0.95], atol=1e-12)
    close(fingertip(np.zeros(4), 0.45, 0.65), [2.0, 0])
    for name in ARMS:  # the model's own kinematics agree
        env = make(name, 1)
        data = mujoco.MjData(env.sim.model)
        data.qpos[:] = np.linspace(0.3, 1.1, env.nq)
        mujoco.mj_kinematics(env.sim.model, data)
        close(data.geom_xpos[-1, :2], fingertip(data.qpos, *ARMS[name][1:]), atol=1e-12)


@pytest.mark.parametrize("name, start", [
    ("wheeled", [0, 0, 0, 0, 1, 0, 0, 0, 0]), ("small_ant", ANT_POSE + [0] * 14),
    ("reacher2", [1, 1, 0, 0, 0, 0, 1.7, 0]), ("reacher4", [1] * 4 + [0] * 8 + [2.0, 0])])
def test_every_episode_starts_alike_and_shows_no_goal(name, start):
    env = make(name, 3)
    close(env.reset().numpy(), [start] * 3, atol=1e-7)
    state = torch.get_rng_state()
    close(env.reset(torch.ones(3, 2)).numpy(), [start] * 3, atol=1e-7)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", GOAL_ROBOTS)
def test_the_position_is_in_the_observation(name):
    env = make(name, 4)
    env.reset(torch.zeros(4, 2) - 3)
    for _ in range(10):
        obs, *_ = env.step(torch.randn(4, *env.action_dims))
    close(obs[:, env.position].numpy(), env._place(env.state), rtol=1e-6)


def test_wheeled_observes_pose_and_velocity():
    env = make("wheeled", 1)
    drive(env, [1.0, -0.5], 7)
    q, v = env.state[0, 1:7], env.state[0, 7:]
    wanted = [*q[:3], np.sin(q[3]), np.cos(q[3]), *v[:4]]
    close(env._observe(env.state)[0], wanted)


# ---------------------------------------------------------------- tasks


def test_goal_sets_have_the_published_check_values():
    sets = goal_sets()
    close([sets[k][0] for k in ("train", "test", "test2")],
          [[-0.248934, 0.660973], [0.39494, 0.62195], [-0.160134, -1.382243]], atol=1e-6)
    radii = {k: np.linalg.norm(v, axis=1) for k, v in sets.items()}
    close([r.mean() for r in radii.values()], [0.778, 0.734, 1.318], atol=5e-4)
    assert 0.2 < min(radii["train"].min(), radii["test"].min()) and radii["test2"].min() > 1.1
    assert max(radii["train"].max(), radii["test"].max()) < 1.1 and radii["test2"].max() < 1.5
    near = np.concatenate([sets["train"], sets["test"]])
    for goals in (near, sets["test2"]):
        gaps = np.linalg.norm(goals[:, None] - goals, axis=-1) + 9 * np.eye(len(goals))
        assert gaps.min() >= 0.1
    assert all(len(v) == 100 for v in sets.values())
    assert not np.array_equal(goal_sets(2)["train"], sets["train"])


def test_sample_tasks_draws_different_goals_of_the_set():
    env = make("wheeled", 1)
    torch.manual_seed(0)
    for split, goals in goal_sets().items():
        drawn = env.sample_tasks(40, split)
        known = {tuple(g) for g in goals.astype(np.float32).tolist()}
        assert len(drawn.unique(dim=0)) == 40 and {tuple(g) for g in drawn.tolist()} <= known
    assert len(env.sample_tasks(250).unique(dim=0)) == 100  # beyond 100 they come again
    with pytest.raises(ValueError, match="split"):
        env.sample_tasks(3, "val")


def test_the_reacher_of_four_links_has_its_own_spacing():
    goals = np.concatenate([make("reacher4", 1).tasks[split] for split in ("train", "test")])
    assert (np.linalg.norm(goals[:, None] - goals, axis=-1) + 9 * np.eye(200)).min() >= 0.11


def test_action_scale_and_clipping():
    def state(scale, action):
        env = make("wheeled", 1, action_scale=scale)
        env.reset(torch.ones(1, 2))
        env.step(torch.tensor([action]))
        return env.state

    assert np.array_equal(state(1.0, [0.5, 0.25]), state(0.5, [1.0, 0.5]))
    assert np.array_equal(state(1.0, [1.0, -1.0]), state(1.0, [7.0, -2.0]))


def test_render_shows_the_goal_of_its_row():
    env = make("wheeled", 2)
    env.reset(torch.tensor([[0.8, -0.5], [0.0, 1.0]]))
    try:
        frame = env.render(1).astype(int)
    except RuntimeError as e:
        pytest.skip(str(e))
    close(env.screen.data.site_xpos[0, :2], [0.0, 1.0])
    y, x = np.nonzero(frame[..., 1] > frame[..., [0, 2]].max(-1) + 30)  # green
    assert len(y) and abs(x.mean() - 160) < 5 and y.mean() < 90
