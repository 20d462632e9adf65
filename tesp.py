"""
TESP: an encoder learns what a task is from its best episodes; one policy, shared by all tasks, acts on that.

  Paper      Lan, Li, Guan, Wang: Meta Reinforcement Learning with Task Embedding and Shared Policy.
             IJCAI 2019, arXiv:1905.06527.
  Problem    Tasks i ~ p(i) differ in a goal that is never observed. Choose an encoder's initial weights phi,
             a step size alpha for each of them, and policy weights psi, such that J policy-gradient steps on
             phi alone, through the embedding z, lead to a high return.
  Algorithm  for each meta-iteration: draw M tasks; for all of them side by side, with g = 0 and B empty:
               W ~ pi_psi(a|o, z = 0): E episodes of H steps, the warm-up               -> rollout()
               B: the L episodes with the largest return seen so far               (1)  -> keep()
               for k = 0 .. J-1:
                 phi_i = phi - clip(alpha, -0.1, 0.1) * g, always from phi itself  (2)  -> adapted()
                 z = mean over B of (last state of a GRU) Wp + bp                  (3)  -> encode()
                 the GRU: hard sigmoid, reset before the recurrent product         (4)  -> GRU.forward()
                   and its derivative, by hand                                     (5)  -> GRU.backward()
                 D_k ~ pi_psi(a|o, z): E episodes; b: linear feature baseline      (6)  -> linear_baseline()
                 A: generalised advantages of D_k, not normalised                  (7)  -> gae()
                 L_in = -mean log pi_psi(a|o, z) A                                 (8)  -> inner_loss()
                 g += dL_in/dphi_i, clipped to norm 60; B: eq. (1) with D_k        (9)  -> adapt()
               V ~ pi_psi(a|o, z) with the z of eqs. (2) and (3) once more; V does not enter B
             L = mean_i [PPO's clipped loss on V_i + eta mean z_i^2]               (10) -> surrogate()
             dL/dphi = mean_i d_i,  dL/dalpha = -mean_i g_i d_i,  d_i = dL/dphi_i  (11) -> outer_gradient()
             19 steps of Adam on (phi, alpha, psi), g_i and B_i frozen; of the 20
             iterates the one with the lowest loss and KL(old || new) < 0.01 stays (12) -> meta_update()
  Symbols    phi    encoder (P,)       g      (M, P)           B       Episodes (M, L, H, F)     z  (M, d)
             alpha  (P,)               phi_i  (M, P)           D_k, V  Batch (M, R), R <= H E    A  adv
             psi    policy (Q,)        x      [phi, alpha, psi], the vector that Adam moves
             M tasks, E episodes, H steps, J fast updates, L buffered episodes, O obs, A actions, U GRU units,
             d numbers in z, F = O + 2A + 1: observation, mean and log std that acted, reward.
  Methods    --adapt-policy: psi takes the fast updates too. --inner-steps 0: the embedding alone.
             --no-learn-alpha: step sizes stay. --buffer best | last | all. Baselines: maml_rl.py, fo-ppo.
  Departures [D1] Each row plays one episode and is masked after its end. The authors' sampler (--restart)
                  starts rows anew until 5,000 steps of finished episodes are in, which favours short, good
                  episodes and takes twice as long once robots arrive.
             [D2] Everything of all tasks is one batch in one process, or shared out by torchrun; the authors
                  run 20 Ray workers, one a task, which send whole gradients and weights at every step.
             [D3] wheeled by default is small (10 tasks, 20 episodes, 64 and 32 units, Adam 0.001), to learn
                  in minutes; the third command has the paper's sizes. Evaluations take 20 goals of each set,
                  the authors' all 100 (--eval-tasks 100).
             [D4] Positions come from the state after the step, the authors' lag it by a physics step; rewards
                  and goals are those of the code, see envs/goal_robots.py. --eval-noise adds to what is
                  observed, as an unused function in the authors' code does.
  Run        python tesp.py --env wheeled                              # 5.4 CPU minutes, on two cores
             python tesp.py --env wheeled --no-learn-alpha
             python tesp.py --env wheeled --paper                      # the paper's sizes, 600 iterations
             python tesp.py --env small_ant                            # the paper's ant
             python tesp.py --env reacher2
             python tesp.py --env reacher4
             python tesp.py --env nav2d                                # a point
             python tesp.py --env wheeled --adapt-policy
             python tesp.py --env wheeled --buffer last
             python tesp.py --env wheeled --inner-steps 0
             torchrun --nproc-per-node 2 tesp.py --env wheeled         # tasks shared out: the same result
             python tesp.py --evaluate runs/x/checkpoint.pt --capture-video --eval-noise 0.1
  Expect     wheeled, three seeds, after 40 iterations, on held-out goals (D'): -170 in the warm-up, then
             -158, -107, -60, -30 after 0 .. 3 updates; with --no-learn-alpha -79, --buffer last -38, all -43,
             --inner-steps 0 -88; Meta-SGD in maml_rl.py, equal steps and episodes, -29. --paper, an hour of
             one core, 50 iterations: -217 before, -23 after three updates. small_ant, an hour, 19 iterations:
             -152 and -105. nav2d, three seeds: -18 in the warm-up, -6.5 after three updates; 10 s.
             torchrun: the same weights to rounding (1e-7 in two iterations of nav2d, also as two hosts).
             Wheels on the ground are chaotic, and rounding grows: there returns part within 200 steps.
  Licence    MIT. Please cite the paper above for the method.
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
from dataclasses import asdict, dataclass, replace
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
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["wheeled", "small_ant", "reacher2", "reacher4", "nav2d"]

# What an argument left at None becomes: the paper's value, or the world's own, or (small) the quick one. [D3]
COMMON = dict(num_tasks=20, num_episodes=25, horizon=200, buffer_size=16, hidden=256, gru_units=256,
              latent_dim=8, latent_coef=0.01, outer_lr=3e-4, iterations=600, eval_every=25, save_every=5)
PAPER = {
    "wheeled": {},
    "small_ant": dict(hidden=512, latent_dim=32),
    "reacher2": dict(latent_coef=0.005),
    "reacher4": dict(hidden=512, latent_dim=16, latent_coef=0.005),
    "nav2d": {},
}
SMALL = {
    "wheeled": dict(num_tasks=10, num_episodes=20, buffer_size=8, hidden=64, gru_units=32, outer_lr=1e-3,
                    iterations=40, eval_every=20, num_threads=1),
    "nav2d": dict(num_tasks=10, num_episodes=10, buffer_size=8, hidden=32, gru_units=16, outer_lr=1e-3,
                  horizon=50, iterations=30, eval_every=10, num_threads=1),
}


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
    paper: bool = False
    """wheeled, nav2d: the paper's sizes instead of small ones (the other worlds always have them)"""
    inner_steps: int = 3
    """J, fast updates, eqs. (2)-(9); 0: the embedding of the warm-up, without updates"""
    adapt_policy: bool = False
    """the paper's variant: the fast updates move the policy too, with learned step sizes"""
    learn_alpha: bool = True
    """learn the step sizes of eq. (2); off: they stay at inner_lr"""
    inner_lr: float = 1e-3
    """first value of all step sizes alpha, eq. (2)"""
    buffer: Literal["best", "last", "all"] = "best"
    """which episodes the encoder reads, eq. (1): the best so far, the whole newest batch, or all"""
    buffer_size: Optional[int] = None
    """L, episodes in the buffer `best`"""
    num_tasks: Optional[int] = None
    """M, tasks in a meta-iteration, over all processes"""
    num_episodes: Optional[int] = None
    """E, episodes in a batch of a task"""
    horizon: Optional[int] = None
    """H, steps in an episode"""
    hidden: Optional[int] = None
    """units in each of the policy's two hidden layers"""
    gru_units: Optional[int] = None
    """U, units of the encoder's GRU"""
    latent_dim: Optional[int] = None
    """d, numbers in the embedding z"""
    latent_coef: Optional[float] = None
    """eta, weight of mean z^2 in eq. (10)"""
    gamma: float = 0.99
    """discount, in [0, 1], eqs. (6) and (7)"""
    gae_lambda: float = 0.97
    """lambda of eq. (7)"""
    epochs: int = 20
    """evaluations of eq. (10) in a meta-iteration; one step of Adam less"""
    clip_coef: float = 0.15
    """ratios are clipped to 1 -+ this in eq. (10)"""
    delta: float = 0.01
    """largest mean KL in nats of an iterate that may be kept, eq. (12)"""
    outer_lr: Optional[float] = None
    """Adam's step size, eq. (12)"""
    restart: bool = False
    """train on what the authors' sampler would have played; --total-steps then counts what is kept [D1]"""
    eval_tasks: int = 20
    """goals of each set in an evaluation, the same in all of them; the sets have 100"""
    eval_noise: float = 0.0
    """in evaluations, standard deviation of normal noise added to what is observed [D4]"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    if args.env not in PAPER:
        fail(f"--env must be one of {', '.join(PAPER)}, not {args.env}: it needs a world with hidden goals")
    preset = COMMON | PAPER[args.env] | (SMALL.get(args.env, {}) if not args.paper else {})
    preset = dict(num_threads=2 if WORLD == 1 else 1) | preset  # they wait asleep: no loss when busy
    iterations = preset.pop("iterations")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_episodes = args.eval_episodes or args.num_episodes
    if args.total_steps is None:
        args.total_steps = iterations * steps_per_iteration(args)
    for name in ("num_tasks", "num_episodes", "horizon", "buffer_size", "hidden", "gru_units", "latent_dim",
                 "epochs", "eval_tasks", "eval_episodes", "num_threads", "save_every", "total_steps"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}")
    for name in ("delta", "outer_lr", "clip_coef"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("inner_steps", "eval_noise", "latent_coef"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    if args.restart and (args.buffer != "best" or args.buffer_size > args.num_episodes):
        fail("--restart gives tasks different numbers of episodes: it takes --buffer best, and no larger a "
             f"--buffer-size than the {args.num_episodes} of --num-episodes")
    if args.num_tasks % WORLD:
        fail(f"--num-tasks {args.num_tasks} does not divide among {WORLD} processes")
    return args


def steps_per_iteration(args):
    return args.num_tasks * args.num_episodes * args.horizon * (args.inner_steps + 2)


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own world by returning an object with these members:
    #   num_envs B, horizon, obs_dims, action_dims, device, and perhaps splits, the names of its sets of tasks
    #   reset(task) -> obs (B, O), one task a row;  sample_tasks(n, split) -> (n, task_dim)
    #   step(action (B, A)) -> obs, reward (B, 1), terminated (B,), truncated (B,), info
    try:
        return envs.make(args.env, num_envs, horizon=args.horizon, device=args.device)
    except ValueError as e:
        fail(e)


# ================================================================ 2. Networks
# Three flat vectors hold all numbers: phi (P,), what the fast updates move, with a step size alpha for each
# entry, and psi (Q,), the shared policy; x = [phi, alpha, psi]. The encoders of M tasks are one (M, P), and
# every layer is one batched product over the tasks. With --adapt-policy phi is [encoder, policy] and psi is
# empty; a policy is then (M, Q), a row for each task.
#
# The time goes into the GRU. Its input product is fused into the recurrent one, [h, x, 1] @ [Wh; Wx; b], its
# constants are folded into weights, and its derivative is written by hand: autograd would add up a (M, U, 3U)
# gradient at each of H steps, twenty times slower. Here that is one product over all steps at the end.
class Net(NamedTuple):
    encoder: dict  # {name: shape} in the order of the flat vector
    policy: dict
    adapt_policy: bool

    def split(self, x):
        """x (2P + Q,) -> phi (P,), alpha (P,), psi (Q,); psi is a part of phi if that takes the updates."""
        P, Q = (sum(math.prod(s) for s in shapes.values()) for shapes in (self.encoder, self.policy))
        return x.split([P + Q, P + Q, 0] if self.adapt_policy else [P, P, Q])

    def parts(self, phi, psi):
        """phi (M, P) and psi (Q,) -> weights of the encoder {name: (M, ...)} and the flat policy, (Q,) or
        (M, Q)."""
        P = sum(math.prod(s) for s in self.encoder.values())
        return unflatten(phi[:, :P], self.encoder), phi[:, P:] if self.adapt_policy else psi


def flatten(p, shapes):
    """{name: (..., *shape)} -> (..., P)."""
    return torch.cat([p[k].flatten(p[k].dim() - len(shape)) for k, shape in shapes.items()], -1)


def unflatten(x, shapes):
    """(..., P) -> {name: (..., *shape)}, views."""
    parts = x.split([math.prod(shape) for shape in shapes.values()], -1)
    return {k: part.unflatten(-1, shape) for (k, shape), part in zip(shapes.items(), parts)}


def columns(n, m, norm):
    """(n, m) normal numbers, each column scaled to `norm`."""
    w = torch.randn(n, m)
    return norm * w / w.norm(dim=0)


def make_encoder(features, units, latent_dim):
    """Gates in the order z, r, candidate. Glorot-uniform wx, wh of orthonormal rows, small wp, biases 0."""
    F, U = features, units
    return {"wx": (2 * torch.rand(F, 3 * U) - 1) * math.sqrt(6 / (F + 3 * U)),
            "wh": torch.nn.init.orthogonal_(torch.empty(U, 3 * U)), "b": torch.zeros(3 * U),
            "wp": columns(U, latent_dim, 0.01), "bp": torch.zeros(latent_dim)}


def make_policy(obs_dim, action_dim, hidden, latent_dim):
    """O + d -> hidden -> hidden -> A means, A log stds; columns of norm 1, in the last layer 0.01."""
    sizes, p = [obs_dim + latent_dim, hidden, hidden, 2 * action_dim], {}
    for l, (n, m) in enumerate(zip(sizes, sizes[1:])):
        p |= {f"w{l}": columns(n, m, 0.01 if l == 2 else 1.0), f"b{l}": torch.zeros(m)}
    return p


def policy(p, obs, z):
    """mean, log_std (M, ..., A) of one policy {name: (...)} or of M policies {name: (M, ...)} at observations
    (M, ..., O) with embeddings z (M, d)."""
    O, x = obs.shape[-1], obs.flatten(1, -2)  # (M, R, O)
    w_obs, w_z = p["w0"].split([O, z.shape[-1]], -2)
    same = z[:, None] @ w_z + p["b0"].unsqueeze(-2)  # (M, 1, hidden): z is the same for all rows of a task
    x = torch.tanh(x @ w_obs + same)
    x = torch.tanh(x @ p["w1"] + p["b1"].unsqueeze(-2))
    x = x @ p["w2"] + p["b2"].unsqueeze(-2)
    return x.unflatten(1, obs.shape[1:-1]).chunk(2, -1)


class Packed(NamedTuple):
    """Episodes of unequal length for the GRU: those of a task sorted by length, then cut into time steps. A
    step has as many rows as the task with the most episodes that long."""

    x: torch.Tensor  # (M, sum of rows, F + 1): features and a 1 for the bias
    rows: list  # rows[t] episodes of each task at step t
    ends: list  # ends[t] (M, rows[t], 1): 1 where an episode ends with step t; None where none does


def pack(x, length):
    """Features (M, L, H, F) and lengths (M, L) >= 1 -> Packed. What x has after an episode's end is never
    used."""
    length, order = length.sort(1, descending=True)
    x = x.gather(1, order[..., None, None].expand_as(x))
    t = torch.arange(x.shape[2], device=x.device)
    valid = t[:, None] < length.amax(0)  # (H, L)
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1).transpose(1, 2).flatten(1, 2)[:, valid.flatten()]
    rows = [n for n in valid.sum(1).tolist() if n]
    last = set(length.unique().tolist())
    ends = [(length[:, :n] == t + 1).to(x.dtype)[..., None] if t + 1 in last else None
            for t, n in enumerate(rows)]
    return Packed(x, rows, ends)


class GRU(torch.autograd.Function):
    """States (M, L, U) after the last step of each episode, in the order of pack()."""

    @staticmethod
    def forward(ctx, wx, wh, b, packed):
        """eq. (4): z = hs(x Wz + h Uz + bz), r = hs(x Wr + h Ur + br), n = tanh(x Wn + (r * h) Un + bn),
        h <- z * h + (1 - z) * n, from h = 0, with hs(v) = clip(v / 5 + 1/2, 0, 1). [Wz Wr Wn] is wx
        (M, F, 3U), [Uz Ur Un] wh (M, U, 3U), and b (M, 3U)."""
        U = wh.shape[1]
        w = torch.cat([wh, wx, b[:, None]], 1)  # (M, U + F + 1, 3U)
        gates, cand = 0.2 * w[..., : 2 * U], w[..., 2 * U :].contiguous()
        gates[:, -1] += 0.5
        hx = w.new_empty(len(w), packed.x.shape[1], w.shape[1])  # [h, x, 1] of every step, and [r * h, x, 1]
        hx[..., U:] = packed.x
        rhx = hx.clone()
        zr, n = hx.new_empty(*hx.shape[:2], 2 * U), hx.new_empty(*hx.shape[:2], U)
        last, o = hx.new_zeros(len(w), packed.rows[0], U), 0
        h = last
        for m, ends in zip(packed.rows, packed.ends):
            s, o = slice(o, o + m), o + m
            h = hx[:, s, :U] = h[:, :m]
            g = torch.clamp(torch.bmm(hx[:, s], gates), 0, 1, out=zr[:, s])  # z and r at once
            torch.mul(g[..., U:], h, out=rhx[:, s, :U])
            c = torch.tanh(torch.bmm(rhx[:, s], cand), out=n[:, s])
            h = torch.lerp(c, h, g[..., :U])
            if ends is not None:
                last[:, :m] += ends * h
        ctx.saved = packed, gates, cand, hx, rhx, zr, n
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_last):
        """eq. (5): back in time with d = dL/dh; the weights' gradients come last, from all steps at once."""
        packed, gates, cand, hx, rhx, zr, n = ctx.saved
        U, o, back = n.shape[-1], n.shape[1], torch.ops.aten
        d_zr, d_n = torch.empty_like(zr), torch.empty_like(n)
        to_h, to_rh = gates[:, :U].mT, cand[:, :U].mT
        d = d_last.new_zeros(len(n), 0, U)
        for m, ends in zip(reversed(packed.rows), reversed(packed.ends)):
            s, o = slice(o - m, o), o - m
            d = torch.nn.functional.pad(d, (0, 0, 0, m - d.shape[1]))  # backwards, episodes come in
            if ends is not None:
                d = d + ends * d_last[:, :m]
            h, c, (z, r), g = hx[:, s, :U], n[:, s], zr[:, s].chunk(2, -1), d_zr[:, s]
            keep = z * d
            d_c = back.tanh_backward.grad_input(d - keep, c, grad_input=d_n[:, s])
            d_rh = torch.bmm(d_c, to_rh)
            torch.mul(d, h - c, out=g[..., :U])
            torch.mul(d_rh, h, out=g[..., U:])
            back.hardtanh_backward.grad_input(g, zr[:, s], 0.0, 1.0, grad_input=g)  # 0 where hs is flat
            d = torch.baddbmm(keep.addcmul_(d_rh, r), g, to_h)
        d_w = torch.cat([(hx.mT @ d_zr).mul_(0.2), rhx.mT @ d_n], -1)  # (M, U + F + 1, 3U)
        return d_w[:, U:-1], d_w[:, :U], d_w[:, -1], None


