"""Batched MuJoCo against gymnasium's own worlds, bit by bit, and what batching must not change."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from envs import make
from envs.mujoco import Simulator

WORLDS = ["half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_vel", "ant_goal"]
equal, close = np.array_equal, np.testing.assert_allclose


def reference(env):
    """One gymnasium env a row, in the row's state."""
    kind = "HalfCheetah-v5" if env.obs_dims == (20,) else "Ant-v5"
    nq, twins = env.sim.model.nq, []
    for state in env.state:
        twin = gymnasium.make(kind).unwrapped
        twin.reset(seed=0)
        twin.set_state(state[1 : 1 + nq], state[1 + nq :])
        twins.append(twin)
    return twins


def play(env, steps, scale=1.0, seed=0):
    """Everything that `steps` random actions return, and the states."""
    draw, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        action = scale * torch.randn(env.num_envs, *env.action_dims, generator=draw)
        obs, reward, terminated, truncated, info = env.step(action)
        out.append((obs, reward, terminated, truncated, info["diverged"], torch.tensor(env.state)))
    return [torch.stack(x) for x in zip(*out)]


# ---------------------------------------------------------------- parity with gymnasium


@pytest.mark.parametrize("name", WORLDS)
def test_bit_equal_to_gymnasium_for_200_steps(name):
    B, H, cheetah = 4, 200, name.startswith("half")
    scale = torch.tensor([[1.0 if cheetah else 0.1]] * 2 + [[1.0]] * 2)  # ants fall under wild actions
    torch.manual_seed(1)
    env = make(name, B, horizon=H)
    obs = env.reset()

    def torso_is_right(b, qpos):
        frame.qpos[:] = qpos
        mujoco.mj_kinematics(env.sim.model, frame)
        torso = frame.body("torso")
        wanted = torso.xpos if cheetah else np.concatenate([torso.xmat, torso.xpos])
        close(obs[b, -len(wanted):].numpy(), wanted, rtol=1e-6, atol=1e-7)

    twins, frame = reference(env), mujoco.MjData(env.sim.model)
    over, slip = np.zeros(B, bool), []
    for b in range(B):  # a drawn orientation is not of unit length
        torso_is_right(b, env.state[b, 1 : 1 + env.sim.model.nq])
    for t in range(H):
        before = env.state.copy()
        action = (scale * torch.randn(B, *env.action_dims)).clamp(-1, 1)
        obs, reward, terminated, truncated, info = env.step(action)
        for b in np.flatnonzero(~over):
            twin, task = twins[b], env.task[b]
            twin.data.qacc_warmstart[:] = 0  # the stated convention
            seen, _, ended, _, paid = twin.step(action[b].double().numpy())
            assert equal(env.state[b, 1:], np.concatenate([twin.data.qpos, twin.data.qvel]))
            skipped = 0 if cheetah else 2  # v5 hides x (HalfCheetah), x and y (Ant)
            mine = obs[b, skipped : skipped + 17 + 10 * (not cheetah)]
            assert equal(mine.numpy(), seen[: len(mine)].astype(np.float32))
            torso_is_right(b, twin.data.qpos)

            v = (twin.data.qpos[0] - before[b, 1]) / 0.05
            close(v, paid["x_velocity"], atol=1e-12 if cheetah else 0.3)  # Ant-v5's positions lag
            slip.append(abs(v - paid["x_velocity"]))
            gain = {"dir": task[0] * v, "vel": -abs(v - task[0]),
                    "goal": -np.abs(twin.data.qpos[:2] - task[:2].repeat(3 - len(task))).sum()}[env.kind]
            if cheetah:
                wanted = gain + 0.5 * paid["reward_ctrl"]  # 0.05 |u|^2 where v5 pays 0.1
            else:
                alive = {"dir": 0.05, "vel": 1.05, "goal": 4.05}[env.kind]
                wanted = gain + 0.01 * paid["reward_ctrl"] + alive  # 0.005 |u|^2 where v5 pays 0.5
            close(reward[b, 0].item(), wanted, rtol=1e-6, atol=1e-7)
            assert terminated[b].item() == ended
            over[b] = ended
        assert truncated.tolist() == [t == H - 1] * B and not info["diverged"].any()
    assert not over[:2].any() and over[2:].any() != cheetah  # both ways to end were compared
    assert cheetah or np.mean(slip) < 0.02


