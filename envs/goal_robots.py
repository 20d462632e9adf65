"""
Four robots that roll, walk or reach to a hidden goal (Lan et al., IJCAI 2019, arXiv:1905.06527), on the
batched Simulator of envs/mujoco.py.

Env        Robot                                                           O    A   Speed    Arrived within
wheeled    a car on two driven wheels                                      9    2   50 rad/s   0.02
small_ant  an ant with limbs at 40 % of the size of gymnasium's           29    8   50 rad/s   0.03
reacher2   an arm of two links; p is its fingertip                         8    2  100 rad/s   0.06
reacher4   an arm of four links                                           14    4   50 rad/s   0.11

Names     small_ant is not ant_goal, which is MAML's full-size ant. An arm's number is that of its links.
Actions   u = a clipped to [-1, 1], times the speed above: the commanded velocity of each joint for 5
          physics steps (0.05 s). All actuators are servos, torque = command - velocity.
Reward    -|p - goal| - 0.0005 |u|^2, where p is the position in the plane after the step. The factor 0.0005
          is that of the authors' code; the supplement has 0.001. Arrival earns nothing: the episode ends, and
          with it the negative rewards. Standing still scores about -156, -147 and -264 on the three sets of
          goals (wheeled, small_ant).
Start     always the same pose, at rest: nothing is drawn. The goal is hidden, p observed.
End       |p - goal| < the last column; small_ant: torso height outside [0.15, 0.45]; a row that diverges, as
          in envs/mujoco.py. info has "arrived" and "diverged", (B,) bool. Ended rows are not simulated.
Tasks     three fixed sets of 100 goals (2,), drawn once: split "train" (D) and "test" (D')
          on the ring 0.2 < |g| < 1.1, all at least 0.1 apart (reacher4: 0.11), and "test2" (D'') beyond it,
          on 1.1 < |g| < 1.5. So the three never overlap. sample_tasks(n, split) draws n different goals of
          the 100 from torch's global CPU stream; beyond 100 they repeat.

The model files are ours, from the published numbers; all masses sum to 24 kg. p comes from qpos. The authors
read a body position that is one physics step old under the Euler integrator (wheeled: 8 mm on average);
stale=True does the same. The solver starts each env step from zero, see envs/mujoco.py.
"""

import functools

import mujoco
import numpy as np
import torch

from .base import FiniteTasks
from .mujoco import Bodies, Screen

NUM_GOALS = 100  # in each set
RINGS = {"train": (0.2, 1.1), "test": (0.2, 1.1), "test2": (1.1, 1.5)}


def model_text(option, default, body, joints, speed):
    """A whole MJCF model. One servo for each of `joints`; a camera above; a mark where the goal is."""
    servos = "".join(f'<velocity joint="{j}" kv="1" ctrlrange="-{speed} {speed}"/>' for j in joints)
    return f"""<mujoco>
  <compiler angle="radian" autolimits="false"/>
  <option timestep="0.01" {option}/>
  <default>{default}<velocity ctrllimited="true"/></default>
  <visual><headlight ambient="0.5 0.5 0.5" specular="0 0 0"/></visual>
  <worldbody>
    <camera name="track" pos="0 0 4.2"/>
    <site name="goal" type="sphere" pos="0 0 0.1" size="0.06" rgba="0 0.6 0 1"/>
    {body}
  </worldbody>
  <actuator>{servos}</actuator>
</mujoco>"""


# Only the floor has a conaffinity: the robots' geoms touch it, and nothing else touches anything.
FLOOR = '<geom name="floor" type="plane" size="40 40 1" contype="0" conaffinity="1" rgba="0.9 0.9 0.9 1"/>'