def encode(p, packed):
    """eq. (3): z (M, d), the mean over the buffered episodes of the GRU's last state, projected, with the
    tasks' encoders {name: (M, ...)}. An empty buffer (None) gives z = 0, and no gradient."""
    if packed is None:
        return torch.zeros_like(p["bp"])
    last = GRU.apply(p["wx"], p["wh"], p["b"], packed)  # (M, L, U)
    return (last.mean(1, keepdim=True) @ p["wp"])[:, 0] + p["bp"]


# ================================================================ 3. Rollout
# All tasks and episodes are played as one batch of B = M E rows [D2], one episode a row [D1]; row r belongs
# to task r // E. z is computed once and stays for the whole batch. No graph is recorded while playing. The
# noise of a task comes from a generator keyed by (seed, iteration, task, phase): it does not depend on who
# plays the task, alone or beside others, in this process or another.
class Play(NamedTuple):
    obs: torch.Tensor  # (M, H, E, O)
    action: torch.Tensor  # (M, H, E, A)
    mean: torch.Tensor  # (M, H, E, A) of the policy that acted
    log_std: torch.Tensor  # (M, H, E, A)
    reward: torch.Tensor  # (M, H, E), 0 after the end
    mask: torch.Tensor  # (M, H, E), 1 up to and with the last step of the episode, 0 after it
    arrived: torch.Tensor  # (M, E), 1 where the goal was reached


