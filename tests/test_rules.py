"""What envs do, by hand and against published numbers, where tests/test_parity.py does not compare it."""

import importlib
import sys

import mujoco
import numpy as np
import pytest
import torch
from test_parity import GOAL_ROBOTS, TARGETS, one_hot, put

from envs import make
from envs.base import STRIPES
from envs.goal_robots import goal_sets
from envs.mujoco import Simulator
from envs.multi_agent_mujoco import FIELDS
from envs.warehouse import CELLS, may_move, number

close, near = torch.testing.assert_close, np.testing.assert_allclose
UP, DOWN, WEST, EAST = range(4)


# ---------------------------------------------------------------- nav2d, and all tasks on a box
def test_steps_of_the_point():
    env, goals = make("nav2d", 5, horizon=3), [[0.3, 0.4], [-0.1, 0], [0.009, 0.009], [0.011, 0], [0, -0.011]]
    close(env.reset(goals), torch.zeros(5, 2))
    action = torch.tensor([[0.05, -0.02], [-3.0, 0.005], [0, 0], [0, 0], [0, 0]])
    obs, reward, terminated, truncated, info = env.step(action)
    close(obs[:2], torch.tensor([[0.05, -0.02], [-0.1, 0.005]]))  # the second row is clipped
    close(reward[:2], -torch.tensor([[(0.25**2 + 0.42**2) ** 0.5], [0.005]]))
    assert terminated.tolist() == [False, True, True, False, False] and not truncated.any()  # both components
    obs, reward, *_ = env.step(torch.full((5, 2), 0.1))
    close(obs[:2], torch.tensor([[0.15, 0.08], [-0.1, 0.005]]))  # who has arrived rests, without reward
    close(reward[:2], torch.tensor([[-((0.15**2 + 0.32**2) ** 0.5)], [0.0]]))
    frame = env.render(row=0, size=100)  # of [-1, 1]^2
    colours = [frame[y, x].tolist() for y, x in ((30, 65), (46, 57), (80, 20))]
    assert colours == [[0, 160, 0], [0, 0, 0], [255, 255, 255]]  # goal, point, nothing


@pytest.mark.parametrize("name, low, high", [
    ("nav2d", -0.5, 0.5), ("half_cheetah_vel", 0, 2), ("ant_vel", 0, 3), ("ant_goal", -3, 3)])
def test_tasks_cover_a_box_evenly(name, low, high):
    torch.manual_seed(0)
    env, n, seen = make(name, 3), 50_000, {}
    for split in ("train", "test"):
        u = (env.sample_tasks(n, split).double() - low) / (high - low)
        assert 0 <= u.min() and u.max() <= 1
        close(u.mean(0), torch.full_like(u[0], 0.5), atol=0.01, rtol=0)
        close(u.std(0), torch.full_like(u[0], 1 / 12**0.5), atol=0.01, rtol=0)
        seen[split] = set((u[:, 0] * STRIPES).floor().long().tolist())
    assert not seen["train"] & seen["test"] and [len(seen[split]) for split in seen] == [80, 20]
    env.reset()
    assert len(np.unique(env.task, axis=0)) == 3  # one task a row
    state = torch.get_rng_state()
    if name == "nav2d":
        env.reset(env.task)
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn when the tasks are given


# ---------------------------------------------------------------- uav
def test_pursuit():
    """Of target and UAV: side by side, changing places, meeting, at the edge; then time is up."""
    env = make("uav", 9)
    env.reset()
    env.place[:] = 1  # all nine moves from the middle: stay, N, S, E, W, NE, SE, SW, NW
    env.step((torch.arange(9), torch.arange(9) % 5))
    wanted = [[1, 1], [0, 1], [2, 1], [1, 2], [1, 0], [0, 2], [2, 2], [2, 0], [0, 0]]
    assert env.place.tolist() == [wanted, wanted[:5] + wanted[:4]]
    torch.manual_seed(0)
    env = make("uav", 4, horizon=2)
    start = env.reset()
    assert (env.place[0, :, 1] == 2).all() and (env.place[1, :, 1] == 0).all()  # last and first column
    own = torch.nn.functional.one_hot(env.place, 3).flatten(2).float()  # (2, B, 6)
    assert all(torch.equal(o[:, :6], x) and (o[:, 6:9].sum(1) == 1).all() for o, x in zip(start, own))
    env.place[:] = torch.tensor([[[0, 2], [1, 1], [1, 2], [0, 2]], [[2, 0], [1, 0], [2, 1], [0, 0]]])
    target, uav = torch.tensor([8, 4, 2, 1]), torch.tensor([0, 3, 3, 1])  # NW; W, E; S, E; N, N
    *_, reward, terminated, truncated, _ = env.step((target, uav))
    assert env.place.tolist() == [[[0, 1], [1, 0], [2, 2], [0, 2]], [[2, 0], [1, 1], [2, 2], [0, 0]]]
    assert reward.tolist() == [[0, 0], [0, 0], [-1, 1], [0, 0]]
    assert terminated.tolist() == [False, False, True, False] and not truncated.any()
    *_, reward, terminated, truncated, _ = env.step((target, uav))
    assert reward.tolist() == [[1, -1], [1, -1], [0, 0], [1, -1]] and truncated.all()