def wheeled_text():
    wheel = "".join(
        f'<body pos="0 {y} 0"><joint name="wheel{i}" type="hinge" axis="0 1 0" pos="0 0 0.5"/>'
        '<geom type="cylinder" pos="0 0 0.5" size="0.1 0.046" euler="1.57 0 0" mass="6.138328275653742"/>'
        '</body>'
        for i, y in ((1, -0.2), (2, 0.2)))  # 1.57, not pi / 2: the car veers a little
    body = f"""{FLOOR}<body name="car" pos="0 0 -0.4">
      <joint name="x" type="slide" axis="1 0 0"/> <joint name="y" type="slide" axis="0 1 0"/>
      <joint name="z" type="slide" axis="0 0 1" limited="true" range="-1 0.03"/>
      <joint name="yaw" type="hinge" axis="0 0 1"/>
      <geom type="box" pos="0 0 0.6" size="0.15 0.1 0.046" mass="11.72334344869252" rgba="0.8 0.4 0.2 1"/>
      {wheel}</body>"""
    default = ('<joint margin="0.01" armature="0" damping="0"/><geom contype="1" conaffinity="0" condim="3" '
               'friction="0.4 0.4 0.4" solref="0.02 1" solimp="0 0.8 0.01"/>')
    return model_text('integrator="Euler"', default, body, ["wheel1", "wheel2"], 50)


def small_ant_text():
    capsule = '<geom type="capsule" size="0.04" fromto="0 0 0 {0} {1} 0" mass="{2}"/>'
    deg, legs = np.pi / 180, ""
    for leg, (sx, sy) in enumerate([(1, 1), (-1, 1), (-1, -1), (1, -1)], start=1):
        axis = "-1 1 0" if leg in (1, 3) else "1 1 0"
        low, high = (30, 70) if leg in (1, 4) else (-70, -30)
        legs += f"""<body>{capsule.format(.08 * sx, .08 * sy, "1.1762394810591905")}
          <body pos="{.08 * sx} {.08 * sy} 0">
            <joint name="hip{leg}" type="hinge" axis="0 0 1" range="{-30 * deg} {30 * deg}"/>
            {capsule.format(.1 * sx, .1 * sy, "1.3760892613947235")}
            <body pos="{.1 * sx} {.1 * sy} 0">
              <joint name="ankle{leg}" type="hinge" axis="{axis}" range="{low * deg} {high * deg}"/>
              {capsule.format(.16 * sx, .16 * sy, "1.975638602401322")}
            </body></body></body>"""
    body = f"""{FLOOR}<body name="torso" pos="0 0 0.25">
      <joint type="free" limited="false" armature="0" damping="0" margin="0.005"/>
      <geom type="sphere" size="0.1" mass="5.888130620579051"/>{legs}</body>"""
    default = ('<joint limited="true" armature="1" damping="1"/><geom contype="1" conaffinity="0" condim="3" '
               'friction="1 0.5 0.5" margin="0.005" rgba="0.8 0.6 0.4 1"/>')
    joints = [f"{name}{leg}" for leg in (4, 1, 2, 3) for name in ("hip", "ankle")]
    return model_text('integrator="RK4"', default, body, joints, 50)


def reacher_text(links, length, last, mass, tip, speed):
    """An arm of `links` links of `length`; its tip is `last` beyond the last hinge. Nothing ever touches."""
    body, limit = "", 160 * np.pi / 180
    for i in reversed(range(links)):
        inner = body or f'<geom type="sphere" size="0.1" pos="{last} 0 0" mass="{tip}" rgba="0 0.3 0.8 1"/>'
        place = f"{length} 0 0" if i else "0 0 0.1"
        limits = f'limited="true" range="{-limit} {limit}"' if i else ""
        body = f"""<body pos="{place}"><joint name="q{i}" type="hinge" axis="0 0 1" {limits}/>
          <geom type="capsule" size="0.1" fromto="0 0 0 {length} 0 0" mass="{mass}"/>{inner}</body>"""
    default = ('<joint armature="1" damping="1"/><geom contype="0" conaffinity="0" rgba="0.8 0.6 0.4 1"/>')
    return model_text('integrator="RK4"', default, body, [f"q{i}" for i in range(links)], speed)


ARMS = {"reacher2": (2, 0.75, 0.95), "reacher4": (4, 0.45, 0.65)}  # links, length, last hinge to tip
TEXTS = {
    "wheeled": wheeled_text,
    "small_ant": small_ant_text,
    "reacher2": lambda: reacher_text(*ARMS["reacher2"], "11.157894736842106", "1.6842105263157896", 100),
    "reacher4": lambda: reacher_text(*ARMS["reacher4"], "5.675675675675676", "1.2972972972972971", 50),
}
ARRIVAL = {"wheeled": 0.02, "small_ant": 0.03, "reacher2": 0.06, "reacher4": 0.11}
ANT_POSE = [0, 0, 0.25, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]