def keyed_noise(key, tasks, phase, *shape):
    """(M, *shape) standard normal numbers, those of task i from a generator seeded with (*key, i, phase)."""
    out = []
    for i in tasks:
        seed = int(np.random.SeedSequence([*key, i, phase]).generate_state(1, np.uint64)[0] >> 1)
        out.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(out)


@torch.no_grad()
def rollout(env, p, z, goals, noise, obs_noise=None, frames=None):
    """Play one batch with policy p and embeddings z (M, d) on goals (M, D); noise (M, H, E, A) is what the
    actions are drawn with, obs_noise (M, H, E, O) is added to what is observed. frames: a list that receives
    a picture of row 0 at every step."""
    M, _, E, _ = noise.shape
    obs, steps = env.reset(goals.repeat_interleave(E, 0)), []
    noise = noise.to(z.device).unbind(1)
    alive = torch.ones(M, E, device=z.device)
    for t in range(env.horizon):
        x = obs.view(M, E, -1)
        if obs_noise is not None:
            x = x + obs_noise[:, t].to(z.device)
        mean, log_std = policy(p, x, z)
        action = mean + log_std.exp() * noise[t]  # the world clips its own copy
        obs, reward, terminated, _, info = env.step(action.flatten(0, 1))
        steps.append((x, action, mean, log_std, reward.view(M, E) * alive, alive))
        alive = alive * ~terminated.view(M, E)
        if frames is not None:
            frames.append(env.render(0))
    arrived = info.get("arrived", terminated).view(M, E).float()
    return Play(*(torch.stack(x, 1) for x in zip(*steps)), arrived)


