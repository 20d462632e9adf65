"""
Meta-MAPG: a policy gradient that reckons with one's own learning and with the learning of the others.

  Paper      Kim, Liu, Riemer, Sun, Abdulhai, Habibi, Lopez-Cot, Tesauro, How: A Policy Gradient Algorithm for
             Learning to Learn in Multiagent Reinforcement Learning. ICML 2021, arXiv:2011.00382.
  Problem    Agent i meets peers who learn. All play K episodes, take one policy-gradient step, play again ...
             L times. Choose the initial policy phi^i_0 (and own step sizes eta) to maximise the return AFTER
             the steps, J = E_{peers ~ p} sum_{l=1..L} V^i(phi_l), phi = (phi^i, phi^-i).
  Algorithm  for each outer iteration: draw C personas as peers; for each of C Markov chains, side by side:
               for l = 0 .. L:
                 tau_l ~ phi_l: K episodes of H steps                                     -> rollout()
                 b^a: linear feature baseline, fitted to the batch                   (1)  -> linear_baseline()
                 O^a = mean_k sum_t gamma^t [box(c_t) r^a_t + (1 - box(s_t)) b^a_t]  (2)  -> dice_objective()
                 phi^a_{l+1} = phi^a_l + lr^a dO^a/dphi^a, for every agent a         (3)  -> inner_update()
               A_l: generalised advantage of tau_l                                   (4)  -> gae()
               loss = -sum_l mean_k sum_t A_l (current + own learning + peer learning)  (5)  -> outer_loss()
             clip each chain's gradient, remove conflicts between chains (PCGrad)    (6)  -> pcgrad()
             phi^i_0, eta, critic: one AMSGrad step                                  (7)  -> AMSGrad.step()
             Tables in a two-player game: V itself has a closed form                 (8)  -> exact_value()
             Opponent modelling: peers' parameters from their actions alone          (9)  -> fit_opponent()
             Pre-training of the peers of half_cheetah_dir: recurrent PPO            (10) -> ppo_loss()
  Symbols    phi^i_0 theta  {name: (C, ...)}   tau_l   batch  (C, H, K[, N])    lr^i_l   eta      (C, L)
             phi_l   players  N such dicts     s_t     nodes  (C, N, H, K)      r        reward   (C, H, K, N)
             C chains, H steps, K episodes, N agents, S states (or numbers that describe one), A actions,
             L updates, P parameters.
  Methods    --method meta-mapg | meta-pg (no peer learning) | lola-dice (--look-ahead) | reinforce
             --no-own-learning, --no-peer-learning: the paper's ablations; --opponent-model: Meta-MAPG-OM.
  Departures [D1] The baseline is regressed on its own time steps; the authors' code pairs time-major features
                  with batch-major targets (--baseline scrambled), at a third more noise. Solved in float64.
                  The squares of one-hot features equal the features; both become a factor sqrt(2).
             [D2] --estimator last keeps the terms of eq. (5) that carry signal in expectation: those of tau_l
                  itself. --estimator code is the authors' sum, which also pairs (t, k) of different batches.
             [D3] C chains make one synchronous step, where the authors' five processes make five asynchronous
                  ones. So the outer step sizes are multiplied by sqrt(C), and PCGrad acts among these chains.
             [D4] log-softmax, where the authors clamp probabilities and lose the gradient of sure actions.
             [D5] RPS has H = 50, as in the authors' code; the paper says 150 (--horizon 150).
             [D6] LOLA-DiCE, REINFORCE, "no own learning" and opponent modelling were never released. Ours:
                  LOLA scores the return after look_ahead steps of the peers alone, REINFORCE that of phi_0,
                  "no own learning" drops log pi^i(tau_m), m >= 1, opponents are fitted by maximum likelihood.
             [D7] The paper's peers for half_cheetah_dir are lost. Ours are the front legs of a pair that PPO
                  trains to run to the left, kept at multiples of 2^-10; the split by iteration is theirs.
                  Outer steps there are ours, too: theirs, 5e-5 (critic 5.5e-5), want up to 62,500 chains.
  Run        python meta_mapg.py --env ipd                    # exact gradient of tables: 10 s on one core
             python meta_mapg.py --env ipd --method meta-pg   # the same without peer learning: 10 s
             python meta_mapg.py --env rps                    # sampled gradient, tables: 1 min on one core
             python meta_mapg.py --env ipd --policy lstm --outer-lr 3e-4 --critic-lr 5e-4   # paper's nets
             python meta_mapg.py --env rps --policy lstm --outer-lr 1e-4 --critic-lr 5e-4   # the same
             python meta_mapg.py --env half_cheetah_dir                        # against the peers we ship
             python meta_mapg.py --env half_cheetah_dir --pretrain-peers       # makes peers, 9 CPU minutes
             python meta_mapg.py --env half_cheetah_dir --personas runs/peers/peers.npz   # against those
             torchrun --nproc-per-node 2 meta_mapg.py --env ipd --policy lstm   # chains shared out
             python meta_mapg.py --env ipd --evaluate runs/x/checkpoint.pt     # the table of a finished run
  Expect     ipd: the sum of rewards over phi_1..phi_7 on held-out personas is about 7 against cooperative and
             4 against defective peers; with --method meta-pg about -1 and -3. rps: about 1.4. ipd with lstm,
             one seed: 1.7 and 6.0 at best in 280 million steps (paper: 10.1, 7.6), see benchmark/README.md.
             half_cheetah_dir, 15 million steps, a quarter of an hour of one core: return under phi_2, seeds
             1, 2, 3: 97, -63, -85 (paper: 207); meta-pg -80, -50, -82 (208); reinforce 18, 11, -60 (113);
             lola-dice, seed 1: 124 (75). Too short to tell methods apart: a run pushes forwards or holds on.
  Licence    MIT. Please cite the paper above for the method.
"""

import contextlib
import csv
import ctypes
import functools
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

# Large pages for torch, and no freed memory given back by glibc: fresh pages took a third of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(Exception):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["ipd", "rps", "rps3", "rps4", "half_cheetah_dir"]

PAPER = {  # what an argument left at None becomes: the paper's value for the game ...
    "ipd": dict(horizon=150, gamma=0.96, chain_length=7, inner_lr=0.1, peer_lr=1.0, outer_lr=1e-4,
                critic_lr=1.5e-4, ent_coef=0.5, num_chains=16, total_steps=600_000_000, num_threads=2,
                eval_every=25, save_every=5),
    "rps": dict(horizon=50,  # [D5]
                gamma=0.90, chain_length=7, inner_lr=0.01, peer_lr=1.0, outer_lr=1e-5, critic_lr=1.5e-5,
                ent_coef=0.0, num_chains=16, total_steps=300_000_000, num_threads=2, eval_every=25,
                save_every=5),
    "half_cheetah_dir": dict(horizon=200, gamma=0.95, chain_length=2, inner_lr=0.005, peer_lr=0.005,
                             outer_lr=1e-3, critic_lr=1e-3,  # [D7]
                             ent_coef=0.0, num_chains=1, num_threads=1, total_steps=15_000_000,
                             eval_every=100, save_every=5),
}
PAPER["rps3"] = PAPER["rps4"] = PAPER["rps"]
TABLE = dict(inner_lr=1.0, outer_lr=0.004, critic_lr=0.02, ent_coef=0.0, num_chains=24, num_threads=1,
             eval_every=25, save_every=25)  # ... or, for --policy table, that of the quick experiment, ours