def fingertip(q, length, last):
    """The tip's position (..., 2) from joint angles q (..., links): each link turns all that follow."""
    angle = np.cumsum(q, axis=-1)
    reach = np.array([*[length] * (q.shape[-1] - 1), last])
    return np.stack([(reach * np.cos(angle)).sum(-1), (reach * np.sin(angle)).sum(-1)], axis=-1)


@functools.cache
def goal_sets(spacing=0.1):
    """{split: (100, 2)}: D, D' and D'' from one stream. All goals of D and D' keep their distance from each
    other, and so do those of D'' among themselves."""
    draw, sets = np.random.RandomState(1), {}
    for split, (inner, outer) in RINGS.items():
        near = sets["train"] if split == "test" else np.empty((0, 2))
        start = len(near)
        while len(near) < start + NUM_GOALS:
            g = draw.uniform(-1.5, 1.5, size=2)
            if inner < np.linalg.norm(g) < outer and (np.linalg.norm(near - g, axis=1) >= spacing).all():
                near = np.vstack([near, g])
        sets[split] = near[start:]
    return sets


class GoalRobot(FiniteTasks, Bodies):
    """B robots, H steps. reset(task) takes the goals, (B, 2), one a row; without them it draws training
    goals."""

    task_dim = 2

    def __init__(self, name, num_envs, stale=False, **common):
        super().__init__(name, num_envs, **common)
        self.stale = stale
        model = mujoco.MjModel.from_xml_string(TEXTS[name]())
        self.build(model)
        self.speed, self.radius = model.actuator_ctrlrange[0, 1], ARRIVAL[name]
        self.tasks = goal_sets(0.11 if name == "reacher4" else 0.1)
        self.start, self.nq = np.zeros(1 + model.nq + model.nv), model.nq  # time, qpos, qvel
        if name == "small_ant":
            self.start[1 : 1 + model.nq] = ANT_POSE
        self.obs_dims, self.action_dims = (self._observe(self.start[None]).shape[1],), (model.nu,)

    def reset(self, task=None):
        self.near = np.zeros(self.num_envs, bool)
        return super().reset(task)

    def step(self, action):
        *out, info = super().step(action)
        return *out, info | {"arrived": self.tensor(self.near & ~self.diverged, torch.bool)}

    def _starts(self):
        return np.tile(self.start, (self.total, 1))

    def _judge(self, rows, after, v, a, u):
        """Rewards (n,), and who has arrived or fallen."""
        gap = self._place(self.sim.out[: len(rows), -2] if self.stale else after) - self.task[rows]
        gap = np.sqrt((gap**2).sum(1))  # (n,)
        self.near[rows] = gap < self.radius
        return -gap - 0.0005 * (u**2).sum(1), self.near[rows] | self._fallen(after)

    def _place(self, state):
        """p (n, 2)."""
        if self.name in ARMS:
            return fingertip(state[:, 1 : 1 + self.nq], *ARMS[self.name][1:])
        return state[:, 1:3]

    def _observe(self, state):
        """(n, O)."""
        q, v = state[:, 1 : 1 + self.nq], state[:, 1 + self.nq :]
        if self.name == "wheeled":  # wheel angles and speeds stay unseen
            return np.concatenate([q[:, :3], np.sin(q[:, 3:4]), np.cos(q[:, 3:4]), v[:, :4]], axis=1)
        if self.name == "small_ant":
            return state[:, 1:]
        return np.concatenate([np.cos(q), np.sin(q), v, self._place(state)], axis=1)

    def _fallen(self, state):
        return (state[:, 3] < 0.15) | (state[:, 3] > 0.45) if self.name == "small_ant" else False

    def sample_tasks(self, n, split="train"):
        """(n, 2) goals, all different up to n = 100."""
        goals = self.all_tasks(split)
        return goals[torch.cat([torch.randperm(NUM_GOALS) for _ in range(-(-n // NUM_GOALS))])[:n]]

    def render(self, row=0):
        """(240, 320, 3) uint8: one row and its goal (green), from above. See Bodies.render()."""
        if self.screen is None:
            self.screen = Screen(self.sim.model, 320, 240)
        self.sim.model.site_pos[0] = [*self.task[row], 0.1]
        return self.screen.draw(self.sim.model, self.state[row])
