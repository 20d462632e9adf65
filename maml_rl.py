"""
MAML for reinforcement learning: a first policy from which one gradient step on a few episodes solves a task.

  Papers     Finn, Abbeel, Levine: Model-Agnostic Meta-Learning. ICML 2017, arXiv:1703.03400 (MAML).
             Li, Zhou, Chen, Li: Meta-SGD. arXiv:1707.09835.  Stadie et al.: E-MAML. arXiv:1803.01118.
             Gupta et al.: MAESN. NeurIPS 2018, arXiv:1802.07245.  Foerster et al.: DiCE. arXiv:1802.05098.
             Rothfuss et al.: ProMP. ICLR 2019, arXiv:1810.06784.  Schulman et al.: TRPO, arXiv:1502.05477.
  Problem    Tasks i ~ p(i) are MDPs that differ in the reward alone. Choose theta (and step sizes alpha) such
             that K policy-gradient steps on a few episodes of a new task lead to a high return.
  Algorithm  for each meta-iteration: draw M tasks; for all of them side by side, with phi_0 = theta:
               for k = 0 .. K-1:
                 D_k ~ phi_k: E episodes of H steps                                -> rollout()
                 b: linear feature baseline, fitted to the batch itself        (1) -> linear_baseline()
                 A: generalised advantages, normalised in each task            (2) -> gae()
                 L_in: loglik, ratio or dice                                   (3) -> inner_loss()
                 phi_{k+1} = phi_k - alpha * g_k,  g_k = dL_in/dphi_k          (4) -> adapt()
               V ~ phi_K: E more episodes, processed in the same way
             L = -mean_V [pi_{phi_K(theta)}(a|s) / pi_old(a|s) * A]            (5) -> surrogate()
             dL/dtheta: w <- w - H_k (alpha * w), k = K-1 .. 0, w = dL/dphi_K  (6) -> pull_back()
             TRPO: least L with KL(pi_old || pi_{phi_K(theta)}) <= delta       (7) -> gaussian_kl()
               F v = J' M J v, J = d(mean, log std on V)/d(theta, alpha)       (8) -> fisher_product()
               F x = dL/dtheta by conjugate gradients                          (9) -> conjugate_gradient()
               theta <- theta - r^j sqrt(2 delta / x'Fx) x, the first good j  (10) -> trpo_step()
             PPO and ProMP: Adam on the clipped L, (4) done anew each epoch   (11) -> ppo_update()
             Extra terms: E-MAML's score of D, ProMP's KL on D, MAESN's |z|^2 (12) -> outer_objective()
             --family fo-ppo: Adam on the clipped L, g_k as constants         (13) -> first_order_ppo()
  Symbols    theta  {name: (...)}       phi_k  (M, P), one row per task    alpha  step sizes, shaped as theta
             D_k, V  batches (M, H, E)  g_k    (M, P)                      z      latent (d,), input to pi
             M tasks, K inner steps, E episodes, H steps, O obs, A actions, P numbers in a policy.
  Methods    --method maml | meta-sgd (alpha learned) | maesn (only z adapts) | pretrained (K = 0 in training)
             --outer trpo | ppo | promp, --inner-grad, --first-order (FOMAML), --e-maml, --family fo-ppo
  Departures [D1] The curvature of (6) is a product with the inner Hessian, which is symmetric, and (8) uses
                  the same product: exact, and no third derivative is ever formed. The authors take finite
                  differences of the KL's gradient.
             [D2] --inner-grad ratio is the default. The MAML paper's loglik has the right first derivative
                  and a wrong second one; ratio lacks the terms across time only, dice none, but is noisy.
             [D3] All steps of a task weigh the same; steps after an early end weigh nothing.
             [D4] MAESN's latent is a variable with one start z_0 for all tasks, as in the code of TESP, not a
                  distribution for each training task.
             [D5] E-MAML's weight is the post-update return, centred and scaled over the iteration's tasks;
                  normalised advantages have mean 0 and would cancel.
             [D6] nav2d: an action is a displacement, tanh 64-64, inner step 0.1. The authors scale actions by
                  0.1 (second command below). Robots: an action of 1 is a tenth of full torque, gymnasium's
                  models, 0.05 s per step. Returns under other choices must not be compared.
  Run        python maml_rl.py --env nav2d                          # MAML, TRPO: 2 min on one core
             python maml_rl.py --env nav2d --action-scale 0.1 --inner-lr 0.5 --hidden 100 --activation relu
             python maml_rl.py --env nav2d --method meta-sgd        # step sizes learned
             python maml_rl.py --env nav2d --method maesn           # a latent learned and adapted
             python maml_rl.py --env nav2d --first-order            # FOMAML
             python maml_rl.py --env nav2d --e-maml                 # E-MAML
             python maml_rl.py --env nav2d --outer promp --total-steps 8000000        # 2 min on one core
             python maml_rl.py --env half_cheetah_dir --num-tasks 10 --horizon 100 --total-steps 2400000
             python maml_rl.py --env nav2d --method pretrained      # control: no adaptation in training
             python maml_rl.py --env half_cheetah_dir --total-steps 32000000          # 200 iterations, < 1 h
             python maml_rl.py --env half_cheetah_vel --num-tasks 40 --num-episodes 10
             python maml_rl.py --env wheeled --family fo-ppo --method meta-sgd        # TESP's baseline
             torchrun --nproc-per-node 2 maml_rl.py --env nav2d     # tasks shared out: the same result
             python maml_rl.py --evaluate runs/x/checkpoint.pt --capture-video   # table, figure or GIF
  Expect     nav2d, 40 held-out goals, return after 0, 1, 2, 3 inner steps: -35, -13, -10, -9.5 (three seeds);
             from a random start -185 to -70, by seed. After 20 iterations FOMAML
             -35, -23, -15, -15; pretrained -36, -32, -30, -27. Second command, 30 iterations:
             -35, -13, -7, -7 (the authors: -40, -12, -3, -3).
             half_cheetah_dir, 60 iterations of 10 tasks, H = 100, 2.5 min: 3, 78, 84, 86 (random: 0 to 1);
             at the defaults 376 iterations, an hour of one core: 84, 478, 494, 501; half_cheetah_vel in the
             same time: -101, -67, -50, -45 (random: -177). One seed each.
             torchrun: the same to rounding, which the chaos of long robot episodes magnifies.
  Licence    MIT. Please cite the papers above for the methods.
"""

import contextlib
import csv
import ctypes
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

# Threads that wait do not spin, large pages for torch, and no freed memory given back by glibc.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(Exception):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

import numpy as np
import torch
import tyro
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["nav2d", "half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_vel", "ant_goal", "wheeled",
              "small_ant", "reacher2", "reacher4"]  # the last four: TESP's robots