TABLE_STEPS = {"exact": 4_320_000, "sampled": 92_160_000}
PRETRAIN = dict(outer_lr=1e-4, critic_lr=1e-3, num_chains=1, total_steps=6_400_000, eval_every=25,
                save_every=25)  # ... or, for --pretrain-peers, ours: 500 iterations of 64 x 200 steps


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
    method: Literal["meta-mapg", "meta-pg", "lola-dice", "reinforce"] = "meta-mapg"
    """what is trained; all methods adapt by eq. (3) when tested"""
    own_learning: bool = True
    """count our own future updates, eq. (5); off: the paper's ablation"""
    peer_learning: bool = True
    """count how our actions shape the peers' updates, eq. (5); off: Meta-PG"""
    opponent_model: bool = False
    """Meta-MAPG-OM: differentiate through peers fitted to their actions, eq. (9)"""
    look_ahead: int = 1
    """steps of the peers that lola-dice looks ahead; the paper tries 1, 3, 5"""
    policy: Optional[Literal["table", "lstm"]] = None
    """agent i: a table of logits for each state, or the paper's LSTM; default: table, peers are tables too;
    in half_cheetah_dir all are LSTMs"""
    gradient: Optional[Literal["exact", "sampled"]] = None
    """eq. (8) or eqs. (1)-(5); default: exact where it is defined (ipd with tables)"""
    estimator: Literal["last", "code"] = "last"
    """terms of eq. (5): those of the scored batch, or the authors' whole sum"""
    baseline: Literal["aligned", "scrambled"] = "aligned"
    """rows of the regression in eq. (1): right, or as in the authors' code"""
    chain_length: Optional[int] = None
    """L, updates in a chain"""
    num_episodes: int = 64
    """K, episodes in a batch; smaller: noisier updates"""
    num_chains: Optional[int] = None
    """C, chains (one persona each) in an outer step, over all processes"""
    horizon: Optional[int] = None
    """H, steps in an episode"""
    gamma: Optional[float] = None
    """discount, in [0, 1)"""
    gae_lambda: float = 0.95
    """lambda of eq. (4)"""
    inner_lr: Optional[float] = None
    """first value of eta, the own step sizes in eq. (3), which are learned"""
    peer_lr: Optional[float] = None
    """step size of the peers in eq. (3)"""
    outer_lr: Optional[float] = None
    """step size of phi_0 and eta for one chain in eq. (7); times sqrt(C)"""
    critic_lr: Optional[float] = None
    """step size of the critic for one chain in eq. (7); times sqrt(C)"""
    ent_coef: Optional[float] = None
    """weight of the entropy of phi_0 where its own return is not scored"""
    max_grad_norm: float = 10.0
    """each chain's gradients (policy, eta, critic) are clipped to this norm"""
    pcgrad: bool = True
    """project away conflicts between the chains' gradients, eq. (6)"""
    recompute: bool = False
    """keep one chain step in memory instead of L: a third slower, for many chains"""
    personas: Optional[str] = None
    """.npz with arrays <class>_<split> of (n, S, A) log-probabilities; default: drawn from persona_seed. In
    half_cheetah_dir: a peers.npz of --pretrain-peers; default: the one in benchmark/peers"""
    pretrain_peers: bool = False
    """half_cheetah_dir: make the population, two agents who learn to run to the left, eq. (10)"""
    persona_seed: int = 0
    """seed of the population, the same for all run seeds"""
    ood: bool = False
    """hold out the most extreme personas for the test instead of random ones"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    cheetah = args.env == "half_cheetah_dir"
    args.policy = args.policy or ("lstm" if cheetah else "table")
    args.gradient = args.gradient or ("exact" if args.env == "ipd" and args.policy == "table" else "sampled")
    preset = dict(PAPER[args.env], eval_episodes=args.num_episodes)
    if args.policy == "table":
        preset |= TABLE | dict(total_steps=TABLE_STEPS[args.gradient])
        preset |= dict(outer_lr=0.02 / math.sqrt(24)) if args.gradient == "exact" else {}
    for name, value in (preset | (PRETRAIN if args.pretrain_peers else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.method == "meta-pg":
        args.peer_learning = False
    if args.gradient == "exact" and (args.policy != "table" or args.env != "ipd"):
        fail(f"--gradient exact needs --policy table and --env ipd, not {args.policy} and {args.env}")
    if args.gradient == "exact" and args.opponent_model:
        fail("--opponent-model fits sampled actions; it needs --gradient sampled")
    if cheetah and (args.policy == "table" or args.opponent_model or args.ood):
        fail("half_cheetah_dir is played by LSTMs: no --policy table, --opponent-model or --ood")
    if args.pretrain_peers and (not cheetah or WORLD > 1):
        fail("--pretrain-peers needs --env half_cheetah_dir and a single process")
    if cheetah and not (args.personas or args.pretrain_peers or POPULATION.exists()):
        fail(f"half_cheetah_dir needs peers and there is no {POPULATION}: make them with --pretrain-peers "
             "--run-dir runs/peers, then say --personas runs/peers/peers.npz")
    if not (args.own_learning or args.peer_learning):
        fail("--no-own-learning and --no-peer-learning together leave nothing to meta-learn")
    for name in ("num_chains", "num_episodes", "horizon", "chain_length", "look_ahead", "num_threads",
                 "save_every", "eval_episodes", "total_steps"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must be in [0, 1), not {args.gamma}")
    if args.num_chains % WORLD:
        fail(f"--num-chains {args.num_chains} does not divide among {WORLD} processes")
    return args


# ================================================================ 1. Environment
# [D7] The paper's peers were a download that is gone, and how they were trained is not said. Ours are made by
# pretrain_update(). Peer n is the front leg that played iteration n of it; which n are for training,
# validation and test is the authors' choice. The weights are kept in units of GRID, as whole numbers, and
# written as differences from one peer to the next, which makes a fifth of them in float16.
VALIDATION = [3, 9, 38, 53, 57, 88, 104, 122, 146, 150, 166, 167, 190, 196, 205, 210, 221, 230, 233, 246, 259,
              265, 273, 278, 293]
SPLITS = {"train": [n for n in range(300) if n not in VALIDATION], "val": VALIDATION,
          "test": [*range(475, 500)]}
POPULATION = Path(__file__).with_name("benchmark") / "peers" / "half_cheetah_dir.npz"  # the one we ship
KEPT, GRID = sorted(sum(SPLITS.values(), [])), 2.0**-10
REWARD_UNIT = 100  # in half_cheetah_dir the agents see the reward divided by this


def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own game by returning an object with these members:
    #   num_envs, horizon, num_agents, states, actions, device, discrete
    #   reset() -> obs, step(action) -> obs, reward (B, N), terminated, truncated, info
    #   where obs[i], action[i]: (B,) long, the state's index instead of a one-hot vector
    #   sample_tasks(n) -> (n, N-1, S, A) logits of the peers; tasks_by_class(split) -> {class: such tasks}
    # or, not discrete: reset(part=), see envs/mujoco.py; obs[i] (B, S), action[i] (B, A), tasks (n, N-1, P)
    try:
        if args.env == "half_cheetah_dir":
            return Cheetah(args, num_envs)
        return envs.make(args.env, num_envs, horizon=args.horizon, device=args.device, index_obs=True,
                         personas=args.personas, persona_seed=args.persona_seed, ood=args.ood)
    except ValueError as e:
        fail(e)


class Cheetah:
    """The two-agent HalfCheetah to the right with its peers or, to make these, to the left."""

    discrete, states, actions = False, 17, 3

    def __init__(self, args, num_envs):
        self.direction = torch.full((num_envs, 1), -1.0 if args.pretrain_peers else 1.0)
        self.world = envs.make("two_agent_half_cheetah", num_envs, horizon=args.horizon, device=args.device)
        self.population = None if args.pretrain_peers else read_population(args.personas or POPULATION)

    def __getattr__(self, name):
        return getattr(self.world, name)

    def reset(self, part):
        return self.world.reset(self.direction, part)

    def step(self, action):
        obs, reward, *rest = self.world.step(action)
        return obs, reward / REWARD_UNIT, *rest

    def peers(self, numbers):
        return self.population[[KEPT.index(n) for n in numbers], None].to(self.device)  # (n, 1, P)

    def sample_tasks(self, n):
        return self.peers(SPLITS["train"][i] for i in torch.randint(len(SPLITS["train"]), (n,)).tolist())

    def tasks_by_class(self, split):
        return {"left": self.peers(SPLITS[split])}  # one class: they all ran to the left


def per_episode(reward, args):
    """Mean reward per step, as the agents see it -> mean return of an episode."""
    return reward * args.horizon * (REWARD_UNIT if args.env == "half_cheetah_dir" else 1)


def score(reward, args):
    """What the paper reports for it: in games the same, in half_cheetah_dir the return of an episode."""
    return per_episode(reward, args) if args.env == "half_cheetah_dir" else reward


def write_population(path, weights, returns):
    """weights (n, P) int16 in units of GRID, peers KEPT[:n]; returns (iterations,) of pre-training."""
    steps = np.diff(weights.numpy(), axis=0, prepend=np.int16(0)).T  # (P, n)
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, steps=np.ascontiguousarray(steps), returns=returns.numpy())
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")


@functools.lru_cache(1)
def read_population(path):
    """(325, P) float32: peers KEPT. Raises ValueError."""
    try:
        with np.load(path) as data:
            steps = data["steps"]
    except Exception as e:  # missing, not an .npz, truncated, of a matrix game: all are the user's to know
        raise ValueError(f"personas {path}: cannot be read as a file of --pretrain-peers ({e})") from None
    size = sum(math.prod(shape) for shape in PEER.values())
    if steps.dtype != np.int16 or steps.shape != (size, len(KEPT)):
        raise ValueError(f"personas {path}: wanted {len(KEPT)} peers of {size} weights, not "
                         f"{steps.shape[::-1]}: --pretrain-peers takes {KEPT[-1] + 1} iterations")
    return torch.from_numpy(np.cumsum(steps, 1, dtype=np.int16).T.astype(np.float32)) * GRID


# ================================================================ 2. Networks
# A player is a dict of tensors with the chains in front. {"logits": (C, S, A)} is a table; anything else is
# the paper's actor: Linear(S -> 64), ReLU, LSTM(64 -> 64), Linear(64 -> A). With a "log_std" (C, A), which
# no input changes, the outputs are the means of a Gaussian. The critic has the same trunk and one output.
# States are S numbers each, or one index of S: then everything before the recurrence is a table of S rows,
# computed once (gate_inputs), and a time step is one look-up and one product with W_hh.
#
# An outer step differentiates twice through L+1 recurrences of H steps, and autograd would record a dozen
# nodes for each. So the recurrence is a Function with a hand-written derivative, LSTMScan, and that
# derivative is a Function too, LSTMScanGrad. Transposing a scan that runs backward in time gives one that
# runs forward: the recurrence of tangents.
def lstm_shapes(states, outputs, hidden=64, gaussian=False):
    """{name: shape}: weights (out, in), gates in the order i, f, g, o."""
    H = hidden
    shapes = {"w1": (H, states), "w_ih": (4 * H, H), "w_hh": (4 * H, H), "w2": (outputs, H)}
    shapes |= {"b1": (H,), "b_ih": (4 * H,), "b_hh": (4 * H,), "b2": (outputs,)}
    return shapes | ({"log_std": (outputs,)} if gaussian else {})


PEER = lstm_shapes(17, 3, gaussian=True)  # of half_cheetah_dir


def make_lstm(states, outputs, hidden=64, gaussian=False):
    """Parameters {name: tensor}: weights Xavier-normal, biases and log_std 0."""
    return {k: torch.randn(shape) * math.sqrt(2 / sum(shape)) if len(shape) == 2 else torch.zeros(shape)
            for k, shape in lstm_shapes(states, outputs, hidden, gaussian).items()}


def gate_weights(p):
    """W_ih^T, its bias, W_hh: (C, H, 4H), (C, 1, 4H), (C, 4H, H). Block g is doubled in all of them, because
    tanh(z) = 2 sigmoid(2z) - 1 makes all four gates one call of the sigmoid."""
    H = p["w_hh"].shape[-1]
    double = torch.tensor([1, 1, 2, 1], device=p["w_hh"].device).repeat_interleave(H)[:, None]
    bias = (p["b_ih"] + p["b_hh"])[..., None] * double
    return (p["w_ih"] * double).mT, bias.mT, p["w_hh"] * double


def gate_inputs(p, w_in, bias, x=None):
    """Input part of the gates for each state x (C, n, S), or for each of the S indices -> (C, n or S, 4H)."""
    w1, b1 = p["w1"].mT, p["b1"][:, None]
    return torch.baddbmm(bias, F.relu(w1 + b1 if x is None else torch.baddbmm(b1, x, w1)), w_in)


def inputs_at(z, rows, t):
    """Step t of the gates' inputs: rows (C, T, K) of a table z (CS, 4H); without rows, of z (C, T, K, 4H)."""
    return z[:, t] if rows is None else z[rows[:, t]]


