"""
LeMOL: an opponent model that learns how its opponent learns.

  Paper      Davies, Tian, Wang: Learning to Model Opponent Learning. AAAI-20 student abstract,
             arXiv:2006.03923. Opponents: Lowe et al., arXiv:1706.02275 (MADDPG); Li et al.: Robust
             Multi-Agent RL via Minimax Deep Deterministic Policy Gradient. AAAI 2019 (M3DDPG).
  Problem    Player i meets an opponent -i who learns while they play, from random weights through thousands
             of episodes. A model a^-i = f(o^i) fitted to the past averages over policies that are gone.
             LeMOL reads a WHOLE learning run as one sequence: an LSTM's state h says where in its learning
             the opponent is; the LSTM's weights phi are trained on many recorded runs.
  Algorithm  for each cycle: R learning runs side by side, each with new players, phi frozen:
               every player acts by a = softmax(logits + Gumbel noise)        (1) -> gumbel_softmax()
               B episodes of the untrained policies (exploration); then, from h = h_0,
               each step: a~ = softmax head(in-ep. LSTM(o^i), h)     (2) -> OpponentModel.predict()
                          a^i = pi^i([o^i; a~]), a^-i = pi^-i(o^-i)               -> rollout()
               each block of L steps: (h, c) <- core(BiLSTM(block), (h, c))   (3) -> OpponentModel.advance()
               each P steps, for each player, from replay:                        -> learn()
                 y = r + gamma (1 - d) Qbar(o', a'), a' of the target actors  (4) -> critic_target()
                 M3DDPG: the other's a' moves a length eps down Qbar          (5) -> adversary()
                 critic: min mean (Q(o, a) - y)^2                             (6) -> critic_loss()
                 actor: min -mean Q(o, pi([o^i; a~]), a^-i) + 0.001 logits^2  (7) -> actor_loss()
                 thetabar <- (1 - polyak) thetabar + polyak theta
             before each cycle: J sweeps over M recorded runs, chunk by chunk:     -> train_models()
               min -mean sum_a a^-i_t log a~_t; (h, c) carried over, detached (8) -> model_loss()
             the opponent that knows all: a~ = a^-i with probability p        (9) -> feed_truth()
  Symbols    theta  {net: (R, P)}    x_t  event [a^-i; o^i; a^i; r^i; end]    h, c  (R, H)
             a~  guess (R, A, B)     u    in-episode LSTM state (N, 32)       phi   OpponentModel
             R runs, L steps of an episode, B minibatch, N = R W worlds, X numbers of an event, D of a replay
             row. Minibatches are (R, features, B): narrow products and softmaxes are 3 to 20 times faster so.
  Methods    --om ep (LeMOL-EP) | flat (h advances each step) | ablated (no h) | oracle | uninformed (noise) |
             naive_online (a net fitted to each minibatch); --bad-policy (agent 0), --good-policy (agent 1):
             lemol | maddpg | ddpg | mmmaddpg (M3DDPG); several joined by _ play in runs of their own.
  The        scenario -> --env; save-dir, load-dir, exp-name, save-rate -> --run-dir, --resume, --save-every;
  authors'   good/bad-policy, discrete_actions, max-episode-len, num-episodes, lr, gamma, batch-size,
  options    num-units, adv-eps(-s), agent_update_freq, polyak, lstm_hidden_dim, omlr, chunk_length,
             num_traj_to_train, traj_per_iter, om_training_iters, n_opp_cycles, episode_embedding_dim,
             recurrent_om_prediction, in_ep_lstm_dim, train_lemol_om_on_oh, decentralise_lemol_obs,
             fully_decentralise_lemol, lemol_true_action_feed_proportion, lemol_oracle_baseline_acc,
             seed: the same here.
             block_processing -> --om ep; ablate_lemol_lstm -> --om ablated; feed_lemol_true_action -> --om
             oracle; lemol_save_path -> --trajectories; display -> --evaluate --capture-video;
             num-adversaries: the world's; replay_buffer_capacity: a whole run. Not here: PPO opponents,
             triplet loss, alternative LSTM cell.
  Departures [D1] Targets start as copies, polyak is 0.01, optimisers start anew with the players, updates
                  come before the first step of a block. --compat, the released code: targets of other random
                  weights, polyak 0.0001, old Adam moments, updates after the first step.
             [D2] The runs of a cycle are one batch, networks stacked: exact, because phi is frozen.
             [D3] phi is trained before a cycle, not after: nothing is trained that is never played.
             [D4] --om flat advances h at every step in play, too; the authors' comes in bursts of P steps,
                  staler than in training. Its c starts from c_0, not from h_0. EP needs P = L.
             [D5] The ablated model has no h at all; without in-episode LSTM theirs kept a random core's.
             [D6] M3DDPG differentiates the sum of Q: the mean's gradients drown in the norm's floor. Its
                  actor is a plain one, as released; --m3-actor paper: eq. (5) there, too.
             [D7] The time limit ends an episode for the critic (d = 1), as released; --bootstrap-at-limit. An
                  episode enters replay when it is over.
             [D8] uav: each player sees its own place and a noisy one of the other; what follows an early end
                  is masked, and blocks stay whole episodes.
             [D9] --profile quick is ours: 8 runs, B = 128, 4 cycles of 1128 episodes.
  Run        python lemol.py --env simple_push                               # quick: 1.5 min
             python lemol.py --env simple_push --profile paper               # the paper's scale: hours
             python lemol.py --env simple_push --om ablated                  # the paper's ablation
             python lemol.py --env simple_push --om oracle --lemol-true-action-feed-proportion 0.8
             python lemol.py --env simple_push --bad-policy maddpg           # MADDPG against MADDPG
             python lemol.py --env simple_push --bad-policy mmmaddpg         # M3DDPG against MADDPG
             python lemol.py --env simple_push --good-policy maddpg_mmmaddpg_ddpg --traj-per-iter 4
             python lemol.py --env simple_push --om flat --chunk-length 400
             python lemol.py --env uav --good-policy lemol --bad-policy maddpg
             python lemol.py --evaluate runs/x/checkpoint.pt --capture-video     # table, and match.gif
  Expect     First command, cross-entropy of LeMOL's and of the ablated model on runs that none has seen, by
             cycle: 1.61 and 1.62 (untrained; ln 5 = 1.609), 1.37 and 1.50, 1.36 and 1.50, 1.32 and 1.48; in
             the last cycle accuracy 0.46 and 0.33. The floor, 0.94, knows the policy AND what the other sees.
             Returns of the last policies -2.4 (defender), -8.4 (attacker); the defender's with --om ablated
             -1.8, oracle -2.2, uninformed -2.9, MADDPG -2.8, M3DDPG -2.7 (three seeds, +- 0.2 to 0.6): in
             quick runs the better model does not gain the higher return.
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
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

# Large pages for torch, and no freed memory given back by glibc.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(Exception):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["simple_push", "simple_speaker_listener", "simple_reference", "simple_tag", "uav"]
KINDS, MODELS = ("lemol", "maddpg", "ddpg", "mmmaddpg"), ("ep", "flat", "ablated")

# What an argument left at None becomes
PAPER = dict(num_episodes=11_024, batch_size=1024, n_opp_cycles=10, traj_per_iter=3, chunk_length=64,
             om_training_iters=5, num_traj_to_train=8, omlr=1e-3, segment=100, num_threads=2, eval_every=0,
             eval_episodes=100, save_every=101)
QUICK = PAPER | dict(num_episodes=1128, batch_size=128, n_opp_cycles=4, traj_per_iter=8, chunk_length=20,
                     omlr=2e-3, segment=50, save_every=21)  # [D9]
PROFILES = {"quick": QUICK, "paper": PAPER}


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
    profile: Literal["quick", "paper"] = "quick"
    """what an argument left empty becomes: minutes, or the paper's scale"""
    bad_policy: str = "lemol"
    """learner of agent 0 (the adversary, where there is one): lemol, maddpg, ddpg, mmmaddpg"""
    good_policy: str = "maddpg"
    """learner of agent 1; several joined by _, on one side and without lemol, play in runs of their own"""
    om: Literal["ep", "flat", "ablated", "oracle", "uninformed", "naive_online"] = "ep"
    """LeMOL's opponent model, see Methods; beside ep and flat an ablated one is trained and measured"""
    discrete_actions: bool = False
    """play one-hot actions; off: soft ones, points of the simplex (uav is always discrete)"""
    max_episode_len: int = 25
    """L, steps in an episode"""
    num_episodes: Optional[int] = None
    """episodes of a learning run, exploration included"""
    n_opp_cycles: Optional[int] = None
    """cycles; sets --total-steps. Default 1 where no model is trained"""
    traj_per_iter: Optional[int] = None
    """K, runs of each kind of opponent in a cycle, side by side"""
    segment: Optional[int] = None
    """episodes of an iteration: what is logged at once"""
    batch_size: Optional[int] = None
    """B, minibatch of eqs. (4)-(7), and the episodes of exploration"""
    agent_update_freq: Optional[int] = None
    """P, steps between updates; default L"""
    lr: float = 1e-2
    """Adam's step size of actors and critics"""
    gamma: float = 0.95
    """discount, in [0, 1]"""
    polyak: Optional[float] = None
    """share of the new weights in the targets at each update; default 0.01, with --compat 0.0001"""
    num_units: int = 64
    """width of the two hidden layers of each network"""
    adv_eps: float = 1e-3
    """eps of eq. (5) against the other side"""
    adv_eps_s: float = 1e-5
    """eps of eq. (5) against one's own side (with --m3-actor paper; the released critic takes adv_eps)"""
    m3_actor: Literal["code", "paper"] = "code"
    """M3DDPG's actor: a plain one, or eq. (5) in its Q [D6]"""
    chunk_length: Optional[int] = None
    """U, blocks (ep, ablated) or steps (flat) through which eq. (8) is differentiated"""
    om_training_iters: Optional[int] = None
    """J, sweeps between cycles"""
    num_traj_to_train: Optional[int] = None
    """M, runs in a sweep, drawn with replacement from all so far"""
    omlr: Optional[float] = None
    """Adam's step size of the opponent model"""
    lstm_hidden_dim: int = 64
    """H, size of the learning state h"""
    episode_embedding_dim: int = 128
    """size of the BiLSTM's summary of a block, even"""
    recurrent_om_prediction: bool = True
    """the head of ep and ablated reads an in-episode LSTM; off: the current observation, as flat does"""
    in_ep_lstm_dim: int = 32
    """size of the in-episode LSTM"""
    train_lemol_om_on_oh: bool = False
    """targets of eq. (8) are one-hot(argmax) also where actions are soft"""
    decentralise_lemol_obs: bool = False
    """LeMOL's critic does not see the other's observation"""
    fully_decentralise_lemol: bool = False
    """nor its policy: in eqs. (4) and (7) the present model's guess stands for the other's action"""
    lemol_true_action_feed_proportion: float = 1.0
    """p of eq. (9), in [0, 1]"""
    lemol_true_action_feed_before: int = 25
    """... in steps of the episode before this one"""
    lemol_true_action_feed_after: int = -1
    """... or after this one"""
    lemol_oracle_baseline_acc: float = 0.0
    """where p says no: the truth nevertheless, with this probability; released: 0.55"""
    bootstrap_at_limit: bool = False
    """the time limit is no end for the critic [D7]"""
    compat: bool = False
    """target nets, polyak, optimisers and update times of the released code [D1]"""
    trajectories: Optional[str] = None
    """.npz of recorded runs: those in it are trained on before the first cycle, new ones are added"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    preset = PROFILES[args.profile] | dict(polyak=1e-4 if args.compat else 1e-2,
                                           agent_update_freq=args.max_episode_len)
    sides, lemol = sides_of(args), "lemol" in (args.bad_policy, args.good_policy)
    if not (lemol and args.om in MODELS):
        preset["n_opp_cycles"] = 1
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.discrete_actions |= args.env == "uav"
    for name in ("num_threads", "eval_episodes", "save_every", "max_episode_len", "num_episodes", "segment",
                 "n_opp_cycles", "traj_per_iter", "batch_size", "agent_update_freq", "num_units",
                 "chunk_length", "om_training_iters", "num_traj_to_train", "lstm_hidden_dim",
                 "in_ep_lstm_dim", "episode_embedding_dim"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("gamma", "polyak", "lemol_true_action_feed_proportion", "lemol_oracle_baseline_acc"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}")
    for side in sides:
        if not set(side) <= set(KINDS) or "lemol" in side and len(side) > 1:
            fail(f"a policy must be lemol, or of maddpg, ddpg, mmmaddpg one or several joined by _, "
                 f"not {'_'.join(side)}")
    if min(map(len, sides)) > 1 or sides == [["lemol"]] * 2:
        fail("one side must be a single policy and LeMOL can play one side only, "
             f"not {args.bad_policy} against {args.good_policy}")
    if lemol and args.om == "ep" and args.agent_update_freq != args.max_episode_len:
        fail(f"--om ep needs --agent-update-freq {args.max_episode_len}: a block is an episode. "
             f"Not {args.agent_update_freq}, which --om flat can take")
    if args.episode_embedding_dim % 2:
        fail(f"--episode-embedding-dim must be even, not {args.episode_embedding_dim}")
    played = args.num_episodes - args.batch_size
    if chunk_steps(args) > played * args.max_episode_len:
        fail(f"--chunk-length {args.chunk_length} is longer than a run: of its {args.num_episodes} episodes "
             f"{max(played, 0)} remain after the exploration, which is --batch-size {args.batch_size}")
    if args.fully_decentralise_lemol and args.om in ("oracle", "uninformed"):
        fail(f"--fully-decentralise-lemol asks a model what the other will do, and --om {args.om} is none")
    if args.total_steps is None:
        runs = args.traj_per_iter * max(map(len, sides))
        args.total_steps = args.n_opp_cycles * runs * args.num_episodes * args.max_episode_len
    if args.total_steps < 1:
        fail(f"--total-steps must be at least 1, not {args.total_steps}")
    return args


def sides_of(args):
    return [args.bad_policy.split("_"), args.good_policy.split("_")]


def chunk_steps(args):
    """Steps in a chunk of eq. (8)."""
    return args.chunk_length * (1 if args.om == "flat" else args.max_episode_len)


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own game of two by returning an object with these members:
    #   num_envs N, horizon L, num_agents 2, num_adversaries (1: two sides), obs_dims, action_dims,
    #   action_splits (sizes of the one-hot blocks of each action), device
    #   reset() -> obs, step(action) -> obs, reward (N, 2), terminated (N,), truncated (N,), info
    #   where obs[i] (N, O_i), action[i] (N, A_i) soft or one-hot; a terminated row rests until the end
    options = {} if args.env == "uav" else dict(dialect="mpe")
    if args.env == "simple_tag":
        options |= dict(num_agents=2, num_adversaries=1)
    try:
        env = envs.make(args.env, num_envs, horizon=args.max_episode_len, device=args.device, **options)
    except ValueError as e:
        fail(e)
    if env.num_agents != 2:
        fail(f"--env {args.env} has {env.num_agents} players; LeMOL needs a world of two")
    return env


class Game(NamedTuple):
    """What never changes: R, who plays whom, and sizes."""

    runs: int
    kinds: tuple  # kinds[i][r]: the learner that is agent i in run r
    lemol: Optional[int]  # the agent with an opponent model, if any
    obs: tuple
    act: tuple
    splits: tuple
    opposed: bool  # two sides, or one

    @classmethod
    def of(cls, args, env):
        sides, K = sides_of(args), args.traj_per_iter
        types = max(map(len, sides))
        kinds = tuple(tuple(side[k % len(side)] for k in range(types) for _ in range(K)) for side in sides)
        lemol = next((i for i in (0, 1) if kinds[i][0] == "lemol"), None)
        return cls(types * K, kinds, lemol, tuple(env.obs_dims), tuple(env.action_dims),
                   tuple(env.action_splits), env.num_adversaries == 1)

    def columns(self, mind):
        """Where things are in a replay row, {name: slice}; `mind` numbers for the in-episode state."""
        sizes = dict(obs0=self.obs[0], obs1=self.obs[1], act0=self.act[0], act1=self.act[1], reward=2, done=1,
                     valid=1, guess=0 if self.lemol is None else self.act[1 - self.lemol], mind=mind)
        ends = dict(zip(sizes, np.cumsum([*sizes.values()]).tolist()))
        where = {k: slice(end - sizes[k], end) for k, end in ends.items()}
        return where | dict(obs=slice(0, ends["obs1"]), joint=slice(0, ends["act1"]),
                            all=slice(0, ends["mind"]))

    def event(self, rows, where):
        """x_t = [a^-i; o^i; a^i; r^i; end], and 1, or 0 after an early end: (..., D) -> (..., X + 1)."""
        i, valid = self.lemol, rows[..., where["valid"]]
        x = [rows[..., where[k]] for k in (f"act{1 - i}", f"obs{i}", f"act{i}")]
        x += [rows[..., where["reward"]][..., i, None], rows[..., where["done"]]]
        return torch.cat([torch.cat(x, -1) * valid, valid], -1)  # [D8]


# ================================================================ 2. Networks
# Actors and critics are Linear-ReLU-Linear-ReLU-Linear. The nets of all R runs are one tensor (R, P), each
# row the weights of one run in a line: one optimiser, one clipping, one polyak step for all of them, and
# batched products in between [D2]. Losses are summed over runs, so that no run feels another.
def xavier(runs, sizes, used=None):
    """(R, P): Xavier-uniform weights (R, out, in) and zero biases, each row by the fans of one net. used (R,)
    counts the inputs of the first layer that are not masked."""
    parts = []
    for k, (n, m) in enumerate(pairwise(sizes)):
        fan = torch.full((runs, 1), float(n)) if k or used is None else used[:, None]
        parts += [(2 * torch.rand(runs, n * m) - 1) * (6 / (fan + m)).sqrt(), torch.zeros(runs, m)]
    return torch.cat(parts, 1)


def tensor_sizes(sizes):
    """How many numbers of a row belong to each weight and bias."""
    return [k for n, m in pairwise(sizes) for k in (n * m, m)]


def layers(flat, sizes):
    """(R, P) -> [(weight (R, out, in), bias (R, out, 1)), ...]"""
    parts = flat.split(tensor_sizes(sizes), 1)
    return [(w.view(-1, m, n), b.view(-1, m, 1))
            for (n, m), w, b in zip(pairwise(sizes), parts[::2], parts[1::2])]


def mlp(net, x):
    """(R, F, B) -> (R, out, B)"""
    for w, b in net[:-1]:
        x = torch.baddbmm(b, w, x).relu_()
    return torch.baddbmm(net[-1][1], net[-1][0], x)


def lstm(inputs, hidden, **options):
    """Glorot input weights, orthogonal recurrent ones for each gate, biases 0, that of the forget gate 1."""
    net = nn.LSTM(inputs, hidden, batch_first=True, **options)
    for name, p in net.named_parameters():
        if "bias" in name:
            p.data.zero_()
            p.data[hidden : 2 * hidden] = float("bias_ih" in name)  # there are two biases
        else:
            for gate in p.data.chunk(4):
                (nn.init.orthogonal_ if "_hh" in name else nn.init.xavier_uniform_)(gate)
    return net


def weights_of(net):
    return net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, net.bias_hh_l0


def shift_right(seq, first):
    """The lag: (M, T, H), (M, H) -> (M, T, H), what was known BEFORE each step. No event may reach a guess of
    its own time."""
    return torch.cat([first[:, None], seq[:, :-1]], 1)


class OpponentModel(nn.Module):
    """phi. kind "ep": h advances once in a block of L steps; "flat": in each step; "ablated": there is no h.
    `episode` is the in-episode LSTM over one's own observations, which starts anew in each block."""

    def __init__(self, kind, obs_dim, event_dim, splits, args):
        super().__init__()
        self.kind, self.splits, self.length = kind, splits, args.max_episode_len
        H, E, U = args.lstm_hidden_dim, args.episode_embedding_dim, args.in_ep_lstm_dim
        recurrent = args.recurrent_om_prediction and args.om != "flat"
        self.episode = lstm(obs_dim, U) if recurrent else None
        self.u0 = nn.Parameter(torch.zeros(2, U)) if recurrent else None
        self.block = lstm(event_dim, E // 2, bidirectional=True) if kind == "ep" else None
        self.core = lstm(E if kind == "ep" else event_dim, H) if kind != "ablated" else None  # [D5]
        self.h0 = nn.Parameter(torch.zeros(2, H)) if kind != "ablated" else None  # h_0 and c_0 [D4]
        self.z_dim = U if recurrent else obs_dim
        self.head = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(
            [self.z_dim + H * (kind != "ablated"), 64, 64, sum(splits)]))
        for layer in self.head:
            nn.init.xavier_uniform_(layer.weight), nn.init.zeros_(layer.bias)

    def start(self, n):
        """The learned (h_0, c_0) before any event, n times."""
        return () if self.core is None else tuple(self.h0[:, None].expand(2, n, -1))

    def begin(self, n):
        """The learned in-episode state before the first observation, n times."""
        return () if self.episode is None else tuple(self.u0[:, None].expand(2, n, -1))

    def remember(self, h=None):
        """h's part in the head's first layer, (..., H) -> (..., 64), for all guesses made from one h."""
        w, b = self.head[0].weight, self.head[0].bias
        return b if self.core is None else F.linear(h, w[:, self.z_dim :], b)

    def log_guess(self, z, memory):
        x = (F.linear(z, self.head[0].weight[:, : self.z_dim]) + memory).relu()
        return log_softmax(self.head[2](self.head[1](x).relu()), self.splits)

    def embed(self, blocks):
        """(N, L, X) -> (N, E): the last forward and the last backward state of the BiLSTM."""
        return torch.cat(self.block(blocks)[1][0].unbind(0), -1)

    def advance(self, events, hc):
        """eq. (3) in play: (h, c) after one more block (N, L, X), or after one event (N, X) of "flat"."""
        x = self.embed(events) if self.kind == "ep" else events
        return torch.lstm_cell(x, hc, *weights_of(self.core))

    def predict(self, obs, memory, u):
        """eq. (2) in play: obs (..., O), memory (..., 64), u (N, 32) twice -> log a~ (..., A), next u."""
        if self.episode is None:
            return self.log_guess(obs, memory), u
        u = torch.lstm_cell(obs.reshape(-1, obs.shape[-1]), u, *weights_of(self.episode))
        return self.log_guess(u[0].view(*obs.shape[:-1], -1), memory), u

    def forward(self, events, obs, hc):
        """eqs. (2) and (3) over a chunk: events (M, T, X), obs (M, T, O) -> log a~ (M, T, A), next (h, c)."""
        M, L, memory = len(obs), self.length, None
        blocks = self.kind == "ep" or self.episode is not None  # (M, U, L, .); else (M, T, .), any T
        z = obs.unflatten(1, (-1, L)) if blocks else obs
        if self.core is None:
            memory = self.remember()
        else:
            x = events if self.kind == "flat" else self.embed(events.reshape(-1, L, events.shape[-1])).view(
                M, -1, self.core.input_size)
            seq, after = self.core(x, tuple(s[None].contiguous() for s in hc))
            memory = self.remember(shift_right(seq, hc[0]))  # (M, U, 64), or (M, T, 64)
            memory = memory if self.kind == "flat" else memory[:, :, None]
            hc = tuple(s[0] for s in after)
        if self.episode is not None:
            flat = z.reshape(-1, L, z.shape[-1])
            start = tuple(s[None].contiguous() for s in self.begin(len(flat)))
            z = self.episode(flat, start)[0].view(*z.shape[:-1], -1)
        return self.log_guess(z, memory).reshape(M, obs.shape[1], -1), hc