@pytest.mark.parametrize("stay, nu", [(False, (0.45, 0.3)), (True, (0.35, 0.2))])
def test_how_often_the_other_is_seen_where_it_is(stay, nu):
    torch.manual_seed(0)
    env = make("uav", 20_000)
    env.reset()
    obs, *_ = env.step((torch.full((20_000,), 3 - 3 * stay), torch.full((20_000,), 4 - 4 * stay)))
    for i in range(2):
        seen = torch.nn.functional.one_hot(env.place[1 - i], 3).float() * obs[i][:, 6:].view(-1, 2, 3)
        right = seen.sum(2)[~env.terminated]  # (n, 2): row and column
        assert torch.equal(right[:, 0], right[:, 1]) and abs(right.mean() - 1 + nu[i]) < 0.015


# ---------------------------------------------------------------- particles
def test_bodies_on_one_spot_do_not_explode():
    env = make("simple_spread", 1)
    put(env, pos=np.zeros((1, 6, 2)))
    obs, reward, *_ = env.step(tuple(torch.tensor([k]) for k in (0, 1, 2)))
    assert all(x.isfinite().all() for x in (*obs, reward))


@pytest.mark.parametrize("name, options, wanted", [
    ("simple_tag", {}, (4, 3, 2)), ("simple_tag", dict(num_agents=3), (3, 2, 1)),
    ("simple_tag", dict(num_agents=8), (8, 4, 2)), ("simple_tag", dict(num_agents=12), (12, 6, 3)),
    ("simple_adversary", {}, (3, 1, 2)), ("simple_adversary", dict(num_agents=8), (8, 1, 7)),
    ("simple_push", dict(num_agents=8), (8, 4, 2)),
    ("simple_push", dict(num_agents=3, num_adversaries=1), (3, 1, 2)),
    ("simple_spread", dict(num_agents=10), (10, 0, 10)),
    ("simple_world_comm", dict(num_agents=8), (8, 4, 5))])
def test_default_numbers(name, options, wanted):
    env = make(name, 1, **options)
    assert (env.num_agents, env.num_adversaries, env.landmarks) == wanted


def test_measures_of_particles():
    """Two of three agents touch, one is on a landmark; an adversary is on its prey, far from the goal."""
    env = make("simple_spread", 2)
    put(env, pos=[[[0, 0], [0.2, 0], [1, 1], [0, 0], [0.2, 0.5], [1, 0]]] * 2)
    wanted = {"collisions": 1, "landmark_distance": (0 + 0.5 + 0.8) / 3, "occupied_landmarks": 1}
    got = env.measures()
    assert got.keys() == wanted.keys() and all(got[k].tolist() == [pytest.approx(wanted[k])] * 2 for k in got)
    env = make("simple_push", 1)
    put(env, pos=[[[0, 0], [0.05, 0], [3, 0], [0, 4]]], goal=[[1]])
    got = {k: v.item() for k, v in env.measures().items()}
    assert got["caught"] == got["collisions"] == 1 and got["goal_distance_adversary"] == 4


def test_a_picture_shows_who_is_far_out_and_who_speaks():
    env = make("simple_reference", 1)
    env.reset()
    silent = env.render()
    env.step((torch.tensor([5 * 3]), torch.tensor([5 * 7])))
    assert (silent != env.render()).any()
    put(env, pos=[[[4.9, 0], [0, 0], [1, 1], [-1, 1], [1, -1]]])
    assert (env.render(size=200)[100, 198] < 200).any()  # the square shown is [-5, 5]^2