# What an argument left at None becomes, in this order: a value for all worlds, the world's, the family's or
# the method's.
COMMON = dict(num_tasks=20, num_episodes=20, inner_steps=1, inner_lr=0.1, gae_lambda=1.0, hidden=64,
              outer="trpo", epochs=5, clip_coef=0.3, outer_lr=1e-3, latent_coef=0.01, save_every=5)  # [D6]
NAV = dict(horizon=100, action_scale=1.0, iterations=60, eval_every=20, eval_episodes=40)
ROBOT = dict(horizon=200, action_scale=0.1, iterations=500, eval_every=50, eval_episodes=20)
PAPER = {env: NAV if env == "nav2d" else ROBOT for env in get_args(Env)}
PAPER |= {env: ROBOT | dict(action_scale=1.0) for env in get_args(Env)[-4:]}
FO_PPO = dict(num_episodes=25, inner_steps=3, inner_lr=1e-3, gae_lambda=0.97, hidden=256, outer="ppo",
              epochs=20, clip_coef=0.15, outer_lr=3e-4)  # Lan et al., IJCAI 2019, arXiv:1905.06527
MAESN = dict(inner_lr=1.0)


@dataclass
class Args:
    # --- experiment: the same in all six scripts
    env: Env = get_args(Env)[0]
    """which world to play"""
    seed: int = 1
    """seeds python, numpy, torch and the worlds"""
    device: str = "cpu"
    """torch device: cpu, cuda, cuda:1"""
    num_threads: Optional[int] = None
    """torch threads of each process; default: what was measured to be fastest"""
    total_steps: Optional[int] = None
    """training transitions, over all worlds, inner-loop ones included; default: the preset of the world"""
    eval_every: Optional[int] = None
    """evaluate each so many outer iterations; 0: only at the end"""
    eval_episodes: Optional[int] = None
    """episodes of each task in an evaluation; default: as many as in training"""
    save_every: Optional[int] = None
    """write checkpoint.pt each so many outer iterations (and at the end, and on Ctrl-C)"""
    run_dir: Optional[str] = None
    """where to write; default runs/<env>__<script>__<seed>__<time>"""
    resume: Optional[str] = None
    """a checkpoint.pt to go on from bit by bit, in its folder, with its arguments unless others are given"""
    evaluate: Optional[str] = None
    """a checkpoint.pt to evaluate: prints the table, writes eval.json beside it, exits"""
    capture_video: bool = False
    """with --evaluate: also write a GIF (2-D worlds, MuJoCo) or a text table of the play (matrix games)"""
    track: bool = False
    """also log to Weights & Biases (needs wandb)"""
    # --- algorithm
    family: Literal["maml", "fo-ppo"] = "maml"
    """maml: eqs. (4)-(12); fo-ppo: eq. (13), the first-order algorithm that TESP is compared with, with its
    network and its unnormalised advantages"""
    method: Literal["maml", "meta-sgd", "maesn", "pretrained"] = "maml"
    """what adapts: the policy; the policy with learned step sizes; a latent with learned step sizes; nothing
    in training (the control: one policy for all tasks)"""
    outer: Optional[Literal["trpo", "ppo", "promp"]] = None
    """the outer step, eqs. (7)-(10) or (11); promp also adds its KL on D, eq. (12); default: trpo"""
    inner_grad: Literal["loglik", "ratio", "dice"] = "ratio"
    """the inner loss, eq. (3)"""
    first_order: bool = False
    """FOMAML: leave the inner Hessian out of eq. (6)"""
    e_maml: bool = False
    """count how theta's own sampling explores, eq. (12)"""
    inner_steps: Optional[int] = None
    """K, inner steps in training"""
    num_tasks: Optional[int] = None
    """M, tasks in a meta-iteration, over all processes"""
    num_episodes: Optional[int] = None
    """E, episodes in a batch of a task"""
    horizon: Optional[int] = None
    """H, steps in an episode"""
    action_scale: Optional[float] = None
    """what a policy action of 1 does: a displacement in nav2d, a share of full torque in the robots"""
    gamma: float = 0.99
    """discount, in [0, 1], eqs. (1) and (2)"""
    gae_lambda: Optional[float] = None
    """lambda of eq. (2)"""
    inner_lr: Optional[float] = None
    """alpha of eq. (4), or its first value where it is learned"""
    later_lr: float = 0.5
    """in evaluation, the factor on alpha in steps beyond those of training"""
    hidden: Optional[int] = None
    """units in each of the two hidden layers"""
    activation: Literal["tanh", "relu"] = "tanh"
    """of the hidden layers; the MAML paper: relu, --hidden 100"""
    latent_dim: int = 8
    """d, numbers in MAESN's latent z"""
    latent_coef: Optional[float] = None
    """weight of mean z^2 of the adapted latent, eq. (12)"""
    delta: float = 0.01
    """bound on the mean KL of an outer step in nats, eq. (7)"""
    cg_iters: int = 10
    """conjugate-gradient iterations, eq. (9)"""
    damping: float = 1e-5
    """added to the diagonal of F, eq. (9)"""
    epochs: Optional[int] = None
    """passes over the batches in eqs. (11) and (13)"""
    clip_coef: Optional[float] = None
    """ratios are clipped to 1 -+ this in eqs. (11) and (13)"""
    outer_lr: Optional[float] = None
    """Adam's step size in eqs. (11) and (13)"""
    kl_coef: float = 5e-4
    """weight of ProMP's KL on D, eq. (12)"""
    eval_tasks: int = 40
    """held-out tasks in an evaluation, the same in all of them"""
    eval_steps: int = 3
    """inner steps in an evaluation"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    if args.env not in PAPER:
        fail(f"--env must be one of {', '.join(PAPER)}, not {args.env}: it needs a world with tasks")
    if args.family == "fo-ppo" and (args.outer in ("trpo", "promp") or args.e_maml):
        fail("--family fo-ppo has an outer step of its own: without --outer and --e-maml")
    if args.outer == "promp" and args.inner_grad != "ratio":
        fail(f"--outer promp needs --inner-grad ratio, not {args.inner_grad}")
    preset = COMMON | PAPER[args.env] | (MAESN if args.method == "maesn" else {})
    preset |= dict(num_threads=2 if WORLD == 1 else 1)  # they wait asleep: no loss when busy
    preset |= FO_PPO if args.family == "fo-ppo" else {}
    iterations = preset.pop("iterations")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.total_steps is None:
        args.total_steps = iterations * steps_per_iteration(args)
    for name in ("num_tasks", "num_episodes", "horizon", "inner_steps", "hidden", "latent_dim", "epochs",
                 "eval_tasks", "eval_steps", "cg_iters", "num_threads", "save_every", "eval_episodes",
                 "total_steps"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}")
    for name in ("delta", "outer_lr", "clip_coef", "action_scale"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.num_tasks % WORLD:
        fail(f"--num-tasks {args.num_tasks} does not divide among {WORLD} processes")
    return args


def train_steps(args):
    """Inner steps in training: K, or none for the control that never adapts."""
    return 0 if args.method == "pretrained" else args.inner_steps


def steps_per_iteration(args):
    return args.num_tasks * args.num_episodes * args.horizon * (train_steps(args) + 1)


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own world by returning an object with these members:
    #   num_envs B, horizon, obs_dims, action_dims, device
    #   reset(task) -> obs (B, O), one task a row;  sample_tasks(n, split) -> (n, task_dim)
    #   (under torchrun also reset(task, part=(first, total)): which rows these are of those of all processes)
    #   step(action (B, A)) -> obs, reward (B, 1), terminated (B,), truncated (B,), info
    try:
        env = envs.make(args.env, num_envs, horizon=args.horizon, device=args.device,
                        action_scale=args.action_scale)
    except ValueError as e:
        fail(e)
    if not hasattr(env, "sample_tasks"):
        fail(f"--env {args.env} is a world without tasks: sample_tasks is missing")
    return env


# ================================================================ 2. Networks
# A policy is a dict {name: tensor}; the policies of M tasks are one dict with the tasks in front, and a layer
# is one batched product for all tasks and rows. For the algebra of learning (section 5) the same numbers are
# a vector of length P: flatten and unflatten go between the two without changing anything.
LOG_STD_MIN = math.log(1e-6)


class Net(NamedTuple):
    shapes: dict  # {name: shape} in the order of the flat vector
    activation: str

    @property
    def size(self):
        return sum(math.prod(shape) for shape in self.shapes.values())  # P


def flatten(p, shapes):
    """{name: (..., *shape)} -> (..., P)."""
    return torch.cat([p[k].flatten(p[k].dim() - len(shape)) for k, shape in shapes.items()], -1)


def unflatten(x, shapes):
    """(..., P) -> {name: (..., *shape)}, views."""
    parts = x.split([math.prod(shape) for shape in shapes.values()], -1)
    return {k: part.unflatten(-1, shape) for (k, shape), part in zip(shapes.items(), parts)}


def make_policy(obs_dim, action_dim, hidden, latent_dim=0, family="maml"):
    """{name: tensor} of O (+ d) -> hidden -> hidden -> mean. Family maml: Xavier-uniform weights and a free
    vector log_std. fo-ppo: columns of norm 1 (0.01 in the last layer) and twice as many outputs, of which the
    second half is log_std. `latent_dim` > 0 adds z, a random direction of norm 0.01."""
    own_std = family == "maml"
    sizes = [obs_dim + latent_dim, hidden, hidden, action_dim * (1 if own_std else 2)]
    p = {}
    for l, (n, m) in enumerate(zip(sizes, sizes[1:])):
        if own_std:
            w = (2 * torch.rand(n, m) - 1) * math.sqrt(6 / (n + m))
        else:
            w = torch.randn(n, m)
            w = w / w.norm(dim=0) * (0.01 if l == 2 else 1.0)
        p[f"w{l}"], p[f"b{l}"] = w, torch.zeros(m)
    if own_std:
        p["log_std"] = torch.zeros(action_dim)
    if latent_dim:
        z = torch.randn(latent_dim)
        p["z"] = 0.01 * z / z.norm()  # [D4]
    return p


def policy(p, obs, activation="tanh"):
    """The Gaussian of M policies, {name: (M, ...)}, at obs (M, ..., O): mean and log_std, (M, ..., A)."""
    act = torch.tanh if activation == "tanh" else torch.relu
    x, last = obs.flatten(1, -2), max(int(k[1:]) for k in p if k[0] == "w")  # (M, R, O)
    for l in range(last + 1):
        w, b = p[f"w{l}"], p[f"b{l}"][:, None]
        if l == 0 and "z" in p:  # the latent is the same for all rows: a part of the bias
            w, wz = w.split([obs.shape[-1], w.shape[1] - obs.shape[-1]], 1)
            b = b + p["z"][:, None] @ wz
        x = torch.baddbmm(b, x, w)
        x = act(x) if l < last else x
    x = x.unflatten(1, obs.shape[1:-1])
    if "log_std" in p:
        mean, log_std = x, p["log_std"].view(len(x), *[1] * (x.dim() - 2), -1).expand_as(x)
    else:
        mean, log_std = x.chunk(2, -1)
    return mean, log_std.clamp(min=LOG_STD_MIN)


# ================================================================ 3. Rollout
# All tasks and episodes are played as one batch of B = M E rows; row r belongs to task r // E. No graph is
# recorded while playing: what is differentiated is computed anew from (obs, action), in one piece.
class Play(NamedTuple):
    obs: torch.Tensor  # (M, H, E, O)
    action: torch.Tensor  # (M, H, E, A)
    reward: torch.Tensor  # (M, H, E), 0 after an early end
    mask: torch.Tensor  # (M, H, E), 1 up to and with the last step of the episode, 0 after it
    diverged: float  # rows that the simulator had to end


@torch.no_grad()
def rollout(env, net, phi, tasks, part=None, frames=None):
    """Play one batch with policies phi (M, P) on tasks (M, D). part: (first, total), which of all tasks these
    are when processes share them. frames: a list that receives a picture of row 0 at every step."""
    M, E, A = len(tasks), env.num_envs // len(tasks), env.action_dims[0]
    first, total = part or (0, M)
    p, steps = unflatten(phi, net.shapes), []
    # Every process draws the noise of all tasks and keeps its own: a task does not depend on who plays it.
    noise = torch.randn(env.horizon, total, E, A, device=env.device)[:, first : first + M].to(phi.dtype)
    # The world does the same with the noise of its starts.
    rows = {} if total == M else dict(part=(first * E, total * E))
    obs = env.reset(tasks.repeat_interleave(E, 0), **rows)
    alive = torch.ones(M, E, device=env.device, dtype=phi.dtype)
    for t in range(env.horizon):
        x = obs.to(phi.dtype).view(M, E, -1)
        mean, log_std = policy(p, x, net.activation)
        action = mean + log_std.exp() * noise[t]
        obs, reward, terminated, _, info = env.step(action.flatten(0, 1).float())
        steps.append((x, action, reward.view(M, E).to(phi.dtype) * alive, alive))
        alive = alive * ~terminated.view(M, E)
        if frames is not None:
            frames.append(env.render(0))
    diverged = info["diverged"].sum().item() if "diverged" in info else 0.0
    return Play(*(torch.stack(x, 1) for x in zip(*steps)), diverged)


# ================================================================ 4. Objectives
# Pure functions of tensors, for each task: (M, H, E) in, time in dimension 1, and (M,) out. `weight` is that
# of each step in its task's mean: 1 / (number of valid steps), or 0 after an early end [D3].
def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension 1."""
    out, acc = torch.empty_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        acc = reward[:, t] + gamma * acc
        out[:, t] = acc
    return out