@pytest.mark.parametrize("name", ["half_cheetah_dir", "ant_dir"])
def test_close_to_an_untouched_gymnasium_env(name):
    torch.manual_seed(0)
    env = make(name, 4)
    env.reset()
    twins = reference(env)
    for _ in range(10):
        action = torch.rand(4, *env.action_dims) * 2 - 1
        env.step(action)
        for b, twin in enumerate(twins):
            twin.step(action[b].double().numpy())
    for b, twin in enumerate(twins):
        close(env.state[b, 1:], np.concatenate([twin.data.qpos, twin.data.qvel]), atol=1e-10)


def test_heights_at_which_an_ant_falls():
    state = np.zeros((4, 30))
    state[:, 3] = [0.19, 0.2, 1.0, 1.01]
    assert make("ant_dir", 1)._fallen(state).tolist() == [True, False, False, True]


def test_models():
    cheetah, ant = make("half_cheetah_dir", 1).sim.model, make("ant_dir", 1).sim.model
    close(cheetah.body_mass.sum(), 14)
    assert (cheetah.nq, cheetah.nv, cheetah.nu) == (9, 9, 6) and (ant.nq, ant.nv, ant.nu) == (15, 14, 8)
    assert cheetah.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
    assert ant.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 and ant.qpos0[2] == 0.75
    assert make("ant_dir", 1, integrator="euler").sim.model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER


# ---------------------------------------------------------------- contract, randomness, tasks


@pytest.mark.parametrize("name", WORLDS)
def test_contract(name):
    env = make(name, 3, horizon=2)
    O, A = ((20,), (6,)) if name.startswith("half") else ((41,), (8,))
    assert (env.num_envs, env.horizon, env.num_agents, env.obs_dims, env.action_dims, env.discrete) == \
        (3, 2, 1, O, A, False)
    seen = [env.reset()]
    for t in range(2):
        obs, reward, terminated, truncated, info = env.step(torch.randn(3, *A))
        assert obs.dtype == reward.dtype == torch.float32
        assert terminated.dtype == truncated.dtype == info["diverged"].dtype == torch.bool
        assert obs.shape == (3, *O) and reward.shape == (3, 1)
        assert terminated.shape == truncated.shape == info["diverged"].shape == (3,)
        assert truncated.tolist() == [t == 1] * 3 and not terminated.any()
        seen.append(obs)
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))  # old observations stay as they were
    env.reset()
    assert not env.step(torch.zeros(3, *A))[3].any()


@pytest.mark.parametrize("name", WORLDS)
def test_torchs_seed_decides(name):
    def run(seed):
        torch.manual_seed(seed)
        env = make(name, 4)
        obs, state = env.reset(), env.state.copy()
        return [obs, torch.tensor(env.task), *torch.tensor(state).T[1:], *play(env, 10)]

    one, two, other = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    differ = [not torch.equal(a, b) for a, b in zip(one, other)]
    assert differ[0] and all(differ[2:-6]) and differ[-1]  # every position and velocity is drawn
    assert differ[1] or name.endswith("dir")  # few directions may well be the same


def test_start():
    torch.manual_seed(0)
    env = make("ant_goal", 4000)
    env.reset()
    noise = env.state[:, 1:16] - env.sim.model.qpos0
    assert np.abs(noise).max() <= 0.1
    close(noise.mean(0), 0, atol=0.005)
    close(noise.std(0), 0.2 / 12**0.5, atol=0.003)
    close(env.state[:, 16:].mean(0), 0, atol=0.01)
    close(env.state[:, 16:].std(0), 0.1, atol=0.005)
    assert len(np.unique(env.task, axis=0)) == 4000  # one task a row
    state = torch.get_rng_state()
    env.reset(env.task)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    env.reset()
    assert not torch.equal(after, torch.get_rng_state())  # tasks are drawn only when none are given


@pytest.mark.parametrize("name, low, high",
                         [("half_cheetah_vel", 0, 2), ("ant_vel", 0, 3), ("ant_goal", -3, 3)])
def test_tasks(name, low, high):
    torch.manual_seed(0)
    env, n, stripes = make(name, 1), 50_000, {}
    for split in ("train", "test"):
        tasks = env.sample_tasks(n, split).double()
        assert tasks.shape == (n, 2 if name == "ant_goal" else 1)
        assert low <= tasks.min() and tasks.max() <= high
        close(tasks.mean(0), (low + high) / 2, atol=0.04)
        close(tasks.std(0), (high - low) / 12**0.5, atol=0.02)
        stripes[split] = set(((tasks[:, 0] - low) / (high - low) * 100).floor().long().tolist())
    assert not stripes["train"] & stripes["test"]
    assert len(stripes["train"]) == 80 and len(stripes["test"]) == 20