# ---------------------------------------------------------------- hidden targets
@pytest.mark.parametrize("name", TARGETS)
def test_nobody_sees_the_task_but_the_reward_tells(name):
    env = make(name, 2)
    tasks = env.all_tasks()
    assert len(tasks) == {"spread": 3, "spread_large": 4, "hunting": 2, "hunting_large": 3}[name]
    assert (tasks.sum(1) == (env.num_agents if "spread" in name else 1)).all()
    env.reset(tasks[:2])
    env.pos[:, :, 1] = env.pos[:, :, 0]
    assert all(torch.equal(o[0], o[1]) for o in env._observe())
    gain = env.reward()
    assert not np.allclose(gain[:, 0], gain[:, 1])


# ---------------------------------------------------------------- the warehouse
@pytest.mark.parametrize("cell, target, wanted", [
    ([1, 2, 3], [2, 1, 2], [0, 0, 0]),  # face to face, and who follows them
    ([1, 2, 12, 11, 0], [2, 12, 11, 1, 1], [1, 1, 1, 1, 0]),  # a ring moves; who follows it does not
    ([3, 1], [2, 2], [1, 0]),  # equals: the first
    ([1, 3, 4, 5, 0], [2, 2, 3, 4, 1], [0, 1, 1, 1, 0]),  # the longer chain: three against two
    # two chains of two: 0 behind 3 (cell 3) and 1 behind 2 (cell 1). Cell 3 enters as robot 0's target.
    ([4, 0, 1, 3], [3, 1, 2, 2], [1, 0, 0, 1]),
    # here 2's cell enters with robot 0, as its target, before that of robot 1, and both chains have two
    ([4, 1, 3, 0], [3, 2, 2, 1], [1, 0, 1, 0]),
    # within a chain: two want the place of a third who moves
    ([5, 15, 6, 30], [6, 6, 7, 30], [1, 0, 1, 1])])
def test_who_may_move(cell, target, wanted):
    cell, target = np.array([cell] * 2), np.array([target] * 2)
    assert may_move(cell, target).astype(int).tolist() == [wanted] * 2


def test_starts_and_requests_are_uniform():
    torch.manual_seed(0)
    env = make("rware", 4000)
    env.reset(one_hot("bottom").expand(4000, -1))
    assert all(len(set(c)) == 4 for c in env.cell[:100])
    spots = np.bincount(env.cell.ravel(), minlength=CELLS)
    assert (spots > 0).sum() == 100 and 100 < spots[spots > 0].min() and spots.max() < 220  # 160 each
    assert np.abs(np.bincount(env.direction.ravel()) / 16000 - 0.25).max() < 0.02
    assert (env.requested.sum(1) == 4).all() and not env.requested[:, 16:].any()
    assert np.abs(env.requested[:, :16].mean(0) - 0.25).max() < 0.04


def test_picture_of_the_warehouse():
    torch.manual_seed(0)
    env = make("rware", 2)
    env.reset(one_hot("left", "right"))
    env.cell[1], env.direction[1] = [number(x, y) for x in (0, 9) for y in (0, 9)], [UP, WEST, DOWN, EAST]
    frame = env.render(1)
    at = lambda x, y, dx=0, dy=0: frame[24 * y + 12 + 7 * dy, 24 * x + 12 + 7 * dx].tolist()
    assert at(0, 0) == at(9, 9) == [70, 120, 230] and at(6, 3) in ([180, 140, 100], [210, 70, 60])
    assert at(4, 9) == [150] * 3 and at(2, 3) == [235] * 3  # a goal, and no shelf on the left
    for x, y, dx, dy in (0, 0, 0, -1), (9, 0, 0, 1), (0, 9, -1, 0), (9, 9, 1, 0):  # a stripe in front alone
        ways = (dx, dy), (-dx, -dy), (dy, dx), (-dy, -dx)
        assert [at(x, y, *way) == [255] * 3 for way in ways] == [True, False, False, False]


# ---------------------------------------------------------------- robots: starts, tasks, ends
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
    near(q.mean(0), 0, atol=0.05 * low)
    near(q.std(0), 2 * low / 12**0.5, rtol=0.05)
    near(v.std(0), std, rtol=0.05)
    assert (np.abs(v).max() > 0.3) == (name != "hopper_param")  # a normal has tails


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
    """50 and 10 others; whatever came before, the parameters are base * scale."""
    env = make("hopper_param", 2)
    for seed, (split, n) in enumerate([("train", 50), ("test", 10)]):
        wanted = np.random.default_rng(seed).uniform(0.5, 1.5, (n, 4))
        near(env.all_tasks(split).numpy(), wanted, rtol=1e-6)
    base = {field: getattr(env.sim.model, field).copy() for field in FIELDS}
    for _ in range(3):
        env.reset()
    for model, task in zip(env.sim.models, env.task):
        for field, scale in zip(FIELDS, task):
            assert np.array_equal(getattr(model, field), base[field] * scale), field
            assert np.array_equal(getattr(env.sim.model, field), base[field])


