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
               each step: a~ = softmax head(in-episode LSTM(o^i), h)          (2) -> OpponentModel.guess()
                          a^i = pi^i([o^i; a~]), a^-i = pi^-i(o^-i)               -> rollout()
               each episode: (h, c) <- core(BiLSTM(its events), (h, c))       (3) -> OpponentModel.advance()
               each P steps, for each player, from replay:                        -> learn()
                 y = r + gamma (1 - d) Qbar(o', a'), a' of the target actors  (4) -> critic_target()
                 M3DDPG: the other's a' moves a length eps down Qbar          (5) -> adversary()
                 critic: min mean (Q(o, a) - y)^2                             (6) -> critic_loss()
                 actor: min -mean Q(o, pi([o^i; a~]), a^-i) + 0.001 logits^2  (7) -> actor_loss()
                 thetabar <- (1 - polyak) thetabar + polyak theta
             before each cycle: J sweeps over M recorded runs, chunk by chunk:     -> train_models()
               min -mean sum_a a^-i_t log a~_t; (h, c) carried over, detached (8) -> model_loss()
  Symbols    theta players' nets   phi OpponentModel   a~ guess (N, A)   x_t event [a^-i; o^i; a^i; r^i; end]
             h, c learning state (R, H)   u, z state and output of the in-episode LSTM (N, U)
             R runs, L steps of an episode, B minibatch, N = R W envs, X numbers of an event
  Methods    --om ep (LeMOL-EP) | ablated (no h) | oracle (a~ is the true action) | policy (a~ is the true
             policy) | uninformed (a~ is noise). --bad-policy (agent 0) and --good-policy (agent 1): lemol |
             maddpg | mmmaddpg (M3DDPG).
  Departures [D1] Targets start as copies, polyak is 0.01, optimisers start anew with the players. Released:
                  targets of other random weights, polyak 0.0001, old Adam moments.
             [D2] The runs of a cycle are one batch, networks stacked: exact, because phi is frozen.
             [D3] phi is trained before a cycle, not after: nothing is trained that is never played.
             [D4] The ablated model has no h at all: H = 0.
             [D5] M3DDPG differentiates the sum of Q. Gradients of the mean are lost in the norm's floor. Its
                  actor is a plain one, as released.
             [D6] The time limit ends an episode for the critic (d = 1), as released.
             [D7] What follows an early end (uav) is masked, and a block stays a whole episode.
             [D8] Eq. (7) reads a~ guessed anew with the present h. Released: with the h of the time of play.
             [D9] The default is small: 8 runs, B = 128, 3 cycles of 528 episodes. --paper has the paper's.
  Run        python lemol.py --env simple_push                      # 1 min; cross-entropy 1.35, ablated 1.53
             python lemol.py --env simple_push --paper              # the paper's scale: hours
             python lemol.py --env simple_push --om ablated         # the paper's ablation
             python lemol.py --env simple_push --bad-policy maddpg --n-opp-cycles 1  # no opponent model
             python lemol.py --env uav                              # the UAV models the target that it hunts
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
from dataclasses import dataclass, fields
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated, Literal, Optional

import torch
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

    is_number = lambda x: isinstance(x, (int, float))
    as_words = lambda x: [str(x)]
    return Annotated[kind, PrimitiveConstructorSpec(
        nargs=1, metavar=f"{kind.__name__.upper()} {low}..{high}", instance_from_str=read,
        is_instance=is_number, str_from_instance=as_words)]


Count, Size, Share = within(int, 1), within(float, 0), within(float, 0, 1)


