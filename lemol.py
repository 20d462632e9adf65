"""
LeMOL: an opponent model that learns how its opponent learns.

  Paper      Davies, Tian, Wang: Learning to Model Opponent Learning. AAAI-20 student abstract,
             arXiv:2006.03923. Opponents: Lowe et al., arXiv:1706.02275 (MADDPG); Li et al.: Robust
             Multi-Agent RL via Minimax Deep Deterministic Policy Gradient. AAAI 2019 (M3DDPG).
  Problem    Player i meets an opponent -i who learns while they play, from random weights on. A model fitted
             to the past averages over policies that are gone. LeMOL reads a WHOLE learning run as one
             sequence: the state h of an LSTM says where in its learning the opponent is.
  Algorithm  for each cycle: R learning runs side by side, each with new players, phi frozen:
               every player acts by a = softmax(logits + Gumbel noise)        (1) -> gumbel_softmax()
               B episodes of the untrained policies (exploration); then, from h = h_0,
               each step: a~ = softmax head(in-episode LSTM(o^i), h)          (2) -> OpponentModel.predict()
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
             the oracle that knows all: a~ = a^-i with probability p          (9) -> feed_truth()
  Symbols    theta {net: (R, P)}   x_t event [a^-i; o^i; a^i; r^i; end]   h, c (R, H)   a~ guess (R, A, B)
             phi   OpponentModel   u   in-episode LSTM state (N, 32)
             R runs, L steps of an episode, B minibatch, N = R W envs, X numbers of an event, D of a row
  Methods    --om ep (LeMOL-EP) | flat (h advances each step) | ablated (no h) | oracle (of the action) |
             policy (oracle of the policy) | uninformed (noise). --bad-policy (agent 0) and --good-policy
             (agent 1): lemol | maddpg | mmmaddpg (M3DDPG).
  Departures [D1] Targets start as copies, polyak is 0.01, optimisers start anew with the players. Released:
                  targets of other random weights, polyak 0.0001, old Adam moments.
             [D2] The runs of a cycle are one batch, networks stacked: exact, because phi is frozen.
             [D3] phi is trained before a cycle, not after: nothing is trained that is never played.
             [D4] --om flat advances h at every step in play too, the released code in bursts of P steps.
             [D5] The ablated model has no h at all.
             [D6] M3DDPG differentiates the sum of Q: the mean's gradients drown in the norm's floor. Its
                  actor is a plain one, as released.
             [D7] The time limit ends an episode for the critic (d = 1), as released.
             [D8] What follows an early end (uav) is masked, and blocks stay whole episodes.
             [D9] The default is small: 8 runs, B = 128, 4 cycles of 1128 episodes. --paper has the paper's.
  Run        python lemol.py --env simple_push                      # 2 min; cross-entropy 1.3, ablated 1.5
             python lemol.py --env simple_push --paper              # the paper's scale: hours
             python lemol.py --env simple_push --om ablated         # the paper's ablation
             python lemol.py --env simple_push --om oracle          # told the action: 30 s
             python lemol.py --env simple_push --bad-policy maddpg  # no opponent model: 30 s
             python lemol.py --env uav                              # the UAV models its pursuer
             python lemol.py --evaluate runs/x/checkpoint.pt --capture-video    # table, and play.gif
  Licence    MIT. Please cite the papers above for the methods.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tyro.constructors import PrimitiveConstructorSpec

import envs

# ================================================================ 0. Arguments
SCRIPT = Path(globals().get("__file__", "notebook.py")).stem


def fail(message, code=2):
    """End with one line on stderr. Exit code 2: bad input; 1: the run itself went wrong."""
    print(f"{SCRIPT}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def within(kind, low, high=math.inf):
    """A number for Args that the command line refuses outside [low, high]; --help shows the range."""

    def read(words):
        value = kind(float(words[0])) if "e" in words[0].lower() else kind(words[0])  # 1e6 is an integer too
        if not low <= value <= high:
            raise ValueError(f"must be in [{low}, {high}], not {value}")
        return value

    return Annotated[kind, PrimitiveConstructorSpec(
        nargs=1, metavar=f"{kind.__name__.upper()} {low}..{high}", instance_from_str=read,
        is_instance=lambda x: isinstance(x, (int, float)), str_from_instance=lambda x: [str(x)])]


Count, Size, Share = within(int, 1), within(float, 0), within(float, 0, 1)


Policy = Literal["lemol", "maddpg", "mmmaddpg"]
MODELS = ("ep", "flat", "ablated")  # the opponent models that are trained


@dataclass
class Args:
    """Defaults: a quick simple_push, two minutes of one core [D9]. PAPER below has the paper's sizes."""

    # --- run: the same in all six scripts
    env: str = "simple_push"  # simple_push, simple_speaker_listener, simple_tag, uav, or your own: make_env()
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch
    total_steps: Count = 902_400  # training transitions of all runs; by default those of n_opp_cycles cycles
    eval_every: within(int, 0) = 0  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 100  # episodes of each run in an evaluation
    save_every: Count = 21  # iterations between checkpoints; also at the end of a cycle and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    paper: bool = False  # the paper's sizes
    bad_policy: Policy = "lemol"  # learner of agent 0, the adversary where there is one
    good_policy: Policy = "maddpg"  # learner of agent 1
    om: Literal["ep", "flat", "ablated", "oracle", "policy", "uninformed"] = "ep"  # opponent model: Methods
    discrete_actions: bool = False  # one-hot actions; off: soft ones, points of the simplex
    max_episode_len: Count = 25  # L, steps in an episode
    num_episodes: Count = 1128  # episodes of a learning run, exploration included
    n_opp_cycles: Count = 4  # cycles, each of fresh players; 1 by default where no model is trained
    traj_per_iter: Count = 8  # R, learning runs side by side in a cycle
    segment: Count = 50  # episodes in an iteration: what is logged at once
    batch_size: Count = 128  # B, minibatch of eqs. (4)-(7), and the episodes of exploration
    agent_update_freq: Count = 25  # P, steps between updates; --om ep needs P = L
    lr: Size = 1e-2  # Adam's step size of actors and critics
    gamma: Share = 0.95  # discount
    polyak: Share = 0.01  # share of the new weights in the targets at each update [D1]
    num_units: Count = 64  # width of the two hidden layers of each network
    adv_eps: Size = 1e-3  # eps of eq. (5), against the other side
    adv_eps_s: Size = 1e-5  # accepted and unused, as released: between two players no one is a team-mate
    chunk_length: Count = 20  # U, blocks (ep, ablated) or steps (flat) that eq. (8) is differentiated through
    om_training_iters: Count = 5  # J, sweeps between cycles
    num_traj_to_train: Count = 8  # M, runs in a sweep, drawn with replacement from all so far
    omlr: Size = 2e-3  # Adam's step size of the opponent model
    lstm_hidden_dim: Count = 64  # H, size of the learning state h
    episode_embedding_dim: within(int, 2) = 128  # size of the BiLSTM's summary of a block, even
    recurrent_om_prediction: bool = True  # ep, ablated: the head reads an in-episode LSTM; off: o^i alone
    in_ep_lstm_dim: Count = 32  # size of the in-episode LSTM
    train_lemol_om_on_oh: bool = False  # targets of eq. (8) are one-hot(argmax) also where actions are soft
    fresh_guesses: bool = False  # eq. (7) reads guesses made anew with the present h, not those of the play
    lemol_true_action_feed_proportion: Share = 1.0  # p of eq. (9)


