"""What robots do beyond tests/test_parity.py: models against published numbers; starts, ends, frames."""

import importlib
import sys

import mujoco
import numpy as np
import pytest
import torch
from test_parity import GOAL_ROBOTS

from envs import make
from envs.goal_robots import ARMS, fingertip, goal_sets
from envs.mujoco import Simulator
from envs.multi_agent_mujoco import FIELDS

equal, close = np.array_equal, np.testing.assert_allclose


# ---------------------------------------------------------------- starts, actions, ends
@pytest.mark.parametrize("name, low, std", [
    ("ant_goal", 0.1, 0.1), ("cheetah_dir", 0.1, 0.1), ("hopper_param", 0.005, 0.01 / 12**0.5)])
def test_starts(name, low, std):
    torch.manual_seed(0)
    env = make(name, 3000)
    tasks = env.sample_tasks(1).expand(3000, -1)
    env.reset(tasks)
    nq = env.sim.model.nq
    q, v = env.state[:, 1 : 1 + nq] - env.sim.model.qpos0, env.state[:, 1 + nq :]
    assert np.abs(q).max() <= low and (env.state[:, 0] == 0).all()
    close(q.mean(0), 0, atol=0.05 * low)
    close(q.std(0), 2 * low / 12**0.5, rtol=0.05)
    close(v.std(0), std, rtol=0.05)
    assert (np.abs(v).max() > 0.3) == (name != "hopper_param")  # a normal has tails


def test_actions_are_clipped():
    """Of a cheetah, whose cost counts what is clipped, and of a wheeled robot."""
    def run(name, action):
        torch.manual_seed(0)
        env = make(name, 2)
        env.reset(torch.ones(2, env.task_dim))
        obs, reward, *_ = env.step(torch.full((2, *env.action_dims), action))
        return torch.cat([obs, reward], 1)

    for name in "half_cheetah_dir", "wheeled":
        half, full, beyond = (run(name, action) for action in (0.5, 1.0, 7.0))
        assert torch.equal(full, beyond) and not torch.equal(half, full)


def test_where_robots_fall():
    for name, heights in ("ant_dir", [0.19, 0.2, 1.0, 1.01]), ("small_ant", [0.149, 0.15, 0.45, 0.451]):
        state = np.zeros((4, 30))
        state[:, 3] = heights
        assert make(name, 1)._fallen(state).tolist() == [True, False, False, True]


def test_direction_of_the_two_agent_cheetah():
    env = make("two_agent_half_cheetah", 3, direction=-1)
    env.reset()
    assert env.task.tolist() == [[-1.0]] * 3
    assert make("two_agent_half_cheetah", 3).all_tasks().tolist() == [[1.0]]
    env.reset(torch.tensor([[1.0], [-1.0], [1.0]]))
    assert env.task[:, 0].tolist() == [1, -1, 1]


def test_tasks_of_the_hopper():
    """50 and 10 others; a hundred tasks later the parameters are base * scale, and nothing compounds."""
    torch.manual_seed(0)
    env = make("hopper_param", 3)
    for seed, (split, n) in enumerate([("train", 50), ("test", 10)]):
        wanted = np.random.default_rng(seed).uniform(0.5, 1.5, (n, 4))
        close(env.all_tasks(split).numpy(), wanted, rtol=1e-6)
    base = {field: getattr(env.sim.model, field).copy() for field in FIELDS}
    for _ in range(100):
        env.reset(env.sample_tasks(3)[[0, 1, 0]])
    assert env.sim.models[0] is env.sim.models[2]  # rows with one task share a model: it is only read
    for model, task in zip(env.sim.models, env.task):
        for field, scale in zip(FIELDS, task):
            assert equal(getattr(model, field), base[field] * scale), field
            assert equal(getattr(env.sim.model, field), base[field])


