"""
Coded MADDPG: multi-agent actor-critic training that waits neither for slow nor for dead learners.

  Papers     Wang, Xie, Atanasov: Coding for Distributed Multi-Agent Reinforcement Learning. ICRA 2021,
             arXiv:2101.02308.  MADDPG: Lowe, Wu, Tamar, Harb, Abbeel, Mordatch. NeurIPS 2017, 1706.02275.
  Problem    M agents, each with an actor mu_i(o_i) and a critic Q_i(all o, all a). The M updates x_i of an
             iteration depend on one snapshot and one minibatch. Let each of N learners return a weighted sum
             of several x_i, such that the answers of many subsets I of the learners give all x_i.
  Algorithm  C: which learner computes which agents, with what weights           (1)  -> make_code()
             for each iteration t: one minibatch of B transitions; for every agent i:
                 a = softmax(logits + Gumbel noise keyed by (seed, t, i))        (2)  -> gumbel_softmax()
                 y = r_i + gamma (1 - done) Q_i-(o', a'), a' of target actors    (3)  -> td_target()
                 g_q = d/dq mean (Q_i(o, a) - y)^2; an Adam step on q            (4)  -> critic_gradient()
                 g_p = d/dp mean -Q_i(o, a with a_i anew) + 1e-3 logits^2        (5)  -> actor_gradient()
                 x_i = [g_q, g_p], each tensor clipped to norm 0.5               (6)  -> clip_to_grid()
               learner j: y_j = sum_i c_ji x_i, agent after agent                (7)  -> encode()
               at the first set I of arrived learners with rank C_I = M          (8)  -> decodable()
               X: least squares of C_I X = Y_I; all other learners stop          (9)  -> decode()
               Adam on p_i and q_i of all agents                                 (10) -> adam()
               p_i- <- (1-tau) p_i- + tau p_i, and q_i- likewise                 (11) -> apply_update()
               an episode in each world with the new actors, to the replay       (12) -> rollout()
             Time of (7)-(9): min_I max_{j in I} (w_j c + t_s [j is slow])       (13) -> arrivals()
  Symbols    p_i, q_i    theta, critic  (M, P)   x  joint obs, joint action  (B, D)   C  code      (N, M)
             p_i-, q_i-  targets        (M, P)   X  all updates  (M, P_q + P_p)       Y  received  (|I|, ..)
             B rows; O, A largest observation, action; D = M (O + A); w_j nonzeros in row j; c time of an x_i.
  Schemes    s: every loss of s learners is survived; load: agents that a learner computes
               uncoded      s = 0, load 1                mds         s = N-M, load M: Chebyshev-Vandermonde
               replication  s = floor(N/M)-1, load 1     random      sparse Gaussian, load about --code-p M
               ldpc         --ldpc p,rho,gamma           sparse-mds  s = N-M at the least load M (N-M+1) / N
             No stragglers: uncoded. Rarely one: ldpc, or replication if N >= 2M. Several: sparse-mds.
  Departures [D1] One minibatch for all agents and one snapshot, as the paper's distributed program; OpenAI's
                  base code goes agent after agent. The controller computes a' once for all agents.
             [D2] x_i are clipped gradients, not weights: learners keep no state, may die and join any time.
             [D3] x_i has 31 bits and C about 20, so that (7) never rounds and (9) is exact: every decodable I
                  gives the very bits of training without learners. The original sums in single precision.
             [D4] mds: Chebyshev polynomials. The paper's powers of .1 ... .5 are singular to floating point
                  (mds-paper shows it). sparse-mds, and the checks of C at the start, are ours.
             [D5] Targets start as copies, the base code's as independent draws. Adam is TensorFlow's.
  Original   --scenario: --env   --max-episode-len: --horizon   --num-episodes, --num_train: --total-steps
  options    --num-adversaries, --good-policy, --adv-policy, --lr, --gamma, --batch-size, --num-units,
             --scheme, --num_agents, --num_learners: the same   --num_straggler: --num-stragglers
             --save-rate: --save-every   --exp-name, --save-dir, --plots-dir: --run-dir
             --load-dir, --restore: --resume FILE   --display: --evaluate FILE --capture-video
             --vanLDPC_p, --vanLDPC_pho, --vanLDPC_gamma: --ldpc p,rho,gamma
             --benchmark, --benchmark-iters, --benchmark-dir: --evaluate FILE --eval-episodes, into eval.json
  Run        python coded_maddpg.py --env simple_spread                       # no learners: 2 min on one core
             python coded_maddpg.py --env simple_tag --num-agents 8 --adv-policy ddpg
             python coded_maddpg.py --env simple_spread --num-agents 8 --num-learners 15 --num-stragglers 4
             python coded_maddpg.py --env simple_push --num-agents 8 --num-learners 15 --scheme ldpc
             python coded_maddpg.py --env simple_spread --num-learners 15 --scheme mds-paper --engine inline
             python coded_maddpg.py --env simple_spread --num-learners 15 --engine ray --ray-address auto
             python coded_maddpg.py --evaluate runs/x/checkpoint.pt --capture-video      # the table and a GIF
  Expect     simple_spread, 40,000 episodes: return -41, summed over agents (three seeds; random: -74).
             With learners the result is that without, bit by bit, whatever dies (one thread each).
  Licence    MIT. Please cite the papers above for the methods.
"""

import contextlib
import csv
import ctypes
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

# Large pages for torch, and no freed memory given back by glibc: fresh pages took a third of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(Exception):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

import numpy as np
import torch
import tyro
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["simple_spread", "simple", "simple_tag", "simple_adversary", "simple_push",
              "simple_speaker_listener", "simple_reference", "simple_crypto", "simple_world_comm"]
Scheme = Literal["centralized", "uncoded", "replication", "mds", "mds-paper", "random", "ldpc", "sparse-mds"]