def linear_baseline(obs, target, mask, ridge=1e-5):
    """eq. (1): ridge regression of target (M, H, E) on [o, o^2, t, t^2, t^3, 1], t in hundreds of steps and o
    (M, H, E, O) clipped to +-10, for each task -> its values (M, H, E), 0 outside of mask. In float64, by a
    solver that stands singular features: a world that never moves has them."""
    M, H, E = target.shape
    o = obs.double().clamp(-10, 10)
    t = (torch.arange(H, device=obs.device, dtype=torch.float64) / 100).view(1, H, 1, 1).expand(M, H, E, 1)
    x = torch.cat([o, o * o, t, t**2, t**3, torch.ones_like(t)], -1) * mask[..., None].double()
    x, y = x.flatten(1, 2), target.double().flatten(1, 2)[..., None]  # (M, HE, 2O+4), (M, HE, 1)
    gram, moment = (x.mT @ x).cpu(), (x.mT @ y).cpu()
    eye = torch.eye(x.shape[-1], dtype=torch.float64)
    w = torch.full_like(moment, math.nan)
    for attempt in range(5 if gram.isfinite().all() and moment.isfinite().all() else 0):
        w = torch.linalg.lstsq(gram + ridge * 10**attempt * eye, moment, driver="gelsd").solution
        if w.isfinite().all():
            break
    return (x @ w.to(x.device)).view(M, H, E).to(target.dtype)


