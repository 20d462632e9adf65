"""
Batched MuJoCo on mujoco.rollout's thread pool, and the locomotion tasks of MAML (Finn et al., 2017,
arXiv:1703.03400, Sec. 5.3), built on it with gymnasium's own model files.

World               Reward of one step (v: velocity, p: position of the torso after it)   Task, by split
half_cheetah_dir    d vx - 0.05 |u|^2                                                     d = -1 or +1
half_cheetah_vel    -|vx - v*| - 0.05 |u|^2                                               v* in [0, 2]
ant_dir             d vx - 0.005 |u|^2 + 0.05                                             d = -1 or +1
ant_vel             -|vx - v*| + 1 - 0.005 |u|^2 + 0.05                                   v* in [0, 3]
ant_goal            -|px - gx| - |py - gy| + 4 - 0.005 |u|^2 + 0.05                       g in [-3, 3]^2

Actions   u = a clipped to [-1, 1], the motors' range, held for 5 physics steps (0.05 s).
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
Warm start: the constraint solver starts each env step from zero. These envs are bit-equal to a gymnasium env
whose data.qacc_warmstart is zeroed before every step. From an untouched one they drift slowly, as chaotic
systems do (1e-13 after 10 steps).
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

from .base import Env, uniform_tasks

ASSETS = os.path.join(os.path.dirname(gymnasium.__file__), "envs", "mujoco", "assets")
FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS  # time, qpos, qvel: one flat vector

# MuJoCo's own handler prints each warning and appends it to MUJOCO_LOG.TXT in the user's folder. Here a
# diverged row is counted instead; logging.basicConfig(level="INFO") shows the texts.
if mujoco.get_mju_user_warning() is None:
    mujoco.set_mju_user_warning(logging.getLogger(__name__).info)


class Simulator:
    """Steps up to B rows of one model. It knows no episodes: states go in and come out.

    models[b] is row b's model. Where tasks change the physics, put changed copies of `model` there (masses,
    friction, gears: whatever leaves the sizes alone). The calling thread is one of `threads`. Their number
    does not change a single bit.
    """

    def __init__(self, model, num_envs, frame_skip=5, threads=1):
        if hasattr(mujoco.mjtDisableBit, "mjDSBL_ISLAND"):  # one robot is one island: 5 to 9 % faster
            model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
        self.model, self.models, self.dt = model, [model] * num_envs, model.opt.timestep * frame_skip
        self.pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)
        self.scratch = [mujoco.MjData(model) for _ in range(threads)]  # one a thread
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
        # falls short. It looks only as a physics step begins, so bad numbers of the last one are still there.
        late = after[:, 0] < state[:, 0] + self.dt - 0.5 * self.model.opt.timestep
        return after, late | ~(np.abs(after) < mujoco.mjMAXVAL).all(1)


class Bodies(Env):
    """What all robots share: B bodies of one model, H steps. Subclasses say what is seen (_observe), what is
    paid and who has ended (_judge)."""

    frame_skip, default_horizon, speed = 5, 200, 1.0

    def build(self, model):
        self.sim, self.screen = Simulator(model, self.num_envs, self.frame_skip, self.threads), None

    def reset(self, task=None):
        self.task = self.check_task(task).cpu().double().numpy()  # (B, D)
        self.state = self._starts()[self.mine]  # (B, S): time, qpos, qvel
        self.t, (self.terminated, self.diverged) = 0, np.zeros((2, self.num_envs), bool)
        return self._see()

    def step(self, action):
        action = torch.cat(self.check_action(action), 1).detach().cpu().double().numpy()  # (B, U)
        rows = np.flatnonzero(~self.terminated)  # (n,): only these are simulated
        a, before = action[rows], self.state[rows]
        u = np.clip(a, -1, 1)
        after, diverged = self.sim.step(before, self.speed * u, rows)  # (n, S), (n,)
        after = self.state[rows] = np.where(diverged[:, None], before, after)
        v = (after[:, 1] - before[:, 1]) / self.sim.dt
        with np.errstate(invalid="ignore", over="ignore"):  # of a NaN action, whose row has diverged
            gain, over = self._judge(rows, after, v, a, u)
        reward, self.t = np.zeros((self.num_envs, self.num_agents)), self.t + 1
        reward[rows] = np.where(diverged, 0, gain)[:, None]
        self.diverged[rows], self.terminated[rows] = diverged, diverged | over
        truncated = np.full(self.num_envs, self.t >= self.horizon)
        flags = [self.tensor(flag, torch.bool) for flag in (self.terminated, truncated, self.diverged)]
        return self._see(), self.tensor(reward), *flags[:2], {"diverged": flags[2]}

    def _starts(self):
        """(total, S): time 0 and the model's own pose, with noise."""
        model = self.sim.model
        q, v = self._noise(model.nq, model.nv)
        return np.concatenate([np.zeros((self.total, 1)), model.qpos0 + q, v], axis=1)

    def _noise(self, nq, nv):
        q = 0.2 * torch.rand(self.total, nq, dtype=torch.float64).numpy() - 0.1
        return q, 0.1 * torch.randn(self.total, nv, dtype=torch.float64).numpy()

    def _see(self):
        seen = self._observe(self.state)
        return self.tensor(seen) if self.num_agents == 1 else tuple(map(self.tensor, seen))

    def render(self, row=0):
        """(240, 320, 3) uint8: one row, off screen. RuntimeError where neither EGL nor OSMesa works."""
        if self.screen is None:
            self.screen = Screen(self.sim.model, 320, 240)
        return self.screen.draw(self.sim.models[row], self.state[row])


