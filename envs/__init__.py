"""
Batched worlds: the only code that the six scripts share.

    env = make("ipd", num_envs=64)

    env.num_envs B   env.horizon H   env.num_agents N   env.obs_dims[i]   env.action_dims[i]   env.discrete
    obs = env.reset(task=None)                                    obs[i]: (B, O_i) float32
    obs, reward, terminated, truncated, info = env.step(action)   action[i]: (B,) long, or (B, A_i) float32
                                                                  reward: (B, N) float32, flags: (B,) bool
    tasks = env.sample_tasks(n, split="train")                    meta worlds; "train" and "test" are disjoint
    env.reset(task, part=(first, total))                          meta worlds: rows shared among processes

`obs` and `action` are tuples over the agents, whose sizes may differ; a world with one agent drops the tuple.
There is no autoreset: all B episodes run to the horizon H together and start again at reset(). An early
`terminated` is a mask, not a reset, and is never mixed with `truncated`, which only says that time is up.
Bring your own world by returning any object with these members from a script's make_env().

Dynamics, rewards, observations and tasks live here. Networks, returns, normalisers and learning opponents
live in the scripts. A module is imported when one of its worlds is made: matrix games need only torch, numpy.
"""

from importlib import import_module

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
    "gather": ("battle", "Gather"),
}


def make(name, num_envs, **options):
    """The world `name` with `num_envs` copies side by side. Raises ValueError for an unknown name or a bad
    option."""
    if name not in WORLDS:
        raise ValueError(f"unknown env {name!r}; known: {', '.join(WORLDS)}")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    module, cls = WORLDS[name]
    return getattr(import_module(f".{module}", __package__), cls)(name, num_envs, **options)