def lstm_cell(z, c_prev, gate, c, tanh_c, h):
    """One step, into gate (..., 4H) and c, tanh_c, h (..., H): c = f c' + i tanh(g), h = o tanh(c)."""
    torch.sigmoid(z, out=gate)
    i, f, g, o = gate.chunk(4, -1)  # tanh(g) = 2 g - 1 from here on
    torch.mul(f, c_prev, out=c).addcmul_(i, g, value=2).sub_(i)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


class LSTMScan(torch.autograd.Function):
    """w (C, 4H, H) and z: a table (C, S, 4H) with rows (C, T, K) = state + S chain, or the gates' inputs
    (C, T, K, 4H) with rows None -> h, gate, c, tanh_c (C, T, K, .)."""

    @staticmethod
    def forward(ctx, z, w, rows):
        ctx.set_materialize_grads(False)
        ctx.states = z.shape[1]
        (C, T, K), H = z.shape[:3] if rows is None else rows.shape, w.shape[-1]
        z = z if rows is None else z.flatten(0, 1)
        gate = z.new_empty(C, T, K, 4 * H)
        c, tanh_c, h = (z.new_empty(C, T, K, H) for _ in range(3))
        h_prev = c_prev = z.new_zeros(C, K, H)
        for t in range(T):
            now = torch.baddbmm(inputs_at(z, rows, t), h_prev, w.mT)
            lstm_cell(now, c_prev, gate[:, t], c[:, t], tanh_c[:, t], h[:, t])
            h_prev, c_prev = h[:, t], c[:, t]
        ctx.save_for_backward(w, gate, c, h, tanh_c, rows)
        ctx.mark_non_differentiable(tanh_c)  # its derivative is counted in that of c
        return h, gate, c, tanh_c

    @staticmethod
    def backward(ctx, dh, dgate, dc, _):
        w, gate, c, h, tanh_c, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # in the inner update: only h was used, and this is differentiated again
            return *LSTMScanGrad.apply(dh, gate, c, h, w, tanh_c, rows, ctx.states), None
        dz, *_ = backward_scan(dh, dgate, dc, gate, c, tanh_c, w)
        return *sum_by_parameter(dz, h, rows, ctx.states), None


def backward_scan(dh_in, dgate_in, dc_in, gate, c, tanh_c, w):
    """Back-propagation through time; *_in: derivatives from outside, (C, T, K, .) or None. Returns those by
    the pre-activations z and the gates, (C, T, K, 4H), and the total ones by h and c, (C, T, K, H)."""
    C, T, K, H = c.shape
    dz, dgate, dhs, dcs = (torch.empty_like(x) for x in (gate, gate, c, c))
    zero = c.new_zeros(C, K, H)
    dc = zero.clone()
    for t in reversed(range(T)):
        i, f, g, o = gate[:, t].chunk(4, -1)
        di, df, dg, do = dgate[:, t].chunk(4, -1)
        dh = dhs[:, t]
        dh.copy_(zero if dh_in is None else dh_in[:, t])
        if t + 1 < T:
            dh.add_(torch.bmm(dz[:, t + 1], w))
        dc.add_(torch.ops.aten.tanh_backward(dh * o, tanh_c[:, t]))
        if dc_in is not None:
            dc.add_(dc_in[:, t])
        dcs[:, t] = dc
        torch.mul(dc, g, out=di).mul_(2).sub_(dc)
        torch.mul(dc, c[:, t - 1] if t else zero, out=df)
        torch.mul(dc, i, out=dg).mul_(2)
        torch.mul(dh, tanh_c[:, t], out=do)
        if dgate_in is not None:
            dgate[:, t].add_(dgate_in[:, t])
        torch.ops.aten.sigmoid_backward.grad_input(dgate[:, t], gate[:, t], grad_input=dz[:, t])
        dc.mul_(f)
    return dz, dgate, dhs, dcs


def sum_by_parameter(dz, h, rows, states):
    """Sum dz (C, T, K, 4H) over the steps that used the same parameter: table (C, S, 4H), w (C, 4H, H)."""
    dw = torch.bmm(dz[:, 1:].flatten(1, 2).mT, h[:, :-1].flatten(1, 2))
    if rows is None:  # no table: each step has inputs of its own
        return dz, dw
    onehot = F.one_hot((rows % states).flatten(1), states).to(dz.dtype)  # (C, TK, S)
    return torch.bmm(onehot.mT, dz.flatten(1, 2)), dw


