"""
Batched environments: the only code that the six scripts share.

    env = make("ipd", num_envs=64, horizon=150)

    every env   num_envs B, horizon H, num_agents N, obs_dims[i], action_dims[i], discrete, device
                obs = env.reset(task=None)                                obs[i]: (B, O_i) float32
                obs, reward, terminated, truncated, info = env.step(action)
                    action[i]: (B,) long where env.discrete, else (B, A_i) float32
                    reward: (B, N) float32; terminated, truncated: (B,) bool
    with tasks  splits, the names of its sets of tasks: "train" comes first, and "test" is among them
                sample_tasks(n, split="train") -> (n, D), from torch's global CPU stream; task_dim D
                reset(task), one a row, (B, D); reset() draws training tasks
                all_tasks(split) -> (K, D) where the set is finite
    perhaps     render(row) -> (height, width, 3) uint8;  close();  measures() -> {name: (B,)} at this step
                action_splits[i], sizes of the one-hot blocks of agent i's action; actions may then also be
                soft, (B, A_i) float32;  num_adversaries K: agents 0 .. K-1 play against the others

`obs` and `action` are tuples over the agents, whose sizes may differ; an env with one agent drops the tuple.
There is no autoreset: all B episodes run to the horizon H together and start again at reset(). An early
`terminated` is a mask, not a reset, and is never mixed with `truncated`, which only says that time is up.
The caller may change what an env returns. A bad option, task or action raises a ValueError of one line.

make(..., part=(rank, world)) makes one of `world` equal shares of a larger batch. Random numbers are drawn
for the whole batch and then cut, so that several processes play what one would. threads=n bounds MuJoCo's
pool.
In matrix games and half_cheetah_peers a task is the policies of the peers, and (D,) becomes their shape.

Bring your own env by returning any object with these members from a script's make_env(); envs/adapters.py
makes one of a PettingZoo or gymnasium env. Dynamics, rewards, observations and tasks live here. Networks,
returns, normalisers and learning opponents live in the scripts. A module is imported when one of its envs is
made: matrix games need only torch and numpy.
"""

from importlib import import_module
from inspect import signature

from .render import Camera as Camera

WORLDS = {  # name: (module, class)
    "ipd": ("matrix_games", "MatrixGame"),
    "rps": ("matrix_games", "MatrixGame"),
    "rps3": ("matrix_games", "MatrixGame"),
    "rps4": ("matrix_games", "MatrixGame"),
    "nav2d": ("navigation", "Navigation"),
    "half_cheetah_dir": ("mujoco", "HalfCheetah"),
    "half_cheetah_vel": ("mujoco", "HalfCheetah"),
    "ant_dir": ("mujoco", "Ant"),
    "ant_vel": ("mujoco", "Ant"),
    "ant_goal": ("mujoco", "Ant"),
    "simple": ("particle", "Simple"),
    "simple_spread": ("particle", "Spread"),
    "simple_tag": ("particle", "Tag"),
    "simple_adversary": ("particle", "Adversary"),
    "simple_push": ("particle", "Push"),
    "simple_speaker_listener": ("particle", "SpeakerListener"),
    "simple_reference": ("particle", "Reference"),
    "simple_crypto": ("particle", "Crypto"),
    "simple_world_comm": ("particle", "WorldComm"),
    "uav": ("pursuit", "Pursuit"),
    "wheeled": ("goal_robots", "GoalRobot"),
    "small_ant": ("goal_robots", "GoalRobot"),
    "reacher2": ("goal_robots", "GoalRobot"),
    "reacher4": ("goal_robots", "GoalRobot"),
    "spread": ("targets", "Spread"),
    "spread_large": ("targets", "Spread"),
    "hunting": ("targets", "Hunting"),
    "hunting_large": ("targets", "Hunting"),
    "cheetah_dir": ("multi_agent_mujoco", "CheetahDir"),
    "hopper_param": ("multi_agent_mujoco", "HopperParam"),
    "two_agent_half_cheetah": ("multi_agent_mujoco", "TwoAgentHalfCheetah"),
    "half_cheetah_peers": ("multi_agent_mujoco", "HalfCheetahPeers"),
    "rware": ("warehouse", "Warehouse"),
}


def make(name, num_envs, horizon=None, device="cpu", threads=1, part=(0, 1), **options):
    """`num_envs` copies of the env `name` side by side. horizon=None: its usual one. Other options: see its
    class. Raises ValueError for an option that the env does not take."""
    if name not in WORLDS:
        raise ValueError(f"unknown env {name!r}; known: {', '.join(WORLDS)}")
    module, cls = WORLDS[name]
    try:
        cls = getattr(import_module(f".{module}", __package__), cls)
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {error}") from None
    inits = [vars(c)["__init__"] for c in cls.__mro__[:-1] if "__init__" in vars(c)]
    known = {key for init in inits for key in signature(init).parameters}
    if unknown := options.keys() - known:
        raise ValueError(f"{name} has no option {', '.join(unknown)}")
    common = dict(horizon=horizon, device=device, threads=threads, part=part)
    return cls(name, num_envs, **common, **options)
