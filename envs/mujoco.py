"""
Batched MuJoCo on mujoco.rollout's thread pool, and on it the locomotion tasks of MAML (Finn et al., 2017,
arXiv:1703.03400, Sec. 5.3) with gymnasium's own model files.

World               Reward of one step (v: velocity, p: position of the torso after it)   Task, by split
half_cheetah_dir    d vx - 0.05 |u|^2                                                     d = -1 or +1
half_cheetah_vel    -|vx - v*| - 0.05 |u|^2                                               v* in [0, 2]
ant_dir             d vx - 0.005 |u|^2 + 0.05                                             d = -1 or +1
ant_vel             -|vx - v*| + 1 - 0.005 |u|^2 + 0.05                                   v* in [0, 3]
ant_goal            -|px - gx| - |py - gy| + 4 - 0.005 |u|^2 + 0.05                       g in [-3, 3]^2

Actions   u = action_scale * a clipped to [-1, 1], the motors' range, held for 5 physics steps (0.05 s).
          action_scale = 1/c is "clip to [-c, c], divide by c" (the MAML authors: c = 1; later codes: 10).
State     every row's (time, qpos, qvel) as float64 in env.state. An episode starts at the model's own
          pose, qpos + U(-0.1, 0.1), qvel + 0.1 N(0, 1), drawn from torch's global CPU stream.
Observed  HalfCheetah (20): qpos without x, qvel, torso position. Ant (41): qpos, qvel, the torso's rotation
          matrix (row by row) and position. All of it is computed from the state after the step.
End       Ant: torso height outside [0.2, 1.0]. HalfCheetah: never. A row that diverges (a non-finite or huge
          number, a NaN action) ends as well: its last sound state stays, that step's reward is 0, and
          info["diverged"], (B,) bool, marks it until reset(). Rows that have ended are no longer simulated.

Against gymnasium's HalfCheetah-v5 and Ant-v5: the same physics, start and actions, other rewards and
observations. v5 pays HalfCheetah vx - 0.1 |u|^2 and Ant vx + 1 - 0.5 |u|^2 - 0.0005 |contact forces|^2. The
MAML authors' ant pays that contact cost too (at most 0.042 a step) and observes the forces; here they are
neither paid for nor observed. v5 leaves x and, for Ant, y out of the observation, and takes Ant's velocity
from positions that lag the state by part of a physics step; here they come from qpos.
Warm start: the constraint solver starts each env step from zero. The worlds are bit-equal to a gymnasium env
whose data.qacc_warmstart is zeroed before every step, and drift from an untouched one as chaos has it (1e-13
after 10 steps).
"""

import ctypes.util
import importlib
import logging
import os
import sys

import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
import torch

from .navigation import check_task, uniform_tasks

ASSETS = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS  # time, qpos, qvel: one flat vector

# MuJoCo's own handler prints each warning and appends it to MUJOCO_LOG.TXT in the user's folder. Here a
# diverged row is counted instead; logging.basicConfig(level="INFO") shows the texts.
if mujoco.get_mju_user_warning() is None:
    mujoco.set_mju_user_warning(logging.getLogger(__name__).info)


class Simulator:
    """Steps any number of rows, up to B, of one model. It keeps no episode: states go in and come out.

    models[b] is row b's model. Where tasks change the physics, put changed copies of `model` there (masses,
    friction, gears: whatever leaves the sizes alone). threads=None takes every core that this process may
    run on; 1 or 0 steps on the calling thread. The number of threads does not change a single bit.
    """

    def __init__(self, model, num_envs, frame_skip=5, threads=None):
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if threads < 0:
            raise ValueError(f"threads must be at least 0, not {threads}")
        self.model, self.models, self.dt = model, [model] * num_envs, model.opt.timestep * frame_skip
        self.pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.scratch = [mujoco.MjData(model) for _ in range(max(threads, 1))]  # one a thread
        sizes = model.nu, mujoco.mj_stateSize(model, FULL), model.nsensordata
        self.ctrl, self.out, self.sensors = (np.empty((num_envs, frame_skip, size)) for size in sizes)

    def step(self, state, ctrl, rows):
        """The states (n, S) after one env step from `state` (n, S) under `ctrl` (n, U), and which of them
        diverged (n,). `rows` (n,) are the indices of the models to use. The states are a view, good until
        the next call."""
        n, models = len(rows), self.models
        if n < len(models):
            models = [models[b] for b in rows]
        self.ctrl[:n] = ctrl[:, None]
        if n:
            # skip_checks: the checks would copy and tile; all shapes are right by construction
            self.pool.rollout(models, self.scratch, np.ascontiguousarray(state), self.ctrl[:n],
                              nstep=self.out.shape[1], state=self.out[:n], sensordata=self.sensors[:n],
                              skip_checks=True)
        after = self.out[:n, -1]
        # On a bad number (NaN or beyond mjMAXVAL) MuJoCo resets the row and rollout stops there: time then
        # falls short. It looks for them as a physics step begins, so those of the last one are still there.
        late = after[:, 0] < state[:, 0] + self.dt - 0.5 * self.model.opt.timestep
        return after, late | ~(np.abs(after) < mujoco.mjMAXVAL).all(1)