PAPER = dict(num_episodes=11_024, batch_size=1024, n_opp_cycles=10, traj_per_iter=3, chunk_length=64,
             omlr=1e-3, segment=50, save_every=101)
PRESETS = {  # what differs from the defaults
    "simple_push": {},
    "simple_speaker_listener": {},
    "simple_tag": {},
    "uav": dict(bad_policy="maddpg", good_policy="lemol", discrete_actions=True),
}


def preset(args):
    """What replaces the defaults where the command line is silent."""
    changes = PRESETS.get(args.env, {}) | (PAPER if args.paper else {})
    defaults = Args()
    silent = {name: v for name, v in changes.items() if getattr(args, name) == getattr(defaults, name)}
    sizes = replace(args, **silent)
    if args.n_opp_cycles == defaults.n_opp_cycles and not trains_model(sizes):
        changes = changes | dict(n_opp_cycles=1)
        sizes = replace(sizes, n_opp_cycles=1)
    steps = sizes.n_opp_cycles * sizes.traj_per_iter * sizes.num_episodes * sizes.max_episode_len
    return changes | dict(total_steps=steps)


def trains_model(args):
    return "lemol" in (args.bad_policy, args.good_policy) and args.om in MODELS


def chunk_steps(args):
    """Steps in a chunk of eq. (8)."""
    return args.chunk_length * (1 if args.om == "flat" else args.max_episode_len)


def check(args):
    """Refuse what no single argument can be blamed for."""
    played = args.num_episodes - args.batch_size
    if args.bad_policy == args.good_policy == "lemol":
        fail("--bad-policy and --good-policy: LeMOL can play one side only")
    if trains_model(args) and args.om == "ep" and args.agent_update_freq != args.max_episode_len:
        fail(f"--om ep needs --agent-update-freq {args.max_episode_len}, an episode; --om flat takes any")
    if args.episode_embedding_dim % 2:
        fail(f"--episode-embedding-dim must be even, not {args.episode_embedding_dim}")
    if chunk_steps(args) > played * args.max_episode_len:
        fail(f"--chunk-length {args.chunk_length} is longer than a run: of its {args.num_episodes} episodes "
             f"{max(played, 0)} remain after the exploration, which is --batch-size {args.batch_size}")
    if args.env == "uav" and not args.discrete_actions:
        fail("--env uav needs --discrete-actions")


