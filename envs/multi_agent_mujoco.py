"""
Robots with several drivers, each of whom moves some of the joints: batched MuJoCo (the Simulator of
envs/mujoco.py) with gymnasium's own model files, factorised as in MaMuJoCo (Peng et al., 2021,
arXiv:2003.06709; gymnasium-robotics' mamujoco_v1).

World                    Drivers (their actions, in this order)      Observes               Task
cheetah_dir              2: bthigh, bshin, bfoot; fthigh, fshin,     (6): q, v of bfoot,    d = -1 or +1
                         ffoot (back leg, front leg)                 bshin, bthigh; f...
hopper_param             3: thigh; leg; foot                         (2): q, v of its own   4 multipliers
two_agent_half_cheetah   2: as cheetah_dir                           (17): qpos without x,  d
                                                                     qvel, for both

cheetah_dir and hopper_param are two envs of MG2L (Zhao et al., 2025): in MaMuJoCo's words "2x3" and "3x1"
with agent_obsk=0 and global_categories=(): nobody observes the torso. Hopper's v is cut to [-10, 10], as in
v5. two_agent_half_cheetah is the third game of Meta-MAPG (Kim et al., 2021, arXiv:2011.00382).

Reward    the same for every driver; a: what all of them ask for, u: a clipped to [-1, 1], the motors' range.
          cheetah_dir d vx - 0.1 |a|^2, two_agent_half_cheetah d vx - 0.1 |u|^2, hopper_param
          vx + 1[healthy] - 0.001 |a|^2: each as its authors have it, two with the unclipped action.
Time      5 physics steps of 0.01 s (hopper: 4 of 0.002 s) a move. H = 1000 (two_agent_half_cheetah: 200).
Start     cheetahs: qpos + U(-0.1, 0.1), qvel + 0.1 N(0, 1); hopper: U(-0.005, 0.005) on both; from torch's
          global CPU stream.
End       hopper: height <= 0.7, |angle| >= 0.2, or any other number beyond 100. Cheetahs: never. A row that
          diverges ends as well, see envs/mujoco.py. No autoreset: the authors' Hopper starts anew within its
          1000 steps, this one rests.
Tasks     cheetah_dir: both directions, in both splits. hopper_param: four factors, each U(0.5, 1.5), of all
          bodies' body_mass, dof_damping, geom_friction (all three columns) and body_inertia: 50 vectors for
          "train", 10 others for "test", the same in every run (numpy's default_rng(0), default_rng(1));
          reset() takes any positive ones. The authors multiply the model they have just used, so that their
          parameters drift from reset to reset. Here the factors always apply to the file's numbers, and
          what MuJoCo derives from them is computed anew (mj_setConst).
          two_agent_half_cheetah: reset(task) takes d; without it, d = `direction`, +1 unless told otherwise
          (-1: the peers of the paper have learnt to run to the left). The script chooses who drives.

Solver    it starts each env step from zero, see envs/mujoco.py.
"""

import copy
import functools
import os

import mujoco
import numpy as np
import torch

from .base import FiniteTasks
from .mujoco import ASSETS, Bodies

FIELDS = "body_mass", "dof_damping", "geom_friction", "body_inertia"  # in the order of a Hopper's task


class Drivers(FiniteTasks, Bodies):
    """What the envs share: B bodies, H steps, N drivers. reset(task) takes (B, D) tasks, one a row; without
    them it draws training tasks. self.columns[i] are the columns of the state that driver i sees."""

    default_horizon = 1000

    def __init__(self, name, num_envs, **common):
        super().__init__(name, num_envs, **common)
        self.build(mujoco.MjModel.from_xml_path(os.path.join(ASSETS, self.xml)))
        self.num_agents, self.task_dim = len(self.action_dims), self.tasks["train"].shape[1]

    def _observe(self, state):
        return [state[:, c] for c in self.columns]


class CheetahDir(Drivers):
    xml, action_dims, obs_dims = "half_cheetah.xml", (3, 3), (6, 6)
    tasks = dict.fromkeys(("train", "test"), np.array([[-1.0], [1.0]]))
    # of state: time, then 9 positions (x, z, pitch, bthigh, bshin, bfoot, fthigh, fshin, ffoot), then their
    # velocities. MaMuJoCo sorts the joints by name: foot, shin, thigh; each position before its velocity.
    columns = [6, 15, 5, 14, 4, 13], [9, 18, 8, 17, 7, 16]

    def _judge(self, rows, after, v, a, u):
        return self.task[rows, 0] * v - 0.1 * (a**2).sum(1), False


class WholeCheetah(CheetahDir):
    """Both drivers see all of it."""

    default_horizon, obs_dims, columns = 200, (17, 17), (slice(2, None),) * 2

    def _judge(self, rows, after, v, a, u):
        return self.task[rows, 0] * v - 0.1 * (u**2).sum(1), False


class TwoAgentHalfCheetah(WholeCheetah):
    def __init__(self, name, num_envs, direction=1, **common):
        if direction not in (-1, 1):
            raise ValueError(f"{name}: direction must be -1 or 1, not {direction!r}")
        super().__init__(name, num_envs, **common)
        self.tasks = dict.fromkeys(("train", "test"), np.array([[float(direction)]]))