# ================================================================ 3. Rollout
# N = R W worlds: W = 1 while players learn, W = B in the exploration before it, where nobody learns yet. The
# opponent acts first, because the oracle wants to see it; a model does not. An episode becomes L + 1 replay
# rows, of which the last holds the final observation alone: the successor of row t is row t + 1, always.
def by_block(function, x, splits, dim):
    """A function along `dim`, for each one-hot block of an action by itself."""
    if len(splits) == 1:
        return function(x, dim)
    return torch.cat([function(part, dim) for part in x.split(splits, dim)], dim)


def log_softmax(logits, splits):
    return by_block(F.log_softmax, logits, splits, -1)


def harden(x, splits, dim=1):
    """One-hot of the largest in each block."""
    one_hot = lambda y, d: torch.zeros_like(y).scatter_(d, y.argmax(d, keepdim=True), 1.0)
    return by_block(one_hot, x, splits, dim)


def gumbel(*shape, device="cpu"):
    return torch.rand(shape).log_().neg_().log_().neg_().to(device)


def gumbel_softmax(logits, noise, splits, dim=1):
    """eq. (1): a point of the simplex whose largest entry is action a with probability softmax(logits)_a."""
    return by_block(F.softmax, logits + noise, splits, dim)


def feed_truth(truth, step, splits, args):
    """eq. (9): the true action (N, A) with probability p, or else the baseline's; or a random action,
    or a uniform point of the simplex."""
    told = step < args.lemol_true_action_feed_before or step > args.lemol_true_action_feed_after
    p = args.lemol_true_action_feed_proportion * told
    p = 0.0 if args.om == "uninformed" else p + (1 - p) * args.lemol_oracle_baseline_acc
    noise = torch.rand(len(truth), sum(splits)).log_().neg_().log_()  # softmax of log Exp(1): Dirichlet(1)
    noise = by_block(F.softmax, noise, splits, 1).to(truth.device)
    noise = harden(noise, splits) if args.discrete_actions else noise
    return torch.where((torch.rand(len(truth), 1) < p).to(truth.device), truth, noise)