def parse():
    """Read the command line. What it leaves open comes from the checkpoint if one is given, else from
    preset(args), a dict that replaces some of the defaults."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows no "±" shows "?"
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    given, _ = tyro.cli(Args, args=words, return_unknown_args=True)
    if given.resume and given.evaluate or given.capture_video and not given.evaluate:
        fail("--resume and --evaluate exclude each other, and --capture-video needs --evaluate")
    path = given.resume or given.evaluate
    own = dict(resume=given.resume, evaluate=given.evaluate, run_dir=None)
    stored = load(path)["args"] | own if path else preset(given)
    args = tyro.cli(Args, description=__doc__, default=Args(**stored))
    free = ("device", "num_threads", "total_steps", "save_every", "capture_video", "track")
    for name, value in stored.items() if path else ():
        if getattr(args, name) != value and name not in free and not name.startswith("eval_"):
            fail(f"--{name.replace('_', '-')} cannot change here: the checkpoint was made with {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU here")
    return args


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own game of two by returning an object with these members:
    #   num_envs N, horizon L, num_agents 2, obs_dims, action_dims, device
    #   reset() -> obs, step(action) -> obs, reward (N, 2), terminated (N,), truncated (N,), info
    #   discrete True; obs[i] (N, O_i), action[i] (N, A_i) soft or one-hot; a terminated row rests until the end
    options = {} if args.env == "uav" else dict(dialect="mpe")
    if args.env == "simple_tag":
        options |= dict(num_agents=2, num_adversaries=1)
    try:
        return envs.make(args.env, num_envs, horizon=args.max_episode_len, device=args.device, **options)
    except ValueError as error:
        fail(error)


def playable(args, env):
    """Refuse what make_env returned if LeMOL cannot play it."""
    blocks = max(map(len, getattr(env, "action_splits", [()])))
    if env.num_agents != 2 or not env.discrete or blocks > 1 or env.horizon != args.max_episode_len:
        fail(f"--env {args.env}: LeMOL needs two players with one discrete choice each and episodes of "
             f"--max-episode-len {args.max_episode_len} steps")


class Game(NamedTuple):
    """What never changes: R, the two learners, and sizes."""

    runs: int
    kinds: tuple  # learner of each agent
    lemol: Optional[int]  # the agent with an opponent model, if any
    obs: tuple
    act: tuple

    def columns(self, mind):
        """Where things are in a replay row, {name: slice}; `mind` numbers for the in-episode state."""
        sizes = dict(obs0=self.obs[0], obs1=self.obs[1], act0=self.act[0], act1=self.act[1], reward=2, done=1,
                     valid=1, guess=0 if self.lemol is None else self.act[1 - self.lemol], mind=mind)
        ends = dict(zip(sizes, itertools.accumulate(sizes.values())))
        where = {name: slice(end - sizes[name], end) for name, end in ends.items()}
        both = dict(obs=slice(0, ends["obs1"]), joint=slice(0, ends["act1"]), all=slice(0, ends["mind"]))
        return where | both

    def event(self, rows, where):
        """x_t = [a^-i; o^i; a^i; r^i; end], and 1, or 0 after an early end: (..., D) -> (..., X + 1)."""
        i = self.lemol
        valid = rows[..., where["valid"]]
        x = [rows[..., where[name]] for name in (f"act{1 - i}", f"obs{i}", f"act{i}")]
        x += [rows[..., where["reward"]][..., i, None], rows[..., where["done"]]]
        return torch.cat([torch.cat(x, -1) * valid, valid], -1)  # [D8]


# ================================================================ 2. Networks
# Actors and critics are Linear-ReLU-Linear-ReLU-Linear. The nets of all R runs are one tensor (R, P), each
# row the weights of one run in a line: one optimiser, one clipping, one polyak step for all of them, and
# batched products in between [D2]. Losses are summed over runs, so that no run feels another. Minibatches are
# (R, features, B): narrow products and softmaxes are 3 to 20 times faster so.
def xavier(runs, sizes):
    """(R, P): Xavier-uniform weights (R, out, in) and zero biases, by the fans of one net."""
    parts = []
    for n, m in itertools.pairwise(sizes):
        parts += [(2 * torch.rand(runs, n * m) - 1) * math.sqrt(6 / (n + m)), torch.zeros(runs, m)]
    return torch.cat(parts, 1)


def tensor_sizes(sizes):
    """How many numbers of a row belong to each weight and bias."""
    return [k for n, m in itertools.pairwise(sizes) for k in (n * m, m)]


def mlp(flat, sizes, x):
    """Nets (R, P) of layers `sizes` on x (R, F, B) -> (R, out, B)"""
    parts = flat.split(tensor_sizes(sizes), 1)
    for k, (n, m) in enumerate(itertools.pairwise(sizes)):
        x = torch.baddbmm(parts[2 * k + 1].view(-1, m, 1), parts[2 * k].view(-1, m, n), x)
        x = x.relu_() if k < len(sizes) - 2 else x
    return x


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

    def __init__(self, kind, obs_dim, event_dim, actions, args):
        super().__init__()
        self.kind, self.length = kind, args.max_episode_len
        H, E, U = args.lstm_hidden_dim, args.episode_embedding_dim, args.in_ep_lstm_dim
        recurrent = args.recurrent_om_prediction and args.om != "flat"
        # what the head reads: z, from the observation, and h
        self.episode = lstm(obs_dim, U) if recurrent else None
        self.u0 = nn.Parameter(torch.zeros(2, U)) if recurrent else None
        self.block = lstm(event_dim, E // 2, bidirectional=True) if kind == "ep" else None
        self.core = lstm(E if kind == "ep" else event_dim, H) if kind != "ablated" else None  # [D5]
        self.h0 = nn.Parameter(torch.zeros(2, H)) if kind != "ablated" else None  # h_0 and c_0
        self.z_dim = U if recurrent else obs_dim
        # the head, an MLP
        sizes = [self.z_dim + H * (kind != "ablated"), 64, 64, actions]
        self.head = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))
        for layer in self.head:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

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
        return self.head[2](self.head[1](x).relu()).log_softmax(-1)

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
        M, L = len(obs), self.length
        by_block = self.kind == "ep" or self.episode is not None
        z = obs.unflatten(1, (-1, L)) if by_block else obs  # (M, U, L, O), or (M, T, O) with any T
        # the learning state, one event or block late
        if self.core is None:
            memory = self.remember()
        else:
            x = events
            if self.kind == "ep":
                x = self.embed(events.reshape(-1, L, events.shape[-1])).view(M, -1, self.core.input_size)
            seq, after = self.core(x, tuple(s[None].contiguous() for s in hc))
            memory = self.remember(shift_right(seq, hc[0]))  # (M, U, 64), or (M, T, 64)
            memory = memory if self.kind == "flat" else memory[:, :, None]
            hc = tuple(s[0] for s in after)
        # the episode so far
        if self.episode is not None:
            flat = z.reshape(-1, L, z.shape[-1])
            start = tuple(s[None].contiguous() for s in self.begin(len(flat)))
            z = self.episode(flat, start)[0].view(*z.shape[:-1], -1)
        return self.log_guess(z, memory).reshape(M, obs.shape[1], -1), hc


# ================================================================ 3. Rollout
# N = R W envs: W = 1 while players learn, W = B in the exploration before it, where nobody learns yet. The
# opponent acts first, because the oracle wants to see it; a model does not. An episode becomes L + 1 replay
# rows, of which the last holds the final observation alone: the successor of row t is row t + 1, always.
def harden(x, dim=1):
    """One-hot of the largest entry."""
    return torch.zeros_like(x).scatter_(dim, x.argmax(dim, keepdim=True), 1.0)


def gumbel(*shape, device="cpu"):
    return torch.rand(shape).log_().neg_().log_().neg_().to(device)


def gumbel_softmax(logits, noise, dim=1):
    """eq. (1): a point of the simplex whose largest entry is action a with probability softmax(logits)_a."""
    return (logits + noise).softmax(dim)


def feed_truth(truth, p, discrete):
    """eq. (9): the true action (N, A) with probability p, else a random action or a uniform point of the
    simplex."""
    noise = torch.rand(truth.shape).log_().neg_().log_()  # softmax of log Exp(1): Dirichlet(1)
    noise = noise.softmax(1).to(truth.device)
    noise = harden(noise) if discrete else noise
    return torch.where((torch.rand(len(truth), 1) < p).to(truth.device), truth, noise)


class Mind:
    """What LeMOL thinks of the other during an episode, in N envs."""

    def __init__(self, match, N):
        self.om = match.om
        if self.om:
            self.hc = tuple(s.repeat_interleave(N // match.game.runs, 0) for s in match.hc)
            self.memory = self.om.remember(*self.hc[:1])
            self.u = self.om.begin(N)

    def guess(self, obs, action, logits, args):
        """Own observation (N, O) -> the guess (N, A), and its logarithm where a model makes it. An oracle is
        told the other's action or logits (N, A) of this step."""
        if args.om == "policy":
            return logits.softmax(1), None
        if not self.om:
            p = args.lemol_true_action_feed_proportion * (args.om == "oracle")
            return feed_truth(action, p, args.discrete_actions), None
        logp, self.u = self.om.predict(obs, self.memory, self.u)
        return harden(logp) if args.discrete_actions else logp.exp(), logp

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
def rollout(env, match, args, update=None, advance=True):
    """One episode in each of N envs. update(t) may change the weights before step t."""
    game, where = match.game, match.where
    N, L, R, i = env.num_envs, env.horizon, game.runs, game.lemol
    order = (0, 1) if i is None else (1 - i, i)
    noise = [gumbel(L, R, A, N // R, device=args.device) for A in game.act]
    # the minds and the envs start
    mind = Mind(match, N)
    keeps = where["mind"].stop > where["mind"].start
    obs, look = env.reset(), int(torch.randint(L, ()))
    over = torch.zeros(N, dtype=torch.bool, device=args.device)
    seen, done, thought, logps = [torch.cat(obs, 1)], [], [], []
    for t in range(L):
        if update is not None:
            update(t)
        # one acts after the other
        action, logits, guess = [None, None], None, ()
        for j in order:
            x = obs[j]
            if j == i:
                thought += [torch.cat(mind.u, 1)] if keeps else []
                *guess, logp = mind.guess(x, action[1 - i], logits, args)
                x = torch.cat([x, *guess], 1)
                logps += [] if logp is None else [logp]
            out = match.actor(j, x.view(R, -1, x.shape[1]).mT)  # (R, A, W)
            a = gumbel_softmax(out, noise[j][t])
            action[j] = (harden(a) if args.discrete_actions else a).mT.reshape(N, -1)
            logits = out.mT.reshape(N, -1)
            if t == look and j == order[0]:
                other = logits
        # what the step brings
        obs, reward, terminated, truncated, _ = env.step(action)
        end = terminated | truncated  # [D7]
        done.append(torch.cat([*action, reward, end[:, None], ~over[:, None], *guess], 1))
        seen.append(torch.cat(obs, 1))
        if advance and args.om == "flat" and match.om:
            mind.see(game.event(torch.cat([seen[-2], done[-1]], 1), where)[:, :-1])
        over = terminated
    # replay rows
    rows = torch.zeros(N, L + 1, where["all"].stop, device=args.device)
    rows[:, :, where["obs"]] = torch.stack(seen, 1)
    rows[:, :L, where["act0"].start : where["guess"].stop] = torch.stack(done, 1)
    if keeps:
        rows[:, :L, where["mind"]] = torch.stack(thought, 1)
    return Play(rows, torch.stack(logps, 1) if logps else None, other, mind)


class Replay:
    """R runs, E episodes, L + 1 rows of D numbers. Only rows before an early end are drawn."""

    def __init__(self, runs, episodes, length, width, device):
        self.data = torch.zeros(runs, episodes, length + 1, width, device=device)
        self.index = torch.zeros(runs, episodes * length, dtype=torch.long, device=device)
        self.count, self.episodes = torch.zeros(runs, 1, dtype=torch.long, device=device), 0

    def add(self, rows, valid):
        """rows (R, W, L + 1, D), valid (R, W, L): W more episodes of each run."""
        R, W, rest, _ = rows.shape
        first = self.episodes
        self.episodes += W
        self.data[:, first : self.episodes] = rows
        number = torch.arange(first * rest, self.episodes * rest, device=rows.device).view(W, rest)[:, :-1]
        for r in range(R):
            new = number[valid[r] > 0]
            at = int(self.count[r])
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


def hits(guess, action):
    """Whether the likeliest action of the guess was taken: (..., A) -> (...)"""
    return (guess.argmax(-1) == action.argmax(-1)).float()


def entropy(logits, discrete, samples=256):
    """The least cross-entropy that a model could reach that knows the logits (N, A): the policy's entropy; of
    soft actions, whose mean is flatter than the policy, that of their mean, by sampling. -> (N,)"""
    if discrete:
        p = logits.softmax(1)
    else:
        p = gumbel_softmax(logits, gumbel(samples, *logits.shape, device=logits.device), 2).mean(0)
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
        i = 0 if args.bad_policy == "lemol" else 1 if args.good_policy == "lemol" else None
        game = Game(args.traj_per_iter, (args.bad_policy, args.good_policy), i, tuple(env.obs_dims),
                    tuple(env.action_dims))
        self.args, self.game, self.models = args, game, {}
        # the models: the one that is played, and beside it an ablated one
        if trains_model(args):
            event = game.act[1 - i] + game.obs[i] + game.act[i] + 2
            for name, kind in {"phi": args.om, "phi_ablated": "ablated"}.items():
                if name == "phi" or args.om != "ablated":
                    model = OpponentModel(kind, game.obs[i], event, game.act[1 - i], args)
                    self.models[name] = model.to(args.device)
        self.om, self.ablated = self.models.get("phi"), self.models.get("phi_ablated")
        keep = args.fresh_guesses and self.om and self.om.episode
        self.where = game.columns(2 * args.in_ep_lstm_dim if keep else 0)
        # the players: layers, weights, optimisers
        units = (args.num_units, args.num_units)
        self.sizes = {f"actor{j}": (game.obs[j] + (j == i) * game.act[1 - j], *units, game.act[j])
                      for j in (0, 1)}
        self.sizes |= {f"critic{j}": (self.where["joint"].stop, *units, 1) for j in (0, 1)}
        self.theta = {name + end: torch.zeros(game.runs, sum(tensor_sizes(sizes)), device=args.device)
                      for end in ("", "_target") for name, sizes in self.sizes.items()}
        self.adam = {name: torch.optim.Adam([self.theta[name]], args.lr, fused=True) for name in self.sizes}
        self.adam |= {name: torch.optim.Adam(om.parameters(), args.omlr) for name, om in self.models.items()}
        # recorded runs, curves of past cycles
        self.pool, self.history = [], []
        self.restart()
        self.episode = args.num_episodes  # the first iteration begins a cycle

    @torch.no_grad()
    def restart(self):
        """New players, empty replay, the learned initial state: the beginning of a cycle. phi stays."""
        args, R = self.args, self.game.runs
        for name, sizes in self.sizes.items():
            self.theta[name].copy_(xavier(R, sizes))
            self.theta[f"{name}_target"].copy_(self.theta[name])  # [D1]
            self.adam[name].state.clear()
        E, L = args.num_episodes, args.max_episode_len
        self.replay = Replay(R, E, L, self.where["all"].stop, args.device)
        self.hc = self.om.start(R) if self.om else ()
        sizes = dict(om_ce=(L,), om_acc=(L,), valid=(L,), floor=(), reward=(2,))
        self.curve = {k: torch.zeros(R, E, *size, device=args.device) for k, size in sizes.items()}

    def actor(self, j, x, end=""):
        """Logits of agent j's actors, or with "_target" of its target actors: x (R, F, B) -> (R, A, B)"""
        return mlp(self.theta[f"actor{j}{end}"], self.sizes[f"actor{j}"], x)

    def q(self, flat, j, obs, action):
        """Q of agent j by weights (R, P): obs (R, O, B) of both, action [(R, A_i, B)] of both -> (R, B)"""
        return mlp(flat, self.sizes[f"critic{j}"], torch.cat([obs, *action], 1))[:, 0]

    def descend(self, name, loss, flat):
        """One step of a net down a loss (R,)."""
        grad, = torch.autograd.grad(loss.sum(), flat)
        self.theta[name].grad = clip_each(grad, self.sizes[name])
        self.adam[name].step()

    @torch.no_grad()
    def imagine(self, rows):
        """The guess by the present h on replay rows (R, D, B), with their own in-episode state: (R, A, B)."""
        x = rows[:, self.where[f"obs{self.game.lemol}"]].mT  # (R, B, O)
        u = rows[:, self.where["mind"]].mT.flatten(0, 1).chunk(2, 1)
        memory = self.om.remember(*(s[:, None] for s in self.hc[:1]))
        guess = self.om.predict(x, memory, u)[0].exp().mT
        return harden(guess) if self.args.discrete_actions else guess

    def state(self):
        """Everything that changes, for a checkpoint."""
        r = self.replay
        play = dict(data=r.data[:, : r.episodes].clone(), index=r.index, count=r.count, curve=self.curve,
                    hc=[s.detach().clone() for s in self.hc], episode=self.episode)
        models = {name: om.state_dict() for name, om in self.models.items()}
        return dict(theta=self.theta, models=models, adam={k: o.state_dict() for k, o in self.adam.items()},
                    play=play, pool=self.pool, history=self.history)

    def load(self, state):
        """Back to such a state."""
        play, r = state["play"], self.replay
        for name, p in self.theta.items():
            p.copy_(state["theta"][name])
        for name, om in self.models.items():
            om.load_state_dict(state["models"][name])
        for name, adam in self.adam.items():
            adam.load_state_dict(state["adam"][name])
        # the cycle that is under way
        r.episodes = play["data"].shape[1]
        r.data[:, : r.episodes] = play["data"]
        r.index.copy_(play["index"])
        r.count.copy_(play["count"])
        for name, curve in self.curve.items():
            curve.copy_(play["curve"][name])
        self.hc, self.episode = tuple(s.to(r.data.device) for s in play["hc"]), play["episode"]
        self.pool, self.history = state["pool"], state["history"]


@torch.no_grad()
def target_actions(match, j, after):
    """a' of eq. (4) for the critic of agent j, [(R, A_i, B)]. The other comes first, then LeMOL, whose target
    actor reads the other's true target action: as released, both critics assume a perfect model."""
    game, action = match.game, [None, None]
    i = game.lemol
    for k in (0, 1) if i is None else (1 - i, i):
        x = after[:, match.where[f"obs{k}"]]
        x = torch.cat([x, action[1 - k]], 1) if k == i else x
        logits = match.actor(k, x, "_target")
        action[k] = gumbel_softmax(logits, gumbel(*logits.shape, device=x.device))
    if game.kinds[j] == "mmmaddpg":

        def q_of(other):
            both = [other, action[1]] if j == 1 else [action[0], other]
            return match.q(match.theta[f"critic{j}_target"], j, after[:, match.where["obs"]], both)

        action[1 - j] = adversary(q_of, action[1 - j], match.args.adv_eps)
    return action


@torch.enable_grad()  # a rollout calls it
def learn(match, j, args):
    """eqs. (4)-(7) for agent j in all runs: one minibatch, one step of critic, actor and targets. Returns
    losses and mean Q, (3,)."""
    where, theta = match.where, match.theta
    now, after = match.replay.sample(args.batch_size)
    obs, obs_after = now[:, where["obs"]], after[:, where["obs"]]
    action = [now[:, where[f"act{k}"]] for k in (0, 1)]
    # the critic's step
    with torch.no_grad():
        next_q = match.q(theta[f"critic{j}_target"], j, obs_after, target_actions(match, j, after))
        y = critic_target(now[:, where["reward"].start + j], now[:, where["done"].start], next_q, args.gamma)
    flat = theta[f"critic{j}"].detach().requires_grad_()
    q_loss = critic_loss(match.q(flat, j, obs, action), y)
    match.descend(f"critic{j}", q_loss, flat)

    # the actor's step; a guess has no gradient: phi learns from eq. (8) alone
    x = now[:, where[f"obs{j}"]]
    if j == match.game.lemol:
        guess = match.imagine(now) if args.fresh_guesses and match.om else now[:, where["guess"]]
        x = torch.cat([x, guess], 1)
    flat = theta[f"actor{j}"].detach().requires_grad_()
    logits = mlp(flat, match.sizes[f"actor{j}"], x)
    action[j] = gumbel_softmax(logits, gumbel(*logits.shape, device=x.device))
    q = match.q(theta[f"critic{j}"], j, obs, action)
    pi_loss = actor_loss(q, logits)
    match.descend(f"actor{j}", pi_loss, flat)

    # the targets follow
    for name in (f"critic{j}", f"actor{j}"):
        theta[f"{name}_target"].lerp_(theta[name], args.polyak)
    return torch.stack([q_loss.mean(), pi_loss.mean(), q.mean()]).detach()


def model_target(action, args):
    """What eq. (8) fits: the other's action (..., A) as it was, or its largest entry."""
    return harden(action, -1) if args.train_lemol_om_on_oh else action


def event_parts(x, match):
    """Recorded steps (..., X + 1) -> events, own observations, targets, flags."""
    A, O = match.game.act[1 - match.game.lemol], match.game.obs[match.game.lemol]
    return x[..., :-1], x[..., A : A + O], model_target(x[..., :A], match.args), x[..., -1]


def train_models(match, args, stop=lambda: False):
    """eq. (8): J sweeps over M recorded runs; each chunk is one Adam step of each model, on the same data.
    The state goes from chunk to chunk as a constant, so the first chunk alone trains h_0 and c_0. Where
    stop() says so, it gives up: {}."""
    runs, size = torch.cat(match.pool), chunk_steps(args)
    for _ in range(args.om_training_iters):
        picks = torch.randint(len(runs), (args.num_traj_to_train,)).tolist()
        states = {name: om.start(len(picks)) for name, om in match.models.items()}
        losses = {name: [] for name in states}
        for t in range(0, runs.shape[1] - size + 1, size):  # an incomplete last chunk is dropped
            if stop():
                return {}
            x = torch.stack([runs[k, t : t + size] for k in picks]).to(args.device)
            events, obs, target, valid = event_parts(x, match)
            # one step of each model
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
    game, where, args, curve = match.game, match.where, match.args, match.curve
    R, L, i = game.runs, args.max_episode_len, game.lemol
    rows = play.rows.view(R, -1, *play.rows.shape[1:])  # (R, W, L + 1, D)
    at = slice(first, first + rows.shape[1])
    valid = rows[:, :, :L, where["valid"]][..., 0]
    match.replay.add(rows, valid)
    # the curves
    curve["valid"][:, at] = valid
    curve["reward"][:, at] = (rows[:, :, :L, where["reward"]] * valid[..., None]).sum(2)
    if i is not None:
        true = rows[:, :, :L, where[f"act{1 - i}"]]
        curve["om_acc"][:, at] = hits(rows[:, :, :L, where["guess"]], true)
        curve["floor"][:, at] = entropy(play.other, args.discrete_actions).view(R, -1)
        if play.logp is not None:
            curve["om_ce"][:, at] = -(play.logp.view(true.shape) * model_target(true, args)).sum(-1)


def begin_cycle(match, args, stop=lambda: False):
    """Train the models on what is recorded [D3], then new players explore. None if stop() said so."""
    logs = {}
    if match.pool and match.models:
        logs = train_models(match, args, stop)
        if not logs:
            return None
    match.restart()
    env = make_env(args, match.game.runs * args.batch_size)
    record(match, rollout(env, match, args, advance=False), 0)
    match.episode = args.batch_size
    return logs


def play_segment(match, env, args):
    """Some episodes in which the players learn: their losses."""
    losses, L = [], args.max_episode_len

    def update(t):
        tau = (match.episode - args.batch_size) * L + t
        if tau % args.agent_update_freq == 0:
            losses.append(torch.stack([learn(match, j, args) for j in (0, 1)]))

    for _ in range(min(args.segment, args.num_episodes - match.episode)):
        play = rollout(env, match, args, update)
        record(match, play, match.episode)
        if args.om == "flat" and match.om:
            match.hc = play.mind.hc
        elif match.om and match.om.kind == "ep":
            with torch.no_grad():
                block = match.game.event(play.rows[:, :-1], match.where)[..., :-1]
                match.hc = match.om.advance(block, match.hc)
        match.episode += 1
    names = [f"{k}_{j}" for j in (0, 1) for k in ("losses/critic", "losses/actor", "charts/q")]
    return dict(zip(names, torch.stack(losses).mean(0).flatten())) if losses else {}


def iterate(match, env, args, stop=lambda: False):
    """The next episodes of a cycle: {tag: value} and the number of transitions, or None if stopped. A cycle
    begins with the training of the models, new players and exploration, and ends by handing its runs over."""
    first = match.episode % args.num_episodes
    logs = play_segment(match, env, args) if first else begin_cycle(match, args, stop)
    if logs is None:
        return None
    phase = phases({k: v[:, first : match.episode] for k, v in match.curve.items()}, match, 1)
    logs |= {f"charts/episodic_return/agent_{j}": phase[f"return_{j}"][0] for j in (0, 1)}
    logs["charts/episodic_return"] = phase[f"return_{match.game.lemol or 0}"][0]
    logs |= {f"om/{k}": phase[k][0] for k in ("om_ce", "om_acc", "floor") if k in phase}
    if match.episode == args.num_episodes:
        logs |= finish_cycle(match, args)
    return logs, match.game.runs * (match.episode - first) * args.max_episode_len


# ================================================================ 6. Evaluation
# How good were the models while the opponent learned: on the runs of a cycle, which none has seen yet. The
# played model made its guesses in play, the ablated one makes its own on the same play. And how good are the
# players now: some episodes in which nobody learns, in own envs and an own random stream, so that
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
    match.history.append(phases(curve, match))
    return {f"cycle/{k}": sum(v) / len(v) for k, v in match.history[-1].items()}


@torch.no_grad()
def recount(match, om, runs):
    """Cross-entropy and hits (R, E, L) of a model on recorded runs (R, T, X + 1), as it would be in play."""
    L, state, out = match.args.max_episode_len, om.start(len(runs)), []
    for x in runs.split(100 * L, 1):
        events, obs, target, _ = event_parts(x, match)
        logp, state = om(events, obs, state)
        pair = (-(logp * target).sum(-1), hits(logp, target))
        out.append([y.unflatten(1, (-1, L)) for y in pair])
    return [torch.cat(parts, 1) for parts in zip(*out)]


def phases(curve, match, number=10):
    """{name: [mean in each tenth of the learning]} of (R, E, L), (R, E), or for "reward" (R, E, 2)."""
    parts = {k: v.tensor_split(min(number, v.shape[1]), 1) for k, v in curve.items()}
    out = {f"return_{j}": [x[..., j].mean().item() for x in parts["reward"]] for j in (0, 1)}
    if match.game.lemol is None:
        return out
    names = [k for k in ("om_ce", "ablated_ce", "om_acc", "ablated_acc") if k in curve]
    names = [k for k in names if k != "om_ce" or match.om]
    means = {k: [((x * v).sum() / v.sum()).item() for x, v in zip(parts[k], parts["valid"])] for k in names}
    return means | {"floor": [x.mean().item() for x in parts["floor"]]} | out


@torch.no_grad()
def evaluate(match, args, env=None):
    """{name: (R,)} of the players and models as they are."""
    game, where, i = match.game, match.where, match.game.lemol
    with torch.random.fork_rng():
        torch.manual_seed((args.seed + 10_000) % 2**64)
        play = rollout(env or make_env(args, game.runs * args.eval_episodes), match, args)
        floor = None if i is None else entropy(play.other, args.discrete_actions)
    rows = play.rows[:, :-1].reshape(game.runs, -1, where["all"].stop)  # (R, W L, D)
    valid = rows[..., where["valid"]]
    returns = (rows[..., where["reward"]] * valid).sum(1) * args.max_episode_len / rows.shape[1]
    out = {f"return_{j}": returns[:, j] for j in (0, 1)}
    if i is None:
        return out
    # the models' guesses, over the steps that count
    weight = valid[..., 0] / valid[..., 0].sum(1, keepdim=True)
    target = model_target(rows[..., where[f"act{1 - i}"]], args)
    out["om_acc"] = (hits(rows[..., where["guess"]], target) * weight).sum(1)
    out["floor"] = floor.view(game.runs, -1).mean(1)
    if play.logp is not None:
        out["om_ce"] = (-(play.logp.view(target.shape) * target).sum(-1) * weight).sum(1)
    if match.ablated:
        ablated = recount(match, match.ablated, game.event(play.rows[:, :-1], where))
        ce, acc = ((x.reshape(weight.shape) * weight).sum(1) for x in ablated)
        out |= {"ablated_ce": ce, "ablated_acc": acc}
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

    def row(name, values, form=".3f"):
        return f"{name:30s}" + "".join(f"{format(v, form):>8s}" for v in values)

    title = {"om_ce": f"{args.om}: cross-entropy", "ablated_ce": "ablated: cross-entropy",
             "floor": "floor (knows the policy)", "om_acc": f"{args.om}: accuracy",
             "ablated_acc": "ablated: accuracy"} | {f"return_{j}": f"return of agent {j}" for j in (0, 1)}
    text = ", ".join(f"{results[f'return_{j}'].mean():.2f} ± {interval(results[f'return_{j}']):.2f}"
                     for j in (0, 1))
    # now
    lines = [f"{args.env}, {' : '.join(match.game.kinds)}: returns of the last policies {text} "
             f"({match.game.runs} runs)"]
    lines += [row(f"now, {title[k]}", [results[k].mean()]) for k in title if k in results]
    # in the past
    for entry in match.history[-1:]:
        lines.append(row("cycle", range(1, len(match.history) + 1), "d"))
        lines += [row(title[k], [sum(e[k]) / len(e[k]) for e in match.history]) for k in title if k in entry]
        lines.append(row("the last cycle, in tenths", range(1, len(entry["return_0"]) + 1), "d"))
        lines += [row(title[k], entry[k]) for k in title if k in entry]
    return "\n".join(lines)


# ================================================================ 7. Runs
# The same text in all six scripts. Everything random comes from torch's generators, so their state is all
# that a bit-exact --resume needs beside the script's own tensors.
VERSION = 2  # of the checkpoints


def load(path):
    """A checkpoint of this script, on the CPU. `path` may be the folder that holds it."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        writer = f"{state['script']}.py, version {state.get('version', 1)}"
        odd = {field.name for field in fields(Args)} ^ set(state["args"])
    except Exception as error:
        fail(f"{path} is not a checkpoint of this script: {type(error).__name__}: {error}")
    if odd or writer != f"{SCRIPT}.py, version {VERSION}":
        fail(f"{path} is of {writer}, this is {SCRIPT}.py, version {VERSION}; only one has: {odd or 'none'}")
    return state | {"folder": path.parent}


def write_eval(folder, values):
    """Write eval.json. A read-only folder costs a warning, not the evaluation."""
    try:
        Path(folder, "eval.json").write_text(json.dumps(values, indent=1))
    except OSError as error:
        print(f"{SCRIPT}: no eval.json: {error}", file=sys.stderr)


class Run:
    """A run folder: args.json, metrics.csv, TensorBoard events, checkpoint.pt. `state` is the checkpoint to
    continue, or None. Ctrl-C sets `interrupted`; the training loop then saves and ends."""

    def __init__(self, args, state=None):
        self.args, self.interrupted, self.start, self.shown = args, False, time.time(), 0
        self.first_step, self.wandb_id = (state["step"], state["wandb_id"]) if state else (0, None)
        if self.first_step >= args.total_steps:
            fail(f"this run ended at step {self.first_step:,}: --evaluate it, or give a larger --total-steps")
        name = args.run_dir or f"runs/{args.env}__{SCRIPT}__{args.seed}__{int(self.start)}"
        try:
            if args.track:  # mirrors TensorBoard; a resumed run stays the same run there
                import wandb
                self.wandb_id = wandb.init(project=SCRIPT, name=name, config=vars(args), id=self.wandb_id,
                                           resume="allow", sync_tensorboard=True).id
            for n in itertools.count(1):  # a folder of its own, however many runs start in the same second
                self.dir = state["folder"] if state else Path(name + f"-{n}" * (n > 1))
                self.dir.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(*() if state or args.run_dir else (FileExistsError,)):
                    self.csv = open(self.dir / "metrics.csv", "a" if state else "x")
                    break
            (self.dir / "args.json").write_text(json.dumps(vars(args), indent=2))
        except Exception as error:
            fail(f"cannot begin: {type(error).__name__}: {error}")
        self.generators = [torch.default_generator, *torch.cuda.default_generators]  # the latter if in use
        for generator, rng in zip(self.generators, state["rng"] if state else []):
            generator.set_state(rng)
        self.csv.truncate(min(state["csv_size"], self.csv.tell()) if state else 0)  # drop later rows
        self.csv.write("" if state else "step,tag,value\n")
        self.board = SummaryWriter(self.dir, purge_step=self.first_step + 1)
        numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        print(f"{SCRIPT}: {args.env}, seed {args.seed}, {args.total_steps:,} steps -> {self.dir}", flush=True)

    def on_signal(self, number, frame):
        self.interrupted = True
        signal.signal(number, signal.default_int_handler)  # the second Ctrl-C does not wait
        print(f"{SCRIPT}: saving after this iteration; Ctrl-C again to stop at once", file=sys.stderr)

    def log(self, values, step, text, milestone):
        """Log {tag: number}; print `text` at milestones, else every ten seconds. A loss or a gradient that is
        not finite ends the run before it reaches a checkpoint; a measure may be undefined."""
        speed = (step - self.first_step) / (time.time() - self.start)
        for tag, value in {**values, "charts/SPS": speed}.items():
            if tag.startswith(("losses/", "grad/")) and not math.isfinite(value):
                fail(f"{tag} is not finite at step {step:,}; {self.dir}/checkpoint.pt is good", code=1)
            self.csv.write(f"{step},{tag},{value:.6g}\n")
            self.board.add_scalar(tag, value, step)
        self.csv.flush()
        if milestone or time.time() > self.shown + 10:
            self.shown = time.time()
            print(f"step {step:>12,}  {text}  {speed:,.0f} steps/s", flush=True)

    def save(self, step, **state):
        """Write checkpoint.pt. The old one stays until the new one is complete."""
        state |= dict(script=SCRIPT, version=VERSION, args=vars(self.args), step=step, wandb_id=self.wandb_id,
                      csv_size=self.csv.tell(), rng=[g.get_state() for g in self.generators])
        with open(self.dir / "checkpoint.tmp", "wb") as file:
            torch.save(state, file)
        (self.dir / "checkpoint.tmp").replace(self.dir / "checkpoint.pt")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            self.board.close(), self.csv.close()
        if isinstance(error, OSError):
            fail(f"cannot write to {self.dir}, whose last checkpoint.pt is good: {error}", code=1)


# ================================================================ 8. Train
def report(match, args, results, folder, step):
    """Print the table of an evaluation and write eval.json."""
    print(table(results, match, args))
    write_eval(folder, summary(results, match) | {"global_step": step, "seed": args.seed})


def film(match, args, folder):
    """play.gif: one episode of the last policies."""
    camera = envs.Camera(make_env(args, match.game.runs))
    evaluate(match, replace(args, eval_episodes=1), camera)
    print(camera.save(folder / "play.gif", {"last policies": 0}))


def describe(match, logs, args):
    """The progress line."""
    text = f"cycle {len(match.history) + (match.episode < args.num_episodes)}"
    for name, tag in {args.om: "cycle/om_ce", "ablated": "cycle/ablated_ce"}.items():
        text += f", cross-entropy of {name} {logs[tag]:.3f}" if tag in logs else ""
    returns = [logs[f"charts/episodic_return/agent_{j}"] for j in (0, 1)]
    return text + f", returns {returns[0]:.2f}, {returns[1]:.2f}"


def train(args):
    check(args)
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    env, state, iteration, step = make_env(args, 1), None, 0, 0
    playable(args, env)
    match = Match(args, env)
    if path := args.resume or args.evaluate:
        state = load(path)
        match.load(state)
        iteration, step = state["iteration"], state["step"]
    if args.evaluate:
        report(match, args, evaluate(match, args), state["folder"], step)
        return film(match, args, state["folder"]) if args.capture_video else None
    env = make_env(args, match.game.runs)

    with Run(args, state) as run:

        def interrupted():
            return run.interrupted

        done = stop = False
        while not stop:
            out = iterate(match, env, args, interrupted)
            if out is None:  # Ctrl-C while the models trained: the end of the cycle before is saved
                break
            logs, steps = out
            iteration += 1
            step += steps
            done = step >= args.total_steps
            if done or args.eval_every and iteration % args.eval_every == 0:
                results = evaluate(match, args)
                logs |= summary(results, match)
            # the end of a cycle is always saved
            ended = match.episode == args.num_episodes
            run.log(logs, step, describe(match, logs, args), done or ended)
            stop = done or run.interrupted
            if stop or ended or iteration % args.save_every == 0:
                run.save(step, iteration=iteration, **match.state())
        if done:
            report(match, args, results, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