class Locomotion:
    """What the worlds share: B bodies, H steps. reset(task) takes (B, D) tasks, one a row; without them it
    draws training tasks."""

    discrete, num_agents = False, 1

    def __init__(self, name, num_envs, horizon=200, device="cpu", action_scale=1.0, threads=None,
                 integrator=None):
        if horizon < 1 or not action_scale > 0:
            raise ValueError(f"{name}: horizon must be at least 1 and action_scale positive, "
                             f"not {horizon} and {action_scale}")
        self.num_envs, self.horizon, self.device = num_envs, horizon, device
        self.action_scale, self.kind = action_scale, name.rpartition("_")[2]  # dir, vel or goal
        model = mujoco.MjModel.from_xml_path(os.path.join(ASSETS, self.xml))
        if integrator is not None:  # another one than the model's own is another task: "implicitfast", ...
            kinds = {k.removeprefix("mjINT_").lower(): v for k, v in mujoco.mjtIntegrator.__members__.items()}
            if integrator not in kinds:
                raise ValueError(f"integrator must be one of {', '.join(kinds)}, not {integrator!r}")
            model.opt.integrator = kinds[integrator]
        self.sim, self.screen = Simulator(model, num_envs, threads=threads), None
        self.action_dims, self.task_dim = (model.nu,), 1 + (self.kind == "goal")

    def reset(self, task=None, part=None):
        """part: (first, total) when these B rows are rows first, first+1, ... of `total` rows that several
        processes share: each of them draws the noise of all rows, so a row's start does not depend on who
        plays it."""
        self.task = check_task(task, self).cpu().double().numpy()  # (B, D)
        B, model = self.num_envs, self.sim.model
        first, total = part or (0, B)
        qpos = 0.2 * torch.rand(total, model.nq, dtype=torch.float64).numpy() - 0.1
        qvel = 0.1 * torch.randn(total, model.nv, dtype=torch.float64).numpy()
        qpos, qvel = model.qpos0 + qpos[first : first + B], qvel[first : first + B]
        self.state = np.concatenate([np.zeros((B, 1)), qpos, qvel], axis=1)  # (B, S)
        self.t, (self.terminated, self.diverged) = 0, np.zeros((2, B), bool)
        return self._tensor(self._observe(), torch.float32)

    def step(self, action):
        wanted = (self.num_envs, *self.action_dims)
        if action.shape != wanted:
            raise ValueError(f"action must be {wanted}, not {tuple(action.shape)}")
        rows = np.flatnonzero(~self.terminated)  # (n,): only who is alive costs physics
        u = np.clip(self.action_scale * action.detach().cpu().double().numpy()[rows], -1, 1)  # (n, U)
        before = self.state[rows]
        after, diverged = self.sim.step(before, u, rows)  # (n, S), (n,)
        after = self.state[rows] = np.where(diverged[:, None], before, after)
        reward, self.t = np.zeros((self.num_envs, 1)), self.t + 1
        reward[rows, 0] = np.where(diverged, 0, self._reward(before, after, u, self.task[rows]))
        self.diverged[rows] = diverged
        self.terminated[rows] = diverged | self._fallen(after)
        truncated = np.full(self.num_envs, self.t >= self.horizon)
        return (self._tensor(self._observe(), torch.float32), self._tensor(reward, torch.float32),
                *(self._tensor(flag, torch.bool) for flag in (self.terminated, truncated)),
                {"diverged": self._tensor(self.diverged, torch.bool)})

    def _reward(self, before, after, u, task):
        """(n,), as in the table above."""
        v = (after[:, 1] - before[:, 1]) / self.sim.dt
        if self.kind == "dir":
            gain = task[:, 0] * v
        elif self.kind == "vel":
            gain = -np.abs(v - task[:, 0])
        else:
            gain = -np.abs(after[:, 1:3] - task).sum(1)
        return gain + self.bonus[self.kind] - self.ctrl_cost * (u**2).sum(1)

    def _tensor(self, x, dtype):
        return torch.tensor(x, dtype=dtype, device=self.device)  # a copy: the arrays change at the next step

    def sample_tasks(self, n, split="train"):
        """(n, D) tasks. The two directions are a fair coin, and take turns in "test": there are no others."""
        low, high = self.ranges[self.kind]
        tasks = uniform_tasks(n, [low] * self.task_dim, [high] * self.task_dim, split)
        return (tasks.sign() if self.kind == "dir" else tasks).to(self.device)

    def render(self, row=0):
        """(240, 320, 3) uint8: one row, off screen. RuntimeError where neither EGL nor OSMesa works."""
        if self.screen is None:
            self.screen = Screen(self.sim.model, 320, 240)
        return self.screen.draw(self.sim.models[row], self.state[row])