class Locomotion(Bodies):
    """The tasks of MAML. reset(task) takes (B, D) tasks, one a row; without them it draws training tasks."""

    splits = ("train", "test")

    def __init__(self, name, num_envs, **common):
        super().__init__(name, num_envs, **common)
        self.build(mujoco.MjModel.from_xml_path(os.path.join(ASSETS, self.xml)))
        self.kind = name.rpartition("_")[2]
        self.action_dims, self.task_dim = (self.sim.model.nu,), 1 + (self.kind == "goal")
        if self.kind == "dir":
            self.all_tasks = self._directions

    def _judge(self, rows, after, v, a, u):
        """Rewards (n,), as in the table above, and who has fallen."""
        task = self.task[rows]
        if self.kind == "dir":
            gain = task[:, 0] * v
        elif self.kind == "vel":
            gain = -np.abs(v - task[:, 0])
        else:
            gain = -np.abs(after[:, 1:3] - task).sum(1)
        return gain + self.bonus[self.kind] - self.ctrl_cost * (u**2).sum(1), self._fallen(after)

    def _directions(self, split="train"):
        """(2, 1): the same in both splits."""
        self.check_split(split)
        return self.tensor([[-1], [1]])

    def sample_tasks(self, n, split="train"):
        """(n, D) tasks. There are only two directions: a fair coin in "train", and in turn in "test"."""
        self.check_split(split)
        low, high = self.ranges[self.kind]
        tasks = uniform_tasks(n, [low] * self.task_dim, [high] * self.task_dim, split)
        return (tasks.sign() if self.kind == "dir" else tasks).to(self.device)


class HalfCheetah(Locomotion):
    xml, obs_dims, ctrl_cost = "half_cheetah.xml", (20,), 0.05
    ranges, bonus = {"dir": (-1, 1), "vel": (0, 2)}, {"dir": 0, "vel": 0}

    def _observe(self, state):
        x, z = state[:, 1:2], state[:, 2:3] + 0.7  # the slides count from the torso's (0, 0, 0.7)
        return np.concatenate([state[:, 2:], x, np.zeros_like(x), z], axis=1)  # (B, 20)

    def _fallen(self, state):
        return False


class Ant(Locomotion):
    xml, obs_dims, ctrl_cost = "ant.xml", (41,), 0.005
    ranges, bonus = {"dir": (-1, 1), "vel": (0, 3), "goal": (-3, 3)}, {"dir": 0.05, "vel": 1.05, "goal": 4.05}

    def _observe(self, state):
        q = state[:, 4:8]  # noisy at reset: MuJoCo normalises it in its first step
        w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
        R = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
             2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
             2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        return np.concatenate([state[:, 1:], np.stack(R, axis=1), state[:, 1:4]], axis=1)  # (B, 41)

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