class Mind:
    """What LeMOL thinks of the other during an episode, in N worlds."""

    def __init__(self, match, N):
        self.match, self.om = match, match.om
        if self.om:
            self.hc = tuple(s.repeat_interleave(N // match.game.runs, 0) for s in match.hc)
            self.memory, self.u = self.om.remember(*self.hc[:1]), self.om.begin(N)

    def guess(self, obs, truth, step, args):
        """Own observation (N, O) -> the guess (N, A), and its logarithm where a model makes it."""
        splits = self.match.other_splits
        if self.om:
            logp, self.u = self.om.predict(obs, self.memory, self.u)
        elif args.om == "naive_online":
            logits = self.match.naive(obs.view(self.match.game.runs, -1, obs.shape[-1]).mT)  # (R, A, W)
            logp = log_softmax(logits.mT.reshape(len(obs), -1), splits)
        else:
            return feed_truth(truth, step, splits, args), None
        return harden(logp, splits) if args.discrete_actions else logp.exp(), logp

    def see(self, event):
        """One more event (N, X): only the flat model's state advances within an episode [D4]."""
        self.hc = self.om.advance(event, self.hc)
        self.memory = self.om.remember(self.hc[0])


class Play(NamedTuple):
    rows: torch.Tensor  # (N, L + 1, D) for replay
    logp: Optional[torch.Tensor]  # (N, L, A) log a~ of a model
    other: torch.Tensor  # (N, A) logits of the other at one random step, for its entropy
    mind: Mind


@torch.no_grad()
def rollout(env, match, args, before_step=None, advance=True, frames=None):
    """One episode in each of N worlds. before_step(t) tells whether it has changed the weights."""
    game, where, N, L = match.game, match.where, env.num_envs, env.horizon
    R, i = game.runs, game.lemol
    noise = [gumbel(L, R, A, N // R, device=args.device) for A in game.act]
    mind, nets, order = Mind(match, N), None, (0, 1) if i is None else (1 - i, i)
    follows = advance and bool(match.om) and match.om.kind == "flat"
    keeps = where["mind"].stop > where["mind"].start
    obs, look = env.reset(), int(torch.randint(L, ()))
    over = torch.zeros(N, dtype=torch.bool, device=args.device)
    seen, done, thought, logps = [torch.cat(obs, 1)], [], [], []
    for t in range(L):
        if before_step is not None and before_step(t) or nets is None:
            nets = [layers(match.theta[f"actor{j}"], match.sizes[f"actor{j}"]) for j in (0, 1)]
        action, guess = [None, None], ()
        for j in order:
            x = obs[j]
            if j == i:
                thought += [torch.cat(mind.u, 1)] if keeps else []
                *guess, logp = mind.guess(x, action[1 - i], t, args)
                x = torch.cat([x, *guess], 1)
                logps.append(logp)
            logits = mlp(nets[j], x.view(R, -1, x.shape[1]).mT)  # (R, A, W)
            a = gumbel_softmax(logits, noise[j][t], game.splits[j])
            action[j] = (harden(a, game.splits[j]) if args.discrete_actions else a).mT.reshape(N, -1)
            if t == look and j == order[0]:
                other = logits.mT.reshape(N, -1)
        obs, reward, terminated, truncated, _ = env.step(action)
        end = terminated if args.bootstrap_at_limit else terminated | truncated  # [D7]
        done.append(torch.cat([*action, reward, end[:, None], ~over[:, None], *guess], 1))
        seen.append(torch.cat(obs, 1))
        if follows:
            mind.see(game.event(torch.cat([seen[-2], done[-1]], 1), where)[:, :-1])
        if frames is not None:
            frames.append(env.render(0))
        over = terminated
    rows = torch.zeros(N, L + 1, where["all"].stop, device=args.device)
    rows[:, :, where["obs"]] = torch.stack(seen, 1)
    rows[:, :L, where["act0"].start : where["guess"].stop] = torch.stack(done, 1)
    if keeps:
        rows[:, :, where["mind"]] = torch.stack([*thought, torch.cat(mind.u, 1)], 1)
    return Play(rows, torch.stack(logps, 1) if logps and logps[0] is not None else None, other, mind)


class Replay:
    """R runs, E episodes, L + 1 rows of D numbers. Only rows before an early end are drawn."""

    def __init__(self, runs, episodes, length, width, device):
        self.data = torch.zeros(runs, episodes, length + 1, width, device=device)
        self.index = torch.zeros(runs, episodes * length, dtype=torch.long, device=device)
        self.count, self.episodes = torch.zeros(runs, 1, dtype=torch.long, device=device), 0

    def add(self, rows, valid):
        """rows (R, W, L + 1, D), valid (R, W, L): W more episodes of each run."""
        (R, W, rest, _), first = rows.shape, self.episodes
        self.data[:, first : first + W], self.episodes = rows, first + W
        number = torch.arange(first * rest, (first + W) * rest, device=rows.device).view(W, rest)[:, :-1]
        for r in range(R):
            new, at = number[valid[r] > 0], int(self.count[r])
            self.index[r, at : at + len(new)] = new
            self.count[r] += len(new)

    def sample(self, batch):
        """Rows t and rows t + 1, each (R, D, B), uniform with replacement."""
        R, E, rest, D = self.data.shape
        pick = (torch.rand(R, batch).to(self.data.device) * self.count).long()
        pick = self.index.gather(1, pick.minimum(self.count - 1))  # rand * count may round up
        pick = (pick + torch.arange(R, device=pick.device)[:, None] * (E * rest)).flatten()
        flat = self.data.view(-1, D)
        return [flat.index_select(0, p).view(R, batch, D).mT.contiguous() for p in (pick, pick + 1)]


# ================================================================ 4. Objectives
# Pure functions of tensors. RL losses are means over the minibatch, one for each run, (R,).
def critic_target(reward, done, next_q, gamma):
    """eq. (4): all (R, B)."""
    assert reward.shape == done.shape == next_q.shape
    return reward + gamma * (1 - done) * next_q


def adversary(q_of, action, eps):
    """eq. (5): action (R, A, B) after a step of length eps (R, 1, 1) down q_of(action) (R, B), each column by
    itself. The step is a constant for autograd; where q is flat, there is none."""
    with torch.enable_grad():
        a = action.detach().requires_grad_()
        slope, = torch.autograd.grad(q_of(a).sum(), a)  # [D6]
    return action - eps * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)


def critic_loss(q, y):
    """eq. (6): (R, B) each -> (R,)"""
    assert q.shape == y.shape
    return ((q - y) ** 2).mean(1)


def actor_loss(q, logits):
    """eq. (7): q (R, B) of the actor's own action, its logits (R, A, B) -> (R,)"""
    assert q.shape == logits[:, 0].shape
    return -q.mean(1) + 1e-3 * logits.square().mean((1, 2))


def model_loss(logp, action, valid):
    """eq. (8): mean over valid steps (...) of the cross-entropy with soft or one-hot actions (..., A)."""
    assert logp.shape == action.shape and valid.shape == logp.shape[:-1]
    return -((action * logp).sum(-1) * valid).sum() / valid.sum()


def hits(guess, action, splits):
    """Whether the likeliest action of the guess was taken, in all blocks: (..., A) -> (...)"""
    pairs = zip(guess.split(splits, -1), action.split(splits, -1))
    return torch.stack([g.argmax(-1) == a.argmax(-1) for g, a in pairs]).all(0).float()


def entropy(logits, splits, discrete, samples=256):
    """The least cross-entropy that a model could reach that knows the logits (N, A): the policy's entropy; of
    soft actions, whose mean is flatter than the policy, that of their mean, by sampling. -> (N,)"""
    if discrete:
        p = by_block(F.softmax, logits, splits, 1)
    else:
        p = gumbel_softmax(logits, gumbel(samples, *logits.shape, device=logits.device), splits, 2).mean(0)
    return -(p * p.clamp(min=1e-12).log()).sum(1)


# ================================================================ 5. Update
def clip_each(grad, sizes, max_norm=0.5):
    """Every weight and bias tensor of every run to a norm of its own, as in the released code: (R, P)."""
    counts = tensor_sizes(sizes)
    norm = torch.stack([g.norm(dim=1) for g in grad.split(counts, 1)], 1)  # (R, tensors)
    scale = max_norm / norm.clamp(min=max_norm)
    return torch.cat([scale[:, k, None].expand(-1, n) for k, n in enumerate(counts)], 1).mul_(grad)


class Match:
    """R learning runs in lock-step, and the models that outlive them."""

    def __init__(self, args, env):
        self.args, self.game = args, Game.of(args, env)
        game, i, R = self.game, self.game.lemol, self.game.runs
        self.other_splits, self.models, event = (), {}, 0
        if i is not None:
            self.other_splits, event = game.splits[1 - i], game.act[1 - i] + game.obs[i] + game.act[i] + 2
        if i is not None and args.om in MODELS:
            for name, kind in ("phi", args.om), ("phi_ablated", "ablated"):
                if name == "phi" or args.om != "ablated":
                    model = OpponentModel(kind, game.obs[i], event, self.other_splits, args)
                    self.models[name] = model.to(args.device)
        self.om, self.ablated = self.models.get("phi"), self.models.get("phi_ablated")
        self.guesses = i is not None and args.om not in ("oracle", "uninformed")
        self.event_size = event + 1  # of a recorded step, with its flag
        keep = args.fully_decentralise_lemol and self.om and self.om.episode
        self.where = game.columns(2 * args.in_ep_lstm_dim if keep else 0)
        units = (args.num_units, args.num_units)
        self.sizes = {f"actor{j}": (game.obs[j] + (j == i) * game.act[1 - j], *units, game.act[j])
                      for j in (0, 1)}
        self.sizes |= {f"critic{j}": (self.where["joint"].stop, *units, 1) for j in (0, 1)}
        if i is not None and args.om == "naive_online":
            self.sizes["naive"] = (game.obs[i], *units, game.act[1 - i])
        names = [*self.sizes, *(f"{name}_target" for name in self.sizes if name != "naive")]
        length = lambda name: sum(tensor_sizes(self.sizes[name.removesuffix("_target")]))
        self.theta = {name: torch.zeros(R, length(name), device=args.device) for name in names}
        self.mask, self.eps = zip(*((self.critic_mask(j), self.step_length(j)) for j in (0, 1)))
        lr = lambda name: args.omlr if name == "naive" else args.lr
        self.adam = {name: torch.optim.Adam([self.theta[name]], lr(name), fused=True) for name in self.sizes}
        self.adam |= {name: torch.optim.Adam(om.parameters(), args.omlr) for name, om in self.models.items()}
        self.pool, self.history = load_trajectories(self), []
        self.restart()
        self.episode = args.num_episodes  # the first iteration begins a cycle

    def critic_mask(self, j):
        """(R, I, 1): what the critic of agent j sees in each run; None: everything."""
        seen = torch.ones(self.game.runs, self.where["joint"].stop, 1)
        local = self.args.decentralise_lemol_obs or self.args.fully_decentralise_lemol
        for r, kind in enumerate(self.game.kinds[j]):
            if kind == "ddpg" or kind == "lemol" and local:
                seen[r, self.where[f"obs{1 - j}"]] = 0
            if kind == "ddpg":
                seen[r, self.where[f"act{1 - j}"]] = 0
        return None if seen.all() else seen.to(self.args.device)

    def step_length(self, j):
        """(R, 1, 1): eps of eq. (5), 0 in runs where agent j is no M3DDPG learner; None: 0 in all."""
        far = self.game.opposed or self.args.m3_actor == "code"  # the released critic forgets who is a friend
        eps = self.args.adv_eps if far else self.args.adv_eps_s
        eps = torch.tensor([eps * (kind == "mmmaddpg") for kind in self.game.kinds[j]]).view(-1, 1, 1)
        return eps.to(self.args.device) if eps.any() else None

    @torch.no_grad()
    def restart(self):
        """New players, empty replay, the learned initial state: the beginning of a cycle. phi stays."""
        args, R = self.args, self.game.runs
        for name, sizes in self.sizes.items():
            mask = self.mask[int(name[-1])] if name.startswith("critic") else None
            used = None if mask is None else mask.sum((1, 2)).cpu()
            self.theta[name].copy_(xavier(R, sizes, used))
            if name != "naive":
                start = xavier(R, sizes, used) if args.compat else self.theta[name]  # [D1]
                self.theta[f"{name}_target"].copy_(start)
            if not args.compat:
                self.adam[name].state.clear()
        E, L = args.num_episodes, args.max_episode_len
        self.replay = Replay(R, E, L, self.where["all"].stop, args.device)
        self.hc = self.om.start(R) if self.om else ()
        sizes = dict(om_ce=(L,), om_acc=(L,), valid=(L,), floor=(), reward=(2,))
        self.curve = {k: torch.zeros(R, E, *size, device=args.device) for k, size in sizes.items()}

    def naive(self, obs):
        """Logits of the online model, (R, O, B) -> (R, A, B)."""
        return mlp(layers(self.theta["naive"], self.sizes["naive"]), obs)

    def q(self, flat, j, obs, action):
        """Q of agent j by weights (R, P): obs (R, O, B) of both, action [(R, A_i, B)] of both -> (R, B)"""
        x = torch.cat([obs, *action], 1)
        x = x if self.mask[j] is None else x * self.mask[j]
        return mlp(layers(flat, self.sizes[f"critic{j}"]), x)[:, 0]

    def worst_case(self, flat, j, obs, action):
        """eq. (5): the other's action at its worst for agent j, by the Q of weights (R, P)."""
        joint = lambda a: [a, action[1]] if j == 1 else [action[0], a]
        return adversary(lambda a: self.q(flat, j, obs, joint(a)), action[1 - j], self.eps[j])

    def descend(self, name, loss, flat):
        """One step of a net down a loss (R,)."""
        grad, = torch.autograd.grad(loss.sum(), flat)
        self.theta[name].grad = clip_each(grad, self.sizes[name])
        self.adam[name].step()

    @torch.no_grad()
    def imagine(self, rows):
        """The guess by the present h on replay rows (R, D, B), with their own in-episode state: (R, A, B)."""
        x = rows[:, self.where[f"obs{self.game.lemol}"]]
        if self.om is None:
            guess = by_block(F.softmax, self.naive(x), self.other_splits, 1)
        else:
            u = rows[:, self.where["mind"]].mT.flatten(0, 1).chunk(2, 1) if self.om.episode else ()
            guess = self.om.predict(x.mT, self.om.remember(*(s[:, None] for s in self.hc[:1])), u)[0].exp().mT
        return harden(guess, self.other_splits) if self.args.discrete_actions else guess

    def state(self):
        """Everything that changes, for a checkpoint."""
        r = self.replay
        play = dict(data=r.data[:, : r.episodes].clone(), index=r.index, count=r.count, curve=self.curve,
                    hc=[s.detach().clone() for s in self.hc], episode=self.episode)
        params = {"theta": self.theta} | {name: dict(om.state_dict()) for name, om in self.models.items()}
        return dict(params=params, optimizers={k: o.state_dict() for k, o in self.adam.items()}, play=play,
                    pool=self.pool, history=self.history)

    def load(self, state):
        """Back to such a state; KeyError, RuntimeError or ValueError if it is of another shape."""
        play, r = state["play"], self.replay
        for name, p in self.theta.items():
            p.copy_(state["params"]["theta"][name])
        for name, om in self.models.items():
            om.load_state_dict(state["params"][name])
        for name, adam in self.adam.items():
            adam.load_state_dict(state["optimizers"][name])
        r.episodes = play["data"].shape[1]
        r.data[:, : r.episodes] = play["data"].to(r.data.device)
        r.index.copy_(play["index"]), r.count.copy_(play["count"])
        for name, curve in self.curve.items():
            curve.copy_(play["curve"][name])
        self.hc, self.episode = tuple(s.to(r.data.device) for s in play["hc"]), play["episode"]
        self.pool, self.history = list(state["pool"]), list(state["history"])


@torch.no_grad()
def target_actions(match, j, after):
    """a' of eq. (4) for the critic of agent j, [(R, A_i, B)]. The other comes first, then LeMOL, whose target
    actor reads the other's true target action: as released, both critics assume a perfect model. Fully
    decentralised, LeMOL takes the model's guess for both."""
    game, i, action = match.game, match.game.lemol, [None, None]
    for k in (0, 1) if i is None else (1 - i, i):
        if j == i != k and match.args.fully_decentralise_lemol:
            action[k] = match.imagine(after)
            continue
        x = after[:, match.where[f"obs{k}"]]
        x = torch.cat([x, action[1 - k]], 1) if k == i else x
        logits = mlp(layers(match.theta[f"actor{k}_target"], match.sizes[f"actor{k}"]), x)
        action[k] = gumbel_softmax(logits, gumbel(*logits.shape, device=x.device), game.splits[k])
    if match.eps[j] is not None:
        obs = after[:, match.where["obs"]]
        action[1 - j] = match.worst_case(match.theta[f"critic{j}_target"], j, obs, action)
    return action


@torch.enable_grad()  # a rollout calls it
def learn(match, j, args):
    """eqs. (4)-(7) for agent j in all runs: one minibatch, one step of critic, actor and targets. Returns
    losses and mean Q, (3,)."""
    game, where, theta = match.game, match.where, match.theta
    now, after = match.replay.sample(args.batch_size)
    obs, obs_after = now[:, where["obs"]], after[:, where["obs"]]
    action = [now[:, where[f"act{k}"]] for k in (0, 1)]
    with torch.no_grad():
        next_q = match.q(theta[f"critic{j}_target"], j, obs_after, target_actions(match, j, after))
        y = critic_target(now[:, where["reward"].start + j], now[:, where["done"].start], next_q, args.gamma)
    flat = theta[f"critic{j}"].detach().requires_grad_()
    q_loss = critic_loss(match.q(flat, j, obs, action), y)
    match.descend(f"critic{j}", q_loss, flat)

    x, other = now[:, where[f"obs{j}"]], action[1 - j]
    if j == game.lemol:  # a guess has no gradient: phi learns from eq. (8) alone
        guess = now[:, where["guess"]]
        if args.fully_decentralise_lemol:
            guess = other = match.imagine(now)
        x = torch.cat([x, guess], 1)
    flat = theta[f"actor{j}"].detach().requires_grad_()
    logits = mlp(layers(flat, match.sizes[f"actor{j}"]), x)
    own = gumbel_softmax(logits, gumbel(*logits.shape, device=x.device), game.splits[j])
    both = [own, other] if j == 0 else [other, own]
    if match.eps[j] is not None and args.m3_actor == "paper":
        both[1 - j] = match.worst_case(theta[f"critic{j}"], j, obs, [a.detach() for a in both])
    q = match.q(theta[f"critic{j}"], j, obs, both)
    pi_loss = actor_loss(q, logits)
    match.descend(f"actor{j}", pi_loss, flat)
    if j == game.lemol and args.om == "naive_online":
        flat = theta["naive"].detach().requires_grad_()
        logits = mlp(layers(flat, match.sizes["naive"]), now[:, where[f"obs{j}"]])
        logp, true = log_softmax(logits.mT, match.other_splits), model_target(action[1 - j].mT, match)
        match.descend("naive", -(logp * true).sum(-1).mean(1), flat)
    for name in (f"critic{j}", f"actor{j}"):
        theta[f"{name}_target"].lerp_(theta[name], args.polyak)
    return torch.stack([q_loss.mean(), pi_loss.mean(), q.mean()]).detach()


def model_target(action, match):
    """What eq. (8) fits: the other's action (..., A) as it was, or its largest entry."""
    return harden(action, match.other_splits, -1) if match.args.train_lemol_om_on_oh else action


def event_parts(x, match):
    """Recorded steps (..., X + 1) -> events, own observations, targets, flags."""
    game, i = match.game, match.game.lemol
    A = game.act[1 - i]
    return x[..., :-1], x[..., A : A + game.obs[i]], model_target(x[..., :A], match), x[..., -1]


def train_models(match, args):
    """eq. (8): J sweeps over M recorded runs; each chunk is one Adam step of each model, on the same data.
    The state goes from chunk to chunk as a constant, so the first chunk alone trains h_0 and c_0."""
    runs, size, losses = torch.cat(match.pool), chunk_steps(args), {}
    for _ in range(args.om_training_iters):
        picks = torch.randint(len(runs), (args.num_traj_to_train,)).tolist()
        states = {name: om.start(len(picks)) for name, om in match.models.items()}
        losses = {name: [] for name in states}
        for t in range(0, runs.shape[1] - size + 1, size):  # an incomplete last chunk is dropped
            x = torch.stack([runs[k, t : t + size] for k in picks]).to(args.device)
            events, obs, target, valid = event_parts(x, match)
            for name, om in match.models.items():
                logp, state = om(events, obs, states[name])
                loss = model_loss(logp, target, valid)
                match.adam[name].zero_grad()
                loss.backward()
                match.adam[name].step()
                states[name] = tuple(s.detach() for s in state)
                losses[name].append(loss.detach())
        for om in match.models.values():
            om.zero_grad(set_to_none=True)
    return {f"losses/{name}": torch.stack(v).mean() for name, v in losses.items()}


def record(match, play, first):
    """Add the W episodes of each run to replay and to the curves of this cycle."""
    game, where, i, args = match.game, match.where, match.game.lemol, match.args
    R, L, curve = game.runs, args.max_episode_len, match.curve
    rows = play.rows.view(R, -1, *play.rows.shape[1:])  # (R, W, L + 1, D)
    at, valid = slice(first, first + rows.shape[1]), rows[:, :, :L, where["valid"]][..., 0]
    match.replay.add(rows, valid)
    curve["valid"][:, at] = valid
    curve["reward"][:, at] = (rows[:, :, :L, where["reward"]] * valid[..., None]).sum(2)
    if i is not None:
        true = rows[:, :, :L, where[f"act{1 - i}"]]
        curve["om_acc"][:, at] = hits(rows[:, :, :L, where["guess"]], true, match.other_splits)
        curve["floor"][:, at] = entropy(play.other, match.other_splits, args.discrete_actions).view(R, -1)
        if play.logp is not None:
            curve["om_ce"][:, at] = -(play.logp.view(true.shape) * model_target(true, match)).sum(-1)


def iterate(match, env, args):
    """The next episodes of a cycle: {tag: value} and the number of transitions. A cycle begins with the
    training of the models, new players and exploration, and ends by handing its runs over to the models."""
    game, logs, losses = match.game, {}, []
    first, L, P, late = args.batch_size, args.max_episode_len, args.agent_update_freq, 0
    if match.episode == args.num_episodes:
        if match.pool and match.models:
            logs |= train_models(match, args)  # [D3]
        match.restart()
        n, match.episode = first, first
        record(match, rollout(make_env(args, game.runs * n), match, args, advance=False), 0)
    else:
        n, late = min(args.segment, args.num_episodes - match.episode), int(args.compat and P > 1)  # [D1]

        def update(t):
            tau = (match.episode - first) * L + t - late
            if due := tau >= 0 and tau % P == 0:
                losses.append(torch.stack([learn(match, j, args) for j in (0, 1)]))
            return due

        for _ in range(n):
            play = rollout(env, match, args, update)
            record(match, play, match.episode)
            if match.om and match.om.kind == "ep":
                with torch.no_grad():
                    block = game.event(play.rows[:, :-1], match.where)[..., :-1]
                    match.hc = match.om.advance(block, match.hc)
            elif match.om:
                match.hc = play.mind.hc
            match.episode += 1
    phase = phases({k: v[:, match.episode - n : match.episode] for k, v in match.curve.items()}, match, 1)
    logs |= {f"charts/episodic_return/agent_{j}": phase[f"return_{j}"][0] for j in (0, 1)}
    logs["charts/episodic_return"] = phase[f"return_{game.lemol or 0}"][0]
    logs |= {f"om/{k}": phase[k][0] for k in ("om_ce", "om_acc", "floor") if k in phase}
    if losses:
        names = [f"{k}_{j}" for j in (0, 1) for k in ("losses/critic", "losses/actor", "charts/q")]
        logs |= dict(zip(names, torch.stack(losses).mean(0).flatten()))
    if match.episode == args.num_episodes:
        logs |= finish_cycle(match, args)
    return logs, game.runs * n * L


# ================================================================ 6. Evaluation
# How good were the models while the opponent learned: on the runs of a cycle, which none has seen yet. The
# played model made its guesses in play, the ablated one makes its own on the same play. And how good are the
# players now: some episodes in which nobody learns, in own worlds and an own random stream, so that
# evaluating does not change what is learned.
@torch.no_grad()
def finish_cycle(match, args):
    """Hand the runs of a cycle over to the models, and note its curves. -> {tag: value}"""
    curve = {k: v[:, args.batch_size :] for k, v in match.curve.items()}
    if match.game.lemol is not None:
        runs = match.game.event(match.replay.data[:, args.batch_size :, :-1], match.where).flatten(1, 2)
        match.pool.append(runs.cpu())  # (R, T, X + 1)
        if match.ablated:
            curve |= dict(zip(("ablated_ce", "ablated_acc"), recount(match, match.ablated, runs)))
        if args.trajectories:
            save_trajectories(match)
    match.history.append(phases(curve, match))
    return {f"cycle/{k}": sum(v) / len(v) for k, v in match.history[-1].items()}


@torch.no_grad()
def recount(match, om, runs):
    """Cross-entropy and hits (R, E, L) of a model on recorded runs (R, T, X + 1), as it would be in play."""
    L, state, out = match.args.max_episode_len, om.start(len(runs)), []
    for x in runs.split(100 * L, 1):
        events, obs, target, _ = event_parts(x, match)
        logp, state = om(events, obs, state)
        hit = hits(logp, target, match.other_splits)
        out.append([y.unflatten(1, (-1, L)) for y in (-(logp * target).sum(-1), hit)])
    return [torch.cat(parts, 1) for parts in zip(*out)]


def phases(curve, match, number=10):
    """{name: [mean in each tenth of the learning]} of (R, E, L), (R, E), or for "reward" (R, E, 2)."""
    parts = {k: v.tensor_split(min(number, v.shape[1]), 1) for k, v in curve.items()}
    out = {f"return_{j}": [x[..., j].mean().item() for x in parts["reward"]] for j in (0, 1)}
    if match.game.lemol is None:
        return out
    names = [k for k in ("om_ce", "ablated_ce", "om_acc", "ablated_acc") if k in curve]
    names = [k for k in names if k != "om_ce" or match.guesses]
    means = {k: [((x * v).sum() / v.sum()).item() for x, v in zip(parts[k], parts["valid"])] for k in names}
    return means | {"floor": [x.mean().item() for x in parts["floor"]]} | out


@torch.no_grad()
def evaluate(match, args, frames=None):
    """{name: (R,)} of the players and models as they are."""
    game, i, R = match.game, match.game.lemol, match.game.runs
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        play = rollout(make_env(args, R * args.eval_episodes), match, args, frames=frames)
        floor = None if i is None else entropy(play.other, match.other_splits, args.discrete_actions)
    column = lambda name: play.rows[:, :-1, match.where[name]]
    valid, total = column("valid")[..., 0], lambda x: x.reshape(R, -1).sum(1).cpu()
    mean = lambda x: total(x * valid) / total(valid)
    out = {f"return_{j}": total(column("reward")[..., j] * valid) / args.eval_episodes for j in (0, 1)}
    if i is None:
        return out
    target = model_target(column(f"act{1 - i}"), match)
    out["om_acc"] = mean(hits(column("guess"), target, match.other_splits))
    out["floor"] = total(floor) / args.eval_episodes
    if play.logp is not None:
        out["om_ce"] = mean(-(play.logp * target).sum(-1))
    if match.ablated:
        ce, hit = recount(match, match.ablated, game.event(play.rows[:, :-1], match.where))
        out |= {"ablated_ce": mean(ce[:, 0]), "ablated_acc": mean(hit[:, 0])}
    return out


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(results, match):
    """{tag: value} of an evaluation and of the cycles before it."""
    flat = {}
    for k, v in results.items():
        flat |= {f"eval/{k}": v.mean().item(), f"eval/{k}_ci95": interval(v).item()}
    for number, entry in enumerate(match.history, 1):
        flat |= {f"eval/cycle_{number}/{k}": sum(v) / len(v) for k, v in entry.items()}
        flat |= {f"eval/cycle_{number}/{k}/{p}": x for k, v in entry.items() for p, x in enumerate(v, 1)}
    return flat


def table(results, match, args):
    """Who got what in the end; models and returns in each cycle, and along the learning in the last one."""
    row = lambda name, values, form=".3f": f"{name:30s}" + "".join(f"{format(v, form):>8s}" for v in values)
    title = {"om_ce": f"{args.om}: cross-entropy", "ablated_ce": "ablated: cross-entropy",
             "floor": "floor (knows the policy)", "om_acc": f"{args.om}: accuracy",
             "ablated_acc": "ablated: accuracy"} | {f"return_{j}": f"return of agent {j}" for j in (0, 1)}
    pairs, lines = [f"{a} : {b}" for a, b in zip(*match.game.kinds)], []
    for pair in dict.fromkeys(pairs):
        runs = [r for r, other in enumerate(pairs) if other == pair]
        returns = [results[f"return_{j}"][runs] for j in (0, 1)]
        text = ", ".join(f"{x.mean():.2f} ± {interval(x):.2f}" for x in returns)
        lines.append(f"{args.env}, {pair}: returns of the last policies {text} ({len(runs)} runs)")
    lines += [row(f"now, {title[k]}", [results[k].mean()]) for k in title if k in results]
    for entry in match.history[-1:]:
        lines.append(row("cycle", range(1, len(match.history) + 1), "d"))
        lines += [row(title[k], [sum(e[k]) / len(e[k]) for e in match.history]) for k in title if k in entry]
        lines.append(row("the last cycle, in tenths", range(1, len(entry["return_0"]) + 1), "d"))
        lines += [row(title[k], entry[k]) for k in title if k in entry]
    return "\n".join(lines)


def capture(match, args, folder):
    """--capture-video: match.gif, one episode of the last policies."""
    from PIL import Image

    args.eval_episodes, frames = 1, []
    evaluate(match, args, frames)
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(folder / "match.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return folder / "match.gif"


def load_trajectories(match):
    """The runs in --trajectories, [(n, T, X + 1)], if there are any."""
    path, args = match.args.trajectories, match.args
    if not path or not Path(path).exists():
        return []
    try:
        with np.load(path) as file:
            runs = torch.from_numpy(file["runs"]).float()
    except Exception as e:
        fail(f"--trajectories {path} cannot be read as .npz with an array `runs` ({type(e).__name__})")
    wanted = ((args.num_episodes - args.batch_size) * args.max_episode_len, match.event_size)
    if runs.dim() != 3 or runs.shape[1:] != wanted or not len(runs) or not runs.isfinite().all():
        fail(f"--trajectories {path} holds {tuple(runs.shape)} numbers, not runs of {wanted} finite ones")
    return [runs]


def save_trajectories(match):
    path = Path(match.args.trajectories)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, runs=torch.cat(match.pool).numpy())
        temporary.replace(path)
    except OSError as e:
        fail(f"cannot write --trajectories {path}: {e.strerror}")


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
def restore(path, match):
    """Put a checkpoint back; returns it."""
    state = load(path)
    try:
        match.load(state)
    except (KeyError, RuntimeError, ValueError):
        holds = lambda a: (f"{a['bad_policy']} against {a['good_policy']} in {a['env']}, --om {a['om']}, "
                           f"{a['num_episodes']} episodes")
        fail(f"{path} holds {holds(state['args'])}; wanted was {holds(asdict(match.args))}, or other sizes")
    return state


def evaluate_checkpoint(args):
    """--evaluate: the table of a run, and its eval.json."""
    args.trajectories = None
    match = Match(args, make_env(args, 1))
    state, folder = restore(args.evaluate, match), Path(args.evaluate).parent
    results = evaluate(match, args)
    print(table(results, match, args))
    write_eval(folder, summary(results, match), state["global_step"], args.seed)
    if args.capture_video:
        print(capture(match, args, folder))
    return match.state()["params"]


def describe(match, logs, args):
    """The progress line."""
    text = f"cycle {len(match.history) + (match.episode < args.num_episodes)}"
    if "cycle/om_ce" in logs:
        names = {args.om: "om", "ablated": "ablated"} if match.ablated else {args.om: "om"}
        text += ", cross-entropy " + ", ".join(f"{k} {logs[f'cycle/{v}_ce']:.3f}" for k, v in names.items())
    return text + ", returns " + ", ".join(f"{logs[f'charts/episodic_return/agent_{j}']:.2f}" for j in (0, 1))


def train(args):
    set_up(resolve(args))
    if args.evaluate:
        return evaluate_checkpoint(args)
    match = Match(args, make_env(args, 1))
    env, iteration, global_step = make_env(args, match.game.runs), 0, 0
    if args.resume:
        state = restore(args.resume, match)
        iteration, global_step = state["iteration"], state["global_step"]
        set_rng(state)
    log, stop, done = Log(args, global_step), False, global_step >= args.total_steps

    while not stop and not done:
        logs, steps = iterate(match, env, args)
        iteration += 1
        global_step += steps
        logs["charts/SPS"] = log.sps(global_step)
        stop, done = log.stop(), global_step >= args.total_steps
        if done or args.eval_every and iteration % args.eval_every == 0:
            results = evaluate(match, args)
            logs |= summary(results, match)
        log.scalars(logs, global_step)
        log.progress(global_step, describe(match, logs, args), match.episode == args.num_episodes)
        if stop or done or iteration % args.save_every == 0:
            place = dict(iteration=iteration, global_step=global_step)
            save(log.dir / "checkpoint.pt", match.state() | place, args)
        if done:
            write_eval(log.dir, summary(results, match), global_step, args.seed)
            print(f"{table(results, match, args)}\n{log.dir}: {global_step} steps")
    log.close()
    return match.state()["params"]


if __name__ == "__main__":
    train(cli(Args, __doc__))