def restarted(plays, size):
    """[D1] Of the rows' first, second, ... episodes (Plays), those that a sampler keeps that starts rows anew
    and stops when `size` steps of finished episodes are in: a Play (M, H, rounds E) where all others have
    mask 0, or None if some row would have played on by then."""
    play, R = Play(*(torch.cat(x, min(2, x[0].dim() - 1)) for x in zip(*plays))), len(plays)
    length = play.mask.sum(1)  # (M, R E)
    end = length.unflatten(1, (R, -1)).cumsum(1).flatten(1)  # when an episode is over
    order = end.argsort(dim=1, stable=True)
    before = length.gather(1, order).cumsum(1) - length.gather(1, order)  # steps that are in by then
    kept = torch.zeros_like(length).scatter(1, order, (before < size).float())
    late = (end * kept).amax(1, keepdim=True) > end.unflatten(1, (R, -1))[:, -1]
    if late.any() or (length.sum(1) < size).any():
        return None
    return play._replace(reward=play.reward * kept[:, None], mask=play.mask * kept[:, None],
                         arrived=play.arrived * kept)


def episode_mean(x, play):
    """Mean of (M, E) over the episodes that count -> (M,)."""
    return (x * play.mask[:, 0]).sum(1) / play.mask[:, 0].sum(1)