# ---------------------------------------------------------------- rows that diverge
@pytest.mark.parametrize("fault", ["state", "action", "nan"])
def test_a_diverged_row_is_ended_and_counted(fault, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(break_it):
        torch.manual_seed(0)
        env, draw, out = make("ant_vel", 5, threads=2), torch.Generator().manual_seed(0), []
        env.reset()
        for t in range(9):
            action = 0.3 * torch.randn(5, *env.action_dims, generator=draw)
            if break_it and t == 4:
                if fault == "action":
                    action[2, 1] = torch.nan
                else:
                    env.state[2, -3] = 1e12 if fault == "state" else np.nan
                sound = env.state.copy()
            obs, reward, terminated, _, info = env.step(action)
            out.append((obs, reward, terminated, info["diverged"], torch.tensor(env.state)))
        return [torch.stack(x) for x in zip(*out)], break_it and sound

    (clean, _), (broken, sound) = run(False), run(True)
    others = [0, 1, 3, 4]
    for a, b in zip(clean, broken):
        assert torch.equal(a[:, others], b[:, others]) and torch.equal(a[:4], b[:4])  # they go on, to the bit
    _, reward, terminated, diverged, state = broken
    assert diverged[:, 2].tolist() == terminated[:, 2].tolist() == [False] * 4 + [True] * 5
    assert not diverged[:, others].any() and (reward[4:, 2] == 0).all() and reward.isfinite().all()
    assert equal(state[-1, 2].numpy(), sound[2], equal_nan=True)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")  # no MUJOCO_LOG.TXT, no noise


def test_divergence_in_the_last_physics_step_is_seen():
    sim = Simulator(make("half_cheetah_dir", 1).sim.model, 2, frame_skip=1)
    state = np.zeros((2, 19))
    state[1, 1], state[1, 10] = 9.99e9, 9e9  # sound as the step begins, beyond mjMAXVAL after it
    after, diverged = sim.step(state, np.zeros((2, 6)), np.arange(2))
    assert after[1, 0] == 0.01 and diverged.tolist() == [False, True]


# ---------------------------------------------------------------- goal robots
@pytest.mark.parametrize("name, nq, nu, masses", [
    ("wheeled", 6, 2, [11.72334344869252, 6.138328275653742, 6.138328275653742]),
    ("small_ant", 15, 8,
     [5.888130620579051] + [1.1762394810591905, 1.3760892613947235, 1.975638602401322] * 4),
    ("reacher2", 2, 2, [11.157894736842106, 11.157894736842106 + 1.6842105263157896]),
    ("reacher4", 4, 4, [5.675675675675676] * 3 + [5.675675675675676 + 1.2972972972972971])])
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
    meets = (model.geom_contype[:, None] & model.geom_conaffinity[None]) != 0
    pairs = {(i, j) for i, j in np.argwhere(meets | meets.T) if i < j}  # only the floor is touched
    assert pairs == ({(0, j) for j in range(1, model.ngeom)} if name in ("wheeled", "small_ant") else set())
    if name == "wheeled":  # a wheel spins with the inertia of a disc
        close(model.body_inertia[2].max(), 0.5 * 6.138328275653742 * 0.1**2, rtol=1e-6)


def test_joints_of_the_ant():
    model = make("small_ant", 1).sim.model
    name = lambda i: mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, i)
    assert [name(i) for i in range(1, 9)] == [part + leg for leg in "1234" for part in ("hip", "ankle")]
    driven = [name(i) for i in model.actuator_trnid[:, 0]]
    assert driven == [part + leg for leg in "4123" for part in ("hip", "ankle")]
    degrees = np.rad2deg(model.jnt_range[1:])
    close(degrees[::2], [[-30, 30]] * 4)
    close(degrees[1::2], [[30, 70], [-70, -30], [-70, -30], [30, 70]])
    assert model.dof_armature[:6].max() == 0 and (model.dof_armature[6:] == 1).all()