class LSTMScanGrad(torch.autograd.Function):
    """The derivative as a function of its own: dh, gate, c, h, w -> those by z and w."""

    @staticmethod
    def forward(ctx, dh_in, gate, c, h, w, tanh_c, rows, states):
        dz, dgate, dh, dc = backward_scan(dh_in, None, None, gate, c, tanh_c, w)
        ctx.save_for_backward(gate, c, h, w, tanh_c, rows, dz, dgate, dh, dc)
        return sum_by_parameter(dz, h, rows, states)

    @staticmethod
    @once_differentiable
    def backward(ctx, u_z, u_w):
        # Read u_z and u_w as directions in parameter space. Then u, e, c_dot, h_dot are the tangents of
        # pre-activations, gates, c, h along them, and every product in backward_scan leaves one term for each
        # of its two factors.
        gate, c, h, w, tanh_c, rows, dz, dgate, dh, dc = ctx.saved_tensors
        C, T, K, H = c.shape
        u_z = u_z if rows is None else u_z.flatten(0, 1)  # see inputs_at
        w_both = torch.cat([w, u_w], -1).mT  # (C, 2H, 4H)
        out_dh, out_gate, out_c, out_h = (torch.empty_like(x) for x in (c, gate, c, h))
        both, zero = c.new_zeros(C, K, 2 * H), c.new_zeros(C, K, H)
        h_dot, h_prev = both.chunk(2, -1)
        c_dot = zero.clone()
        for t in range(T):
            (i, f, g, o), (oi, of, og, oo) = gate[:, t].chunk(4, -1), out_gate[:, t].chunk(4, -1)
            c_prev, dct, dht, tct = c[:, t - 1] if t else zero, dc[:, t], dh[:, t], tanh_c[:, t]
            u = torch.baddbmm(inputs_at(u_z, rows, t), both, w_both)
            e = torch.ops.aten.sigmoid_backward(u, gate[:, t])
            ei, ef, eg, eo = e.chunk(4, -1)
            u.mul_(dgate[:, t])
            torch.addcmul(u, u, gate[:, t], value=-2, out=out_gate[:, t])  # the slope's slope, 1 - 2 gate
            oi.addcmul_(eg, dct, value=2)
            of.addcmul_(c_dot, dct)
            og.addcmul_(ei, dct, value=2)
            c_dot.mul_(f).addcmul_(ei, g, value=2).sub_(ei).addcmul_(ef, c_prev).addcmul_(eg, i, value=2)
            tanh_dot = torch.ops.aten.tanh_backward(c_dot, tct)
            oo.addcmul_(tanh_dot, dht)
            if t:
                out_c[:, t - 1].addcmul_(ef, dct)
            by_tanh = torch.sub(eo, torch.mul(c_dot, o).mul_(tct), alpha=2).mul_(dht)
            out_c[:, t] = torch.ops.aten.tanh_backward(by_tanh, tct)
            torch.mul(o, tanh_dot, out=h_dot).addcmul_(eo, tct)
            out_dh[:, t] = h_dot
            h_prev.copy_(h[:, t])
        later = dz[:, 1:].flatten(1, 2)
        out_w = torch.bmm(later.mT, out_dh[:, :-1].flatten(1, 2))
        out_h[:, :-1] = torch.bmm(later, u_w).unflatten(1, (T - 1, K))
        out_h[:, -1] = 0
        return out_dh, out_gate, out_c, out_h, out_w, None, None, None


def lstm_outputs(p, state):
    """The whole network on (C, T, K) or (C, T, K, S) states -> (C, T, K, outputs), twice differentiable."""
    w_in, bias, w = gate_weights(p)
    if state.is_floating_point():
        x, rows = state.flatten(1, 2).to(w.dtype), None
        z = gate_inputs(p, w_in, bias, x).unflatten(1, state.shape[1:3])
    else:
        z = gate_inputs(p, w_in, bias)
        rows = state + z.shape[1] * torch.arange(len(state), device=state.device).view(-1, 1, 1)
    h, *_ = LSTMScan.apply(z, w, rows)
    return torch.baddbmm(p["b2"][:, None], h.flatten(1, 2), p["w2"].mT).unflatten(1, state.shape[1:3])


def look_up(table, state):
    """(C, S, X) rows at (C, T, K) states -> (C, T, K, X)."""
    index = state.flatten(1)[..., None].expand(-1, -1, table.shape[-1])
    return table.gather(1, index).unflatten(1, state.shape[1:])


def log_policy(p, state):
    """log pi(.|s) at (C, T, K) states -> (C, T, K, A)."""
    if "logits" in p:
        return look_up(p["logits"].log_softmax(-1), state)
    return lstm_outputs(p, state).log_softmax(-1)  # [D4]


def std_of(p):
    """Standard deviations of a Gaussian policy, (C, 1, 1, A)."""
    return p["log_std"].clamp(min=math.log(1e-6)).exp()[:, None, None]