class HopperParam(Drivers):
    xml, frame_skip, action_dims, obs_dims = "hopper.xml", 4, (1, 1, 1), (2, 2, 2)
    tasks = {split: np.random.default_rng(seed).uniform(0.5, 1.5, (n, 4))
             for split, seed, n in (("train", 0, 50), ("test", 1, 10))}
    # of state: time, then 6 positions (x, z, pitch, thigh, leg, foot), then their velocities
    columns = [4, 10], [5, 11], [6, 12]

    def __init__(self, name, num_envs, **common):
        super().__init__(name, num_envs, **common)
        self.spare, self.data = [], mujoco.MjData(self.sim.model)

    def reset(self, task=None):
        task = self.check_task(task)
        if not ((task > 0) & (task < np.inf)).all():
            raise ValueError(f"{self.name}: the multipliers of a task must be positive and finite")
        # Rows of the same task share a model: it is only read. self.sim.model keeps the file's numbers.
        scales, index = np.unique(task.cpu().double().numpy(), axis=0, return_inverse=True)
        while len(self.spare) < len(scales):
            self.spare.append(copy.copy(self.sim.model))
        for model, scale in zip(self.spare, scales):
            for field, factor in zip(FIELDS, scale):
                getattr(model, field)[:] = getattr(self.sim.model, field) * factor
            mujoco.mj_setConst(model, self.data)
        self.sim.models = [self.spare[i] for i in index.reshape(-1)]
        return super().reset(task)

    def _noise(self, nq, nv):
        noise = 0.01 * torch.rand(self.total, nq + nv, dtype=torch.float64).numpy() - 0.005
        return noise[:, :nq], noise[:, nq:]

    def _observe(self, state):
        return [np.stack([state[:, q], np.clip(state[:, v], -10, 10)], axis=1) for q, v in self.columns]

    def _judge(self, rows, after, v, a, u):
        healthy = self._healthy(after)
        return v + healthy - 0.001 * (a**2).sum(1), ~healthy

    def _healthy(self, state):
        rest = state[:, 3:]  # all but time, x, z; the first is the torso's angle
        return (state[:, 2] > 0.7) & (np.abs(rest[:, 0]) < 0.2) & (np.abs(rest) < 100).all(1)


# ---------------------------------------------------------------- the peers of two_agent_half_cheetah
# Tasks are peers, as in envs/matrix_games.py: the weights with which the driver of the front leg begins, one
# flat vector each, of an LSTM with a Gaussian head (lstm_shapes() in meta_mapg.py). The paper's peers were a
# download that is gone, and it does not say how they were trained. Ours come from benchmark/make_peers.py: n
# is the front leg that played iteration n of a training to the left. Which n are for training, validation and
# test is the authors' choice.
VALIDATION = [3, 9, 38, 53, 57, 88, 104, 122, 146, 150, 166, 167, 190, 196, 205, 210, 221, 230, 233, 246, 259,
              265, 273, 278, 293]
PEER_SPLITS = {"train": [n for n in range(300) if n not in VALIDATION], "val": VALIDATION,
               "test": [*range(475, 500)]}
KEPT = sorted(sum(PEER_SPLITS.values(), []))
GRID = 2.0**-10  # the unit of the weights, which are kept as whole numbers ...
PEERS = os.path.join(os.path.dirname(__file__), "..", "benchmark", "peers", "half_cheetah_dir.npz")


class HalfCheetahPeers(WholeCheetah):
    """Runs to the right. Its tasks are peers; they do not change the env, so reset() ignores them."""

    def __init__(self, name, num_envs, peers=None, **common):
        super().__init__(name, num_envs, **common)
        del self.task_dim  # a peer is no row (D,), but (1, P)
        population = read_peers(os.path.abspath(peers or PEERS))  # (325, P)
        self.tasks = {split: population[[KEPT.index(n) for n in numbers], None].numpy()  # (n, 1, P)
                      for split, numbers in PEER_SPLITS.items()}

    def check_task(self, task):
        wanted = (self.num_envs, *self.tasks["train"].shape[1:])
        if task is not None and tuple(task.shape) != wanted:
            raise ValueError(f"{self.name}: task must be {wanted}, not {tuple(task.shape)}")
        return torch.ones(self.num_envs, 1)  # to the right

    def tasks_by_class(self, split):
        """{"left": (n, 1, P)}: each peer of the split once. There is one class: all have run to the left."""
        return {"left": self.all_tasks(split)}


def write_peers(path, weights, returns):
    """weights (n, P) int16 in units of GRID, peers KEPT[:n]; returns (iterations,) of their training. The
    file holds the differences from one peer to the next: a fifth of the size that float16 would have."""
    steps = np.diff(weights.numpy(), axis=0, prepend=np.int16(0)).T  # (P, n)
    with open(path, "wb") as file:
        np.savez_compressed(file, steps=np.ascontiguousarray(steps), returns=returns.numpy())


@functools.lru_cache(1)
def read_peers(path):
    """(325, P) float32: peers KEPT. Raises ValueError."""
    try:
        with np.load(path) as data:
            steps = data["steps"]
    except Exception as error:  # missing, not an .npz, truncated, of a matrix game
        raise ValueError(f"peers {path}: not a file of benchmark/make_peers.py ({error})") from None
    if steps.dtype != np.int16 or steps.ndim != 2 or steps.shape[1] != len(KEPT):
        raise ValueError(f"peers {path}: wanted {len(KEPT)} of them, not {steps.shape[1:]}")
    return torch.from_numpy(np.cumsum(steps, 1, dtype=np.int16).T.astype(np.float32)) * GRID