def test_wheeled_drives_straight_and_turns_on_the_spot():
    env = make("wheeled", 1)

    def drive(left, right, steps):
        env.reset(torch.tensor([[30.0, 30.0]]))  # out of reach
        for _ in range(steps):
            env.step(torch.tensor([[left, right]]))
        return env.state[0, [1, 2, 4, 7]]  # x, y, yaw, speed along x

    close(drive(1.0, 1.0, 20)[:3], [1.948, 0, 0], atol=0.01)
    close(drive(1.0, 1.0, 200)[[0, 3]], [46.0, 4.92], atol=0.1)
    close(drive(1.0, -1.0, 20)[:3], [0, 0, 11.66], atol=0.02)
    assert (drive(0.0, 0.0, 20) == 0).all()


def test_fingertips():
    close(fingertip(np.array([0, 0]), 0.75, 0.95), [1.7, 0])
    close(fingertip(np.array([0, np.pi / 2]), 0.75, 0.95), [0.75, 0.95], atol=1e-12)
    for name in ARMS:  # the model's own kinematics agree
        env = make(name, 1)
        data = mujoco.MjData(env.sim.model)
        data.qpos[:] = np.linspace(0.3, 1.1, env.nq)
        mujoco.mj_kinematics(env.sim.model, data)
        close(data.geom_xpos[-1, :2], fingertip(data.qpos, *ARMS[name][1:]), atol=1e-12)


@pytest.mark.parametrize("name", GOAL_ROBOTS)
def test_every_episode_starts_alike_and_shows_no_goal(name):
    env, state = make(name, 3), torch.get_rng_state()
    one, two = env.reset(torch.ones(3, 2)), env.reset(torch.zeros(3, 2) - 1)
    assert torch.equal(one, two) and torch.equal(one, one[:1].expand(3, -1))
    assert torch.equal(state, torch.get_rng_state())


def test_goal_sets_have_the_published_check_values():
    sets = goal_sets()
    close([sets[k][0] for k in ("train", "test", "test2")],
          [[-0.248934, 0.660973], [0.39494, 0.62195], [-0.160134, -1.382243]], atol=1e-6)
    close([np.linalg.norm(v, axis=1).mean() for v in sets.values()], [0.778, 0.734, 1.318], atol=5e-4)
    for name in "wheeled", "reacher4":
        env = make(name, 1)
        r = {k: np.linalg.norm(v, axis=1) for k, v in env.tasks.items()}
        assert 0.2 < min(r["train"].min(), r["test"].min()) and max(r["train"].max(), r["test"].max()) < 1.1
        assert 1.1 < r["test2"].min() and r["test2"].max() < 1.5 and {len(v) for v in r.values()} == {100}
        for goals in (np.concatenate([env.tasks["train"], env.tasks["test"]]), env.tasks["test2"]):
            gaps = np.linalg.norm(goals[:, None] - goals, axis=-1) + 9 * np.eye(len(goals))
            assert gaps.min() >= (0.11 if name == "reacher4" else 0.1)
        assert [len(env.sample_tasks(n).unique(dim=0)) for n in (40, 250)] == [40, 100]  # first all different


# ---------------------------------------------------------------- frames
def test_a_frame_shows_the_goal_of_its_row():
    env = make("wheeled", 2)
    env.reset(torch.tensor([[0.8, -0.5], [0.0, 1.0]]))
    try:
        frame = env.render(1).astype(int)
    except RuntimeError as e:
        pytest.skip(str(e))
    close(env.screen.data.site_xpos[0, :2], [0.0, 1.0])
    y, x = np.nonzero(frame[..., 1] > frame[..., [0, 2]].max(-1) + 30)  # green
    assert len(y) and abs(x.mean() - 160) < 5 and y.mean() < 90


def test_no_opengl_is_one_clear_line(monkeypatch):
    def missing(name, *args):
        if name in ("mujoco.egl", "mujoco.osmesa"):
            raise AttributeError("no such\nlibrary")
        return real(name, *args)

    real = importlib.import_module
    env = make("ant_goal", 1)
    env.reset()
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match="EGL.*OSMesa.*no such library") as e:
        env.render()
    assert "\n" not in str(e.value)
    env.step(torch.zeros(1, 8))  # the world itself goes on