def log_prob(p, state, action):
    """log pi(a|s) of the actions (C, T, K) or, of a Gaussian, (C, T, K, A) -> (C, T, K)."""
    if "log_std" not in p:
        return log_policy(p, state).gather(-1, action[..., None])[..., 0]
    std = std_of(p)
    z = (action - lstm_outputs(p, state)) / std
    return -(0.5 * z**2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(p, state):
    """That of pi(.|s) -> (C, T, K), or (C, 1, 1) for a Gaussian, where it is the same in every state."""
    if "log_std" in p:
        return (std_of(p).log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    log_pi = log_policy(p, state)
    return -(log_pi.exp() * log_pi).sum(-1)


def together(players):
    """N Gaussian players as one with N C chains, so that their time steps are one product; else None."""
    if not all("log_std" in p for p in players):
        return None
    return {k: torch.cat([p[k] for p in players]) for k in players[0]}


def critic_value(psi, state):
    """v(s_t) at (C, T, K) states, each episode read from its start -> (C, T, K)."""
    return (look_up(psi["values"], state) if "values" in psi else lstm_outputs(psi, state))[..., 0]


# ================================================================ 3. Rollout
# All C chains and K episodes are played as one batch of B = C K games. Nobody learns during a batch, so no
# graph is recorded here: section 5 recomputes the log-probabilities from (state, action) to differentiate.
class Batch(NamedTuple):
    state: torch.Tensor  # (C, H, K[, S]) what all agents saw
    action: torch.Tensor  # (C, H, K, N[, A])
    reward: torch.Tensor  # (C, H, K, N)


def player(p):
    """A function from states (C, K[, S]) to probabilities, or a Gaussian's means, (C, K, A); it keeps the
    LSTM's memory between calls."""
    if "logits" in p:
        table = p["logits"].softmax(-1)
        chain = torch.arange(len(table), device=table.device)[:, None]
        return lambda state: table[chain, state]
    w_in, bias, w = gate_weights(p)
    table = None if "log_std" in p else gate_inputs(p, w_in, bias)
    chain, memory, H = torch.arange(len(w), device=w.device)[:, None], [], w.shape[-1]

    def step(state):
        if not memory:
            memory.extend(w.new_zeros(*state.shape[:2], n) for n in (H, H, H, 4 * H))
        h, c, tanh_c, gate = memory
        z = table[chain, state] if table is not None else gate_inputs(p, w_in, bias, state.to(w.dtype))
        lstm_cell(torch.baddbmm(z, h, w.mT), c, gate, c, tanh_c, h)
        out = torch.baddbmm(p["b2"][:, None], h, p["w2"].mT)
        return out if table is None else out.softmax(-1)

    return step


def draw(p, out, noise):
    """Actions from what player() returned: of a Gaussian (C, K, A) with noise N(0, 1); else (C, K), by the
    inverse transform of noise U(0, 1)."""
    if "log_std" in p:
        return out + std_of(p)[:, 0] * noise
    return (noise[..., None] > out.cumsum(-1)[..., :-1]).sum(-1)


@torch.no_grad()
def rollout(env, players, num_episodes, chains=None, frames=None):
    """Play one batch with N players, agent 0 first. chains: (first, total) of this process's C chains.
    frames: a list that receives a picture of the first game at every step."""
    C, K, N = env.num_envs // num_episodes, num_episodes, env.num_agents
    first, total = chains or (0, C)
    # Every process draws for all chains and keeps its own part: a chain does not depend on who runs it.
    noise, shape = (torch.rand, ()) if env.discrete else (torch.randn, (env.actions,))
    noise = noise(env.horizon, total, K, N, *shape, device=env.device)[:, first : first + C]
    obs = env.reset() if env.discrete else env.reset(part=(first * K, total * K))
    one = together(players)
    act, steps = [player(p) for p in ([one] if one else players)], []
    for t in range(env.horizon):
        state = [o.unflatten(0, (C, K)) for o in obs]
        if one:
            action = draw(one, act[0](torch.cat(state)), noise[t].movedim(2, 0).flatten(0, 1)).chunk(N)
        else:
            action = [draw(p, act[a](state[a]), noise[t, :, :, a]) for a, p in enumerate(players)]
        obs, reward, _, _, _ = env.step([a.flatten(0, 1) for a in action])
        steps.append((state[0], torch.stack(action, 2), reward.view(C, K, N)))
        if frames is not None:
            frames.append(env.render(0))
    return Batch(*(torch.stack(x, 1) for x in zip(*steps)))


# ================================================================ 4. Objectives
# Pure functions of tensors. Time is dimension -2 and the episode dimension -1 in (..., H, K).
def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension -2."""
    out, acc = torch.empty_like(reward), torch.zeros_like(reward[..., 0, :])
    for t in reversed(range(reward.shape[-2])):
        acc = reward[..., t, :] + gamma * acc
        out[..., t, :] = acc
    return out


def gae(reward, value, gamma, gae_lambda):
    """eq. (4): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t, and v_H = 0."""
    assert reward.shape == value.shape
    next_value = torch.cat([value[..., 1:, :], torch.zeros_like(value[..., :1, :])], -2)
    return returns_to_go(reward + gamma * next_value - value, gamma * gae_lambda)


def linear_baseline(state, reward, num_states, gamma, scrambled=False, ridge=1e-5):
    """eq. (1): ridge regression of the return-to-go on [s, s^2, t, t^2, t^3, 1], t in hundreds of steps, for
    each chain and agent. state (C, H, K[, S]), reward (C, N, H, K) -> (C, N, H, K), constant for autograd."""
    C, N, H, K = reward.shape
    t = torch.arange(H, device=state.device, dtype=torch.float64)[:, None].expand(H, K) / 100
    time = torch.stack([t, t**2, t**3, torch.ones_like(t)], -1).expand(C, H, K, 4)
    if state.is_floating_point():
        s = torch.cat([state, state**2], -1).double()
    else:
        s = F.one_hot(state, num_states).double() * math.sqrt(2)  # [D1] s and s^2 at once
    x = torch.cat([s, time], -1).flatten(1, 2)  # (C, HK, S+4 or 2S+4)
    target = returns_to_go(reward.double(), gamma)
    if scrambled:
        target = target.mT  # [D1] batch-major targets against time-major rows
    target = target.reshape(C, N, H * K).mT  # (C, HK, N)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    w = torch.linalg.solve(gram, x.mT @ target)
    return (x @ w).mT.reshape(C, N, H, K).to(reward.dtype).detach()


def box(z):
    """DiCE's magic box: value 1, derivative that of z."""
    return torch.exp(z - z.detach())


def dice_objective(nodes, reward, baseline, gamma):
    """eq. (2), for each chain and agent: all (C, N, H, K) -> (C, N). `nodes` are the log-probabilities
    through which the samples depend on parameters: the own ones, or those of all agents, which lets our
    policy shape their step."""
    assert nodes.shape == reward.shape == baseline.shape
    discount = gamma ** torch.arange(nodes.shape[-2], device=nodes.device, dtype=nodes.dtype)[:, None]
    objective = box(nodes.cumsum(-2)) * reward + (1 - box(nodes)) * baseline
    return (discount * objective).sum(-2).mean(-1)


def outer_loss(logprobs, advantages, own_learning=True, peer_learning=True, estimator="last"):
    """eq. (5), summed over scored l: logprobs[l] (C, N, H, K), advantages[l] (C, H, K) or None -> (C,)."""
    loss = earlier = 0.0
    for l, (logprob, adv) in enumerate(zip(logprobs, advantages)):
        if l == 0:
            score = logprob[:, 0]  # the current policy
        else:
            own = logprob[:, 0] if own_learning else 0.0  # own learning: phi^i_l depends on phi^i_0
            peer = logprob[:, 1:].sum(1) if peer_learning else 0.0  # peer learning: so does phi^-i_l
            score = earlier + own + peer
        if estimator == "code":  # [D2] the terms of all batches so far
            earlier = score
        if adv is not None:
            assert adv.shape == logprob[:, 0].shape
            loss = loss - (adv * score).sum(-2).mean(-1)
    return loss


def ppo_loss(logprob, old, adv, clip_coef=0.2):
    """eq. (10): the clipped surrogate, mean over all steps. logprob, old (N, H, K), adv (1, H, K)."""
    ratio = (logprob - old).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv).mean()


def exact_value(x, y, reward_table, gamma, horizon):
    """eq. (8): V = sum_{t<H} gamma^t d_t R, where d_{t+1} = d_t P is the distribution of joint actions.
    x, y (C, S, A) logits of player 0 and 1, reward_table (S, 2) -> V (C, 2), discounted visits (C, S-1)."""
    joint = (x.softmax(-1)[..., :, None] * y.softmax(-1)[..., None, :]).flatten(2)  # (C, S, AA): next state
    start, P = joint[:, :1], joint[:, 1:] * gamma
    # sum_{t<n} P^t by doubling, reading H from its highest bit: S_2n = S_n + P^n S_n and S_{n+1} = I + P S_n
    eye = torch.eye(P.shape[-1], device=P.device, dtype=P.dtype).expand_as(P)
    total, power = eye, P
    for bit in bin(horizon)[3:]:
        total, power = total + power @ total, power @ power
        if bit == "1":
            total, power = eye + P @ total, power @ P
    visits = (start @ total)[:, 0]
    return visits @ reward_table[1:].to(visits.dtype), visits


# ================================================================ 5. Update
# A chain is L steps of inner_update. create_graph keeps every step differentiable, so that one backward pass
# walks the whole chain: eq. (5) sees phi_l as a function of phi_0. Each chain has copies of phi_0 and eta of
# its own; hence the gradient of the sum over chains comes out chain by chain, as clipping and PCGrad need it.
def log_probs(players, batch):
    """log pi^a of the actions that were taken, (C, N, H, K)."""
    if one := together(players):
        action = batch.action.movedim(3, 0).flatten(0, 1)  # (NC, H, K, A)
        logprob = log_prob(one, batch.state.repeat(len(players), 1, 1, 1), action)
        return logprob.unflatten(0, (len(players), -1)).transpose(0, 1)
    return torch.stack([log_prob(p, batch.state, a) for p, a in zip(players, batch.action.unbind(3))], 1)


def inner_update(players, batch, lrs, args, num_states, shaping, create_graph):
    """eqs. (1)-(3): one policy-gradient step of every agent on one batch. Returns log_probs and new players.
    With `shaping` all agents' log-probabilities are nodes: this changes derivatives, not the step."""
    logprob, reward = log_probs(players, batch), batch.reward.movedim(-1, 1)  # (C, N, H, K)
    baseline = linear_baseline(batch.state, reward, num_states, args.gamma, args.baseline == "scrambled")
    nodes = logprob.sum(1, keepdim=True).expand_as(logprob) if shaping else logprob
    objective = dice_objective(nodes, reward, baseline, args.gamma)
    # phi^a reaches O^a through node a and there through its own log-probability: so the derivatives by all
    # nodes are the weights of the log-probabilities in one backward pass for all agents.
    weight, = torch.autograd.grad(objective.sum(), nodes, retain_graph=True, create_graph=create_graph)
    return logprob, ascend(players, logprob, lrs, create_graph, weight)


def ascend(players, objective, lrs, create_graph, weight=None):
    """eq. (3): phi^a + lr^a dO^a/dphi^a for objective (C, N): each agent follows its own column and no other.
    lrs[a]: (C,), a number, or None for an agent that stands still. With `weight`, O^a = <objective, weight>,
    of which agent a's part depends on phi^a alone."""
    moving = [a for a, lr in enumerate(lrs) if lr is not None]
    by = lambda y, agents, **kw: torch.autograd.grad(y, [v for a in agents for v in players[a].values()],
                                                     retain_graph=True, create_graph=create_graph, **kw)
    if weight is not None:
        grads = iter(by(objective, moving, grad_outputs=weight))
    else:
        grads = iter([g for a in moving for g in by(objective[:, a].sum(), [a])])
    new = [*players]
    for a in moving:
        scale = lambda x, lr=lrs[a]: x * (lr.view(-1, *[1] * (x.dim() - 1)) if torch.is_tensor(lr) else lr)
        new[a] = {name: value + scale(next(grads)) for name, value in players[a].items()}
    return new


def fit_opponent(model, batch, agent, steps=50, lr=2.0):
    """eq. (9): argmax_y sum_t log pi(a_t|s_t, y) by gradient ascent from `model` {"logits": (C, S, A)}, where
    each state's step is divided by its number of visits, so that rare ones converge as fast as others. The
    new values replace the old; the derivative by phi_0 that the model carries from its last step stays."""
    C, S, A = model["logits"].shape
    index = (batch.state * A + batch.action[..., agent]).flatten(1)
    counts = torch.zeros(C, S * A, device=index.device).scatter_add_(1, index, torch.ones_like(index).float())
    visits = counts.view(C, S, A).sum(-1, keepdim=True)
    seen, frequency = visits > 0, counts.view(C, S, A) / visits.clamp(min=1)
    y = model["logits"].detach().clone()
    for _ in range(steps):
        y += lr * seen * (frequency - y.softmax(-1))  # gradient of the mean log-likelihood of each state
    return {"logits": model["logits"] + (y - model["logits"]).detach()}


def leaves(p, *copies):
    """Constants to differentiate by: {name: (*copies, ...)}."""
    return {k: v.expand(*copies, *v.shape).detach().clone().requires_grad_() for k, v in p.items()}


def peers_of(tasks):
    """(C, N-1, S, A) logits, or (C, N-1, P) weights of PEER -> N-1 players."""
    if tasks.dim() == 4:
        return [leaves({"logits": logits}) for logits in tasks.unbind(1)]
    sizes = [math.prod(shape) for shape in PEER.values()]
    return [leaves({k: v.unflatten(1, shape) for (k, shape), v in zip(PEER.items(), flat.split(sizes, 1))})
            for flat in tasks.unbind(1)]


def training_plan(args):
    """Length of the chain in training, which l are scored, and whether agent i moves along it."""
    if args.method == "reinforce":  # [D6] the return of phi_0
        return 0, [0], False
    if args.method == "lola-dice":  # [D6] the return after steps of the peers alone
        return args.look_ahead, [args.look_ahead], False
    return args.chain_length, list(range(1, args.chain_length + 1)), True


def sampled_chain(env, theta, eta, psi, tasks, args, chains):
    """eqs. (1)-(5) for each row of `tasks`. Returns the losses (C,) of actor and critic, and L+1 batches."""
    length, scored, moves = training_plan(args)
    players, batches, logprobs = [theta, *peers_of(tasks)], [], []
    model = peers_of(torch.zeros_like(tasks)) if args.opponent_model else []
    for l in range(length + 1):
        batches.append(rollout(env, players, args.num_episodes, chains))
        model = [fit_opponent(m, batches[l], 1 + j) for j, m in enumerate(model)]
        seen = [players[0], *model] if model else players  # OM: only the peers' actions are known
        if l == length:
            logprobs.append(log_probs(seen, batches[l]))
            break
        lrs = [eta[:, l] if moves else None] + [args.peer_lr] * (env.num_agents - 1)
        step = (seen, batches[l], lrs, args, env.states, args.peer_learning, True)
        if args.recompute:
            logprob, new = checkpoint(inner_update, *step, use_reentrant=False)
        else:
            logprob, new = inner_update(*step)
        logprobs.append(logprob)
        if model:
            model = new[1:]
            real = inner_update(players, batches[l], [None, *lrs[1:]], args, env.states, False, False)
            new[1:] = real[1][1:]
        players = new if args.peer_learning and not model else [new[0], *map(leaves, new[1:])]

    critic_loss, advantages = 0.0, [None] * (length + 1)
    for l in scored:  # one critic for all l; batch by batch, because a step of 64 episodes fits the cache
        reward, value = batches[l].reward[..., 0], critic_value(psi, batches[l].state)
        critic_loss = critic_loss + ((value - returns_to_go(reward, args.gamma)) ** 2).mean((-2, -1))
        advantages[l] = gae(reward, value.detach(), args.gamma, args.gae_lambda)
    loss = outer_loss(logprobs, advantages, args.own_learning, args.peer_learning, args.estimator)
    if args.ent_coef and 0 not in scored:
        per_step = entropy(theta, batches[0].state).expand(-1, args.horizon, args.num_episodes)
        loss = loss - args.ent_coef * per_step.sum(1).mean(-1)
    return loss / (length + 1), critic_loss / (length + 1), batches


def exact_chain(theta, eta, tasks, reward_table, args, training=True):
    """The same with expected updates: tables, eqs. (3) and (8), nothing sampled. Returns the loss (C,), or 0
    when not training, and the joint policies [(x_l, y_l)] for l = 0..L."""
    length, scored, moves = training_plan(args) if training else (args.chain_length, [], True)
    players, policies, loss = [theta, *peers_of(tasks)], [], 0.0
    for l in range(length + 1):
        x, y = (p["logits"] for p in players)
        policies.append((x, y))
        value = exact_value(x, y, reward_table, args.gamma, args.horizon)[0]  # (C, 2)
        if l in scored and not args.own_learning:  # [D6] phi^i_l constant; phi^-i_l still depends on phi^i_0
            loss = loss - exact_value(x.detach(), y, reward_table, args.gamma, args.horizon)[0][:, 0]
        elif l in scored:
            loss = loss - value[:, 0]
        if l < length:
            players = ascend(players, value, [eta[:, l] if moves else None, args.peer_lr], training)
            if not training:
                players = [leaves(p) for p in players]
            elif not args.peer_learning:
                players[1] = leaves(players[1])
    return loss / (length + 1), policies


def clip(grads, max_norm):
    """(C, P) gradients, each chain scaled down to norm max_norm; and the norms before, (C,)."""
    norm = grads.norm(dim=1)
    return grads * (max_norm / (norm + 1e-6)).clamp(max=1)[:, None], norm


def pcgrad(grads, order):
    """eq. (6): each chain's gradient loses its component against any other chain it conflicts with, in random
    order (Yu et al., arXiv:2001.06782). grads (C, P), order (C, C): a permutation in each row. -> (C, P)."""
    out = grads
    for others in order.T:  # its own turn changes nothing: <g, g> >= 0
        g = grads[others]
        out = out - ((out * g).sum(1) / ((g * g).sum(1) + 1e-8)).clamp(max=0)[:, None] * g
    return out


class AMSGrad:
    """eq. (7): Adam with the running maximum of v, and eps = 1e-3 inside the bias correction, as in the
    authors' code: torch.optim.Adam(amsgrad=True, eps=1e-3) begins with steps up to four times larger."""

    def __init__(self, size, lr, device, eps=1e-3):
        self.lr, self.eps, self.k = lr, eps, 0
        self.m, self.v, self.v_max = (torch.zeros(size, device=device) for _ in range(3))

    def step(self, grad):
        """(P,) gradient of a loss -> (P,) change of the parameters."""
        self.k += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        self.v_max = torch.maximum(self.v_max, self.v)
        rate = self.lr * math.sqrt(1 - 0.999**self.k) / (1 - 0.9**self.k)
        return -rate * self.m / (self.v_max.sqrt() + self.eps)

    def state_dict(self):
        return dict(k=self.k, m=self.m, v=self.v, v_max=self.v_max)

    def load_state_dict(self, state):
        self.__dict__.update({k: v.to(self.m.device) if torch.is_tensor(v) else v for k, v in state.items()})


def move(p, change):
    """Add (P,) numbers to the parameters {name: tensor}, in place."""
    for value, d in zip(p.values(), change.split([v.numel() for v in p.values()])):
        value += d.view_as(value)


def outer_update(env, params, optimizers, args):
    """One outer iteration, the algorithm box; params {"theta", "eta", "psi": {name: tensor}} change in place.
    Returns {tag: value} and the mean reward per step of each agent along the chain, (L+1, N)."""
    C, first = args.num_chains // WORLD, RANK * args.num_chains // WORLD
    tasks = env.sample_tasks(args.num_chains)[first : first + C]
    order = torch.rand(args.num_chains, args.num_chains, device=env.device).argsort(1)
    theta, psi, eta = leaves(params["theta"], C), leaves(params["psi"], C), leaves(params["eta"], C)["eta"]
    if args.gradient == "exact":
        loss, policies = exact_chain(theta, eta, tasks, env.reward_table, args)
        reward = [exact_value(*xy, env.reward_table, 1.0, args.horizon)[0] / args.horizon for xy in policies]
        critic_loss = torch.zeros_like(loss)
    else:
        chains = (first, args.num_chains)
        loss, critic_loss, batches = sampled_chain(env, theta, eta, psi, tasks, args, chains)
        reward = [batch.reward.mean((1, 2)) for batch in batches]

    moves, logs = training_plan(args)[2], {}
    grads = torch.autograd.grad(loss.sum(), [*theta.values(), *([eta] if moves else [])])  # one pass for both
    grads = {"theta": grads[: len(theta)], "eta": grads[len(theta) :]}
    if args.gradient == "sampled":
        grads["psi"] = torch.autograd.grad(critic_loss.sum(), [*psi.values()])
    for group, g in grads.items():
        if g:
            g, norm = clip(gather(torch.cat([x.flatten(1) for x in g], 1)), args.max_grad_norm)  # (all C, P)
            change = optimizers[group].step((pcgrad(g, order) if args.pcgrad else g).mean(0))
            move(params[group], change)
            logs["grad/norm_" + {"theta": "outer", "eta": "eta", "psi": "critic"}[group]] = norm.mean()
    columns = torch.cat([loss[:, None], critic_loss[:, None], torch.stack(reward, 1).flatten(1)], 1)
    mean = gather(columns.detach()).mean(0)
    return logs | {"losses/actor": mean[0], "losses/critic": mean[1]}, mean[2:].view(-1, env.num_agents)


def pretrain_update(env, params, optimizers, args, population, epochs=2):
    """[D7] One iteration of recurrent PPO: two actors (theta, stacked) and their critic (psi) learn to run to
    the left, on whole episodes in one batch. Adds the front leg that has played, if it is one of KEPT, to
    population["weights"] and its return to population["returns"]. Returns as outer_update, with L = 0."""
    theta, psi = params["theta"], params["psi"]
    players = [{k: v[a : a + 1] for k, v in theta.items()} for a in range(env.num_agents)]
    batch = rollout(env, players, args.num_episodes)
    mean = batch.reward.mean((0, 1, 2))[None]  # (1, N)
    if len(population["returns"]) in KEPT:
        flat = torch.cat([v.flatten() for v in players[1].values()]).cpu() / GRID
        population["weights"] = torch.cat([population["weights"], flat.round().short()[None]])
    population["returns"] = torch.cat([population["returns"], per_episode(mean[0, :1], args).cpu()])
    state, action, reward = batch.state, batch.action[0].movedim(2, 0), batch.reward[..., 0]
    both = state.expand(env.num_agents, *state.shape[1:])  # (N, H, K, S); action (N, H, K, A)
    with torch.no_grad():
        old, value = log_prob(theta, both, action), critic_value(psi, state)
        adv = gae(reward, value, args.gamma, args.gae_lambda)  # (1, H, K)
        target, adv = adv + value, (adv - adv.mean()) / adv.std()
    for _ in range(epochs):
        p, q = leaves(theta), leaves(psi)
        losses = {"theta": ppo_loss(log_prob(p, both, action), old, adv),
                  "psi": (critic_value(q, state) - target).square().mean()}
        for group, leaf in ("theta", p), ("psi", q):
            g = torch.cat([x.flatten() for x in torch.autograd.grad(losses[group], [*leaf.values()])])
            move(params[group], optimizers[group].step(clip(g[None], args.max_grad_norm)[0][0]))
    logs = {"losses/actor": losses["theta"].detach(), "losses/critic": losses["psi"].detach(),
            "charts/std": theta["log_std"].exp().mean()}
    return logs, mean


# ================================================================ 6. Evaluation
# Meta-test: one chain for each held-out persona, every agent learning from its own samples alone, without
# derivatives through learning. Own games and own random stream: how often one evaluates does not change what
# is learned.
def adapt(env, params, tasks, args, films=None):
    """Scores (n, L+1, N) and action frequencies (n, L+1, N, A or, if not discrete, 0) along the chains of n
    tasks. films: a list that receives for each l the pictures of the first game."""
    n, L, A = len(tasks), args.chain_length, env.actions
    theta, eta, rewards, freqs = leaves(params["theta"], n), params["eta"]["eta"].expand(n, L), [], []
    if args.gradient == "exact":
        for x, y in exact_chain(theta, eta, tasks, env.reward_table, args, training=False)[1]:
            value, visits = exact_value(x, y, env.reward_table, 1.0, args.horizon)
            rewards.append(value.detach() / args.horizon)
            joint = visits.detach().view(n, A, A) / args.horizon
            freqs.append(torch.stack([joint.sum(2), joint.sum(1)], 1))
        return torch.stack(rewards, 1), torch.stack(freqs, 1)
    players, lrs = [theta, *peers_of(tasks)], [args.peer_lr] * (env.num_agents - 1)
    for l in range(L + 1):
        if films is not None:
            films.append([])
        batch = rollout(env, players, args.eval_episodes, frames=films and films[-1])
        rewards.append(score(batch.reward.mean((1, 2)), args))
        action = F.one_hot(batch.action, A).float() if env.discrete else batch.action[..., :0]
        freqs.append(action.mean((1, 2)))
        if l < L:
            players = inner_update(players, batch, [eta[:, l], *lrs], args, env.states, False, False)[1]
            players = [leaves(p) for p in players]
    return torch.stack(rewards, 1), torch.stack(freqs, 1)


def evaluate(args, params, split):
    """{persona class: (rewards (n, L+1, N), action frequencies (n, L+1, N, A))} on "val" or "test"."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        classes = make_env(args, 1).tasks_by_class(split)
        results = {}
        for name, tasks in classes.items():
            # The inner update of a peer of half_cheetah_dir takes 0.2 GB: a few peers at a time.
            parts = tasks.split(len(tasks) if args.env != "half_cheetah_dir" else 5)
            done = [adapt(make_env(args, len(t) * args.eval_episodes), params, t, args) for t in parts]
            results[name] = tuple(torch.cat(x) for x in zip(*done))
        return results


def summary(results):
    """{tag: value} of an evaluation: all personas, and each class with its 95 % interval over personas."""
    every = torch.cat([reward[..., 0] for reward, _ in results.values()])  # (n, L+1)
    flat = {f"eval/return_{l}": v for l, v in enumerate(every.mean(0).tolist())}
    flat["eval/sum_after_phi_0"] = every[:, 1:].sum(1).mean().item()
    for name, (reward, freq) in results.items():
        flat[f"eval/{name}/sum_after_phi_0"] = reward[:, 1:, 0].sum(1).mean().item()
        for l in range(reward.shape[1]):
            flat[f"eval/{name}/return_{l}"] = reward[:, l, 0].mean().item()
            flat[f"eval/{name}/return_{l}_ci95"] = interval(reward[:, l, 0]).item()
            for who, agent in enumerate(("self", "peer")):
                for a, p in enumerate(freq[:, l, who].mean(0).tolist()):
                    flat[f"eval/{name}/{agent}_action_{a}_{l}"] = p
    return flat


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def table(results, args):
    """The adaptation table: what agent i gets after 0..L updates, and what both sides play."""
    actions = {"ipd": ["D", "C"], "half_cheetah_dir": []}.get(args.env, ["rock", "paper", "scissors"])
    what, form, digits = ("reward per step", "+.3f", 2) if actions else ("return of an episode", "+.1f", 1)
    row = lambda name, values, form: f"{name:22s}" + "".join(f"{format(v, form):9s}" for v in values)
    lines = [f"{args.env}: {what} of agent i against held-out personas, ± 95 % interval"]
    lines[0] += "; actions" if actions else ""
    lines.append(row("", [f"phi_{l}" for l in range(args.chain_length + 1)], "s") + "sum from phi_1")
    for name, (reward, freq) in results.items():
        mean = reward[..., 0].mean(0).tolist()
        lines.append(row(f"{name} peer", mean, form) + f"{sum(mean[1:]):+.{digits}f}")
        lines.append(row("  ±", interval(reward[..., 0]).tolist(), form[1:]))
        for a, label in list(enumerate(actions))[1 if len(actions) == 2 else 0 :]:  # P(D) = 1 - P(C)
            for who, agent in enumerate(("self", "peer")):
                lines.append(row(f"  P({label}) {agent}", freq[:, :, who, a].mean(0).tolist(), ".2f"))
    return "\n".join(line.rstrip() for line in lines)


def pretraining_curve(returns):
    """{tag: value} and a table of the returns (iterations,) of pre-training, means over 9 iterations, and, if
    it was finished, that of the 25 peers for the test."""
    mean = {n: returns[max(n - 4, 0) : n + 5].mean().item() for n in range(0, len(returns), 25)}
    if len(returns) > KEPT[-1]:
        mean["475_499"] = returns[SPLITS["test"]].mean().item()
    lines = ["pre-training: return to the left by iteration"]
    lines += [f"{n!s:>8} {value:+7.1f}" for n, value in mean.items()]
    return {f"eval/pretraining/return_{n}": value for n, value in mean.items()}, "\n".join(lines)


def capture(args, params, folder):
    """--capture-video: play.txt, the table, in games; before_after.gif in half_cheetah_dir: agent i with the
    first held-out peer under phi_0 and, beside it, phi_L."""
    from PIL import Image, ImageDraw

    films, pictures = [], []
    try:
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            env = make_env(args, args.eval_episodes)
            adapt(env, params, env.peers(SPLITS["test"][:1]), args, films)
    except RuntimeError as e:
        fail(e)
    for pair in list(zip(films[0], films[-1]))[::2]:
        picture = Image.fromarray(np.concatenate(pair, 1))
        for left, text in (10, "phi_0"), (picture.width // 2 + 10, f"phi_{args.chain_length}"):
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
    """Parameters and optimisers, in the three groups that are clipped and stepped separately."""
    S, A = env.states, env.actions
    if args.pretrain_peers:  # two actors, stacked, and a critic; nothing adapts
        actors = [make_lstm(S, A, gaussian=True) for _ in range(env.num_agents)]
        params = {"theta": {k: torch.stack([p[k] for p in actors]) for k in PEER},
                  "psi": {k: v[None] for k, v in make_lstm(S, 1).items()}}
    elif args.policy == "table":
        params = {"theta": {"logits": torch.zeros(S, A)}, "psi": {"values": torch.zeros(S, 1)}}
    else:
        params = {"theta": make_lstm(S, A, gaussian=not env.discrete), "psi": make_lstm(S, 1)}
    if not args.pretrain_peers:
        params["eta"] = {"eta": torch.full((args.chain_length,), args.inner_lr)}
    params = copy_of(params, args.device)
    lrs = {"theta": args.outer_lr, "psi": args.critic_lr, "eta": args.outer_lr}
    size = {group: sum(v.numel() for v in p.values()) for group, p in params.items()}
    scale, eps = math.sqrt(args.num_chains), 1e-8 if args.pretrain_peers else 1e-3  # [D3]
    return params, {group: AMSGrad(size[group], lrs[group] * scale, args.device, eps) for group in params}


def copy_of(params, device):
    return {group: {k: v.to(device, copy=True) for k, v in p.items()} for group, p in params.items()}


def evaluate_checkpoint(args):
    """--evaluate: the table of the parameters that were best on validation personas, on the test split."""
    state, folder = load(args.evaluate), Path(args.evaluate).parent
    params = copy_of(state["best"], args.device)
    report(args, params, state["population"], folder, state["global_step"])
    if args.capture_video and args.env == "half_cheetah_dir" and not args.pretrain_peers:
        print(capture(args, params, folder))
    return params


def report(args, params, population, folder, step):
    """Write eval.json and print the table: of the test split, or of the pre-training."""
    if args.pretrain_peers:
        values, text = pretraining_curve(population["returns"])
    else:
        results = evaluate(args, params, "test")
        values, text = summary(results), table(results, args)
    write_eval(folder, values, step, args.seed)
    print(text)
    if args.evaluate and args.capture_video and args.env != "half_cheetah_dir":
        (folder / "play.txt").write_text(text + "\n")


def restore(args, params, optimizers):
    """Put a checkpoint's tensors and random states back in place; returns the checkpoint."""
    state = load(args.resume)
    try:
        for group, p in params.items():
            for k in p:
                p[k].copy_(state["params"][group][k])
            optimizers[group].load_state_dict(state["optimizers"][group])
    except (KeyError, RuntimeError):
        was = state["args"]
        fail(f"{args.resume} holds a {was['policy']} for {was['env']} and {was['chain_length']} steps, "
             f"not a {args.policy} for {args.env} and {args.chain_length}")
    set_rng(state)
    return state


def train(args):
    set_up(resolve(args))
    if args.evaluate:
        return evaluate_checkpoint(args)
    episodes = 1 if args.gradient == "exact" else args.num_episodes
    env = make_env(args, args.num_chains // WORLD * episodes)
    params, optimizers = build(args, env)
    nobody = {"weights": torch.zeros(0, dtype=torch.int16), "returns": torch.zeros(0)}
    state = {"iteration": 0, "global_step": 0, "best": params, "best_score": -math.inf, "population": nobody}
    if args.resume:
        state = restore(args, params, optimizers)
    iteration, global_step, population = (state[k] for k in ("iteration", "global_step", "population"))
    best, best_score = copy_of(state["best"], args.device), state["best_score"]
    update = outer_update
    if args.pretrain_peers:
        update = functools.partial(pretrain_update, population=population)
    log, stop, done = Log(args, global_step), False, global_step >= args.total_steps

    while not stop and not done:
        logs, reward = update(env, params, optimizers, args)
        iteration += 1
        global_step += len(reward) * args.num_chains * episodes * args.horizon
        logs |= {f"adapt/return_{l}": v for l, v in enumerate(score(reward[:, 0], args))}  # as in the paper
        returns = per_episode(reward, args)  # (L+1, N)
        logs |= {f"charts/episodic_return/agent_{a}": v for a, v in enumerate(returns.mean(0))}
        logs["charts/episodic_return"] = returns[:, 0].mean()
        logs["charts/SPS"] = log.sps(global_step)
        stop, done = log.stop(), global_step >= args.total_steps
        milestone = done or args.eval_every and iteration % args.eval_every == 0
        if milestone and RANK == 0 and not args.pretrain_peers:
            # keep the parameters that adapt best to validation personas
            logs |= summary(evaluate(args, params, "val"))
            if logs["eval/sum_after_phi_0"] > best_score:
                best, best_score = copy_of(params, args.device), logs["eval/sum_after_phi_0"]
        log.scalars(logs, global_step)
        first, last = score(reward[[0, -1], 0], args)
        text = f"reward {first:+.3f} -> {last:+.3f}, best validation sum {best_score:+.2f}"
        log.progress(global_step, text, milestone)
        if stop or done or iteration % args.save_every == 0:
            save(log.dir / "checkpoint.pt", dict(
                params=params, optimizers={group: o.state_dict() for group, o in optimizers.items()},
                best=params if args.pretrain_peers else best, best_score=best_score, population=population,
                iteration=iteration, global_step=global_step), args)
    if RANK == 0 and done:
        if args.pretrain_peers:
            write_population(log.dir / "peers.npz", **population)
        report(args, best, population, log.dir, global_step)
        print(f"{log.dir}: {global_step} steps")
    log.close()
    return params


if __name__ == "__main__":
    train(cli(Args, __doc__))