# ================================================================ 4. Objectives
# Pure functions of tensors, for each task. While time matters they are (M, H, E), time in dimension 1; then
# only the valid steps are kept, as rows (M, R), and `weight` is that of each in its task's mean.
def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension 1."""
    out, acc = torch.empty_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        acc = reward[:, t] + gamma * acc
        out[:, t] = acc
    return out


def linear_baseline(obs, target, mask, ridge=1e-5):
    """eq. (6): ridge regression of target (M, H, E) on [o, o^2, t, t^2, t^3, 1], t in hundreds of steps and o
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
    """eq. (7): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t; v = 0 after the
    last step: arrival, a fall, and the time limit too, as the baseline knows the time. All (M, H, E)."""
    assert reward.shape == value.shape == mask.shape
    value = value * mask
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return returns_to_go((reward + gamma * next_value - value) * mask, gamma * gae_lambda)


def log_prob(mean, log_std, action):
    """log N(action; mean, std), summed over the last dimension: (..., A) -> (...)."""
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_0, log_std_0, mean_1, log_std_1):
    """KL(N_0 || N_1), summed over the last dimension: (..., A) -> (...)."""
    ratio = ((mean_0 - mean_1) ** 2 + (2 * log_std_0).exp()) * (-2 * log_std_1).exp()
    return (log_std_1 - log_std_0 + 0.5 * (ratio - 1)).sum(-1)


def inner_loss(mean, log_std, rows):
    """eq. (8): -mean log pi A -> (M,). No entropy, no value, nothing of z itself."""
    return -(rows.weight * log_prob(mean, log_std, rows.action) * rows.adv).sum(1)


def surrogate(mean, log_std, rows, clip_coef):
    """eq. (10) without its penalty: -mean min(ratio A, clip(ratio) A) -> (M,), and KL(old || new) (M,)."""
    assert mean.shape == rows.mean.shape
    ratio = torch.exp(log_prob(mean, log_std, rows.action) - rows.logprob)
    gain = torch.minimum(ratio * rows.adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * rows.adv)
    kl = gaussian_kl(rows.mean, rows.log_std, mean, log_std)
    return -(rows.weight * gain).sum(1), (rows.weight * kl).sum(1)


# ================================================================ 5. Update
# All of it is first order: g enters phi_i = phi - clip(alpha) * g as a constant, so that derivatives by phi
# and alpha are closed forms of d_i = dL/dphi_i, eq. (11), and d_i is two pieces: back through the policy to
# z_i (through_policy), then back through the encoder (autograd with eq. (5)).
INNER_CLIP, ALPHA_BOUND = 60.0, 0.1  # largest norm of a task's inner gradient, and of a step size
ROWS = 8192  # rows that go through the policy at a time: their activations stay in the cache


class Batch(NamedTuple):
    """The valid steps of a Play first, in dimension 1."""

    obs: torch.Tensor  # (M, R, O)
    action: torch.Tensor  # (M, R, A)
    mean: torch.Tensor  # (M, R, A) of the policy that acted, as are the next two
    log_std: torch.Tensor  # (M, R, A)
    logprob: torch.Tensor  # (M, R)
    adv: torch.Tensor  # (M, R)
    weight: torch.Tensor  # (M, R): 1 / (number of valid steps), 0 for what is not valid


class Episodes(NamedTuple):
    """What a buffer holds."""

    x: torch.Tensor  # (M, L, H, F): observation, mean and log std that acted, reward; 0 after the end
    length: torch.Tensor  # (M, L)
    ret: torch.Tensor  # (M, L), undiscounted


@torch.no_grad()
def process(play, args):
    """Play -> Batch: eqs. (6) and (7)."""
    value = linear_baseline(play.obs, returns_to_go(play.reward, args.gamma), play.mask)
    adv = gae(play.reward, value, play.mask, args.gamma, args.gae_lambda)
    logprob = log_prob(play.mean, play.log_std, play.action)
    mask = play.mask.flatten(1)  # (M, H E)
    order = torch.argsort(-mask, dim=1, stable=True)[:, : int(mask.sum(1).max())]
    first = lambda x: x.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    scalars = first(torch.stack([logprob, adv, play.mask], -1))  # (M, R, 3)
    logprob, adv, mask = scalars.unbind(-1)
    rows = [first(x) for x in (play.obs, play.action, play.mean, play.log_std)]
    return Batch(*rows, logprob.contiguous(), adv.contiguous(), mask / mask.sum(1, keepdim=True))


def episodes(play):
    """Play -> Episodes, one of each row."""
    x = torch.cat([play.obs, play.mean, play.log_std, play.reward[..., None]], -1) * play.mask[..., None]
    ret = play.reward.sum(1).masked_fill(play.mask[:, 0] == 0, -math.inf)  # was not kept: never the best
    return Episodes(x.transpose(1, 2), play.mask.sum(1).long(), ret)


def keep(old, new, kind, size):
    """eq. (1): the buffer (None: empty) after a batch of Episodes. best: the `size` episodes with the largest
    return, ties by age; last: the new ones; all."""
    if old is None or kind == "last":
        both = new
    else:
        both = Episodes(*(torch.cat(pair, 1) for pair in zip(old, new)))
    if kind != "best":
        return both
    order = both.ret.sort(dim=1, descending=True, stable=True).indices[:, :size]  # (M, L)
    return Episodes(*(x[torch.arange(len(x), device=x.device)[:, None], order] for x in both))


def adapted(phi, alpha, g):
    """eq. (2): (P,), (P,), (M, P) -> (M, P)."""
    return phi - alpha.clamp(-ALPHA_BOUND, ALPHA_BOUND) * g