@dataclass
class Args:
    """Defaults: a quick simple_push, 85 seconds of one core [D9]. PAPER below has the paper's sizes."""

    # --- run: the same in all six scripts
    env: str = "simple_push"  # simple_push, simple_speaker_listener, uav, or your own: make_env()
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch
    total_steps: Count = 316_800  # training transitions of all runs; by default those of n_opp_cycles cycles
    eval_every: within(int, 0) = 0  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 100  # episodes of each run in an evaluation
    save_every: Count = 20  # iterations between checkpoints; also at the end of a cycle and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    paper: bool = False  # the paper's sizes
    bad_policy: Literal["lemol", "maddpg", "mmmaddpg"] = "lemol"  # learner of agent 0, the adversary
    good_policy: Literal["lemol", "maddpg", "mmmaddpg"] = "maddpg"  # learner of agent 1
    om: Literal["ep", "ablated", "oracle", "policy", "uninformed"] = "ep"  # opponent model: see Methods
    discrete_actions: bool = False  # one-hot actions; off: soft ones, points of the simplex
    max_episode_len: Count = 25  # L, steps in an episode
    num_episodes: Count = 528  # episodes of a learning run, exploration included
    n_opp_cycles: Count = 3  # cycles, each of fresh players; it sets total_steps
    traj_per_iter: Count = 8  # R, learning runs side by side in a cycle
    segment: Count = 25  # episodes in an iteration: what is logged at once; Ctrl-C waits for its end
    batch_size: Count = 128  # B, minibatch of eqs. (4)-(7), and the episodes of exploration
    replay_buffer_capacity: Count = 1_000_000  # steps of a run that minibatches are drawn from, the latest
    agent_update_freq: Count = 25  # P, steps between updates; --om ep needs P = L
    lr: Size = 1e-2  # Adam's step size of actors and critics
    gamma: Share = 0.95  # discount
    polyak: Share = 0.01  # share of the new weights in the targets at each update [D1]
    stored_guesses: bool = False  # eq. (7) reads a~ as it was in play, as released; off: as it is now [D8]
    num_units: Count = 64  # width of the two hidden layers of each network
    adv_eps: Size = 1e-3  # eps of eq. (5) against an opponent
    adv_eps_s: Size = 1e-5  # eps of eq. (5) against a team-mate, in an env without adversaries
    chunk_length: Count = 20  # episodes that eq. (8) is differentiated through
    om_training_iters: Count = 8  # J, sweeps between cycles
    num_traj_to_train: Count = 8  # M, runs in a sweep, drawn with replacement from all so far
    omlr: Size = 2e-3  # Adam's step size of the opponent model
    lstm_hidden_dim: Count = 64  # H, size of the learning state h; the BiLSTM has H each way
    in_ep_lstm_dim: Count = 32  # U, size of the in-episode LSTM


PAPER = dict(num_episodes=11_024, batch_size=1024, n_opp_cycles=10, traj_per_iter=3, chunk_length=64,
             om_training_iters=5, omlr=1e-3, save_every=200)
PRESETS = {"uav": dict(bad_policy="maddpg", good_policy="lemol", discrete_actions=True)}  # others: none


def preset(args):
    """What replaces the defaults where the command line is silent."""
    changes = PRESETS.get(args.env, {}) | (PAPER if args.paper else {})
    given = {name: x for name, x in vars(args).items() if x != getattr(Args(), name)}
    final = vars(Args()) | changes | given
    sizes = ("n_opp_cycles", "traj_per_iter", "num_episodes", "max_episode_len")
    return changes | dict(total_steps=math.prod(final[name] for name in sizes))


def check(args):
    """Refuse what no single argument can be blamed for."""
    if args.bad_policy == args.good_policy == "lemol":
        fail("--bad-policy and --good-policy: LeMOL can play one side only")
    has_model = "lemol" in (args.bad_policy, args.good_policy) and args.om in ("ep", "ablated")
    if has_model and args.agent_update_freq != args.max_episode_len:
        fail(f"an opponent model needs --agent-update-freq {args.max_episode_len}, an episode")
    if args.chunk_length > args.num_episodes - args.batch_size:
        fail("--chunk-length exceeds --num-episodes less the --batch-size episodes of exploration")


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
            fail(f"--{name.replace('_', '-')} cannot change here: the checkpoint keeps its own ({value})")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU here")
    return args


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own game of two by returning an object with these members:
    #   num_envs N, horizon L, num_agents 2, discrete True, obs_dims, action_dims, device
    #   reset() -> obs, step(action) -> obs, reward (N, 2), terminated (N,), truncated (N,), info
    #   where obs[i] (N, O_i), action[i] (N, A_i) soft or one-hot; a terminated row rests until the end
    options = {} if args.env == "uav" else dict(dialect="mpe")
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


# ================================================================ 2. Networks
# Actors and critics are Linear-ReLU-Linear-ReLU-Linear. The same net of all R runs is one list of tensors,
# weight (R, in, out) and bias (R, 1, out) in turn: one batched product, one optimiser for all of them [D2].
# Losses are summed over runs, so that no run feels another.
def xavier(runs, sizes):
    """R nets of layers `sizes`: Xavier-uniform weights and zero biases."""
    net = []
    for n, m in itertools.pairwise(sizes):
        bound = math.sqrt(6 / (n + m))
        net += [(2 * torch.rand(runs, n, m) - 1) * bound, torch.zeros(runs, 1, m)]
    return net