def gae(reward, value, mask, gamma, gae_lambda):
    """eq. (2): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t; v = 0 after the
    last step, the time limit's too: the baseline knows the time. All (M, H, E)."""
    assert reward.shape == value.shape == mask.shape
    value = value * mask
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return returns_to_go((reward + gamma * next_value - value) * mask, gamma * gae_lambda)


def normalize(adv, mask):
    """Mean 0 and standard deviation 1 over the valid steps of each task, (M, H, E)."""
    n = mask.sum((1, 2), keepdim=True)
    adv = (adv - (adv * mask).sum((1, 2), keepdim=True) / n) * mask
    return adv / ((adv**2).sum((1, 2), keepdim=True) / n + 1e-16).sqrt()


def log_prob(mean, log_std, action):
    """log N(action; mean, std), summed over the last dimension: (..., A) -> (...)."""
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_0, log_std_0, mean_1, log_std_1):
    """eq. (7): KL(N_0 || N_1), summed over the last dimension: (..., A) -> (...)."""
    ratio = ((mean_0 - mean_1) ** 2 + (2 * log_std_0).exp()) * (-2 * log_std_1).exp()
    return (log_std_1 - log_std_0 + 0.5 * (ratio - 1)).sum(-1)


def box(z):
    """DiCE's magic box: value 1, derivative that of z."""
    return torch.exp(z - z.detach())


def inner_loss(logprob, old_logprob, adv, weight, kind="ratio"):
    """eq. (3): -mean w_t A_t -> (M,). The gradient at the sampling policy is the same for the three kinds of
    w_t; only the second derivatives differ [D2]."""
    assert logprob.shape == adv.shape == weight.shape
    if kind == "loglik":
        w = logprob
    elif kind == "ratio":
        w = torch.exp(logprob - old_logprob)
    else:  # box(c_t) - box(c_{t-1}), c the sum of log-probabilities so far: the score of one step alone
        c = box(logprob.cumsum(1))
        w = c - torch.cat([torch.ones_like(c[:, :1]), c[:, :-1]], 1)
    return -(weight * w * adv).sum((1, 2))


def surrogate(logprob, old_logprob, adv, weight, clip_coef=None):
    """eq. (5): -mean ratio A -> (M,); with clip_coef the pessimistic clipped form of PPO, eqs. (11) and
    (13)."""
    assert logprob.shape == old_logprob.shape == adv.shape == weight.shape
    ratio = torch.exp(logprob - old_logprob)
    gain = ratio * adv
    if clip_coef is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv)
    return -(weight * gain).sum((1, 2))


def exploration_score(logprob, old_logprob, weight, score):
    """E-MAML's part of eq. (12): -score_i mean_t log pi_theta(a_t|s_t) over D -> (M,). score (M,) says how
    well what was sampled served the update. Old log-probabilities make it 0 where they were sampled."""
    return -score * (weight * (logprob - old_logprob)).sum((1, 2))


# ================================================================ 5. Update
# An inner step is a map of flat vectors, phi' = phi - alpha * g(phi), whose derivatives are known in closed
# form: dphi'/dphi = I - diag(alpha) H, with H the inner Hessian, and dphi'/dalpha = -diag(g). H is symmetric.
# So one tool, H times a vector, carries gradients back from phi_K to theta (pull_back) and changes of theta
# forward to phi_K (push_forward) [D1], and first order is to leave H out. Each phi_k is a leaf of autograd
# and each g_k keeps its graph, which H_k v walks once.
INNER_CLIP, ALPHA_BOUND = 60.0, 0.1  # fo-ppo: largest norm of a task's inner gradient, and of a step size


class Batch(NamedTuple):
    obs: torch.Tensor  # (M, H, E, O)
    action: torch.Tensor  # (M, H, E, A)
    reward: torch.Tensor  # (M, H, E)
    weight: torch.Tensor  # (M, H, E)
    adv: torch.Tensor  # (M, H, E)
    mean: torch.Tensor  # (M, H, E, A) of the policy that acted, as are the next two
    log_std: torch.Tensor  # (M, H, E, A)
    logprob: torch.Tensor  # (M, H, E)
    diverged: float


class Chain(NamedTuple):
    phis: list  # phi_0 .. phi_K, (M, P) leaves
    grads: list  # g_0 .. g_{K-1}, (M, P), with their graphs if second order
    batches: list  # D_0 .. D_{K-1}, V


def distribution(net, phi, batch):
    """mean, log_std (M, H, E, A) and the log-probability (M, H, E) of the actions taken, under phi (M, P)."""
    mean, log_std = policy(unflatten(phi, net.shapes), batch.obs, net.activation)
    return mean, log_std, log_prob(mean, log_std, batch.action)


@torch.no_grad()
def process(net, phi, play, args):
    """Play -> Batch: eqs. (1) and (2), and the policy that acted."""
    value = linear_baseline(play.obs, returns_to_go(play.reward, args.gamma), play.mask)
    adv = gae(play.reward, value, play.mask, args.gamma, args.gae_lambda)
    if args.family == "maml":
        adv = normalize(adv, play.mask)
    weight = play.mask / play.mask.sum((1, 2), keepdim=True)  # [D3]
    old = distribution(net, phi, play)
    return Batch(play.obs, play.action, play.reward, weight, adv, *old, play.diverged)


