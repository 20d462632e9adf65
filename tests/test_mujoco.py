"""Batched MuJoCo against gymnasium's own worlds, bit by bit, and what batching must not change."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from envs import make
from envs.mujoco import Simulator

equal, close = np.array_equal, np.testing.assert_allclose


# ---------------------------------------------------------------- parity with gymnasium


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


# ---------------------------------------------------------------- rows do not touch one another


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