def mlp(net, x):
    """R nets on x (R, B, in) -> (R, B, out)"""
    for k in range(0, len(net), 2):
        x = torch.baddbmm(net[k + 1], x, net[k])  # (R, B, out)
        x = x.relu() if k + 2 < len(net) else x
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


def unroll(net, x, state):
    """An LSTM over x (N, T, F) from state (2, N, H): outputs (N, T, H), the last state (2, N, H)."""
    h, c = state.contiguous()
    out, after = net(x, (h[None], c[None]))
    return out, torch.cat(after)


def shift_right(seq, first):
    """(M, T, H), (M, H) -> (M, T, H), what was known BEFORE each: no event may reach a guess of its time."""
    return torch.cat([first[:, None], seq[:, :-1]], 1)


class OpponentModel(nn.Module):
    """phi. `episode` reads one's own observations, from u_0 in each episode anew. `block` sums up a whole
    episode, and `core` carries what it says into the learning state. Kind "ablated" has neither of these."""

    def __init__(self, kind, obs_dim, event_dim, actions, args):
        super().__init__()
        self.length = args.max_episode_len
        H = args.lstm_hidden_dim if kind == "ep" else 0  # [D4]
        U = args.in_ep_lstm_dim
        self.episode = lstm(obs_dim, U)
        self.u0 = nn.Parameter(torch.zeros(2, U))
        if H:
            self.block = lstm(event_dim, H, bidirectional=True)
            self.core = lstm(2 * H, H)
        self.h0 = nn.Parameter(torch.zeros(2, H))  # h_0 and c_0
        self.head = nn.ParameterList(xavier(1, (U + H, 64, 64, actions)))

    def start(self, n):
        """The learned (h_0, c_0) before any event: (2, n, H)."""
        return self.h0[:, None].expand(-1, n, -1)

    def begin(self, n):
        """The learned in-episode state before the first observation: (2, n, U)."""
        return self.u0[:, None].expand(-1, n, -1)

    def remember(self, obs, u):
        """The in-episode state (2, N, U) after one more observation (N, O)."""
        return torch.stack(torch.lstm_cell(obs, (u[0], u[1]), *self.episode.parameters()))

    def embed(self, blocks):
        """(N, L, X) -> (N, 2 H): the last forward and the last backward state of the BiLSTM."""
        _, (last, _) = self.block(blocks)
        return torch.cat([last[0], last[1]], -1)

    def advance(self, block, hc):
        """eq. (3) in play: (h, c) (2, N, H) after one more episode (N, L, X)."""
        return unroll(self.core, self.embed(block)[:, None], hc)[1] if hc.shape[2] else hc

    def guess(self, z, h):
        """The head: z (..., U) of the episode so far, h (..., H) -> log a~ (..., A)."""
        x = torch.cat([z, h], -1)
        return mlp(self.head, x.reshape(1, -1, x.shape[-1])).log_softmax(-1).view(*x.shape[:-1], -1)

    def forward(self, events, obs, hc):
        """eqs. (2) and (3) over a chunk: events (M, T, X), obs (M, T, O) -> log a~ (M, T, A), next (h, c)."""
        M, T, _ = obs.shape
        E = T // self.length  # episodes
        # the learning state, one episode late
        h = hc[0][:, None].expand(-1, E, -1)
        if hc.shape[2]:
            blocks = events.reshape(M * E, self.length, -1)  # (M E, L, X)
            seq, after = unroll(self.core, self.embed(blocks).view(M, E, -1), hc)
            h, hc = shift_right(seq, hc[0]), after  # (M, E, H), (2, M, H)
        # the episode so far
        blocks = obs.reshape(M * E, self.length, -1)  # (M E, L, O)
        z, _ = unroll(self.episode, blocks, self.begin(M * E))  # (M E, L, U)
        return self.guess(z.reshape(M, T, -1), h.repeat_interleave(self.length, 1)), hc


# ================================================================ 3. Rollout
# N = R W envs: W = 1 while players learn, W = B in the exploration before it, where nobody learns yet. The
# opponent acts first, because an oracle looks at its action; a model does not. Rows are {name: tensor}: obs_i
# and act_i of both players, reward, done, valid (0 after an early end), the guess, and the z that it was made
# of. An episode has L + 1 rows; the last holds the final observation alone: row t + 1 always follows row t.
def harden(x):
    """One-hot of the largest entry: (..., A) -> (..., A)"""
    return torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)