@pytest.mark.parametrize("name", ["half_cheetah_dir", "ant_dir"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_directions_are_a_fair_coin(name, split):
    torch.manual_seed(0)
    tasks = make(name, 1).sample_tasks(10_000, split)
    assert tasks.shape == (10_000, 1) and set(tasks.flatten().tolist()) == {-1.0, 1.0}
    assert abs(tasks.mean()) < 0.05


def test_action_scale_and_clipping():
    def run(scale, action):
        torch.manual_seed(0)
        env = make("half_cheetah_dir", 2, action_scale=scale)
        env.reset(torch.ones(2, 1))
        obs, reward, *_ = env.step(torch.full((2, 6), action))
        return obs, reward, torch.tensor(env.state[:, 1])

    half, tenth, full, beyond = run(1.0, 0.5), run(0.1, 5.0), run(1.0, 1.0), run(1.0, 7.0)
    for a, b in zip(half, tenth):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(full, beyond))  # the cost counts the clipped action
    assert not torch.equal(half[0], full[0])


@pytest.mark.parametrize("call", [
    lambda: make("ant_dir", 2, horizon=0), lambda: make("ant_dir", 2, action_scale=0),
    lambda: make("ant_dir", 2, threads=-1), lambda: make("ant_dir", 2, integrator="verlet"),
    lambda: make("ant_dir", 2).reset(torch.zeros(1, 1)), lambda: make("ant_goal", 2).reset(torch.zeros(2)),
    lambda: make("ant_dir", 2).sample_tasks(3, "val"),
    lambda: [env := make("ant_dir", 2), env.reset(), env.step(torch.zeros(8))]])
def test_bad_input_is_one_clear_line(call):
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value)


def test_mujoco_is_imported_only_when_needed():
    code = "import sys, envs; envs.make('nav2d', 2); envs.make('ipd', 2); assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---------------------------------------------------------------- rows do not touch one another


def test_rows_shared_among_processes_start_as_in_one():
    world = lambda B: make("ant_dir", B, threads=1)
    torch.manual_seed(3)
    whole = world(5).reset(torch.ones(5, 1))
    parts = []
    for first, n in (0, 2), (2, 3):
        torch.manual_seed(3)
        parts.append(world(n).reset(torch.ones(n, 1), part=(first, 5)))
    assert torch.equal(torch.cat(parts), whole) and len(whole.unique(dim=0)) == 5


def test_threads_change_nothing():
    def run(threads):
        torch.manual_seed(0)
        env = make("ant_vel", 37, threads=threads)
        env.reset()
        return play(env, 30)

    alone = run(0)
    assert alone[2].any() and not alone[2].all()  # rows end on the way
    for threads in (1, 2, 5, None):
        assert all(torch.equal(a, b) for a, b in zip(alone, run(threads)))


def test_rows_that_end_leave_the_others_alone():
    torch.manual_seed(0)
    env, asked = make("ant_goal", 6), []
    env.reset()
    env.state[[1, 4], 3] = 3.0  # too high: these end at once
    start, task, step = env.state.copy(), env.task.copy(), env.sim.step
    env.sim.step = lambda state, ctrl, rows: asked.append(len(rows)) or step(state, ctrl, rows)
    obs, reward, terminated, truncated, diverged, state = play(env, 20, scale=0.3)
    assert asked == [6] + [4] * 19  # who has ended costs nothing
    assert terminated.T.tolist() == [[b in (1, 4)] * 20 for b in range(6)]
    assert not truncated.any() and not diverged.any()
    for b in (1, 4):
        assert (reward[0, b] != 0) and (reward[1:, b] == 0).all()
        assert (obs[:, b] == obs[0, b]).all() and (state[:, b] == state[0, b]).all()
    for b in range(6):  # each row by itself, under the same actions
        solo = make("ant_goal", 1)
        solo.reset(task[b : b + 1])
        solo.state[:] = start[b]
        draw = torch.Generator().manual_seed(0)
        for t in range(20):
            action = 0.3 * torch.randn(6, 8, generator=draw)
            again = solo.step(action[b : b + 1])
            assert torch.equal(again[0][0], obs[t, b]) and torch.equal(again[1][0], reward[t, b])
            assert equal(solo.state[0], state[t, b].numpy())


def test_when_all_rows_have_ended_nothing_happens():
    env = make("ant_dir", 3)
    env.reset()
    env.state[:, 3] = 3.0
    obs, reward, terminated, _, _, state = play(env, 3)
    assert terminated.all() and (reward[1:] == 0).all() and torch.equal(state[0], state[2])