def through_policy(shapes, psi, z, batch, objective, wanted=(True, True)):
    """objective(mean, log_std, rows) -> loss (n,), or loss and others, for the policy psi, (Q,) or (M, Q),
    with embeddings z (M, d), at a Batch. Returns its numbers (1 or more, M), and the gradients of the summed
    loss by z (M, d) and by psi, where wanted. Goes by groups of tasks, about ROWS rows at a time."""
    d_z, d_psi, values = torch.zeros_like(z), torch.zeros_like(psi), []
    counts, each = (batch.weight > 0).sum(1).tolist(), psi.dim() == 2
    group = max(1, ROWS // batch.weight.shape[1])
    for i in range(0, len(z), group):
        tasks, R = slice(i, i + group), max(counts[i : i + group])
        rows = Batch(*(x[tasks, :R] for x in batch))
        with torch.set_grad_enabled(any(wanted)):
            own_z = z[tasks].detach().requires_grad_(wanted[0])
            own_psi = (psi[tasks] if each else psi).detach().requires_grad_(wanted[1])
            out = objective(*policy(unflatten(own_psi, shapes), rows.obs, own_z), rows)
        out = out if isinstance(out, tuple) else (out,)
        values.append(torch.stack(out).detach())
        leaves = [x for x in (own_z, own_psi) if x.requires_grad]
        grads = list(torch.autograd.grad(out[0].sum(), leaves)) if leaves else []
        if wanted[0]:
            d_z[tasks] = grads[0]
        if wanted[1] and each:
            d_psi[tasks] = grads[-1]
        elif wanted[1]:
            d_psi += grads[-1]
    return torch.cat(values, 1), d_z, d_psi


class Adapted(NamedTuple):
    g: torch.Tensor  # (M, P), the sum of the inner gradients
    packed: Packed  # the buffer as it was when V was played
    z: torch.Tensor  # (M, d), with which V was played
    batches: list  # D_0 .. D_{J-1}, V
    plays: list  # W, D_0 .. D_{J-1}, V


def adapt(net, x, M, play, args):
    """eq. (9) and all before it, the fast updates of M tasks. play(phase, p, z) plays phase 0 (W), 1 .. J
    (D_0 ..) and J + 1 (V) with policy p and embeddings z. The k-th gradient sees the buffer without D_k."""
    phi, alpha, psi = net.split(x.detach())
    g, buffer, packed, batches, plays = phi.new_zeros(M, len(phi)), None, None, [], []
    for phase in range(args.inner_steps + 2):
        with torch.set_grad_enabled(0 < phase <= args.inner_steps):
            phi_i = adapted(phi, alpha, g).requires_grad_()
            p, own = net.parts(phi_i, psi)
            z = encode(p, packed)  # its graph waits until D_k has been played with it
        own, fixed = own.detach(), z.detach()
        plays.append(play(phase, unflatten(own, net.policy), fixed))
        if phase:
            batches.append(process(plays[-1], args))
        if 0 < phase <= args.inner_steps:
            _, d_z, d_own = through_policy(net.policy, own, fixed, batches[-1], inner_loss,
                                           (True, net.adapt_policy))
            g_k = torch.autograd.grad(z, phi_i, d_z)[0]
            if net.adapt_policy:
                g_k[:, -d_own.shape[1] :] += d_own
            g = g + g_k * (INNER_CLIP / (g_k.norm(dim=1, keepdim=True) + 1e-12)).clamp(max=1)
        if phase <= args.inner_steps:
            buffer = keep(buffer, episodes(plays[-1]), args.buffer, args.buffer_size)
            packed = pack(buffer.x, buffer.length)
    return Adapted(g, packed, fixed, batches, plays)


def outer_gradient(net, x, g, packed, batch, args, wanted=True):
    """eqs. (10) and (11): the clipped loss without its penalty, KL(old || new) and mean z^2, means over the
    tasks of all processes, and dL/dx (2P + Q,), or None where it is not wanted."""
    phi, alpha, psi = net.split(x.detach())
    with torch.set_grad_enabled(wanted):
        phi_i = adapted(phi, alpha, g).requires_grad_(wanted)
        p, own = net.parts(phi_i, psi)
        z = encode(p, packed)
        size = (z**2).mean(1)
    objective = lambda mean, log_std, rows: surrogate(mean, log_std, rows, args.clip_coef)
    (loss, kl), d_z, d_own = through_policy(net.policy, own.detach(), z.detach(), batch, objective,
                                            (wanted, wanted))
    numbers = torch.stack([loss.mean(), kl.mean(), size.detach().mean()])
    if not wanted:
        return *mean_over_processes(numbers), None
    d = torch.autograd.grad([z, size], phi_i, [d_z, torch.full_like(size, args.latent_coef)])[0]
    if net.adapt_policy:
        d[:, -d_own.shape[1] :] += d_own
        d_own = d_own[:0, 0]
    inside = (alpha.abs() < ALPHA_BOUND) if args.learn_alpha else 0.0
    gradient = torch.cat([d.sum(0), -(g * d).sum(0) * inside, d_own]) / len(g)
    flat = mean_over_processes(torch.cat([numbers, gradient]))
    return *flat[:3], flat[3:]


def mean_over_processes(x):
    """The same numbers on every process, so that none has to send its weights afterwards."""
    if WORLD == 1:
        return x
    total = x.cpu()
    torch.distributed.all_reduce(total)
    return total.to(x.device) / WORLD


def meta_update(env, net, x, optimizer, iteration, args):
    """One meta-iteration, the algorithm box; x = [phi, alpha, psi] changes in place. Returns {tag: value} and
    the mean return of an episode in each phase, (J + 2,)."""
    M, first = args.num_tasks // WORLD, RANK * args.num_tasks // WORLD
    goals, mine = env.sample_tasks(args.num_tasks)[first : first + M], range(first, first + M)
    shape = (args.horizon, args.num_episodes, env.action_dims[0])

    def play(phase, p, z):
        rounds, played = [], None
        while played is None:
            key = phase + len(rounds) * (args.inner_steps + 2)
            noise = keyed_noise((args.seed, 0, iteration), mine, key, *shape)
            rounds.append(rollout(env, p, z, goals, noise))
            played = restarted(rounds, args.num_episodes * args.horizon) if args.restart else rounds[0]
        return played

    out = adapt(net, x, M, play, args)
    best, best_loss, kept, logs = x.clone(), math.inf, 0, {}
    for n in range(args.epochs):  # eq. (12)
        loss, kl, size, gradient = outer_gradient(net, x, out.g, out.packed, out.batches[-1], args,
                                                  n < args.epochs - 1)
        if n == 0 and gradient is not None:
            logs["grad/norm_outer"] = gradient.norm()
        if kl < args.delta and loss < best_loss:
            best, best_loss, kept = x.clone(), loss, n
            logs |= {"losses/outer": loss, "losses/kl": kl, "losses/z_squared": size}
        if gradient is not None:
            x.grad = gradient
            optimizer.step()
    x.copy_(best)  # Adam's moments are not taken back
    logs = {"losses/outer": best_loss} | logs  # not finite if no iterate was
    returns = [episode_mean(play.reward.sum(1), play) for play in out.plays]
    returns, last = gather(torch.stack(returns, 1)).mean(0), out.plays[-1]
    numbers = torch.stack([out.g.norm(dim=1).mean(), last.log_std.mean(),
                           episode_mean(last.arrived, last).mean(),
                           episode_mean(last.mask.sum(1), last).mean()])
    tags = ("grad/norm_inner", "charts/log_std", "charts/arrived", "charts/episode_length")
    logs |= dict(zip(tags, mean_over_processes(numbers)))
    return logs | {"losses/iterate": kept, "adapt/alpha": net.split(x)[1].abs().mean()}, returns


# ================================================================ 6. Evaluation
# Meta-test: the whole inner procedure on goals of each set, D (trained on), D' (held out) and D'' (farther
# away than any in training), without an outer step. "0 updates" already reads the warm-up's episodes: compare
# methods at equal episodes. Own world, own noise: how often one evaluates does not change what is learned.
TEST_SEED = 1
SETS = {"train": "D, goals of training", "test": "D', held out", "test2": "D'', farther away"}


def evaluate(args, net, x, split="test", frames=None):
    """Adapt to args.eval_tasks goals of a split -> goals (n, D) and Adapted."""
    n, E = args.eval_tasks, args.eval_episodes
    env = make_env(args, n * E)
    with torch.random.fork_rng():
        torch.manual_seed(TEST_SEED)
        goals = env.sample_tasks(n, split)
        key = (args.seed, 1 + list(SETS).index(split), 0)

        def play(phase, p, z):
            noise = keyed_noise(key, range(n), phase, env.horizon, E, env.action_dims[0] + env.obs_dims[0])
            noise, obs_noise = noise.split([env.action_dims[0], env.obs_dims[0]], -1)
            shown = frames is not None and phase in (0, args.inner_steps + 1)
            pictures = frames.setdefault(phase, []) if shown else None
            return rollout(env, p, z, goals, noise, args.eval_noise * obs_noise if args.eval_noise else None,
                           pictures)

        return goals, adapt(net, x, n, play, args)


def evaluate_all(args, net, x, splits):
    """{split: (returns (n, J + 2), lengths (n, J + 2), arrived (n, J + 2))}, means over a task's episodes."""
    results = {}
    for split in splits:
        plays = evaluate(args, net, x, split)[1].plays
        results[split] = [torch.stack([number(play) for play in plays], 1) for number in (
            lambda p: p.reward.sum(1).mean(1), lambda p: p.mask.sum(1).mean(1), lambda p: p.arrived.mean(1))]
    return results


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(results):
    """{tag: value} of evaluate_all()."""
    flat = {}
    for split, (returns, *others) in results.items():
        names = ["warmup", *range(returns.shape[1] - 1)]
        for name, mean, half in zip(names, returns.mean(0).tolist(), interval(returns).tolist()):
            flat |= {f"eval/{split}/return_{name}": mean, f"eval/{split}/return_{name}_ci95": half}
        for tag, numbers in zip(("length", "arrived"), others):
            flat[f"eval/{split}/{tag}"] = numbers[:, -1].mean().item()
    return flat


def table(results, args):
    """Return of an episode in the warm-up and after 0..J fast updates, on each set."""
    row = lambda name, values: f"{name:24s}" + "".join(f"{v:>11s}" for v in values)
    columns = ["warm-up", *(f"{k} updates" for k in range(args.inner_steps + 1)), "length", "arrived"]
    noise = f", noise {args.eval_noise}" if args.eval_noise else ""
    lines = [f"{args.env}: return on {args.eval_tasks} goals of each set, ± 95 % interval{noise}"]
    lines.append(row("", columns))
    for split, (returns, length, arrived) in results.items():
        ends = [f"{length[:, -1].mean():.0f}", f"{100 * arrived[:, -1].mean():.0f} %"]
        lines += [row(SETS[split], [f"{v:.1f}" for v in returns.mean(0).tolist()] + ends),
                  row("  ±", [f"{v:.1f}" for v in interval(returns).tolist()])]
    return "\n".join(lines)


def splits_of(args):
    return getattr(make_env(args, 1), "splits", ("train", "test"))


def capture(args, net, x, folder):
    """--capture-video: embedding.png, paths to six held-out goals in the warm-up and after J updates, and the
    embeddings of all sets in their first two principal components; where a renderer works also
    before_after.gif of one held-out goal. Returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    goals, out = evaluate(args, net, x)
    place = getattr(make_env(args, 1), "position", slice(0, 2))  # where an observation holds the position
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for i in range(min(6, len(goals))):
        for play, colour in (out.plays[0], "0.8"), (out.plays[-1], f"C{i}"):
            for e in range(min(4, play.obs.shape[2])):
                axes[0].plot(*play.obs[i, play.mask[i, :, e] > 0, e][:, place].cpu().T, color=colour, lw=0.8)
        axes[0].plot(*goals[i].cpu(), "*", color=f"C{i}", ms=13, mec="k", zorder=3)
    axes[0].set(title="paths to held-out goals: warm-up (grey), adapted", aspect="equal")
    sets = [(split, *evaluate(args, net, x, split)) for split in splits_of(args)]
    z = torch.cat([out.z for _, _, out in sets])
    _, _, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    for (split, goals, out), mark in zip(sets, "os^"):
        where, angle = ((out.z - z.mean(0)) @ directions[:2].T).cpu(), torch.atan2(*goals.cpu().T.flip(0))
        shown = axes[1].scatter(*where.T, c=angle, cmap="hsv", vmin=-math.pi, vmax=math.pi, marker=mark,
                                label=SETS[split])
    figure.colorbar(shown, label="angle of the goal")
    axes[1].set(title="embeddings, first two principal components", xlabel="1", ylabel="2")
    axes[1].legend()
    figure.savefig(folder / "embedding.png", dpi=100)
    from PIL import Image, ImageDraw

    try:
        frames = {}
        evaluate(replace(args, eval_tasks=1), net, x, frames=frames)
    except RuntimeError as e:
        return f"{folder / 'embedding.png'} (no GIF: {e})"
    pictures = []
    for pair in list(zip(frames[0], frames[args.inner_steps + 1]))[::2]:
        picture = Image.fromarray(np.concatenate(pair, 1))
        for left, text in (10, "warm-up"), (picture.width // 2 + 10, f"after {args.inner_steps} updates"):
            ImageDraw.Draw(picture).text((left, 10), text, "black", font_size=20)
        pictures.append(picture.reduce(2).quantize(48, Image.Quantize.FASTOCTREE))
    pictures[0].save(folder / "before_after.gif", save_all=True, append_images=pictures[1:], duration=100,
                     loop=0)
    return f"{folder / 'embedding.png'} {folder / 'before_after.gif'}"


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
    """The net, x = [phi, alpha, psi] (2P + Q,) and Adam."""
    O, A = env.obs_dims[0], env.action_dims[0]
    encoder = make_encoder(O + 2 * A + 1, args.gru_units, args.latent_dim)
    shared = make_policy(O, A, args.hidden, args.latent_dim)
    net = Net(*({k: tuple(v.shape) for k, v in p.items()} for p in (encoder, shared)), args.adapt_policy)
    phi, psi = flatten(encoder, net.encoder), flatten(shared, net.policy)
    if args.adapt_policy:
        phi, psi = torch.cat([phi, psi]), psi[:0]
    x = torch.cat([phi, torch.full_like(phi, args.inner_lr), psi]).to(args.device)
    return net, x, torch.optim.Adam([x], lr=args.outer_lr)


def named(net, x):
    """{"theta": {name: tensor}, "alpha": {...}, "psi": {...}} as views of x."""
    phi, alpha, psi = net.split(x)
    shapes = net.encoder | net.policy if net.adapt_policy else net.encoder
    return {"theta": unflatten(phi, shapes), "alpha": unflatten(alpha, shapes),
            "psi": {} if net.adapt_policy else unflatten(psi, net.policy)}


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
        fail(f"{path} holds a policy of {was['hidden']} and an encoder of {was['gru_units']} units for "
             f"{was['env']}, not of {args.hidden} and {args.gru_units} for {args.env}")
    return state


def evaluate_checkpoint(args):
    """--evaluate: the table of a finished run, and its eval.json."""
    net, x, _ = build(args, make_env(args, 1))
    state, folder = restore(args.evaluate, args, net, x), Path(args.evaluate).parent
    results = evaluate_all(args, net, x, splits_of(args))
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
    net, x, optimizer = build(args, env)
    iteration = global_step = 0
    if args.resume:
        state = restore(args.resume, args, net, x, optimizer)
        iteration, global_step = state["iteration"], state["global_step"]
        set_rng(state)
    log, stop, done = Log(args, global_step), False, global_step >= args.total_steps

    while not stop and not done:
        logs, returns = meta_update(env, net, x, optimizer, iteration, args)
        iteration += 1
        global_step += steps_per_iteration(args)
        logs |= {f"adapt/return_{k}": v for k, v in zip(["warmup", *range(len(returns) - 1)], returns)}
        logs["charts/episodic_return"] = logs["charts/episodic_return/agent_0"] = returns[-1]  # adapted
        logs["charts/SPS"] = log.sps(global_step)
        stop, done = log.stop(), global_step >= args.total_steps
        if done and RANK == 0:
            results = evaluate_all(args, net, x, splits_of(args))
            logs |= summary(results)
        elif args.eval_every and iteration % args.eval_every == 0 and RANK == 0:
            logs |= summary(evaluate_all(args, net, x, ["test"]))
        log.scalars(logs, global_step)
        text = f"iteration {iteration}: return {returns[0]:.1f} -> {returns[-1]:.1f}"
        if "eval/test/return_warmup" in logs:
            last = logs[f"eval/test/return_{args.inner_steps}"]
            text += f", held out {logs['eval/test/return_warmup']:.1f} -> {last:.1f}"
        log.progress(global_step, text, "held" in text)
        if stop or done or iteration % args.save_every == 0:
            save(log.dir / "checkpoint.pt", dict(
                params=named(net, x), optimizers={"x": optimizer.state_dict()}, iteration=iteration,
                global_step=global_step), args)
        if done and RANK == 0:
            write_eval(log.dir, summary(results), global_step, args.seed)
            print(f"{table(results, args)}\n{log.dir}: {global_step} steps")
    log.close()
    return named(net, x)


if __name__ == "__main__":
    train(cli(Args, __doc__))