def gumbel(*shape, device="cpu"):
    return torch.rand(shape).log_().neg_().log_().neg_().to(device)


def gumbel_softmax(logits, noise=None):
    """eq. (1): a point of the simplex whose largest entry is action a with probability softmax(logits)_a."""
    noise = gumbel(*logits.shape, device=logits.device) if noise is None else noise
    return (logits + noise).softmax(-1)


def make_guess(match, z, action, logits):
    """What LeMOL takes for the other's action now. action and logits (N, A) are the other's, and only the
    oracles look at them; z (N, U) is what the model has seen of the episode. -> a~ (N, A)"""
    om = match.args.om
    if om == "oracle":
        return action
    if om == "policy":
        return logits.softmax(-1)
    if om == "uninformed":
        noise = -torch.rand(action.shape).log().to(action.device)
        guess = noise / noise.sum(-1, keepdim=True)  # uniform on the simplex
        return harden(guess) if match.args.discrete_actions else guess
    return match.ask(z.unflatten(0, (match.runs, -1))).flatten(0, 1)


@torch.no_grad()
def rollout(env, match, args, update=None):
    """An episode in each of N envs -> {name: (N, L + 1, ...)}. update(t) may change weights before step t."""
    N, L, R, i = env.num_envs, env.horizon, match.runs, match.lemol
    order = (0, 1) if i is None else (1 - i, i)  # the opponent, then LeMOL
    noise = [gumbel(L, R, N // R, A, device=args.device) for A in match.act_dims]
    # the envs and the model's memory start
    obs = env.reset()  # of both agents
    rows = {name: x.new_zeros(N, *x.shape[2:]) for name, x in match.data.items()}
    over = torch.zeros(N, dtype=torch.bool, device=args.device)
    u = match.om.begin(N) if match.om else torch.zeros(2, N, 0)

    for t in range(L):
        if update is not None:
            update(t)
        step = dict(obs0=obs[0], obs1=obs[1], valid=~over)
        # one acts after the other
        action, logits = [None, None], [None, None]
        for j in order:
            x = obs[j]  # (N, O_j)
            if j == i:
                if match.om:
                    u = match.om.remember(x, u)
                guess = make_guess(match, u[0], action[1 - i], logits[1 - i])
                step |= dict(z=u[0], guess=guess)
                x = torch.cat([x, guess], 1)
            out = mlp(match.theta[f"actor{j}"], x.unflatten(0, (R, -1)))  # (R, W, A)
            logits[j] = out.flatten(0, 1)  # (N, A)
            action[j] = gumbel_softmax(out, noise[j][t]).flatten(0, 1)
            action[j] = harden(action[j]) if args.discrete_actions else action[j]
            step[f"act{j}"] = action[j]
        # what the step brings
        obs, reward, terminated, truncated, _ = env.step(action)
        step |= dict(reward=reward, done=terminated | truncated)  # [D6]
        for name, x in step.items():
            rows[name][:, t] = x
        over = terminated
    rows["obs0"][:, L], rows["obs1"][:, L] = obs
    return rows


def returns_of(rows):
    """Sums of rewards over the steps of an episode: (..., 2)"""
    return (rows["reward"] * rows["valid"][..., None]).sum(-2)


def event_of(rows, i):
    """x_t = [a^-i; o^i; a^i; r^i; end], and 1, or 0 after an early end, of each step: (..., L, X + 1)."""
    valid = rows["valid"][..., None]
    x = [rows[f"act{1 - i}"], rows[f"obs{i}"], rows[f"act{i}"]]
    x += [rows["reward"][..., i, None], rows["done"][..., None]]
    x = torch.cat([torch.cat(x, -1) * valid, valid], -1)  # [D7]
    return x[..., :-1, :]  # without the row of the final observation


def sample(data, batch):
    """Replay rows {name: (R, B, ...)}, uniform with replacement among the valid ones of each run, and the
    observations that followed. data: {name: (R, E, L + 1, ...)}."""
    pick = torch.multinomial(data["valid"].flatten(1), batch, replacement=True)  # (R, B)
    run = torch.arange(len(pick), device=pick.device)[:, None]
    now = {name: x.flatten(1, 2)[run, pick] for name, x in data.items()}
    after = {name: data[name].flatten(1, 2)[run, pick + 1] for name in ("obs0", "obs1")}
    return now, after


# ================================================================ 4. Objectives
# Pure functions of tensors. RL losses are means over the minibatch, one for each run, (R,).
def critic_target(reward, done, next_q, gamma):
    """eq. (4): all (R, B)."""
    return reward + gamma * (1 - done) * next_q


def adversary(q_of, action, eps):
    """eq. (5): action (R, B, A) after a step of length eps down q_of(action) (R, B), each by itself. The step
    is a constant for autograd; where q is flat, there is none."""
    with torch.enable_grad():
        a = action.detach().requires_grad_()
        slope, = torch.autograd.grad(q_of(a).sum(), a)  # [D5]
    return action - eps * slope / slope.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def critic_loss(q, y):
    """eq. (6): (R, B) each -> (R,)"""
    return ((q - y) ** 2).mean(1)


def actor_loss(q, logits):
    """eq. (7): q (R, B) of the actor's own action, its logits (R, B, A) -> (R,)"""
    return -q.mean(1) + 1e-3 * logits.square().mean((1, 2))


def model_loss(logp, action, valid):
    """eq. (8): mean over valid steps (...) of the cross-entropy with soft or one-hot actions (..., A)."""
    return -((action * logp).sum(-1) * valid).sum() / valid.sum()


# ================================================================ 5. Update
# A cycle: the models train on all runs so far, new players explore, and then they learn while they play. What
# an iteration does is either the beginning of a cycle or a segment of its episodes.
def clip(grad, max_norm=0.5):
    """The gradient of one weight or bias, (R, ., .): each run's to a norm of its own, as released."""
    norm = grad.norm(dim=(1, 2), keepdim=True)
    return grad * (max_norm / norm.clamp(min=max_norm))


class Match:
    """R learning runs in lock-step, and the models that outlive them."""

    def __init__(self, args, env):
        self.args, self.runs = args, args.traj_per_iter
        self.kinds = (args.bad_policy, args.good_policy)
        self.lemol = i = self.kinds.index("lemol") if "lemol" in self.kinds else None  # who has a model
        self.eps = args.adv_eps if getattr(env, "num_adversaries", 1) else args.adv_eps_s
        self.obs_dims, self.act_dims = tuple(env.obs_dims), tuple(env.action_dims)
        guess_dim = 0 if i is None else self.act_dims[1 - i]
        # the model that is played, and an ablated one beside it
        self.models = nn.ModuleDict()
        if i is not None and args.om in ("ep", "ablated"):
            event = guess_dim + self.obs_dims[i] + self.act_dims[i] + 2  # X
            kinds = {"om": "ep", "ablated": "ablated"} if args.om == "ep" else {"om": "ablated"}
            for name, kind in kinds.items():
                model = OpponentModel(kind, self.obs_dims[i], event, guess_dim, args)
                self.models[name] = model.to(args.device)
        self.om = self.models["om"] if self.models else None
        # layers of the players' nets, and replay {name: (R, E, L + 1, ...)}
        self.sizes, self.data = {}, {}
        shape = (self.runs, args.num_episodes, args.max_episode_len + 1)
        U = args.in_ep_lstm_dim * bool(self.models)
        columns = dict(reward=[2], done=[], valid=[], guess=[guess_dim], z=[U])
        for j in (0, 1):
            O, A, width = self.obs_dims[j], self.act_dims[j], args.num_units
            self.sizes[f"actor{j}"] = (O + guess_dim * (j == i), width, width, A)
            self.sizes[f"critic{j}"] = (sum(self.obs_dims + self.act_dims), width, width, 1)
            columns |= {f"obs{j}": [O], f"act{j}": [A]}
        for name, size in columns.items():
            self.data[name] = torch.zeros(*shape, *size, device=args.device)
        self.pool, self.history = [], []  # recorded runs (R, T, X + 1) and measures of past cycles
        self.adam = {"models": torch.optim.Adam(self.models.parameters(), args.omlr)} if self.models else {}
        self.restart()

    @torch.no_grad()
    def restart(self):
        """New players, empty replay, the learned initial state: the beginning of a cycle. phi stays."""
        self.theta = {}
        for name, sizes in self.sizes.items():
            net = [p.to(self.args.device) for p in xavier(self.runs, sizes)]
            self.theta[f"{name}_target"] = [p.clone() for p in net]  # [D1]
            self.theta[name] = [p.requires_grad_() for p in net]
            self.adam[name] = torch.optim.Adam(net, self.args.lr, fused=True)
        self.episode = 0
        self.hc = self.om.start(self.runs) if self.om else torch.zeros(2, self.runs, 0)  # (2, R, H)

    @torch.no_grad()
    def ask(self, z):
        """eq. (2): the model's guesses at the present h, z (R, B, U) -> (R, B, A)"""
        h = self.hc[0][:, None].expand(-1, z.shape[1], -1)
        guess = self.om.guess(z, h).exp()
        return harden(guess) if self.args.discrete_actions else guess

    def q(self, name, rows, action):
        """Q by one of the critics: observations of `rows`, action [(R, B, A_i)] of both -> (R, B)"""
        x = torch.cat([rows["obs0"], rows["obs1"], *action], -1)
        return mlp(self.theta[name], x)[..., 0]

    def descend(self, name, loss):
        """One step of a net down a loss (R,)."""
        net = self.theta[name]
        for p, grad in zip(net, torch.autograd.grad(loss.sum(), net)):
            p.grad = clip(grad)
        self.adam[name].step()

    def tensors(self):
        """What changes in place: the players' nets, replay, phi."""
        nets = {f"{name}.{k}": p.detach() for name, net in self.theta.items() for k, p in enumerate(net)}
        return nets | self.data | self.models.state_dict()

    def state(self):
        """Everything that changes, for a checkpoint."""
        adam = {name: x.state_dict() for name, x in self.adam.items()}
        return dict(tensors=self.tensors(), adam=adam, hc=self.hc, pool=self.pool, history=self.history,
                    episode=self.episode)

    def load(self, state):
        """Back to such a state."""
        for name, x in self.tensors().items():
            x.copy_(state["tensors"][name])
        for name, adam in self.adam.items():
            adam.load_state_dict(state["adam"][name])
        self.hc = state["hc"].to(self.args.device)
        self.pool, self.history, self.episode = (state[k] for k in ("pool", "history", "episode"))


def episodes(match, first):
    """Replay from episode `first` of the cycle to the present one: {name: (R, E, L + 1, ...)}."""
    return {name: x[:, first : match.episode] for name, x in match.data.items()}


@torch.no_grad()
def target_actions(match, j, after):
    """a' of eq. (4) for the critic of agent j, [(R, B, A_i)]. The other comes first, then LeMOL, whose target
    actor reads the other's true target action: as released, both critics assume a perfect model."""
    i, action = match.lemol, [None, None]
    for k in (0, 1) if i is None else (1 - i, i):
        x = after[f"obs{k}"]
        x = torch.cat([x, action[1 - k]], -1) if k == i else x
        action[k] = gumbel_softmax(mlp(match.theta[f"actor{k}_target"], x))
    if match.kinds[j] == "mmmaddpg":

        def q_of(other):
            both = [other, action[1]] if j == 1 else [action[0], other]
            return match.q(f"critic{j}_target", after, both)

        action[1 - j] = adversary(q_of, action[1 - j], match.eps)
    return action


@torch.enable_grad()  # a rollout calls it
def learn(match, j, args):
    """eqs. (4)-(7) for agent j in all runs: one minibatch, one step of critic, actor and targets."""
    kept = max(1, args.replay_buffer_capacity // args.max_episode_len)
    now, after = sample(episodes(match, max(0, match.episode - kept)), args.batch_size)
    action = [now["act0"], now["act1"]]
    # the critic's step
    with torch.no_grad():
        next_q = match.q(f"critic{j}_target", after, target_actions(match, j, after))
        y = critic_target(now["reward"][..., j], now["done"], next_q, args.gamma)
    q_loss = critic_loss(match.q(f"critic{j}", now, action), y)
    match.descend(f"critic{j}", q_loss)

    # the actor's step; a guess has no gradient: phi learns from eq. (8) alone
    x = now[f"obs{j}"]  # (R, B, O_j)
    if j == match.lemol:
        anew = match.om and not args.stored_guesses  # [D8]
        guess = match.ask(now["z"]) if anew else now["guess"]
        x = torch.cat([x, guess], -1)
    logits = mlp(match.theta[f"actor{j}"], x)  # (R, B, A_j)
    action[j] = gumbel_softmax(logits)
    q = match.q(f"critic{j}", now, action)  # (R, B)
    pi_loss = actor_loss(q, logits)
    match.descend(f"actor{j}", pi_loss)

    # the targets follow
    with torch.no_grad():
        for name in (f"critic{j}", f"actor{j}"):
            for target, p in zip(match.theta[f"{name}_target"], match.theta[name]):
                target.lerp_(p, args.polyak)
    means = {"losses/critic": q_loss, "losses/actor": pi_loss, "charts/q": q}
    return {f"{name}_{j}": x.mean().item() for name, x in means.items()}


def average(logs):
    """The mean of each tag."""
    return {tag: sum(log[tag] for log in logs) / len(logs) for tag in (logs[0] if logs else ())}


def parts_of(x, match):
    """Recorded steps (..., X + 1) -> events, own observations, the other's actions, flags."""
    A, O = match.act_dims[1 - match.lemol], match.obs_dims[match.lemol]
    return x[..., :-1], x[..., A : A + O], x[..., :A], x[..., -1]


def train_models(match, args, run=None):
    """eq. (8): J sweeps over M recorded runs; each chunk is one Adam step. (h, c) goes from chunk to chunk as
    a constant, so the first chunk alone trains h_0 and c_0. None after Ctrl-C."""
    runs = torch.cat(match.pool)  # (all runs so far, T, X + 1)
    size = args.chunk_length * args.max_episode_len  # steps of a chunk
    losses = []
    for _ in range(args.om_training_iters):
        picks = torch.randint(len(runs), (args.num_traj_to_train,))
        hc = {name: om.start(len(picks)) for name, om in match.models.items()}
        for t in range(0, runs.shape[1] - size + 1, size):  # an incomplete last chunk is dropped
            if run and run.interrupted:
                return None
            x = runs[picks, t : t + size].to(args.device)  # (M, size, X + 1)
            events, obs, target, valid = parts_of(x, match)
            # one step of each model
            loss = {}
            for name, om in match.models.items():
                logp, after = om(events, obs, hc[name])  # (M, size, A)
                loss[f"losses/{name}"] = model_loss(logp, target, valid)
                hc[name] = after.detach()
            match.adam["models"].zero_grad()
            sum(loss.values()).backward()  # they share no weights
            match.adam["models"].step()
            losses.append({tag: x.item() for tag, x in loss.items()})
    return average(losses)


def record(match, rows):
    """Add the next W episodes of each run to replay."""
    first = match.episode
    match.episode += len(rows["done"]) // match.runs
    for name, x in rows.items():
        match.data[name][:, first : match.episode] = x.unflatten(0, (match.runs, -1))


def begin_cycle(match, args, run=None):
    """Train the models on what is recorded [D3], then new players explore. None after Ctrl-C."""
    logs = train_models(match, args, run) if match.pool and match.models else {}
    if logs is not None:
        match.restart()
        env = make_env(args, match.runs * args.batch_size)
        record(match, rollout(env, match, args))
    return logs


@torch.no_grad()
def play_segment(match, env, args):
    """Some episodes in which the players learn: their losses."""
    losses = []

    def update(t):
        steps = (match.episode - args.batch_size) * args.max_episode_len + t  # since the exploration
        if steps % args.agent_update_freq == 0:
            losses.append(learn(match, 0, args) | learn(match, 1, args))

    for _ in range(min(args.segment, args.num_episodes - match.episode)):
        rows = rollout(env, match, args, update)
        record(match, rows)
        if match.om:  # the episode enters the learning state
            block = event_of(rows, match.lemol)[..., :-1]  # (R, L, X)
            match.hc = match.om.advance(block, match.hc)
    return average(losses)


def iterate(match, env, args, run=None):
    """The next episodes of a cycle: {tag: value}, None after Ctrl-C, and the number of transitions. A cycle
    begins with the training of the models, new players and exploration, and ends by handing its runs over."""
    first = match.episode % args.num_episodes
    logs = play_segment(match, env, args) if first else begin_cycle(match, args, run)
    if logs is None:
        return None, 0
    returns = returns_of(episodes(match, first)).mean((0, 1))  # (2,)
    logs |= {f"charts/episodic_return/agent_{j}": returns[j] for j in (0, 1)}
    logs["charts/episodic_return"] = returns[match.lemol or 0]  # LeMOL's, if it plays
    if match.episode == args.num_episodes:
        logs |= finish_cycle(match, args)
    return logs, match.runs * (match.episode - first) * args.max_episode_len


# ================================================================ 6. Evaluation
# How good were the models while the opponent learned? At the end of a cycle each is asked for its guesses at
# every step of the new runs, which it has not seen yet. And how good are the players now? They play some
# episodes without learning, in other envs and with other random numbers: evaluating changes nothing.
@torch.no_grad()
def finish_cycle(match, args):
    """Hand the runs of a cycle over to the models, and note what it brought. -> {tag: value}"""
    data = episodes(match, args.batch_size)  # without the exploration
    returns = returns_of(data).mean((0, 1))  # (2,)
    entry = {f"return_{j}": returns[j].item() for j in (0, 1)}
    if match.lemol is not None:
        runs = event_of(data, match.lemol).flatten(1, 2)  # (R, T, X + 1)
        match.pool.append(runs.cpu())
        for name, om in match.models.items():
            entry[f"{name}_ce"], entry[f"{name}_acc"] = score_model(match, om, runs)
    match.history.append(entry)
    return {f"cycle/{name}": x for name, x in entry.items()}


def score_model(match, om, runs):
    """Mean cross-entropy and accuracy of a model on recorded runs (R, T, X + 1)."""
    scores = []
    for x in runs.split(1):  # one by one, for the memory's sake
        events, obs, target, valid = parts_of(x, match)
        logp, _ = om(events, obs, om.start(1))  # (1, T, A)
        hit = (logp.argmax(-1) == target.argmax(-1)) * valid
        scores.append((model_loss(logp, target, valid), hit.sum() / valid.sum()))
    return torch.tensor(scores).mean(0).tolist()


@torch.no_grad()
def evaluate(match, args, env=None):
    """{tag: value}: returns of the present players, and what each cycle so far brought."""
    with torch.random.fork_rng():
        torch.manual_seed((args.seed + 10_000) % 2**64)
        rows = rollout(env or make_env(args, match.runs * args.eval_episodes), match, args)
    returns = returns_of(rows).view(match.runs, -1, 2).mean(1)  # (R, 2)
    half = 1.96 * returns.std(0, correction=min(1, match.runs - 1)) / math.sqrt(match.runs)
    values = {f"eval/cycle_{number}/{name}": x for number, entry in enumerate(match.history, 1)
              for name, x in entry.items()}
    for j in (0, 1):
        values[f"eval/return_{j}"] = returns[:, j].mean().item()
        values[f"eval/return_{j}_ci95"] = half[j].item()
    return values


def report(values, match, args, folder, step):
    """Print who got what in the end, and returns and models in each cycle. Write eval.json."""
    print(f"{args.env}, {' : '.join(match.kinds)}, {match.runs} runs")
    for j in (0, 1):
        mean, half = values[f"eval/return_{j}"], values[f"eval/return_{j}_ci95"]
        print(f"return_{j} of the last policies: {mean:.2f} ± {half:.2f}")
    # om: the model that was played; ce: cross-entropy; acc: accuracy
    for name in match.history[0] if match.history else ():
        row = "".join(f"{entry[name]:9.3f}" for entry in match.history)
        print(f"{name:12s} in each cycle:{row}")
    write_eval(folder, values | {"global_step": step, "seed": args.seed})


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
        if isinstance(error, (OSError, KeyboardInterrupt)):
            fail(f"{kind.__name__} {error}; the last checkpoint.pt in {self.dir} is good", code=1)


# ================================================================ 8. Train
def train(args):
    check(args)
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    env = make_env(args, args.traj_per_iter)
    state, iteration, step = None, 0, 0
    playable(args, env)
    match = Match(args, env)
    if path := args.resume or args.evaluate:
        state = load(path)
        match.load(state)
        iteration, step = state["iteration"], state["step"]
    if args.evaluate:
        report(evaluate(match, args), match, args, state["folder"], step)
        if args.capture_video:  # one episode of the last policies
            camera = envs.Camera(env)
            evaluate(match, args, camera)
            print(camera.save(state["folder"] / "play.gif", {"last policies": 0}))
        return

    with Run(args, state) as run:
        done = stop = False
        while not stop:
            logs, steps = iterate(match, env, args, run)
            if logs is None:  # Ctrl-C while the models trained: the end of the cycle before is saved
                break
            iteration += 1
            step += steps
            done = step >= args.total_steps
            if done or args.eval_every and iteration % args.eval_every == 0:
                values = evaluate(match, args)
                logs |= values
            ended = match.episode == args.num_episodes  # the end of a cycle is always saved
            text = f"cycle {len(match.history) + (not ended)}: return {logs['charts/episodic_return']:.2f}"
            text += f", cross-entropy {logs['cycle/om_ce']:.3f}" if "cycle/om_ce" in logs else ""
            run.log(logs, step, text, done or ended)
            stop = done or run.interrupted
            if stop or ended or iteration % args.save_every == 0:
                run.save(step, iteration=iteration, **match.state())
        if done:
            report(values, match, args, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