# What an argument left at None becomes. OpenAI's runs have 60,000 episodes, the paper's 16,000.
PAPER = dict(num_threads=1, total_steps=1_000_000, eval_every=1000, eval_episodes=400, save_every=1000)


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
    num_agents: Optional[int] = None
    """M, agents; default: the standard world's"""
    num_adversaries: Optional[int] = None
    """how many of them, the first ones, play against the others; default: the world's"""
    dialect: Literal["mpe2", "mpe"] = "mpe2"
    """the rules of the maintained package or of the original one: scores must not be compared"""
    good_policy: Literal["maddpg", "ddpg"] = "maddpg"
    """the critics of the good agents see all observations and actions, or only their own"""
    adv_policy: Literal["maddpg", "ddpg"] = "maddpg"
    """the same for the adversaries"""
    horizon: int = 25
    """H, steps in an episode"""
    num_envs: int = 4
    """worlds side by side; an iteration is one episode in each of them and one update"""
    lr: float = 0.01
    """Adam's step size, eq. (10)"""
    gamma: float = 0.95
    """discount in eq. (3), in [0, 1]"""
    tau: float = 0.01
    """how far targets follow in an iteration, eq. (11)"""
    batch_size: int = 1024
    """B, transitions in a minibatch"""
    num_units: int = 64
    """units in each of the two hidden layers"""
    max_grad_norm: float = 0.5
    """each tensor's gradient is clipped to this norm, eq. (6)"""
    replay_size: int = 1_000_000
    """transitions that the replay holds; memory is taken as it fills"""
    learning_starts: Optional[int] = None
    """transitions before the first update; default: batch_size * horizon"""
    num_learners: int = 0
    """N, learner processes; 0: ordinary MADDPG in this one"""
    scheme: Scheme = "sparse-mds"
    """who computes what, eq. (1); for --num-learners > 0"""
    code_p: float = 0.8
    """share of nonzeros in --scheme random"""
    ldpc: Optional[str] = None
    """p,rho,gamma of --scheme ldpc: gamma x rho blocks of p x p; default: the first that fits N and M"""
    engine: Literal["local", "inline", "ray"] = "local"
    """learners are processes here; or played one after another with a virtual clock; or actors on Ray"""
    ray_address: str = "auto"
    """the running Ray cluster, host:port or auto"""
    num_stragglers: int = 0
    """k, learners drawn anew in each iteration that hold their answer back"""
    straggler_delay: float = 0.25
    """t_s, seconds for which they do"""
    agent_seconds: float = 0.0
    """the least time for a learner's update of one agent; emulates nodes slower than ours"""
    learner_timeout: float = 60.0
    """seconds until a learner that does not answer is replaced, and until an undecodable iteration ends"""
    on_undecodable: Literal["wait", "stop", "compute"] = "wait"
    """too few learners left: wait for their restart, save and stop, or compute the missing agents here"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    preset = PAPER | dict(learning_starts=args.batch_size * args.horizon)
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    counts = "num_envs horizon batch_size num_units learning_starts num_threads save_every eval_episodes"
    for names, fits, what in (
            (f"{counts} total_steps", lambda x: x >= 1, "at least 1"),
            ("lr max_grad_norm learner_timeout code_p", lambda x: x > 0, "positive"),
            ("num_learners num_stragglers straggler_delay agent_seconds seed", lambda x: x >= 0, "0 or more"),
            ("gamma tau code_p", lambda x: 0 <= x <= 1, "in [0, 1]")):
        for name in names.split():
            if not fits(getattr(args, name)):
                fail(f"--{name.replace('_', '-')} must be {what}, not {getattr(args, name)}")
    if args.replay_size < max(args.learning_starts, args.num_envs * args.horizon):
        fail(f"--replay-size {args.replay_size} is smaller than --learning-starts {args.learning_starts} "
             f"or than the {args.num_envs * args.horizon} transitions of an iteration")
    return args


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own world by returning an object with these members:
    #   num_envs B, horizon, num_agents N, obs_dims, action_dims
    #   reset() -> obs, N times (B, O_i);  step(N times (B, A_i), probabilities) -> obs, reward (B, N), ...
    #   optional: action_splits[i], sizes of agent i's one-hot blocks; num_adversaries; render(row)
    options = dict(num_agents=args.num_agents, num_adversaries=args.num_adversaries, dialect=args.dialect)
    try:
        return envs.make(args.env, num_envs, horizon=args.horizon, device=args.device, **options)
    except ValueError as e:
        fail(e)


# ================================================================ 2. Networks
# The actors of all agents are one tensor (M, P_p), a row an agent; so are critics and targets; named views of
# it go into batched products. Observations and actions smaller than the largest are padded with zeros: the
# weights of the padding get zero gradients and never matter. There is no autograd in this file: an update is
# a few products, written out below and checked against autograd in the tests.
class Spec(NamedTuple):
    """Everything that an update of an agent depends on but its data; plain numbers, to be sent around."""

    obs_dims: tuple
    splits: tuple  # of each agent: sizes of its one-hot blocks
    local: tuple  # of each agent: does its critic see only its own observation and action (ddpg)?
    hidden: int
    batch_size: int
    gamma: float
    lr: float
    clip: float
    seed: int


def make_spec(args, env):
    M, K = env.num_agents, getattr(env, "num_adversaries", 0) or 0
    splits = getattr(env, "action_splits", None) or [(n,) for n in env.action_dims]
    local = tuple((args.adv_policy if i < K else args.good_policy) == "ddpg" for i in range(M))
    return Spec(tuple(map(int, env.obs_dims)), tuple(tuple(map(int, s)) for s in splits), local,
                args.num_units, args.batch_size, args.gamma, args.lr, args.max_grad_norm, args.seed)


def once(function):
    """Remembers what it returned. (functools' own cannot be sent to a Ray cluster.)"""
    memory = {}
    return lambda *key: memory[key] if key in memory else memory.setdefault(key, function(*key))


class Shape(NamedTuple):
    M: int
    O: int  # largest observation
    A: int  # largest action
    D: int  # width of x: M observations, then M actions
    actor: dict  # {name: shape} in the order of the flat vector
    critic: dict
    P_actor: int
    P_critic: int


@once
def shape(spec):
    M, O, A, H = len(spec.obs_dims), max(spec.obs_dims), max(map(sum, spec.splits)), spec.hidden
    # w3 (out, H) gives outputs (out, B): on a CPU five times faster than (B, out) while out is 1 or 5
    net = lambda n, out: dict(w1=(n, H), b1=(1, H), w2=(H, H), b2=(1, H), w3=(out, H), b3=(out, 1))
    size = lambda shapes: sum(map(math.prod, shapes.values()))
    actor, critic = net(O, A), net(M * (O + A), 1)
    return Shape(M, O, A, M * (O + A), actor, critic, size(actor), size(critic))


def unflatten(flat, shapes):
    """(n, P) -> {name: (n, *shape)}, views."""
    parts = flat.split([math.prod(s) for s in shapes.values()], -1)
    return {k: part.unflatten(-1, s) for (k, s), part in zip(shapes.items(), parts)}


@once
def critic_mask(spec, device="cpu"):
    """(M, D, 1): 1 where an agent's critic looks; None if all look at everything that there is."""
    s = shape(spec)
    mask = torch.zeros(s.M, s.D, 1)
    for i, j in itertools.product(range(s.M), range(s.M)):
        if i == j or not spec.local[i]:
            mask[i, j * s.O : j * s.O + spec.obs_dims[j]] = 1
            start = s.M * s.O + j * s.A
            mask[i, start : start + sum(spec.splits[j])] = 1
    return mask.to(device) if any(spec.local) else None


def glorot(shapes, fan_in, fan_out):
    """(P,): uniform with variance 2 / (fan in + fan out) in the first fan_in inputs and fan_out outputs."""
    net = {k: torch.zeros(1, *s) for k, s in shapes.items()}
    H = net["w2"].shape[-1]
    for name, rows, cols in ("w1", fan_in, H), ("w2", H, H), ("w3", fan_out, H):
        net[name][0, :rows] = (2 * torch.rand(rows, cols) - 1) * math.sqrt(6 / (rows + cols))
    return torch.cat([v.flatten() for v in net.values()])


def make_nets(spec):
    """{"theta": (M, P_actor), "critic": (M, P_critic), and the targets, their copies} [D5]."""
    s = shape(spec)
    actor = torch.stack([glorot(s.actor, o, sum(a)) for o, a in zip(spec.obs_dims, spec.splits)])
    critic = torch.stack([glorot(s.critic, s.D, 1) for _ in range(s.M)])
    if (mask := critic_mask(spec)) is not None:  # a local critic: drawn for as many inputs as it has
        w1, seen = unflatten(critic, s.critic)["w1"], mask.sum(1, keepdim=True)
        w1 *= mask * ((s.D + spec.hidden) / (seen + spec.hidden)).sqrt()
    return {"theta": actor, "critic": critic, "target_theta": actor.clone(), "target_critic": critic.clone()}


def mlp(p, x):
    """x (n, B, in) -> hidden h1, h2 (n, B, H), and the output, transposed: (n, out, B)."""
    h1 = torch.baddbmm(p["b1"], x, p["w1"]).relu_()
    h2 = torch.baddbmm(p["b2"], h1, p["w2"]).relu_()
    return h1, h2, torch.baddbmm(p["b3"], p["w3"], h2.mT)


def mlp_backward(p, x, h1, h2, d_out):
    """From the derivative by the output (n, out, B) to that by the parameters, (n, P) in mlp's order."""
    d2 = (d_out.mT @ p["w3"]).mul_(h2.sign())  # 1 where the ReLU is open, 0 where it is not
    d1 = (d2 @ p["w2"].mT).mul_(h1.sign())
    grads = (x.mT @ d1, d1.sum(1), h1.mT @ d2, d2.sum(1), d_out @ h2, d_out.sum(-1))
    return torch.cat([g.flatten(1) for g in grads], 1)


PLAY, TARGETS, BATCH, SLOW, EVAL = range(1 << 15, (1 << 15) + 5)  # streams beside those of the agents


def keyed(seed, t, stream):
    """A counter-based generator: what it draws depends on (seed, t, stream) alone, wherever it runs."""
    return np.random.Generator(np.random.Philox(key=[seed, t << 16 | stream]))


def noise(seed, t, stream, size):
    """Exp(1) numbers (float32); minus their logarithm is Gumbel noise."""
    return torch.from_numpy(np.maximum(keyed(seed, t, stream).standard_exponential(size, np.float32), 1e-30))


@once
def blocks(spec, device="cpu"):
    """Masks (M, A, 1), the k-th for all k-th one-hot blocks; none if every agent has one, of size A."""
    s = shape(spec)
    masks = torch.zeros(max(map(len, spec.splits)), s.M, s.A, 1, dtype=torch.bool)
    for i, sizes in enumerate(spec.splits):
        for k in range(len(sizes)):
            masks[k, i, sum(sizes[:k]) : sum(sizes[: k + 1])] = True
    return () if len(masks) == 1 and masks.all() else tuple(masks.to(device))


def gumbel_softmax(logits, e, masks):
    """eq. (2), block by block, along dimension 1: logits, e ~ Exp(1) (n, A, B); masks (n, A, 1) -> (n, A, B).
    Soft at temperature 1, as the base code: this vector goes to the world and into the replay."""
    z = logits - e.log()
    if not masks:
        return z.softmax(1)
    return sum(z.masked_fill(~m, -math.inf).softmax(1).where(m, 0) for m in masks)


def softmax_backward(action, d_action, masks):
    """The derivative by the logits of gumbel_softmax."""
    g = action * d_action
    for m in masks or (torch.ones((), dtype=torch.bool),):
        g = g - action * (action * d_action * m).sum(1, keepdim=True) * m
    return g


# ================================================================ 3. Rollout
# The worlds play one episode with the current actors, all agents in one batched product a step. The soft
# action is the only exploration. An episode is stored as H + 1 rows: the next observation is the next row.
class Replay:
    """The last E episodes as a ring. torch.empty takes memory only where it is written to."""

    def __init__(self, size, horizon, width, num_agents, num_actions, device):
        self.H, self.E, self.stored = horizon, size // horizon, 0  # stored: episodes ever
        rows = self.E * (horizon + 1)
        self.obs = torch.empty(rows, width, device=device)  # joint observation, M O
        self.act = torch.empty(rows, num_actions, device=device)  # joint action, M A
        self.end = torch.empty(rows, num_agents + 1, device=device)  # reward of each agent, terminated

    def __len__(self):
        return min(self.stored, self.E) * self.H

    def append(self, obs, act, end):
        """Episodes as (H+1, n, .), (H, n, .), (H, n, .)."""
        n = obs.shape[1]
        where = (torch.arange(n) + self.stored).to(obs.device) % self.E
        for store, new in (self.obs, obs), (self.act, act), (self.end, end):
            rows = store.view(self.E, self.H + 1, -1)
            rows[where, : len(new)] = new.transpose(0, 1)
            rows[where, len(new) :] = 0  # nothing follows the last observation
        self.stored += n

    def sample(self, seed, t, n):
        """n transitions, uniform with replacement: obs, next obs (n, .), act, end."""
        i = keyed(seed, t, BATCH).integers(len(self), size=n)
        row = torch.from_numpy(i // self.H * (self.H + 1) + i % self.H).to(self.obs.device)
        return (self.obs.index_select(0, row), self.obs.index_select(0, row + 1),
                self.act.index_select(0, row), self.end.index_select(0, row))

    def state_dict(self):
        n = min(self.stored, self.E) * (self.H + 1)
        return dict(stored=self.stored, **{k: getattr(self, k)[:n].clone() for k in ("obs", "act", "end")})

    def load_state_dict(self, state):
        self.stored = state["stored"]
        for name in ("obs", "act", "end"):
            getattr(self, name)[: len(state[name])] = state[name]


def side_by_side(parts, width):
    """M times (B, n_i <= width) -> (B, M width), padded with zeros."""
    if any(p.shape[1] != width for p in parts):
        parts = [torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts]
    return torch.cat(parts, 1)


def rollout(env, spec, theta, key, watch=None):
    """eq. (12): one episode in each world: obs (H+1, B, M O), act (H, B, M A), end (H, B, M+1: rewards,
    terminated). key: (seed, t, stream) of the noise. watch: called with the world after each step."""
    s, B, H, device = shape(spec), env.num_envs, env.horizon, theta.device
    p, masks = unflatten(theta, s.actor), blocks(spec, str(device))
    e = noise(*key, (H, s.M, s.A, B)).to(device)
    obs, act, end = (torch.empty(n, B, w, device=device) for n, w in
                     ((H + 1, s.M * s.O), (H, s.M * s.A), (H, s.M + 1)))
    tuple_of = lambda x: (x,) if torch.is_tensor(x) else x  # a world with one agent drops the tuple
    obs[0] = side_by_side(tuple_of(env.reset()), s.O)
    for t in range(H):
        seen = obs[t].view(B, s.M, s.O).transpose(0, 1)  # (M, B, O)
        action = gumbel_softmax(mlp(p, seen)[2], e[t], masks).mT  # (M, B, A)
        act[t].view(B, s.M, s.A).copy_(action.transpose(0, 1))
        action = tuple(a[:, : sum(split)] for a, split in zip(action, spec.splits))
        o, reward, terminated, _, _ = env.step(action if s.M > 1 else action[0])
        obs[t + 1] = side_by_side(tuple_of(o), s.O)
        end[t, :, : s.M], end[t, :, s.M] = reward, terminated  # time being up is no end: it is bootstrapped
        if watch:
            watch(env)
    return obs, act, end


# ================================================================ 4. Objectives
# The update of an agent is a function of a snapshot, a minibatch and a key, and of nothing else. It must give
# the same bits wherever it runs: so learners, and the controller on a CPU, compute one agent at a time, in
# products of the same shapes: no loss there, as each fills a core. On a GPU all M go at once.
class Job(NamedTuple):
    """What learners get for update t: all there is to know [D2]."""

    x: torch.Tensor  # (B, D) observations of all agents, then actions of all
    x_next: torch.Tensor  # (B, D) the same one step later, with the target actors' actions
    end: torch.Tensor  # (B, M+1) rewards, terminated
    theta: torch.Tensor  # (M, P_actor)
    critic: torch.Tensor  # (M, P_critic)
    target_critic: torch.Tensor
    m: torch.Tensor  # (M, P_critic) Adam's moments of the critics
    v: torch.Tensor


def make_job(spec, nets, adam_state, sample, t):
    """One minibatch for all agents, and a' of all agents from one snapshot of the targets [D1]."""
    s, (obs, next_obs, act, end) = shape(spec), sample
    device = obs.device
    seen = next_obs.view(-1, s.M, s.O).transpose(0, 1)  # (M, B, O)
    e = noise(spec.seed, t, TARGETS, (s.M, s.A, len(obs))).to(device)
    logits = mlp(unflatten(nets["target_theta"], s.actor), seen)[2]
    a_next = gumbel_softmax(logits, e, blocks(spec, str(device))).permute(2, 0, 1).flatten(1)  # (B, M A)
    return Job(torch.cat([obs, act], 1), torch.cat([next_obs, a_next], 1), end, nets["theta"], nets["critic"],
               nets["target_critic"], adam_state["m"][:, : s.P_critic], adam_state["v"][:, : s.P_critic])


def job_shapes(spec):
    s, B = shape(spec), spec.batch_size
    return Job((B, s.D), (B, s.D), (B, s.M + 1), (s.M, s.P_actor), *[(s.M, s.P_critic)] * 4)


def job_views(flat, spec):
    """A Job whose tensors lie one after another in `flat`, as it travels."""
    shapes = job_shapes(spec)
    return Job(*(part.view(s) for part, s in zip(flat.split([*map(math.prod, shapes)]), shapes)))


def td_target(target_critic, x_next, reward, terminated, gamma):
    """eq. (3): reward, terminated (n, B), x_next (n, B, D) -> y (n, B)."""
    return reward + gamma * (1 - terminated) * mlp(target_critic, x_next)[2][:, 0]


def critic_gradient(critic, x, y):
    """eq. (4): x (n, B, D), y (n, B) -> gradient (n, P), loss (n,)."""
    assert x.shape[:2] == y.shape
    h1, h2, q = mlp(critic, x)
    error = q[:, 0] - y
    return mlp_backward(critic, x, h1, h2, error[:, None] * (2 / y.shape[1])), error.square().mean(1)


def actor_gradient(actor, critic, x, obs, old, own, e, masks, sizes):
    """eq. (5): x (n, B, D), obs (n, B, O), old (n, B, A) the own action in x, own (n, A, H) its rows of the
    critic's w1, noise e (n, A, B), sizes (n,) of the actions -> gradient (n, P), loss (n,)."""
    B = x.shape[1]
    g1, g2, logits = mlp(actor, obs)
    action = gumbel_softmax(logits, e, masks)  # (n, A, B)
    # x with the own action replaced, without a copy of x: only that much of the first layer changes
    h1 = torch.baddbmm(critic["b1"], x, critic["w1"]).baddbmm_(action.mT - old, own).relu_()
    h2 = torch.baddbmm(critic["b2"], h1, critic["w2"]).relu_()
    # back through the critic to the action: d(-mean q)/dq is -1/B everywhere
    d2 = critic["w3"] / -B * h2.sign()
    d1 = (d2 @ critic["w2"].mT).mul_(h1.sign())
    d_logits = softmax_backward(action, own @ d1.mT, masks)
    weight = 1e-3 / (B * sizes)[:, None, None]  # of each squared logit
    q = (critic["w3"] @ h2.mean(1)[..., None])[:, 0, 0] + critic["b3"][:, 0, 0]
    loss = -q + (weight * logits.square()).sum((1, 2))
    return mlp_backward(actor, obs, g1, g2, d_logits + 2 * weight * logits), loss


def grid(clip):
    """Unit and bound of the numbers that travel: multiples of 2^-31 of the bound, a power of 2 [D3]."""
    bound = 2.0 ** math.ceil(math.log2(clip))
    return bound * 2.0**-31, bound


def clip_to_grid(grads, shapes, clip):
    """eq. (6): each tensor of (n, P) to norm <= clip, then to multiples of the unit, all in place."""
    unit, bound = grid(clip)
    for g in grads.split([math.prod(s) for s in shapes.values()], -1):
        g.mul_(clip / g.norm(dim=1, keepdim=True).clamp(min=clip))
    return grads.mul_(1 / unit).round_().mul_(unit).clamp_(-bound, bound)  # powers of 2: only round_ rounds


def adam(g, m, v, n, lr):
    """eq. (10), step n = 1, 2, ... in TensorFlow's form: change of the parameters, new m and v [D5]."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    rate = lr * math.sqrt(1 - 0.999**n) / (1 - 0.9**n)
    return m / (v.sqrt() + 1e-8) * -rate, m, v


def agent_update(job, spec, t, i, j):
    """x_i .. x_{j-1}, eqs. (2)-(6), as (n, P_critic + P_actor), and losses of critic and actor, (n, 2)."""
    s, n, device = shape(spec), j - i, job.x.device
    x, x_next = (z.expand(n, -1, -1) for z in (job.x, job.x_next))
    terminated = job.end[:, s.M].expand(n, -1)
    target, reward = unflatten(job.target_critic[i:j], s.critic), job.end[:, i:j].T  # (n, B)
    y = td_target(target, x_next, reward, terminated, spec.gamma)
    g_q, loss_q = critic_gradient(unflatten(job.critic[i:j], s.critic), x, y)
    if (mask := critic_mask(spec, str(device))) is not None:
        unflatten(g_q, s.critic)["w1"].mul_(mask[i:j])
    clip_to_grid(g_q, s.critic, spec.clip)
    # the actor is judged by the critic after its step, which everyone takes for himself
    change, _, _ = adam(g_q, job.m[i:j], job.v[i:j], t, spec.lr)
    critic = unflatten(job.critic[i:j] + change, s.critic)
    obs, acts = job.x[:, : s.M * s.O], job.x[:, s.M * s.O :]
    own = torch.stack([critic["w1"][k - i, s.M * s.O + k * s.A :][: s.A] for k in range(i, j)])
    e = torch.stack([noise(spec.seed, t, k, (s.A, len(x[0]))) for k in range(i, j)]).to(device)  # eq. (2)
    g_p, loss_p = actor_gradient(
        unflatten(job.theta[i:j], s.actor), critic, x, obs.unflatten(1, (s.M, s.O))[:, i:j].transpose(0, 1),
        acts.unflatten(1, (s.M, s.A))[:, i:j].transpose(0, 1), own, e,
        tuple(m[i:j] for m in blocks(spec, str(device))),
        torch.tensor([sum(split) for split in spec.splits[i:j]], device=device))
    clip_to_grid(g_p, s.actor, spec.clip)
    return torch.cat([g_q, g_p], 1), torch.stack([loss_q, loss_p], 1)


def all_updates(job, spec, t):
    """X (M, P), losses (M, 2), without learners."""
    M = shape(spec).M
    step = M if job.x.is_cuda else 1
    parts = [agent_update(job, spec, t, i, i + step) for i in range(0, M, step)]
    return tuple(torch.cat(z) for z in zip(*parts))


# ================================================================ 5. Update
# First the codes, then who computes: this process, learners played one after another, processes, Ray actors.
# All four give X, bit for bit the same, and the controller applies it. Learners know nothing but their job.
class Code(NamedTuple):
    C: np.ndarray  # (N, M)
    exact: bool  # on the grid of [D3]; otherwise single precision, as in the original
    survives: int  # s: every loss of so many learners is decodable
    condition: float  # the worst condition number of what is then left


LIMIT = 1e8  # of condition numbers: beyond, wait for one more row


def chebyshev(N, M):
    """Columns cos(i phi_j), orthonormal: a Vandermonde matrix times an invertible one, so any M rows are
    invertible [D4]."""
    C = np.sqrt(2 / N) * np.cos(np.arange(M) * (2 * np.arange(N)[:, None] + 1) * np.pi / (2 * N))
    C[:, 0] /= np.sqrt(2)
    return C


def cyclic(N, M, rng):
    """Column i is nonzero in the N-M+1 rows from floor(i N / M) on, cyclically: so any r columns touch N-M+r
    rows, which makes any M rows invertible with probability one [D4]."""
    C = np.zeros((N, M))
    for i in range(M):
        rows = (i * N // M + np.arange(N - M + 1)) % N
        C[rows, i] = rng.uniform(0.5, 1.5, len(rows)) * rng.choice([-1, 1], len(rows))
    return C


def array_ldpc(p, rho, gamma):
    """C = [I; B] from the parity check [I B] over GF(2), block (a, b) of which is the cyclic shift by ab."""
    H = np.block([[np.roll(np.eye(p, dtype=int), a * b, 1) for b in range(rho)] for a in range(gamma)])
    pivots = []
    for col in range(p * rho):
        below = np.flatnonzero(H[len(pivots) :, col]) + len(pivots)
        if len(below):
            H[[len(pivots), below[0]]] = H[[below[0], len(pivots)]]
            others = (H[:, col] == 1) & (np.arange(len(H)) != len(pivots))
            H[others] ^= H[len(pivots)]
            pivots.append(col)
    B = np.delete(H[: len(pivots)], pivots, 1)
    return np.vstack([np.eye(B.shape[1]), B])


def find_ldpc(N, M, text):
    if text is None:
        choices = [(p, N // p, g) for p in range(2, N) if N % p == 0 for g in range(1, N // p)]
    else:
        p, rho, gamma = map(int, text.split(","))
        choices = [(p, rho, gamma)]
    codes = [array_ldpc(*choice) for choice in choices if min(choice) > 0]
    for C in codes:
        if C.shape == (N, M):
            return C
    known = ", ".join(sorted({f"{n} learners for {m} agents" for n, m in (C.shape for C in codes)}))
    raise ValueError(f"--ldpc {text or 'p,rho,gamma'} has {known or 'nothing'}, not {N} for {M}")


DRAW = {  # scheme: (N, M) from N, M and the options
    "uncoded": lambda N, M, *_: np.eye(N, M),
    "replication": lambda N, M, *_: np.eye(M)[np.arange(N) % M],
    "mds": lambda N, M, *_: chebyshev(N, M),
    "mds-paper": lambda N, M, *_: np.linspace(0.1, 0.5, M) ** (N - 1 - np.arange(N)[:, None]),
    "random": lambda N, M, p, ldpc, rng: rng.standard_normal((N, M)) * (rng.random((N, M)) < p),
    "ldpc": lambda N, M, p, ldpc, rng: find_ldpc(N, M, ldpc),
    "sparse-mds": lambda N, M, p, ldpc, rng: cyclic(N, M, rng),
}


def make_code(scheme, N, M, seed=1, p=0.8, ldpc=None):
    """eq. (1). Random matrices are drawn until one is fit. ValueError if the scheme cannot reach rank M."""
    if N < M:
        raise ValueError(f"--num-learners {N} are fewer than the {M} agents")
    exact = scheme != "mds-paper"
    for attempt in range(50 if scheme in ("random", "sparse-mds") else 1):
        C = DRAW[scheme](N, M, p, ldpc, np.random.default_rng([seed, attempt]))
        if exact:  # so few bits that sums of M products with 31-bit numbers fit in the 53 of a float64 [D3]
            unit = 2.0 ** (math.ceil(math.log2(max(np.abs(C).sum(1).max(), 1e-9))) - 22)
            C = np.round(C / unit) * unit
        if decodable(C, exact) and (scheme == "uncoded" or C.any(1).all()):
            code = Code(C, exact, *tolerance(C, exact))
            if scheme != "sparse-mds" or code.survives == N - M:
                return code
    raise ValueError(f"--scheme {scheme} with {N} learners does not reach rank {M}, the number of agents"
                     + f" (--code-p {p})" * (scheme == "random"))


def conditions(C, size):
    """Condition numbers of all subsets of so many nonzero rows; of 3000 random ones if there are too many."""
    rows = np.flatnonzero(C.any(1))
    if math.comb(len(rows), size) <= 20_000:
        subsets = np.array(list(itertools.combinations(rows, size)))
    else:
        subsets = np.random.default_rng(0).permuted(np.tile(rows, (3000, 1)), axis=1)[:, :size]
    s = np.linalg.svd(C[subsets], compute_uv=False)
    return s[:, 0] / np.maximum(s[:, -1], 1e-300)


def tolerance(C, exact=True):
    """The largest s such that any s losses among the nonzero rows are decodable; the worst condition then."""
    N, M = np.count_nonzero(C.any(1)), C.shape[1]
    worst, limit = lambda lost: conditions(C, N - lost).max(), LIMIT if exact else 1e15
    if (most := worst(N - M)) < limit:  # if so, fewer losses are decodable, too
        return N - M, most
    lost = next(s for s in range(N - M + 1) if worst(s) >= limit) - 1
    return lost, worst(lost) if lost >= 0 else math.inf


def decodable(rows, exact=True):
    """eq. (8): do these rows of C, (n, M), determine all agents, and safely so?"""
    if len(rows) < rows.shape[1]:
        return False
    s = np.linalg.svd(rows, compute_uv=False)
    return s[-1] * (LIMIT if exact else 1e15) > s[0]


def decode(rows, Y, clip, exact=True):
    """eq. (9): X (M, P) float32 from rows C_I (n, M) and Y_I (n, P) float64. Sums on the grid are exact, so a
    residual of zero proves the solution, and refinement finds it whatever the condition number [D3]. If there
    is none, learners disagree about some x_i: other hardware, other libraries, bad memory."""
    rows, (unit, bound) = torch.from_numpy(rows), grid(clip)
    inverse = torch.linalg.pinv(rows)
    X = inverse @ Y
    for _ in range(4 * exact):
        X.mul_(1 / unit).round_().mul_(unit).clamp_(-bound, bound)
        residual = torch.addmm(Y, rows, X, alpha=-1)
        if not residual.any() or not torch.isfinite(Y).all():  # not finite: nor is the loss, which says so
            break
        X.addmm_(inverse, residual)
    else:
        if exact:
            raise Stopped("the learners' results contradict each other: do they all run on the same kind of "
                          "processor, with the same library versions?")
    return X.float()


def encode(row, job, spec, t, exact=True, cancelled=lambda seconds: False, agent_seconds=0.0, delay=0.0):
    """eq. (7), a learner's whole work: y_j (P,) float64 and {agent: losses}. None if `cancelled`, which waits
    for so many seconds, says so between two agents, or while a straggler holds its answer back."""
    s, losses = shape(spec), {}
    y = torch.zeros(s.P_critic + s.P_actor, dtype=torch.float64 if exact else torch.float32)
    for i in map(int, np.flatnonzero(row)):
        start = time.perf_counter()
        x, loss = agent_update(job, spec, t, i, i + 1)
        y.add_(x[0], alpha=float(row[i]))
        losses[i] = loss[0].tolist()
        if cancelled(max(0.0, agent_seconds - (time.perf_counter() - start))):
            return None
    return None if cancelled(delay) else (y.double(), losses)


def slow_ones(C, seed, t, k):
    """The k stragglers of update t, (N,) bool, among the learners that have work."""
    slow, used = np.zeros(len(C), bool), np.flatnonzero(C.any(1))
    slow[keyed(seed, t, SLOW).choice(used, k, replace=False)] = True
    return slow


def arrivals(C, slow, agent_seconds, delay, exact=True):
    """eq. (13) on equal learners: the first decodable I in order of arrival, and when it is complete."""
    load = np.count_nonzero(C, axis=1)
    finish = np.where(load > 0, load * agent_seconds + delay * slow, math.inf)
    order = np.argsort(finish, kind="stable")
    for n in range(C.shape[1], len(C) + 1):
        if decodable(C[order[:n]], exact):
            return order[:n], finish[order[n - 1]]
    return order, math.inf


def undecodable_agents(rows):
    """Agents whose x_i these rows (n, M) do not determine: the unit vector is not in the row space."""
    inside = np.diag(np.linalg.pinv(rows) @ rows) if len(rows) else np.zeros(rows.shape[1])
    return np.flatnonzero(inside < 1 - 1e-6).tolist()


class Stopped(Exception):
    """The run cannot go on. Nothing of the update has been applied: the state before it is good."""


class Central:
    """No learners: ordinary MADDPG."""

    def __init__(self, spec):
        self.spec = spec

    def solve(self, t, job):
        return *all_updates(job, self.spec, t), {}

    def close(self):
        pass


class Inline(Central):
    """The arithmetic of the learners that would be first, on a virtual clock."""

    def __init__(self, code, spec, args):
        self.code, self.spec, self.args = code, spec, args

    def solve(self, t, job):
        (C, exact, *_), args = self.code, self.args
        slow = slow_ones(C, args.seed, t, args.num_stragglers)
        order, seconds = arrivals(C, slow, args.agent_seconds or 0.01, args.straggler_delay, exact)
        job = Job(*(z.cpu() for z in job))
        answers = [encode(C[j], job, self.spec, t, exact) for j in order]
        X = decode(C[order], torch.stack([y for y, _ in answers]), args.max_grad_norm, exact)
        return X, losses_of(answers), {"learners/seconds": seconds, "learners/used": len(order)}


def losses_of(answers):
    """(M, 2) from the [(y, {agent: losses})] of a decodable set, which touches every agent."""
    losses = {i: pair for _, pairs in answers for i, pair in pairs.items()}
    return torch.tensor([losses[i] for i in sorted(losses)])


# The protocol, for processes and for Ray. A learner is starting (None), idle (0) or busy with job t > 0, and
# gets a job only when idle: a hung one is never written to twice. Results of an old t are dropped: whoever is
# late may read a snapshot half overwritten, and one buffer is enough.
class Pool:
    def __init__(self, code, spec, args):
        self.code, self.spec, self.args = code, spec, args
        self.state, self.since, self.failures, self.restarts = {}, {}, {}, 0
        self.interrupted = lambda: False
        self.open()
        for j in map(int, np.flatnonzero(code.C.any(1))):  # those that have work
            self.failures[j] = 0
            self.launch(j)
        while None in self.state.values():
            self.listen(0, {})

    def launch(self, j):
        self.state[j], self.since[j] = None, time.monotonic()
        self.start(j)

    def lost(self, j):
        """Learner j is dead, or has not answered in time: put another one in its place."""
        self.restarts, self.failures[j] = self.restarts + 1, self.failures[j] + 1
        self.kill(j)
        if self.failures[j] > 5:  # since its last answer
            raise Stopped(f"learner {j} has died {self.failures[j]} times in a row")
        self.launch(j)

    def solve(self, t, job):
        args, begin = self.args, time.monotonic()
        C, exact = self.code.C, self.code.exact
        slow = slow_ones(C, args.seed, t, args.num_stragglers)
        self.publish(job)
        answers, own, bad_since = {}, {}, None  # own: agents that are computed here
        rows_of = lambda learners: np.concatenate([C[[*learners]], np.eye(C.shape[1])[[*own]]])
        while not decodable(rows_of(answers), exact):
            for j in [j for j, state in self.state.items() if state == 0 and j not in answers]:
                self.state[j], self.since[j] = t, time.monotonic()
                self.send(j, t, args.straggler_delay * slow[j])
            possible = [j for j, state in self.state.items() if state is not None or j in answers]
            if decodable(rows_of(possible), exact):
                bad_since = None
            elif args.on_undecodable == "compute":
                i = undecodable_agents(rows_of(possible))[0]  # any of them raises the rank by one
                own[i] = agent_update(job, self.spec, t, i, i + 1)
                continue
            else:
                bad_since = self.complain(t, rows_of(possible), possible, bad_since)
            self.listen(t, answers)
        for j in [j for j, state in self.state.items() if state == t]:
            self.cancel(j, t)
        arrived, pairs = time.monotonic(), [(y, losses) for y, losses in answers.values()]
        pairs += [(x[0].double().cpu(), {i: loss[0].tolist()}) for i, (x, loss) in own.items()]
        X = decode(rows_of(answers), torch.stack([y for y, _ in pairs]), args.max_grad_norm, exact)
        info = {"learners/seconds": arrived - begin, "learners/decode_seconds": time.monotonic() - arrived,
                "learners/used": len(answers), "learners/stragglers_used": sum(slow[[*answers]]),
                "learners/computed_here": len(own), "learners/restarts": self.restarts}
        return X, losses_of(pairs), info

    def listen(self, t, answers):
        """Take in what learners say, for at most 0.2 s, and see to the silent ones."""
        for j, answer in self.receive(0.2):
            if answer is None:
                self.lost(j)
            elif j in self.state:
                self.state[j], self.since[j] = 0, time.monotonic()
                self.failures[j] *= answer[0] == 0  # an answer, be it that it was cancelled
                if answer[0] == t and answer[1] is not None:
                    answers[j] = answer[1]
        for j, state in self.state.items():
            patience = max(120.0, self.args.learner_timeout) if state is None else self.args.learner_timeout
            if state != 0 and time.monotonic() - self.since[j] > patience:  # to start, it has to load torch
                self.lost(j)
        if self.interrupted():
            raise Stopped("")

    def complain(self, t, rows, possible, bad_since):
        """Too few learners are left for update t. Says what is missing, once; returns since when."""
        gone, agents = sorted(set(self.state) - set(possible)), undecodable_agents(rows)
        text = (f"update {t} is undecodable: learners {gone} are gone, and the {len(possible)} left do not "
                f"determine agents {agents} (rank {np.linalg.matrix_rank(rows)} of {rows.shape[1]})")
        if self.args.on_undecodable == "stop":
            raise Stopped(text)
        if bad_since is None:
            print(f"{SCRIPT}: {text}; waiting for their restart", file=sys.stderr, flush=True)
            return time.monotonic()
        if time.monotonic() - bad_since > self.args.learner_timeout:
            raise Stopped(f"{text}, and none came back in {self.args.learner_timeout:g} s")
        return bad_since


class LocalPool(Pool):
    """Processes on this machine. Job and results lie in shared memory; a message is a few bytes through a
    pipe, which never fills up: a learner is sent a job and a cancel, no more. End of file means death."""

    def open(self):
        s = shape(self.spec)
        self.context = get_context("forkserver")  # a plain fork would copy torch's threads in any state
        self.context.set_forkserver_preload(["__main__", SCRIPT, "torch"])
        self.flat = self.context.RawArray("f", sum(map(math.prod, job_shapes(self.spec))))
        self.results = self.context.RawArray("d", len(self.code.C) * (s.P_critic + s.P_actor))
        self.job = job_views(torch.frombuffer(self.flat, dtype=torch.float32), self.spec)
        self.Y = torch.frombuffer(self.results, dtype=torch.float64).view(len(self.code.C), -1)
        self.process, self.pipe = {}, {}

    def start(self, j):
        self.pipe[j], theirs = self.context.Pipe()
        given = (theirs, self.flat, self.results, j, self.code, self.spec, self.args.agent_seconds)
        self.process[j] = self.context.Process(target=learner, args=given, daemon=True)
        self.process[j].start()
        theirs.close()

    def kill(self, j):
        self.process[j].kill()
        self.process[j].join()
        self.pipe[j].close()

    def publish(self, job):
        for ours, new in zip(self.job, job):
            ours.copy_(new)

    def send(self, j, *message):
        with contextlib.suppress(OSError):  # dead: receive() will see the end of its pipe
            self.pipe[j].send(message)

    def cancel(self, j, t):
        self.send(j, -t, 0.0)

    def receive(self, seconds):
        name = {pipe: j for j, pipe in self.pipe.items()}
        for pipe in connection.wait([*name], seconds):
            j = name[pipe]
            try:
                t, losses = pipe.recv()
                yield j, (t, None if losses is None else (self.Y[j], losses))
            except (EOFError, OSError):
                yield j, None

    def close(self):
        for j in self.process:
            self.kill(j)


def learner(pipe, flat, results, j, code, spec, agent_seconds):
    """A learner process: one job after another, until the controller hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller
    torch.set_num_threads(1)
    job = job_views(torch.frombuffer(flat, dtype=torch.float32), spec)
    out = torch.frombuffer(results, dtype=torch.float64).view(len(code.C), -1)[j]
    cancelled = lambda seconds: pipe.poll(seconds) and bool(pipe.recv())  # nothing else comes in mid-job
    with contextlib.suppress(EOFError, OSError):
        pipe.send((0, None))  # ready
        while True:
            t, delay = pipe.recv()
            if t > 0:  # otherwise a cancel that came after the answer
                answer = encode(code.C[j], job, spec, t, code.exact, cancelled, agent_seconds, delay)
                if answer:
                    out.copy_(answer[0])
                pipe.send((t, answer and answer[1]))


class RayPool(Pool):
    """Actors on an existing Ray cluster. A lost actor is replaced by a new one; of Ray's own restarts and
    cancellation nothing is used."""

    def open(self):
        try:
            import ray
        except ImportError:
            fail("--engine ray needs the package ray, on this machine and on the cluster's")
        address = self.args.ray_address
        try:
            if address != "auto":  # ray would try for a minute
                host, port = address.removeprefix("ray://").rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address, log_to_driver=False, logging_level="CRITICAL")
        except Exception as e:
            fail(f"--ray-address {address}: no Ray cluster there ({' '.join(str(e).split())[:200]}); one is "
                 "started by `ray start --head`, and nodes join it by `ray start --address host:port`")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes need torch, not this file
        self.ray, self.actors, self.pending = ray, {}, {}
        options = dict(num_cpus=0.1, max_concurrency=2, scheduling_strategy="SPREAD")
        self.Actor = ray.remote(**options)(RemoteLearner)

    def start(self, j):
        self.actors[j] = self.Actor.remote(j, self.code, self.spec, self.args.agent_seconds)
        self.pending[self.actors[j].ready.remote()] = j

    def kill(self, j):
        self.pending = {ref: k for ref, k in self.pending.items() if k != j}
        self.ray.kill(self.actors[j])

    def publish(self, job):
        self.flat = self.ray.put(torch.cat([z.flatten().cpu() for z in job]).numpy())

    def send(self, j, t, delay):
        self.pending[self.actors[j].work.remote(self.flat, t, delay)] = j

    def cancel(self, j, t):
        self.actors[j].cancel.remote(t)

    def receive(self, seconds):
        self.ray.wait([*self.pending], timeout=seconds)
        done, _ = self.ray.wait([*self.pending], num_returns=len(self.pending), timeout=0)
        for ref in done:
            j = self.pending.pop(ref, None)
            if j is None:
                continue
            try:
                t, answer = self.ray.get(ref)
                yield j, (t, answer and (torch.from_numpy(answer[0].copy()), answer[1]))
            except self.ray.exceptions.RayError:
                yield j, None

    def close(self):
        self.ray.shutdown()


class RemoteLearner:
    """The same learner as an actor with two threads, one of which listens for cancel."""

    def __init__(self, j, code, spec, agent_seconds):
        torch.set_num_threads(1)
        self.row, self.exact, self.spec, self.agent_seconds = code.C[j], code.exact, spec, agent_seconds
        self.last, self.news = 0, threading.Condition()

    def ready(self):
        return 0, None

    def cancel(self, t):
        with self.news:
            self.last = t
            self.news.notify()

    def work(self, flat, t, delay):
        def cancelled(seconds):
            with self.news:
                return self.news.wait_for(lambda: self.last >= t, seconds)

        job = job_views(torch.from_numpy(flat.copy()), self.spec)
        answer = encode(self.row, job, self.spec, t, self.exact, cancelled, self.agent_seconds, delay)
        return t, answer and (answer[0].numpy(), answer[1])


def make_engine(args, spec):
    if args.num_learners == 0 or args.scheme == "centralized":
        return Central(spec)
    M = shape(spec).M
    try:
        code = make_code(args.scheme, args.num_learners, M, args.seed, args.code_p, args.ldpc)
    except ValueError as e:
        fail(e)
    load = np.count_nonzero(code.C, axis=1)
    if args.num_stragglers > np.count_nonzero(load):
        fail(f"--num-stragglers {args.num_stragglers}: only {np.count_nonzero(load)} learners have work")
    try:
        engine = {"inline": Inline, "local": LocalPool, "ray": RayPool}[args.engine](code, spec, args)
    except Stopped as e:
        fail(e, code=1)
    few = load[load > 0].min()
    print(f"{args.scheme}: {args.num_learners} learners, {few} to {load.max()} of {M} agents each, "
          f"any {code.survives} may be lost; condition numbers up to {code.condition:.0e}", flush=True)
    return engine


def apply_update(nets, optimizer, X, args):
    """What eqs. (10) and (11) change, in place; X (M, P_critic + P_actor)."""
    optimizer["n"] += 1
    change, optimizer["m"], optimizer["v"] = adam(X, optimizer["m"], optimizer["v"], optimizer["n"], args.lr)
    split = nets["critic"].shape[1]
    nets["critic"] += change[:, :split]
    nets["theta"] += change[:, split:]
    nets["target_theta"].lerp_(nets["theta"], args.tau)
    nets["target_critic"].lerp_(nets["critic"], args.tau)


def iterate(env, spec, nets, optimizer, replay, engine, args, iteration):
    """The algorithm box, from the update to the next episodes: so nothing has been drawn or changed when the
    engine gives up, and the state before it can be saved. Returns {tag: value}."""
    logs = {}
    if len(replay) >= args.learning_starts:
        t = optimizer["n"] + 1
        job = make_job(spec, nets, optimizer, replay.sample(args.seed, t, args.batch_size), t)
        X, losses, info = engine.solve(t, job)
        apply_update(nets, optimizer, X.to(args.device), args)
        logs = info | {"losses/critic": losses[:, 0].mean(), "losses/actor": losses[:, 1].mean()}
    episodes = rollout(env, spec, nets["theta"], (args.seed, iteration, PLAY))
    replay.append(*episodes)
    returns = episodes[2][..., :-1].sum(0).mean(0)  # (M,)
    logs |= {f"charts/episodic_return/agent_{i}": r for i, r in enumerate(returns.tolist())}
    return logs | {"charts/episodic_return": returns.sum()}  # over agents, as the original's


# ================================================================ 6. Evaluation
# As in the original: actions are sampled as in training. Own worlds and own random streams: how often one
# evaluates does not change what is learned. The control is a net that is all zeros: the random policy.
def evaluate(args, spec, theta):
    """{row: returns (episodes, M)}, and {row: {measure: mean}} of what the worlds count (`count`)."""
    results, counts = {}, {}
    for name, policy in ("eval", theta), ("eval/random", torch.zeros_like(theta)):
        with torch.random.fork_rng():
            torch.manual_seed(args.seed + 10_000)
            env, seen = make_env(args, args.eval_episodes), []
            watch = lambda env, seen=seen: seen.append(count(env))
            end = rollout(env, spec, policy, (args.seed, 0, EVAL), watch)[2]
        results[name] = end[..., :-1].sum(0)
        counts[name] = {k: float(np.mean([c[k] for c in seen])) for k in seen[0]}
    return results, counts


def count(env):
    """The original's benchmark measures, where the world has them: means over the worlds, at one step."""
    if not hasattr(env, "touch"):
        return {}
    N, K, pos, out = env.num_agents, env.num_adversaries, env.state()["pos"], {}
    gap = np.linalg.norm(pos[:, :, None] - pos[:, None, :N], axis=-1)  # (B, N + L, N)
    if len(env.touch):  # agents collide
        hits = np.triu(gap[:, :N] < env.touch[:N], 1)
        out["collisions"] = hits.sum((1, 2)).mean()
        out |= {"caught": hits[:, :K, K:].sum((1, 2)).mean()} if K else {}
    if env.name == "simple_spread":
        nearest = gap[:, N:].min(2)
        out |= {"landmark_distance": nearest.mean(), "occupied_landmarks": (nearest < 0.1).sum(1).mean()}
    elif env.name in ("simple_adversary", "simple_push"):
        to_goal = gap[np.arange(len(gap)), N + env.goal[0]]  # (B, N)
        out |= {"goal_distance_adversary": to_goal[:, :K].min(1).mean()}
        out |= {"goal_distance_good": to_goal[:, K:].min(1).mean()}
    return out


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(evaluation):
    """{tag: value} of an evaluation."""
    flat = {}
    for name, returns in evaluation[0].items():
        total = returns.sum(1)
        flat |= {f"{name}/return": total.mean().item(), f"{name}/return_ci95": interval(total).item()}
        flat |= {f"{name}/return/agent_{i}": r for i, r in enumerate(returns.mean(0).tolist())}
        flat |= {f"{name}/{k}": v for k, v in evaluation[1][name].items()}
    return flat


def table(evaluation, args):
    """Returns of the policy and of a random one, summed over agents and for each."""
    row = lambda name, values: f"{name:14s}" + "".join(f"{v:>11s}" for v in values)
    number = lambda values: [f"{v:.2f}" for v in values]
    M = evaluation[0]["eval"].shape[1]
    lines = [f"{args.env}: return of an episode, mean of {args.eval_episodes}, ± 95 % interval",
             row("", ["all agents", *(f"agent {i}" for i in range(M))])]
    for name, label in ("eval", "learned"), ("eval/random", "random"):
        both = torch.cat([evaluation[0][name].sum(1, keepdim=True), evaluation[0][name]], 1)
        lines += [row(label, number(both.mean(0).tolist())), row("  ±", number(interval(both).tolist()))]
        lines += [f"  {k.replace('_', ' ')} {v:.3f}" for k, v in evaluation[1][name].items()]
    return "\n".join(lines)


def capture(args, spec, theta, folder, episodes=4):
    """--capture-video: a GIF of some episodes, a tenth of a second a step."""
    from PIL import Image

    frames = []
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        env = make_env(args, 1)
        for k in range(episodes):
            rollout(env, spec, theta, (args.seed, 1 + k, EVAL), lambda env: frames.append(env.render()))
    pictures = [Image.fromarray(frame).quantize(64) for frame in frames]
    pictures[0].save(folder / "play.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return folder / "play.gif"


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
    """What an update needs, the networks, and Adam's state [g_q, g_p] in the order of X."""
    spec = make_spec(args, env)
    nets = {k: v.to(args.device) for k, v in make_nets(spec).items()}
    zeros = torch.zeros(shape(spec).M, shape(spec).P_critic + shape(spec).P_actor, device=args.device)
    return spec, nets, {"n": 0, "m": zeros, "v": zeros.clone()}


def named(spec, nets):
    """{"theta": {name: (M, ...)}, "critic": ..., and the targets}, views."""
    s = shape(spec)
    return {k: unflatten(v, s.actor if "theta" in k else s.critic) for k, v in nets.items()}


def restore(path, args, spec, nets, optimizer=None, replay=None):
    """Put a checkpoint's tensors in place; returns the checkpoint."""
    state = load(path)
    try:
        for group, p in named(spec, nets).items():
            for k in p:
                p[k].copy_(state["params"][group][k])
        if optimizer:
            adam = state["optimizers"]["adam"]
            optimizer |= {"n": adam["n"], "m": adam["m"].to(args.device), "v": adam["v"].to(args.device)}
            replay.load_state_dict(state["replay"])
    except (KeyError, RuntimeError):
        was = state["args"]
        M = len(state["params"]["theta"]["b1"])
        fail(f"{path} holds {M} agents of {was['env']} with {was['num_units']} units and --replay-size "
             f"{was['replay_size']}, not {shape(spec).M} of {args.env} with {args.num_units} and "
             f"{args.replay_size}")
    return state


def evaluate_checkpoint(args):
    """--evaluate: the table of a finished run, and its eval.json."""
    spec, nets, _ = build(args, make_env(args, 1))
    state, folder = restore(args.evaluate, args, spec, nets), Path(args.evaluate).parent
    evaluation = evaluate(args, spec, nets["theta"])
    print(table(evaluation, args))
    write_eval(folder, summary(evaluation), state["global_step"], args.seed)
    if args.capture_video:
        print(capture(args, spec, nets["theta"], folder))
    return named(spec, nets)


def train(args):
    set_up(resolve(args))
    if args.evaluate:
        return evaluate_checkpoint(args)
    env = make_env(args, args.num_envs)
    spec, nets, optimizer = build(args, env)
    s, iteration, global_step = shape(spec), 0, 0
    replay = Replay(args.replay_size, env.horizon, s.M * s.O, s.M, s.M * s.A, args.device)
    state = restore(args.resume, args, spec, nets, optimizer, replay) if args.resume else None
    engine = make_engine(args, spec)
    if state:
        iteration, global_step = state["iteration"], state["global_step"]
        set_rng(state)
    log, stop, done, why = Log(args, global_step), False, global_step >= args.total_steps, None
    engine.interrupted = lambda: log.interrupted

    with contextlib.closing(engine):
        while not stop and not done:
            try:
                logs = iterate(env, spec, nets, optimizer, replay, engine, args, iteration + 1)
            except Stopped as e:  # nothing has changed since the last iteration, so that is what is saved
                logs, stop, why = {}, True, str(e)
            else:
                iteration += 1
                global_step += env.num_envs * env.horizon
                logs["charts/SPS"] = log.sps(global_step)
                stop, done = log.stop(), global_step >= args.total_steps
            milestone = done or not stop and args.eval_every and iteration % args.eval_every == 0
            if milestone:
                evaluation = evaluate(args, spec, nets["theta"])
                logs |= summary(evaluation)
            if logs:
                log.scalars(logs, global_step)
                text = f"return {logs['charts/episodic_return']:.2f}"
                text += f", evaluated {logs['eval/return']:.2f}" if milestone else ""
                log.progress(global_step, text, milestone)
            if stop or done or iteration % args.save_every == 0:
                save(log.dir / "checkpoint.pt", dict(
                    params=named(spec, nets), optimizers={"adam": optimizer}, replay=replay.state_dict(),
                    iteration=iteration, global_step=global_step), args)
    if done:
        write_eval(log.dir, summary(evaluation), global_step, args.seed)
        print(f"{table(evaluation, args)}\n{log.dir}: {global_step} steps")
    log.close()
    if why:
        fail(f"{why}. All before it is in {log.dir}/checkpoint.pt: go on with --resume", code=1)
    return named(spec, nets)


if __name__ == "__main__":
    train(cli(Args, __doc__))