@pytest.mark.parametrize("bad", [1e12, np.nan])
def test_a_diverged_state_keeps_its_last_sound_one(bad, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    env = make("ant_vel", 2)
    env.reset()
    env.state[1, -3] = bad
    sound = env.state[1].copy()
    _, reward, terminated, _, info = env.step(torch.zeros(2, 8))
    assert info["diverged"].tolist() == terminated.tolist() == [False, True] and reward[1] == 0
    assert np.array_equal(env.state[1], sound, equal_nan=True)
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
    near(model.body_mass[1:], masses, rtol=1e-12)
    near(model.body_mass.sum(), 24, rtol=1e-12)
    assert model.opt.timestep == 0.01 and make(name, 1).sim.dt == 0.05
    kind = mujoco.mjtIntegrator.mjINT_EULER if name == "wheeled" else mujoco.mjtIntegrator.mjINT_RK4
    assert model.opt.integrator == kind
    near(model.actuator_gainprm[:, 0], 1)
    near(model.actuator_biasprm[:, 2], -1)  # torque = command - velocity
    near(model.actuator_ctrlrange, [[-s, s] for s in [100 if name == "reacher2" else 50] * nu])
    meets = (model.geom_contype[:, None] & model.geom_conaffinity[None]) != 0
    pairs = {(i, j) for i, j in np.argwhere(meets | meets.T) if i < j}  # only the floor is touched
    assert pairs == ({(0, j) for j in range(1, model.ngeom)} if name in ("wheeled", "small_ant") else set())
    if name == "wheeled":  # a wheel spins with the inertia of a disc
        near(model.body_inertia[2].max(), 0.5 * 6.138328275653742 * 0.1**2, rtol=1e-6)


def test_joints_of_the_ant():
    model = make("small_ant", 1).sim.model
    name = lambda i: mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, i)
    assert [name(i) for i in range(1, 9)] == [part + leg for leg in "1234" for part in ("hip", "ankle")]
    driven = [name(i) for i in model.actuator_trnid[:, 0]]
    assert driven == [part + leg for leg in "4123" for part in ("hip", "ankle")]
    degrees = np.rad2deg(model.jnt_range[1:])
    near(degrees[::2], [[-30, 30]] * 4)
    near(degrees[1::2], [[30, 70], [-70, -30], [-70, -30], [30, 70]])
    assert model.dof_armature[:6].max() == 0 and (model.dof_armature[6:] == 1).all()


def test_wheeled_drives_straight_and_turns_on_the_spot():
    env = make("wheeled", 1)

    def drive(left, right, steps):
        env.reset(torch.tensor([[30.0, 30.0]]))  # out of reach
        for _ in range(steps):
            env.step(torch.tensor([[left, right]]))
        return env.state[0, [1, 2, 4, 7]]  # x, y, yaw, speed along x

    near(drive(1.0, 1.0, 20)[:3], [1.948, 0, 0], atol=0.01)
    near(drive(1.0, 1.0, 200)[[0, 3]], [46.0, 4.92], atol=0.1)
    near(drive(1.0, -1.0, 20)[:3], [0, 0, 11.66], atol=0.02)
    assert (drive(0.0, 0.0, 20) == 0).all()


@pytest.mark.parametrize("name", GOAL_ROBOTS)
def test_every_episode_starts_alike_and_draws_nothing(name):
    env, state = make(name, 2), torch.get_rng_state()
    one, two = env.reset(torch.ones(2, 2)), env.reset(-torch.ones(2, 2))  # nor is the goal seen
    assert torch.equal(one, two) and torch.equal(one[0], one[1])
    assert torch.equal(state, torch.get_rng_state())


def test_goal_sets_have_the_published_check_values():
    sets = goal_sets()
    near([sets[k][0] for k in ("train", "test", "test2")],
          [[-0.248934, 0.660973], [0.39494, 0.62195], [-0.160134, -1.382243]], atol=1e-6)
    near([np.linalg.norm(v, axis=1).mean() for v in sets.values()], [0.778, 0.734, 1.318], atol=5e-4)
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
    near(env.screen.data.site_xpos[0, :2], [0.0, 1.0])
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