def inner_gradient(net, phi, batch, args, create_graph):
    """g = dL_in/dphi, eq. (3), (M, P): the tasks' losses are summed, and each row of phi sees its own."""
    *_, logprob = distribution(net, phi, batch)
    loss = inner_loss(logprob, batch.logprob, batch.adv, batch.weight, args.inner_grad)
    g = torch.autograd.grad(loss.sum(), phi, create_graph=create_graph)[0]
    if args.family == "fo-ppo":
        g = g * (INNER_CLIP / (g.norm(dim=1, keepdim=True) + 1e-12)).clamp(max=1)
    return g


def adapt(net, x, source, num_steps, args, second_order=False):
    """eq. (4), K = num_steps times from x = [theta, alpha] (M, 2P). source(k, phi) gives the k-th batch: it
    plays a new one, or hands out a stored one. Returns the Chain."""
    phi, alpha = x.detach().chunk(2, -1)
    if args.family == "fo-ppo":
        alpha = alpha.clamp(-ALPHA_BOUND, ALPHA_BOUND)
    chain = Chain([], [], [])
    for k in range(num_steps + 1):
        phi = phi.detach().clone().requires_grad_()
        chain.phis.append(phi)
        chain.batches.append(source(k, phi.detach()))
        if k < num_steps:
            with torch.enable_grad():
                g = inner_gradient(net, phi, chain.batches[k], args, second_order)
            chain.grads.append(g)
            later = args.later_lr if k >= args.inner_steps else 1.0
            phi = phi - later * alpha * g
    return chain


def hessian_product(chain, k, v):
    """H_k v, (M, P): the inner Hessian of each task at phi_k times a vector."""
    return torch.autograd.grad(chain.grads[k], chain.phis[k], v, retain_graph=True)[0]


def pull_back(chain, cotangents, alpha, first_order=False):
    """eq. (6): from dL/dphi_k (M, P) for k = 0..K, each through its own batch alone, to dL/d[theta, alpha]
    (M, 2P) through all inner steps."""
    w, d_alpha = cotangents[-1], torch.zeros_like(cotangents[-1])
    for k in reversed(range(len(chain.grads))):
        d_alpha = d_alpha - chain.grads[k].detach() * w
        if not first_order:
            w = w - hessian_product(chain, k, alpha * w)
        w = w + cotangents[k]
    return torch.cat([w, d_alpha], -1)


def push_forward(chain, tangent, alpha, first_order=False):
    """The transpose of eq. (6): a change of [theta, alpha] (M, 2P) -> the change of phi_K (M, P)."""
    v, v_alpha = tangent.chunk(2, -1)
    for k in range(len(chain.grads)):
        if not first_order:
            v = v - alpha * hessian_product(chain, k, v)
        v = v - v_alpha * chain.grads[k].detach()
    return v


def outer_objective(net, chain, scores, args):
    """eqs. (5) and (12): the outer loss (M,), and KL(pi_old || pi) on V (M,)."""
    V, K = chain.batches[-1], len(chain.grads)
    mean, log_std, logprob = distribution(net, chain.phis[-1], V)
    loss = surrogate(logprob, V.logprob, V.adv, V.weight, None if args.outer == "trpo" else args.clip_coef)
    kl = (V.weight * gaussian_kl(V.mean, V.log_std, mean, log_std)).sum((1, 2))
    if args.e_maml or args.outer == "promp":
        for phi, D in zip(chain.phis, chain.batches[:-1]):
            mean, log_std, logprob = distribution(net, phi, D)
            if args.e_maml:
                loss = loss + exploration_score(logprob, D.logprob, D.weight, scores)
            if args.outer == "promp":
                moved = gaussian_kl(D.mean, D.log_std, mean, log_std)
                loss = loss + args.kl_coef / K * (D.weight * moved).sum((1, 2))
    if args.method == "maesn":
        loss = loss + args.latent_coef * (unflatten(chain.phis[-1], net.shapes)["z"] ** 2).mean(1)
    return loss, kl