class HalfCheetah(Locomotion):
    xml, obs_dims, ctrl_cost = "half_cheetah.xml", (20,), 0.05
    ranges, bonus = {"dir": (-1, 1), "vel": (0, 2)}, {"dir": 0, "vel": 0}

    def _observe(self):
        x, z = self.state[:, 1:2], self.state[:, 2:3] + 0.7  # the slides count from the torso's (0, 0, 0.7)
        return np.concatenate([self.state[:, 2:], x, np.zeros_like(x), z], axis=1)  # (B, 20)

    def _fallen(self, state):
        return False


class Ant(Locomotion):
    xml, obs_dims, ctrl_cost = "ant.xml", (41,), 0.005
    ranges, bonus = {"dir": (-1, 1), "vel": (0, 3), "goal": (-3, 3)}, {"dir": 0.05, "vel": 1.05, "goal": 4.05}

    def _observe(self):
        q = self.state[:, 4:8]  # noisy at reset: MuJoCo normalises it in its first step
        w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
        R = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
             2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
             2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        return np.concatenate([self.state[:, 1:], np.stack(R, axis=1), self.state[:, 1:4]], axis=1)  # (B, 41)

    def _fallen(self, state):
        return (state[:, 3] < 0.2) | (state[:, 3] > 1.0)


class Screen:
    """An OpenGL buffer without a window. The libraries are loaded when the first frame is asked for."""

    def __init__(self, model, width, height):
        kind = os.environ.get("MUJOCO_GL")
        try:
            if kind or sys.platform != "linux":
                context = mujoco.GLContext
            else:  # MuJoCo's own choice would be a window
                kind = "egl" if ctypes.util.find_library("EGL") else "osmesa"
                context = importlib.import_module(f"mujoco.{kind}").GLContext
            self.gl = context(width, height)
            self.gl.make_current()
            self.con = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as e:  # a missing library shows as anything from ImportError to AttributeError
            raise RuntimeError("cannot render off screen: install EGL (libegl1) or OSMesa (libosmesa6); "
                               f"{kind or 'OpenGL'} failed with: {' '.join(str(e).split())}") from None
        self.rect = mujoco.MjrRect(0, 0, width, height)
        self.scene, self.data = mujoco.MjvScene(model, maxgeom=1000), mujoco.MjData(model)
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")

    def draw(self, model, state):
        mujoco.mj_setState(model, self.data, state, FULL)
        mujoco.mj_forward(model, self.data)
        self.gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.con)
        mujoco.mjv_updateScene(model, self.data, mujoco.MjvOption(), None, self.camera,
                               mujoco.mjtCatBit.mjCAT_ALL, self.scene)
        mujoco.mjr_render(self.rect, self.scene, self.con)
        frame = np.empty((self.rect.height, self.rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, self.rect, self.con)
        return frame[::-1].copy()  # OpenGL counts rows from below