@pytest.mark.parametrize("fault", ["state", "action", "nan"])
@pytest.mark.parametrize("name", ["half_cheetah_vel", "ant_vel"])
def test_a_diverged_row_is_ended_and_counted(name, fault, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(break_it):
        torch.manual_seed(0)
        env, draw, out = make(name, 5, threads=2), torch.Generator().manual_seed(0), []
        env.reset()
        sound = None
        for t in range(12):
            action = 0.3 * torch.randn(5, *env.action_dims, generator=draw)
            if break_it and t == 4:
                if fault == "action":
                    action[2, 1] = torch.nan
                else:
                    env.state[2, -3] = 1e12 if fault == "state" else np.nan
                sound = env.state.copy()
            obs, reward, terminated, _, info = env.step(action)
            out.append((obs, reward, terminated, info["diverged"], torch.tensor(env.state)))
        return [torch.stack(x) for x in zip(*out)], sound

    (clean, _), (broken, sound) = run(False), run(True)
    others = [0, 1, 3, 4]
    for a, b in zip(clean, broken):
        assert torch.equal(a[:, others], b[:, others])  # the run goes on, to the bit
        assert torch.equal(a[:4], b[:4])
    _, reward, terminated, diverged, state = broken
    assert diverged[:, 2].tolist() == terminated[:, 2].tolist() == [False] * 4 + [True] * 8
    assert not diverged[:, others].any() and not clean[3].any()
    assert (reward[4:, 2] == 0).all() and reward.isfinite().all()
    assert equal(state[-1, 2].numpy(), sound[2], equal_nan=True)
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")  # no MUJOCO_LOG.TXT, no noise


def test_divergence_in_the_last_physics_step_is_seen():
    model = make("half_cheetah_dir", 1).sim.model
    sim = Simulator(model, 2, frame_skip=1)
    state = np.zeros((2, 19))
    state[1, 1], state[1, 10] = 9.99e9, 9e9  # sound as the step begins, beyond mjMAXVAL after it
    after, diverged = sim.step(state, np.zeros((2, 6)), np.arange(2))
    assert after[1, 0] == 0.01 and diverged.tolist() == [False, True]


def test_no_log_file_from_a_fresh_process(tmp_path):
    root = Path(__file__).parent.parent
    code = (f"import sys; sys.path.insert(0, {str(root)!r}); import envs, torch; "
            "env = envs.make('half_cheetah_dir', 2); env.reset(); env.state[0, 12] = 1e12; "
            "assert env.step(torch.zeros(2, 6))[4]['diverged'].tolist() == [True, False]")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and list(tmp_path.iterdir()) == []


def test_one_model_a_row():
    torch.manual_seed(0)
    base = make("half_cheetah_dir", 1).sim.model
    light = copy.copy(base)
    light.body_mass[:] *= 0.5
    light.body_inertia[:] *= 0.5
    sim = Simulator(base, 4, threads=2)
    sim.models[1] = sim.models[3] = light
    state = np.concatenate([np.zeros((4, 1)), np.tile(base.qpos0, (4, 1)), np.zeros((4, 9))], 1)
    after, _ = sim.step(state, np.ones((4, 6)), np.arange(4))
    after = after.copy()
    assert equal(after[0], after[2]) and equal(after[1], after[3]) and not equal(after[0], after[1])
    some, _ = sim.step(state[:2], np.ones((2, 6)), np.array([1, 2]))  # rows 1 and 2 only: their own models
    assert equal(some, after[1:3])
    data = mujoco.MjData(light)
    data.ctrl[:] = 1
    mujoco.mj_step(light, data, nstep=5)
    assert equal(after[1, 1:], np.concatenate([data.qpos, data.qvel]))


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["half_cheetah_dir", "ant_goal"])
def test_render(name):
    torch.manual_seed(0)
    env = make(name, 3)
    env.reset()
    env.step(torch.randn(3, *env.action_dims))
    state = env.state.copy()
    try:
        frame = env.render()
    except RuntimeError as e:
        pytest.skip(str(e))
    assert frame.shape == (240, 320, 3) and frame.dtype == np.uint8 and frame.std() > 10
    assert not equal(frame, env.render(row=2)) and equal(frame, env.render(row=0)) and equal(state, env.state)
    assert frame[:60].std() < frame[-60:].std()  # the plain sky is above, the chequered floor below


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