def meta_gradient(net, chain, x, scores, args):
    """The mean over all tasks of the loss, the KL, and dL/d[theta, alpha] (2P,), eq. (6)."""
    loss, kl = outer_objective(net, chain, scores, args)
    w = torch.autograd.grad(loss.sum(), chain.phis, materialize_grads=True)
    g = pull_back(chain, w, x[len(x) // 2 :], args.first_order)
    return mean_over_tasks(torch.cat([loss[:, None], kl[:, None], g], 1).detach()).tensor_split([1, 2])


def mean_over_tasks(rows):
    """(M / processes, ...) -> the mean over the rows of all processes."""
    return gather(rows).mean(0)


def fisher_product(net, chain, alpha, first_order=False):
    """eq. (8) as a function v -> F v, (2P,) -> (2P,). KL and its gradient vanish at pi_old. So its Hessian is
    J' M J exactly, with M that of KL by (mean, log std): diag(1 / std^2, 2)."""
    phi, V = chain.phis[-1], chain.batches[-1]
    mean, log_std, _ = distribution(net, phi, V)
    out = torch.cat([mean, log_std], -1)  # (M, H, E, 2A)
    metric = V.weight[..., None] * torch.cat([(-2 * log_std).exp(), torch.full_like(log_std, 2)], -1).detach()
    # out' u is linear in the dummy u, so the derivative of its gradient by u is J: a forward derivative
    u = torch.zeros_like(out, requires_grad=True)
    transposed = torch.autograd.grad(out, phi, u, create_graph=True)[0]

    def product(v):
        v = push_forward(chain, v.expand(len(phi), -1), alpha, first_order)
        jv = torch.autograd.grad(transposed, u, v, retain_graph=True)[0]
        w = torch.autograd.grad(out, phi, metric * jv, retain_graph=True)[0]
        zeros = [torch.zeros_like(w)] * len(chain.grads)
        return mean_over_tasks(pull_back(chain, [*zeros, w], alpha, first_order))

    return product


def conjugate_gradient(product, g, iters, tolerance=1e-10):
    """eq. (9): x with product(x) = g, and the residual g - product(x), which comes for free. All (n,)."""
    x, r = torch.zeros_like(g), g.clone()
    p, rr = r, r @ r
    for _ in range(iters):
        if rr < tolerance:
            break
        z = product(p)
        step = rr / (p @ z)
        x, r = x + step * p, r - step * z
        p, rr = r + (r @ r) / rr * p, r @ r
    return x, r


def trpo_step(x, loss, g, product, trial, delta, cg_iters=10, damping=1e-5, backtrack=0.8, trials=15):
    """eq. (10): the first x - backtrack^j s, j = 0..trials-1, with a lower loss and KL <= delta; x itself if
    there is none. trial(x) -> loss, KL. Returns the new x, its loss, its KL, and j."""
    d, residual = conjugate_gradient(lambda v: product(v) + damping * v, g, cg_iters)
    curvature = d @ (g - residual)  # d' (F + damping) d
    step = (2 * delta / curvature.clamp(min=1e-30)).sqrt() * d
    for j in range(trials):
        new = x - backtrack**j * step
        new_loss, kl = trial(new)
        if new_loss < loss and kl <= delta:
            return new, new_loss, kl, j
    return x, loss, torch.zeros_like(loss), trials


def trpo_update(net, chain, x, mask, scores, args):
    """The outer step of eqs. (5)-(10); `mask` (2P,) is 1 where x is learned. Changes x in place."""
    loss, _, g = meta_gradient(net, chain, x, scores, args)
    alpha = x[len(x) // 2 :]
    fisher = fisher_product(net, chain, alpha, args.first_order)

    def trial(new):
        again = adapt(net, new.expand(len(chain.phis[0]), -1), lambda k, _: chain.batches[k],
                      len(chain.grads), args)
        with torch.no_grad():
            return mean_over_tasks(torch.stack(outer_objective(net, again, scores, args), 1))

    g = g * mask
    new, new_loss, kl, backtracks = trpo_step(x, loss[0], g, lambda v: fisher(v * mask) * mask, trial,
                                              args.delta, args.cg_iters, args.damping)
    x.copy_(new)
    return {"losses/outer": new_loss, "losses/kl": kl, "losses/backtracks": backtracks,
            "grad/norm_outer": g.norm()}


def ppo_update(net, chain, x, mask, scores, optimizer, args):
    """eq. (11): `epochs` steps of Adam on the clipped loss. The batches stay; the inner steps are taken anew
    from where x has come to. Changes x in place."""
    for epoch in range(args.epochs):
        if epoch:
            chain = adapt(net, x.expand(len(chain.phis[0]), -1), lambda k, _, c=chain: c.batches[k],
                          len(chain.grads), args, not args.first_order)
        loss, kl, g = meta_gradient(net, chain, x, scores, args)
        x.grad = g * mask
        optimizer.step()
    return {"losses/outer": loss, "losses/kl": kl, "grad/norm_outer": x.grad.norm()}


def first_order_ppo(net, chain, x, mask, optimizer, args):
    """eq. (13): phi_K = theta - clip(alpha) * G with G = sum_k g_k held fixed, clipped loss, Adam. Of all x
    that were evaluated, the one with the lowest loss and a KL within delta is kept; Adam's moments go on."""
    total, V = sum(chain.grads, torch.zeros_like(chain.phis[0])), chain.batches[-1]
    best, best_loss, best_kl = x.clone(), math.inf, 0.0
    for n in range(args.epochs):
        leaf = x.detach().expand(len(total), -1).clone().requires_grad_()  # (M, 2P)
        theta, alpha = leaf.chunk(2, -1)
        phi = theta - alpha.clamp(-ALPHA_BOUND, ALPHA_BOUND) * total
        mean, log_std, logprob = distribution(net, phi, V)
        loss = surrogate(logprob, V.logprob, V.adv, V.weight, args.clip_coef)
        kl = (V.weight * gaussian_kl(V.mean, V.log_std, mean, log_std)).sum((1, 2))
        penalty = 0.0
        if args.method == "maesn":
            penalty = args.latent_coef * (unflatten(phi, net.shapes)["z"] ** 2).mean(1)
        g = torch.autograd.grad((loss + penalty).sum(), leaf)[0]
        rows = torch.cat([loss[:, None], kl[:, None], g], 1).detach()
        loss, kl, g = mean_over_tasks(rows).tensor_split([1, 2])
        if n == 0:
            norm = (g * mask).norm()
        if kl < args.delta and loss < best_loss:
            best, best_loss, best_kl = x.clone(), loss, kl
        if n < args.epochs - 1:
            x.grad = g * mask
            optimizer.step()
    x.copy_(best)
    return {"losses/outer": best_loss, "losses/kl": best_kl, "grad/norm_outer": norm}


def meta_update(env, net, x, mask, optimizer, args):
    """One meta-iteration, the algorithm box; x = [theta, alpha] (2P,) changes in place. Returns {tag: value}
    and the mean return of an episode after 0..K inner steps, (K+1,)."""
    M, first = args.num_tasks // WORLD, RANK * args.num_tasks // WORLD
    tasks, K = env.sample_tasks(args.num_tasks)[first : first + M], train_steps(args)

    def source(k, phi):
        return process(net, phi, rollout(env, net, phi, tasks, (first, args.num_tasks)), args)

    second_order = args.family == "maml" and not args.first_order
    chain = adapt(net, x.expand(M, -1), source, K, args, second_order)
    returns = gather(torch.stack([b.reward.sum(1).mean(1) for b in chain.batches], 1))  # (all M, K+1)
    spread = returns[:, -1].std(correction=0) + 1e-8
    scores = ((returns[:, -1] - returns[:, -1].mean()) / spread)[first : first + M]  # [D5]
    if args.family == "fo-ppo":
        logs = first_order_ppo(net, chain, x, mask, optimizer, args)
    elif args.outer == "trpo":
        logs = trpo_update(net, chain, x, mask, scores, args)
    else:
        logs = ppo_update(net, chain, x, mask, scores, optimizer, args)
    bad = torch.tensor([float(sum(b.diverged for b in chain.batches))])
    return logs | {"charts/diverged": gather(bad).sum()}, returns.mean(0)


# ================================================================ 6. Evaluation
# Meta-test: held-out tasks, the same in every evaluation and for every seed; inner steps without derivatives
# through them; beyond the steps of training alpha shrinks (later_lr), as in the MAML authors' code. Own world
# and own random stream: how often one evaluates does not change what is learned.
TEST_SEED = 1


def evaluate(args, net, x, num_tasks=None, frames=None):
    """Adapt x (2P,) to the test tasks: mean returns (n, steps+1), the tasks (n, D), and the batches."""
    n, steps = num_tasks or args.eval_tasks, args.eval_steps
    with torch.random.fork_rng():
        torch.manual_seed(TEST_SEED)
        env = make_env(args, n * args.eval_episodes)
        tasks = env.sample_tasks(args.eval_tasks, split="test")[:n]
        torch.manual_seed(args.seed + 10_000)

        def source(k, phi):
            pictures = frames.setdefault(k, []) if frames is not None and k < 2 else None
            return process(net, phi, rollout(env, net, phi, tasks, frames=pictures), args)

        batches = adapt(net, x.expand(n, -1), source, steps, args).batches
    return torch.stack([b.reward.sum(1).mean(1) for b in batches], 1), tasks, batches


def evaluate_all(args, net, x):
    """{row: returns (n, steps+1)}: what was learned, and the control, the run's own random start."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        start = build(args, make_env(args, 1))[1]
    return {"eval": evaluate(args, net, x)[0], "eval/random": evaluate(args, net, start)[0]}


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(results):
    """{tag: value} of {row: returns (n, steps+1)}."""
    flat = {}
    for name, returns in results.items():
        for k, (mean, half) in enumerate(zip(returns.mean(0).tolist(), interval(returns).tolist())):
            flat |= {f"{name}/return_{k}": mean, f"{name}/return_{k}_ci95": half}
    return flat


def table(results, args):
    """The adaptation table: return of an episode before and after each inner step."""
    row = lambda name, values: f"{name:24s}" + "".join(f"{v:>10s}" for v in values)
    number = lambda values: [f"{v:.1f}" for v in values.tolist()]
    lines = [f"{args.env}: return on {args.eval_tasks} held-out tasks after 0..{args.eval_steps} inner "
             "steps, ± 95 % interval", row("", [f"{k} steps" for k in range(args.eval_steps + 1)])]
    for name, label in ("eval", args.method), ("eval/random", "random start"):
        lines += [row(label, number(results[name].mean(0))), row("  ±", number(interval(results[name])))]
    return "\n".join(lines)


def capture(args, net, x, folder):
    """--capture-video: paths.png, the paths to six held-out goals, one episode (thin) and the mean of all, in
    nav2d; before_after.gif, one held-out task before and after an inner step, side by side, for robots."""
    if args.env == "nav2d":
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        _, tasks, batches = evaluate(args, net, x, num_tasks=6)
        figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained")
        for i, ax in enumerate(axes.flat):
            for k, colour in zip(range(args.eval_steps + 1), ["0.6", "C0", "C1", "C2"]):
                paths = batches[k].obs[i].cpu()  # (H, E, 2)
                ax.plot(*paths[:, 0].T, color=colour, lw=0.5, alpha=0.5)
                ax.plot(*paths.mean(1).T, color=colour, lw=2.5, label=f"{k} steps")
            ax.plot(*tasks[i].cpu(), "k*", ms=12)
            ax.set(xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), aspect="equal")
        axes[0, 0].legend(fontsize=8)
        figure.savefig(folder / "paths.png", dpi=100)
        return folder / "paths.png"
    from PIL import Image, ImageDraw

    frames = {}
    try:
        evaluate(args, net, x, num_tasks=1, frames=frames)
    except RuntimeError as e:
        fail(e)
    pictures = []
    for pair in list(zip(frames[0], frames[1]))[::2]:
        picture = Image.fromarray(np.concatenate(pair, 1))
        for left, text in (10, "before"), (picture.width // 2 + 10, "after one inner step"):
            ImageDraw.Draw(picture).text((left, 10), text, "white", font_size=20)
        pictures.append(picture.reduce(2).quantize(48, Image.Quantize.FASTOCTREE))
    pictures[0].save(folder / "before_after.gif", save_all=True, append_images=pictures[1:], duration=100,
                     loop=0)
    return folder / "before_after.gif"


# ================================================================ 7. Logging and checkpoints
# The same text in all six scripts. A run folder holds args.json, metrics.csv, TensorBoard events,
# checkpoint.pt and eval.json. Under torchrun every process computes and only the first one (RANK 0) writes.
SCRIPT = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fail(message, code=2):
    """One line on stderr, then the end. Code 2: bad input; 1: the run itself went wrong."""
    if RANK == 0:
        print(f"{SCRIPT}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def cli(args_class, doc):
    """The command line as Args. --resume and --evaluate start from the arguments stored in the checkpoint."""

    def parse(default=None):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                return tyro.cli(args_class, description=doc, default=default)
        except SystemExit as e:
            if not e.code:  # --help
                raise
            fail(re.sub(r"╭.*|[^ -~]|-{5,}", " ", errors.getvalue()))  # the text in tyro's box, as one line

    args = parse()
    if path := args.resume or args.evaluate:
        stored = load(path)["args"] | {"run_dir": str(Path(path).parent)}
        try:
            args = parse(args_class(**stored))
        except TypeError:
            fail(f"{path} was written by another version of {SCRIPT}.py")
    return args


def set_up(args):
    """Seeds, threads and, under torchrun, the process group."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    try:
        torch.zeros(1, device=args.device)
    except Exception as e:
        fail(f"--device {args.device} cannot be used here: {str(e).splitlines()[0]}")
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def gather(x):
    """(n, ...) of each process -> (n * WORLD, ...) of all, in order of rank, the same everywhere."""
    if WORLD == 1:
        return x
    x_cpu = x.detach().cpu().contiguous()
    parts = [torch.empty_like(x_cpu) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x_cpu)
    return torch.cat(parts).to(x.device)


def save(path, state, args):
    """Write a checkpoint with all random states. A kill or a full disk in mid-write leaves the old one."""
    if RANK:
        return
    name, keys, *position = np.random.get_state()
    rng = {"python": random.getstate(), "numpy": (name, keys.tolist(), *position),
           "torch": torch.get_rng_state(),
           "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    temporary = Path(f"{path}.tmp")
    try:
        torch.save({**state, "script": SCRIPT, "args": asdict(args), "rng": rng}, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(e).splitlines()[0]}); the checkpoint before it is untouched")


def load(path):
    """A checkpoint of this script as a dict on the CPU; set_rng(state) restores its random states."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as e:
        fail(f"{path} is not a readable checkpoint ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        fail(f"{path} is not a checkpoint of {SCRIPT}.py")
    return state


def set_rng(state):
    rng = state["rng"]
    random.setstate((rng["python"][0], tuple(rng["python"][1]), rng["python"][2]))
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rng["cuda"])


class Log:
    """metrics.csv (step, tag, value), the same scalars in TensorBoard, a progress line, Ctrl-C as a flag."""

    def __init__(self, args, step=0):
        self.start, self.first, self.interrupted, self.wandb = time.time(), step, False, None
        self.dir = Path(args.run_dir or f"runs/{args.env}__{SCRIPT}__{args.seed}__{int(time.time())}")
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, self.interrupt)
        if RANK:
            return
        file, kept = self.dir / "metrics.csv", []
        if file.exists() and not args.resume:
            fail(f"{self.dir} already holds a run; choose another --run-dir, or --resume its checkpoint.pt")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if file.exists():  # drop what was logged after the checkpoint that we go on from
                rows = [line.split(",") for line in file.read_text().splitlines()]
                kept = [r for r in rows if len(r) == 3 and r[0].isdigit() and int(r[0]) <= step]
            (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
            self.file = file.open("w", newline="")
            self.csv = csv.writer(self.file, lineterminator="\n")
            self.csv.writerows([["step", "tag", "value"], *kept])
            self.file.flush()
        except OSError as e:
            fail(f"cannot write in {self.dir}: {e.strerror}")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(self.dir), purge_step=step + 1 if args.resume else None)
        if args.track:
            import wandb

            self.wandb = wandb.init(project=SCRIPT, name=self.dir.name, config=asdict(args), dir=self.dir)
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=args.total_steps, initial=step, unit="step", unit_scale=True, disable=quiet)

    def interrupt(self, number, frame):
        if self.interrupted:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.interrupted = True
        if RANK == 0:
            print(f"\n{SCRIPT}: saving after this iteration; Ctrl-C again to stop at once", file=sys.stderr)

    def stop(self):
        """Whether a Ctrl-C or SIGTERM has reached any of the processes."""
        return bool(gather(torch.tensor([float(self.interrupted)])).any())

    def scalars(self, values, step):
        """Log {tag: number} at `step`. A value that is not finite ends the run, before any checkpoint."""
        values = {tag: float(v) for tag, v in values.items()}
        if bad := [tag for tag, v in values.items() if not math.isfinite(v)]:
            fail(f"{bad[0]} is not finite at step {step}; the last checkpoint in {self.dir} is good", code=1)
        if RANK:
            return
        try:
            self.csv.writerows([[step, tag, f"{v:.6g}"] for tag, v in values.items()])
            self.file.flush()
        except OSError as e:
            fail(f"cannot write {self.dir}/metrics.csv: {e.strerror}")
        for tag, v in values.items():
            self.board.add_scalar(tag, v, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def sps(self, step):
        """Training transitions per second since the start or the resume."""
        return (step - self.first) / max(time.time() - self.start, 1e-9)

    def progress(self, step, text, milestone):
        """One line that moves on a terminal; elsewhere one plain line for each milestone."""
        if RANK == 0:
            self.bar.set_description_str(text)
            self.bar.update(step - self.bar.n)
            if milestone and self.bar.disable:
                print(f"step {step:>12,d}  {text}  {self.sps(step):,.0f} steps/s", flush=True)

    def close(self):
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if RANK == 0:
            self.bar.close(), self.board.close(), self.file.close()
            if self.wandb:
                self.wandb.finish()
        if WORLD > 1:  # leave together: rank 0 may still evaluate
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def write_eval(folder, values, step, seed):
    """eval.json: the last evaluation as one flat object."""
    if RANK == 0:
        try:
            values = {**values, "global_step": step, "seed": seed}
            (Path(folder) / "eval.json").write_text(json.dumps(values, indent=1))
        except OSError as e:
            fail(f"cannot write {folder}/eval.json: {e.strerror}")


# ================================================================ 8. Train
def build(args, env):
    """The net, x = [theta, alpha] (2P,), the mask (2P,) of what is learned in it, and Adam or None."""
    latent = args.latent_dim if args.method == "maesn" else 0
    theta = make_policy(env.obs_dims[0], env.action_dims[0], args.hidden, latent, args.family)
    net = Net({k: tuple(v.shape) for k, v in theta.items()}, args.activation)
    adapts = {k: torch.full_like(v, float(not latent or k == "z")) for k, v in theta.items()}
    adapts = flatten(adapts, net.shapes)
    x = torch.cat([flatten(theta, net.shapes), args.inner_lr * adapts]).to(args.device)
    learned = adapts if args.method in ("meta-sgd", "maesn") else torch.zeros_like(adapts)
    mask = torch.cat([torch.ones_like(adapts), learned]).to(args.device)
    trpo = args.family == "maml" and args.outer == "trpo"
    return net, x, mask, None if trpo else torch.optim.Adam([x], lr=args.outer_lr)


def named(net, x):
    """{"theta": {name: tensor}, "alpha": {name: tensor}} as views of x (2P,)."""
    return {group: unflatten(part, net.shapes) for group, part in zip(("theta", "alpha"), x.chunk(2))}


def restore(path, args, net, x, optimizer=None):
    """Put a checkpoint's tensors into x, and its moments into the optimizer; returns the checkpoint."""
    state = load(path)
    try:
        for group, p in named(net, x).items():
            for k in p:
                p[k].copy_(state["params"][group][k])
        if optimizer:
            optimizer.load_state_dict(state["optimizers"]["x"])
    except (KeyError, RuntimeError, ValueError):
        was = state["args"]
        fail(f"{path} holds a policy of {was['family']}, {was['method']} with {was['hidden']} units for "
             f"{was['env']}, not {args.family}, {args.method} with {args.hidden} units for {args.env}")
    return state


def evaluate_checkpoint(args):
    """--evaluate: the table of a finished run, and its eval.json."""
    net, x, *_ = build(args, make_env(args, 1))
    state, folder = restore(args.evaluate, args, net, x), Path(args.evaluate).parent
    results = evaluate_all(args, net, x)
    print(table(results, args))
    write_eval(folder, summary(results), state["global_step"], args.seed)
    if args.capture_video:
        print(capture(args, net, x, folder))
    return named(net, x)


def train(args):
    set_up(resolve(args))
    if args.evaluate:
        return evaluate_checkpoint(args)
    env = make_env(args, args.num_tasks // WORLD * args.num_episodes)
    net, x, mask, optimizer = build(args, env)
    iteration = global_step = 0
    if args.resume:
        state = restore(args.resume, args, net, x, optimizer)
        iteration, global_step = state["iteration"], state["global_step"]
        set_rng(state)
    log, stop, done = Log(args, global_step), False, global_step >= args.total_steps

    while not stop and not done:
        logs, returns = meta_update(env, net, x, mask, optimizer, args)
        iteration += 1
        global_step += steps_per_iteration(args)
        logs |= {f"adapt/return_{k}": v for k, v in enumerate(returns)}
        logs["charts/episodic_return"] = logs["charts/episodic_return/agent_0"] = returns[-1]  # adapted
        logs["charts/SPS"] = log.sps(global_step)
        stop, done = log.stop(), global_step >= args.total_steps
        if done and RANK == 0:
            results = evaluate_all(args, net, x)
            logs |= summary(results)
        elif args.eval_every and iteration % args.eval_every == 0 and RANK == 0:
            logs |= summary({"eval": evaluate(args, net, x)[0]})
        log.scalars(logs, global_step)
        text = f"iteration {iteration}: return {returns[0]:.1f} -> {returns[-1]:.1f}"
        log.progress(global_step, text, done or "eval/return_0" in logs)
        if stop or done or iteration % args.save_every == 0:
            adam = {"x": optimizer.state_dict()} if optimizer else {}
            save(log.dir / "checkpoint.pt", dict(params=named(net, x), optimizers=adam, iteration=iteration,
                                                 global_step=global_step), args)
        if done and RANK == 0:
            write_eval(log.dir, summary(results), global_step, args.seed)
            print(f"{table(results, args)}\n{log.dir}: {global_step} steps")
    log.close()
    return named(net, x)


if __name__ == "__main__":
    train(cli(Args, __doc__))
