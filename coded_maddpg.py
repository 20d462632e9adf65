"""
Coded MADDPG: multi-agent actor-critic training that waits neither for slow nor for dead learners.

  Papers     Wang, Xie, Atanasov: Coding for Distributed Multi-Agent Reinforcement Learning. ICRA 2021,
             arXiv:2101.02308. MADDPG: Lowe et al. NeurIPS 2017, arXiv:1706.02275.
  Problem    M agents, each with an actor mu_i(o_i) and a critic Q_i(all o, all a). Their M updates x_i start
             from one snapshot and one minibatch. Each of N learners returns a weighted sum of several x_i, so
             that the answers of many subsets I of the learners give all x_i.
  Algorithm  C: which learner computes which agents, with what weights           (1)  -> make_code()
             for each update t: one minibatch of B transitions; for every agent i:
                 a = softmax(logits + Gumbel noise keyed by (seed, t, i))        (2)  -> gumbel_softmax()
                 y = r_i + gamma (1 - done) Q_i-(o', a'), a' of target actors    (3)  -> td_target()
                 g_q = d/dq mean (Q_i(o, a) - y)^2; an Adam step on q            (4)  -> critic_loss()
                 g_p = d/dp mean -Q_i(o, a with a_i anew) + 1e-3 logits^2        (5)  -> actor_loss()
                 x_i = [g_q, g_p], each tensor clipped to norm 0.5               (6)  -> clip_to_grid()
               learner j: y_j = sum_i c_ji x_i, agent after agent                (7)  -> encode()
               at the first set I of arrived learners with rank C_I = M          (8)  -> decodable()
               X: least squares of C_I X = Y_I; all other learners stop          (9)  -> decode()
               Adam on p_i and q_i of all agents                                 (10) -> adam()
               p_i- <- (1-tau) p_i- + tau p_i, and q_i- likewise                 (11) -> apply_update()
             an episode in each env with the new actors, to the replay           (12) -> rollout()
             Time of (7)-(9): min_I max_{j in I} (w_j c + t_s [j is slow])       (13) -> arrivals()
  Symbols    p_i, q_i: actor, critic; p_i-, q_i-: their targets. P: numbers in an x_i. w_j: nonzeros in row j
             of C. c: seconds for an x_i. t_s: delay of a straggler. O_i, A_i: sizes of obs and action.
  Departures [D1] One minibatch and snapshot for all agents, as the paper's program; OpenAI's goes one by one.
             [D2] x_i are clipped gradients, not weights: learners keep no state, may die and join any time.
             [D3] x_i are multiples of a unit, 2^-32 for norm 0.5, and eq. (9) is rounded to them. So every
                  decodable I gives the very bits of training without learners.
             [D4] mds: the paper's powers of .1 to .5 give condition numbers beyond 1e10. sparse-mds is ours.
             [D5] Targets start as copies, the base code's as independent draws. Adam is TensorFlow's.
             [D6] B is 512, not 1024: the same return in two thirds of the time.
  Run        python coded_maddpg.py --env simple_spread                 # 2 minutes: return -43, random -74
             python coded_maddpg.py --env simple_tag --num-agents 8 --adv-policy ddpg
             python coded_maddpg.py --num-agents 8 --num-learners 15 --num-stragglers 4   # processes
             python benchmark/ray_engine.py --num-learners 15                             # a Ray cluster
             python coded_maddpg.py --evaluate runs/x/checkpoint.pt --capture-video       # table and film
"""

import contextlib
import itertools
import json
import math
import multiprocessing as mp
import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from multiprocessing import connection, forkserver
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated, Literal, NamedTuple, Optional

import numpy as np
import torch
import tyro
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
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
Scheme = Literal["uncoded", "replication", "mds", "random", "ldpc", "sparse-mds"]


@dataclass
class Args:
    """Defaults: three agents on simple_spread, the authors' hyper-parameters but for B, and no learners."""

    # --- run: the same in all six scripts
    env: str = "simple_spread"  # simple, simple_spread, _tag, _adversary, _push, ...: PRESETS; or your own
    seed: int = 1  # of torch, of environments and networks, and of all keyed noise
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch, in the controller
    total_steps: Count = 500_000  # training transitions of all environments
    eval_every: within(int, 0) = 250  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 400  # episodes in an evaluation
    save_every: Count = 500  # iterations between checkpoints, which hold the replay: 150 MB a million steps
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    num_agents: Optional[int] = None  # M; default: the environment's own number
    num_adversaries: Optional[int] = None  # the first of them play against the others; default: the env's
    dialect: Literal["mpe2", "mpe"] = "mpe2"  # rules of the maintained package or the original
    good_policy: Literal["maddpg", "ddpg"] = "maddpg"  # critics see everything, or what is their own
    adv_policy: Literal["maddpg", "ddpg"] = "maddpg"  # the same for the adversaries
    horizon: Count = 25  # H, steps of an episode
    num_envs: Count = 16  # environments side by side; an iteration is an episode in each of them
    update_every: Count = 100  # transitions between two updates
    lr: Size = 0.01  # Adam's step size, eq. (10)
    gamma: Share = 0.95  # discount, eq. (3)
    tau: Share = 0.01  # how far the targets follow, eq. (11)
    batch_size: Count = 512  # B, transitions in a minibatch [D6]
    num_units: Count = 64  # units in each of the two hidden layers
    max_grad_norm: within(float, 1e-9) = 0.5  # each tensor's gradient is clipped to this norm, eq. (6)
    replay_size: Count = 1_000_000  # transitions that the replay holds; memory is taken as it fills
    learning_starts: Count = 25_600  # transitions before the first update
    num_learners: within(int, 0) = 0  # N; 0: ordinary MADDPG in this process
    scheme: Scheme = "sparse-mds"  # who computes what, eq. (1)
    code_p: Share = 0.8  # share of nonzeros in --scheme random
    engine: Literal["local", "inline"] = "local"  # processes, or a virtual clock
    num_stragglers: within(int, 0) = 0  # k, learners drawn in each update that hold their answer back
    straggler_delay: Size = 0.25  # t_s, seconds for which they do
    agent_seconds: Size = 0.0  # c, at least so long for an x_i: emulates slow nodes; the clock of inline
    learner_timeout: within(float, 1e-3) = 60.0  # seconds after which nobody waits for a learner any more


OTHERS = ("tag", "adversary", "push", "speaker_listener", "reference", "crypto", "world_comm")
PRESETS = {f"simple_{name}": dict(total_steps=1_000_000) for name in OTHERS}  # what differs from the defaults


def preset(args):
    """What replaces the defaults where the command line is silent."""
    return PRESETS.get(args.env, {})


def check(args):
    """Refuse what no single argument can be blamed for."""
    if args.replay_size < max(args.learning_starts, args.num_envs * args.horizon):
        fail("--replay-size must hold --learning-starts and the --num-envs x --horizon of an iteration")
    if args.num_stragglers and args.straggler_delay >= args.learner_timeout and args.engine != "inline":
        fail("--straggler-delay must be shorter than --learner-timeout: every straggler would count as dead")
    if args.num_stragglers and not args.num_learners:
        fail("--num-stragglers needs --num-learners")


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
    """The one function to replace for an env of your own; envs/__init__.py lists what an env has."""
    options = dict(num_agents=args.num_agents, num_adversaries=args.num_adversaries, dialect=args.dialect)
    try:
        return envs.make(args.env, num_envs, horizon=args.horizon, device=args.device, **options)
    except ValueError as error:
        fail(f"--env {args.env}: {error}")


def playable(args, env):
    """Refuse what make_env returned if these actors, which give probabilities, cannot play it."""
    if not env.discrete or not hasattr(env, "action_splits"):
        fail(f"--env {args.env}: needs discrete actions that may be soft (action_splits), eq. (2)")
    if env.num_agents < 2 or env.horizon != args.horizon:
        fail(f"--env {args.env}: needs at least two agents, and episodes of --horizon {args.horizon} steps")


# ================================================================ 2. Networks
# Each agent has an actor and a critic of its own. A net is a flat vector, and the nets of all agents are the
# rows of one array; zeros end the shorter rows, and stay zero. So Adam is one line for everybody, and what
# travels to a learner is a few arrays.
class Spec(NamedTuple):
    """What an update depends on beside its data: plain numbers, sent to each learner once."""

    args: Args
    obs: tuple  # O_i, of each agent
    act: tuple  # A_i
    splits: tuple  # of each agent: sizes of its one-hot blocks, which sum to A_i
    adversaries: int  # K, the first of the agents
    local: tuple  # of each agent: does its critic see only its own observation and action (ddpg)?
    actor: tuple  # of each agent: layer sizes of its actor
    critic: tuple  # the same of its critic


def make_spec(args, env):
    obs, act, hidden = env.obs_dims, env.action_dims, (args.num_units, args.num_units)
    K = getattr(env, "num_adversaries", 0) or 0
    policies = [args.adv_policy] * K + [args.good_policy] * (env.num_agents - K)
    local = tuple(policy == "ddpg" for policy in policies)
    actor = tuple((O, *hidden, A) for O, A in zip(obs, act))
    critic = tuple((O + A if own else sum(obs) + sum(act), *hidden, 1) for O, A, own in zip(obs, act, local))
    return Spec(args, obs, act, env.action_splits, K, local, actor, critic)


def layers(net, sizes):
    """[w1, b1, w2, b2, w3, b3] of a net, views of its row."""
    shapes = [shape for n, m in itertools.pairwise(sizes) for shape in ((n, m), (m,))]
    lengths = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(net[: sum(lengths)].split(lengths), shapes)]


def glorot(sizes):
    """A net: weights uniform with variance 2 / (fan in + fan out), biases zero."""
    net = torch.zeros(sum(n * m + m for n, m in itertools.pairwise(sizes)))
    for weight in layers(net, sizes)[::2]:
        weight.uniform_(-1, 1).mul_(math.sqrt(6 / sum(weight.shape)))
    return net


def make_nets(spec, device):
    """Actors, critics, their targets, which start as copies [D5], and Adam's moments m and v."""
    nets = {}
    for kind in ("actor", "critic"):
        net = pad_sequence([*map(glorot, getattr(spec, kind))], batch_first=True).to(device)  # (M, longest)
        nets |= {kind: net, f"target_{kind}": net.clone()}
        nets |= {f"m_{kind}": torch.zeros_like(net), f"v_{kind}": torch.zeros_like(net)}
    return nets


def mlp(net, x):
    """x (B, in) -> (B, out); net: its layers."""
    w1, b1, w2, b2, w3, b3 = net
    x = torch.addmm(b1, x, w1).relu()  # (B, 64)
    x = torch.addmm(b2, x, w2).relu()
    return torch.addmm(b3, x, w3)


# Noise and minibatches are keyed, not drawn from a stream: so learners agree on them, whoever computes what.
PLAY, TARGETS, BATCH, SLOW, EVAL = range(1 << 15, (1 << 15) + 5)  # streams beside those of the agents


def keyed(seed, t, stream):
    """A counter-based generator: what it draws depends on (seed, t, stream) alone, wherever it runs."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, t << 16 | stream], np.uint64)))


def gumbel(seed, t, stream, shape):
    """Gumbel noise: minus the logarithm of Exp(1) numbers."""
    e = keyed(seed, t, stream).standard_exponential(shape, np.float32)
    return -torch.from_numpy(np.maximum(e, 1e-30)).log()


def gumbel_softmax(logits, noise, split):
    """eq. (2): (B, A) -> (B, A), block by block, at temperature 1. Env and replay get this soft action."""
    return torch.cat([block.softmax(1) for block in (logits + noise).split(split, 1)], 1)


# ================================================================ 3. Rollout
# An episode in each env with the current actors. The soft action is the only exploration. A row holds what
# belongs to one time step; an episode is H + 1 rows, so the next observation is the next row.
class Replay:
    """The last E episodes as a ring (E, H+1, W). torch.empty takes memory only where it is written to."""

    def __init__(self, args, spec):
        self.widths = sum(spec.obs), sum(spec.act), len(spec.obs) + 1  # obs, act, rewards and terminated
        self.stored = 0  # episodes ever
        episodes = args.replay_size // args.horizon
        self.rows = torch.empty(episodes, args.horizon + 1, sum(self.widths), device=args.device)

    def append(self, episodes):
        self.rows[(torch.arange(len(episodes)) + self.stored) % len(self.rows)] = episodes
        self.stored += len(episodes)

    def sample(self, seed, t, n):
        """n transitions, uniform with replacement: obs, act, end, next obs, each (n, .)."""
        H = self.rows.shape[1] - 1
        i = keyed(seed, t, BATCH).integers(H * min(self.stored, len(self.rows)), size=n)
        now, following = self.rows[i // H, i % H], self.rows[i // H, i % H + 1]  # (n, W)
        return *now.split(self.widths, 1), following[:, : self.widths[0]]


def act_all(actors, spec, obs, noise):
    """eq. (2) for all agents: layers of their actors, obs (B, sum O), noise (B, sum A) -> (B, sum A)."""
    logits = [mlp(net, o) for net, o in zip(actors, obs.split(spec.obs, 1))]  # (B, A_i) each
    return gumbel_softmax(torch.cat(logits, 1), noise, sum(spec.splits, ()))


@torch.no_grad()
def rollout(env, spec, actor, key):
    """eq. (12): an episode of each env, as rows of the replay, (B, H+1, W), and the returns, (B, M)."""
    actors = [*map(layers, actor, spec.actor)]
    noise = gumbel(*key, (env.horizon, env.num_envs, sum(spec.act))).to(actor.device)  # (H, B, sum A)
    obs = torch.cat(env.reset(), 1)  # (B, sum O)
    rows, returns = [], 0
    for e in noise:
        act = act_all(actors, spec, obs, e)  # (B, sum A)
        new, reward, terminated, _, _ = env.step(act.split(spec.act, 1))
        # time being up is no end: it is bootstrapped
        rows.append(torch.cat([obs, act, reward, terminated[:, None]], 1))  # (B, W)
        returns = returns + reward  # (B, M)
        obs = torch.cat(new, 1)
    nothing = torch.zeros_like(rows[0][:, obs.shape[1] :])  # follows the last observation
    return torch.stack([*rows, torch.cat([obs, nothing], 1)], 1), returns


# ================================================================ 4. Objectives
# The update of an agent is a function of a snapshot, a minibatch and a key, and of nothing else. Coding adds
# up what different learners computed: x_i must have the same bits wherever it is computed. So all run this.
class Job(NamedTuple):
    """What learners get for update t: all there is to know [D2]. Nets and moments have a row an agent."""

    obs: torch.Tensor  # (B, sum O)
    act: torch.Tensor  # (B, sum A)
    end: torch.Tensor  # (B, M+1) rewards, terminated
    next_obs: torch.Tensor  # (B, sum O)
    next_act: torch.Tensor  # (B, sum A) of the target actors
    actor: torch.Tensor  # (M, longest actor)
    critic: torch.Tensor  # (M, longest critic)
    target_critic: torch.Tensor
    m_critic: torch.Tensor  # Adam's moments
    v_critic: torch.Tensor


@torch.no_grad()
def make_job(spec, nets, sample, t):
    """One minibatch for all agents, and a' of all agents from one snapshot of the targets [D1]."""
    obs, act, _, next_obs = sample
    noise = gumbel(spec.args.seed, t, TARGETS, act.shape).to(act.device)
    next_act = act_all(map(layers, nets["target_actor"], spec.actor), spec, next_obs, noise)
    return Job(*sample, next_act, *(nets[name] for name in Job._fields[5:]))


def seen_by(spec, i, obs, act):
    """What the critic of agent i sees: everything, or (ddpg) what is its own."""
    if spec.local[i]:
        obs, act = obs.split(spec.obs, 1)[i], act.split(spec.act, 1)[i]
    return torch.cat([obs, act], 1)


def td_target(target_critic, x_next, reward, terminated, gamma):
    """eq. (3): x_next (B, in), reward and terminated (B,) -> y (B,)."""
    return reward + gamma * (1 - terminated) * mlp(target_critic, x_next)[:, 0]


def critic_loss(critic, x, y):
    """eq. (4): x (B, in), y (B,) -> scalar."""
    return (mlp(critic, x)[:, 0] - y).square().mean()


def actor_loss(actor, critic, spec, i, obs, act, noise):
    """eq. (5): the own action is replaced, those of the others stay the replay's."""
    logits = mlp(actor, obs.split(spec.obs, 1)[i])  # (B, A_i)
    acts = list(act.split(spec.act, 1))
    acts[i] = gumbel_softmax(logits, noise, spec.splits[i])
    q = mlp(critic, seen_by(spec, i, obs, torch.cat(acts, 1)))  # (B, 1)
    return 1e-3 * logits.square().mean() - q.mean()


def grid(clip):
    """The unit of the numbers that travel: 2^-31 of the bound, rounded up to a power of 2 [D3]."""
    return 2.0 ** (math.ceil(math.log2(clip)) - 31)


def clip_to_grid(grads, P, clip):
    """eq. (6): a net's gradients, each clipped to norm <= clip, as one row of P multiples of the unit."""
    row = torch.cat([(g * (clip / g.norm().clamp(min=clip))).flatten() for g in grads])
    row = pad(row, (0, P - len(row)))  # (P,)
    return (row / grid(clip)).round() * grid(clip)  # powers of 2: only round() rounds


def adam(g, m, v, n, lr):
    """eq. (10), step n = 1, 2, ... in TensorFlow's form: change of the parameters, new m and v [D5]."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    rate = lr * math.sqrt(1 - 0.999**n) / (1 - 0.9**n)
    return m / (v.sqrt() + 1e-8) * -rate, m, v


def agent_update(job, spec, t, i):
    """x_i (P,) by eqs. (2)-(6), and the losses of critic and actor, (2,)."""
    args, sizes = spec.args, spec.critic[i]
    actor = layers(job.actor[i].requires_grad_(), spec.actor[i])
    critic = layers(job.critic[i].requires_grad_(), sizes)

    # the critic's gradient
    with torch.no_grad():
        x_next = seen_by(spec, i, job.next_obs, job.next_act)  # (B, in)
        y = td_target(layers(job.target_critic[i], sizes), x_next, job.end[:, i], job.end[:, -1], args.gamma)
    loss_q = critic_loss(critic, seen_by(spec, i, job.obs, job.act), y)
    g_q = clip_to_grid(torch.autograd.grad(loss_q, critic), job.critic.shape[1], args.max_grad_norm)

    # the actor is judged by the critic after its step, which every learner takes for itself
    stepped = job.critic[i] + adam(g_q, job.m_critic[i], job.v_critic[i], t, args.lr)[0]
    noise = gumbel(args.seed, t, i, (len(job.obs), spec.act[i])).to(job.obs.device)
    loss_p = actor_loss(actor, layers(stepped, sizes), spec, i, job.obs, job.act, noise)
    g_p = clip_to_grid(torch.autograd.grad(loss_p, actor), job.actor.shape[1], args.max_grad_norm)
    return torch.cat([g_q, g_p]), torch.stack([loss_q, loss_p]).detach()


# ================================================================ 5. Update
# First come the codes, then the engines that compute X: this process, maybe on a virtual clock; learners that
# are processes; or actors on Ray. All give the same bits of X, and the controller applies it.
# LDPC {M: agents that each row after the first M adds up}: an array code of 3 x 5 blocks of 3 x 3
LDPC = {8: "0127 0137 0147 057 067 1 1", 10: "012349 0159 0369 02379 01289"}


def draw(scheme, N, M, p, rng):
    """C (N, M) of a scheme, not yet checked. s: whichever s learners are lost, the others are enough; load:
    agents that a learner computes. No stragglers: uncoded. Rarely one: ldpc. Several: sparse-mds."""
    if scheme == "uncoded":  # s = 0, load 1; there is no work for more than M learners
        return np.eye(M)
    if scheme == "replication":  # s = floor(N / M) - 1, load 1
        return np.eye(M)[np.arange(N) % M]
    if scheme == "mds":  # s = N - M, load M: cos(i phi_j), Vandermonde times an invertible matrix [D4]
        phi = (2 * np.arange(N) + 1) * np.pi / (2 * N)
        return np.cos(np.arange(M) * phi[:, None])
    if scheme == "random":  # mostly s = N - M, load about p M
        return rng.standard_normal((N, M)) * (rng.random((N, M)) < p)
    if scheme == "ldpc":  # s = 1, load 1 to 4 or 6
        C = np.eye(N, M)
        for j, agents in enumerate(LDPC[M].split(), M):
            C[j, [*map(int, agents)]] = 1
        return C
    # sparse-mds: s = N - M at the least load, M (N-M+1) / N. Column i fills N-M+1 rows from i N / M on,
    # cyclically: so any r columns touch N-M+r rows, and any M rows are invertible with probability one [D4]
    C = np.zeros((N, M))
    for i in range(M):
        rows = (i * N // M + np.arange(N - M + 1)) % N
        C[rows, i] = rng.uniform(0.5, 1.5, len(rows)) * rng.choice([-1, 1], len(rows))
    return C


def make_code(scheme, N, M, seed=1, p=0.8):
    """eq. (1): C (N, M). Random matrices are drawn until one is fit."""
    if N < M:
        fail(f"--num-learners {N} are fewer than the {M} agents")
    if scheme == "ldpc" and (N != 15 or M not in LDPC):
        fail("--scheme ldpc needs 15 learners and 8 or 10 agents, as the paper has")
    for attempt in range(50):
        C = draw(scheme, N, M, p, np.random.default_rng([seed % 2**64, attempt]))
        if decodable(C) and C.any(1).all():
            return C
    fail(f"--scheme {scheme} with {N} learners does not reach rank {M}, the number of agents")


def decodable(rows):
    """eq. (8): do these rows of C, (n, M), determine all agents? Full rank means a finite condition number.
    Below 1e6, float64 errs by less than half a unit, so that rounding is exact [D3]."""
    if len(rows) < rows.shape[1]:
        return False
    s = np.linalg.svd(rows, compute_uv=False)  # (M,), the largest first
    return s[-1] * 1e6 > s[0]


def encode(row, job, spec, t, cancelled=None, hold=0.0):
    """eq. (7), a learner's whole work: y_j (P,), then the losses of all agents, nan if not its own, float64.
    It lasts at least `hold` seconds. cancelled(seconds) waits so long for a cancel, which makes it None."""
    begin = time.monotonic()
    losses = torch.full((len(row), 2), math.nan, dtype=torch.float64)  # (M, 2)
    y = 0
    for i in np.flatnonzero(row).tolist():
        x, losses[i] = agent_update(job, spec, t, i)
        y = y + float(row[i]) * x.cpu().double()  # (P,)
        if cancelled and cancelled(0.0):
            return None
    if cancelled and cancelled(max(0.0, begin + hold - time.monotonic())):
        return None
    return torch.cat([y, losses.flatten()])


def decode(rows, Y, clip):
    """eq. (9): rows C_I (n, M) and what encode() gave for them -> X (M, P) float32, losses (M, 2). The x_i
    lie on the grid, so X is rounded to it [D3]. If that does not give Y_I back, the learners disagree."""
    M, unit, C = rows.shape[1], grid(clip), torch.from_numpy(rows)
    Y, losses = Y[:, : -2 * M], Y[:, -2 * M :].nanmean(0).view(M, 2)  # (n, P), (M, 2)
    X = (torch.linalg.pinv(C) @ Y / unit).round() * unit  # (M, P)
    if (C @ X - Y).abs().max() > unit / 1000:  # a nan is not: the losses will show it
        fail("the learners' results contradict each other: do they all run on the same kind of processor, "
             "with the same library versions? The last checkpoint.pt is good", code=1)
    return X.float(), losses


def holds(C, t, args):
    """w_j c + t_s [j is slow] of eq. (13), (N,): the least seconds of each learner. k of them are slow."""
    slow = keyed(args.seed, t, SLOW).choice(len(C), args.num_stragglers, replace=False)
    delay = args.straggler_delay * np.isin(np.arange(len(C)), slow)  # (N,)
    return np.count_nonzero(C, axis=1) * args.agent_seconds + delay


def arrivals(C, finish):
    """eq. (13): the first decodable I of learners that finish at these times, (N,), and when that is."""
    order = np.argsort(finish, kind="stable")  # (N,)
    n = C.shape[1]
    while not decodable(C[order[:n]]):
        n += 1
    return order[:n], finish[order[n - 1]]


class Central:
    """Computes here what the first learners by eq. (13) would send. With C = identity: ordinary MADDPG."""

    def __init__(self, C, spec, args):
        self.C, self.spec, self.args = C, spec, args

    def solve(self, t, job):
        """X (M, P), losses (M, 2), {tag: value} of update t."""
        first, seconds = arrivals(self.C, holds(self.C, t, self.args))
        Y = torch.stack([encode(row, job, self.spec, t) for row in self.C[first]])  # (n, P + 2M)
        logs = {"learners/seconds": seconds, "learners/used": len(first)} if self.args.num_learners else {}
        return *decode(self.C[first], Y, self.args.max_grad_norm), logs

    def close(self):
        pass


# The engine. A learner is busy (it starts, or has a job) or idle, and only an idle one gets a job. So a hung
# one is sent a job and a cancel at most, and its pipe cannot fill up. One job in shared memory is enough: a
# late learner may read it half overwritten, but answers to an old t are dropped. A pipe's end is a death.
class Learners(Central):
    """Processes on this machine. benchmark/ray_engine.py overrides what speaks to them: publish to kill."""

    def __init__(self, C, spec, args):
        super().__init__(C, spec, args)
        if getattr(mp.current_process(), "_inheriting", False):
            raise SystemExit(2)  # a learner imports a program without the guard, which would start learners
        forks = "forkserver" in mp.get_all_start_methods()  # a plain fork copies torch's threads in any state
        self.context = mp.get_context("forkserver" if forks else "spawn")
        if forks and current_thread() is main_thread():  # learners inherit this: Ctrl-C is for the controller
            self.context.set_forkserver_preload(["__main__", SCRIPT, "torch"])
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            forkserver.ensure_running()
            signal.signal(signal.SIGINT, handler)
        self.busy = dict.fromkeys(range(len(C)), 0)  # {learner: t of its job, 0 while it starts}
        self.restarts = 0
        self.job, self.process, self.pipe = None, {}, {}

    def solve(self, t, job):
        C, answers, hold = self.C, {}, holds(self.C, t, self.args).tolist()
        begin, notice, enough = time.monotonic(), 10.0, self.restarts + 5 * len(self.C)
        self.publish(job)
        while not decodable(C[[*answers]]):
            # give the job to all idle learners, then receive what comes
            for j in set(range(len(C))) - self.busy.keys() - answers.keys():
                self.busy[j] = t
                self.send(j, t, hold[j])
            for j, when, answer in self.receive(0.2):
                del self.busy[j]
                if when < 0:
                    self.replace(j)
                elif when == t:
                    answers[j] = answer

            # nobody waits for ever: the silent are replaced, and this process computes the update
            waited = time.monotonic() - begin
            if self.restarts > enough:
                fail("learners end again and again without an answer (a program that calls train() needs "
                     '`if __name__ == "__main__":`)', code=1)
            if waited > notice:  # say so, once
                notice = math.inf
                print(f"{SCRIPT}: update {t}: waiting for {len(C) - len(answers)} of {len(C)} learners",
                      file=sys.stderr)
            if waited > self.args.learner_timeout:
                silent = [j for j, when in self.busy.items() if when]  # the others are still starting
                print(f"{SCRIPT}: update {t} is computed here, as too few have answered in {waited:.0f} s; "
                      f"replaced are learners {silent or 'none'}", file=sys.stderr)
                for j in silent:
                    self.replace(j)
                C = np.eye(C.shape[1])  # (M, M): decodable
                answers = {i: encode(row, job, self.spec, t) for i, row in enumerate(C)}

        # enough: the others stop
        for j, when in self.busy.items():
            if when == t:
                self.send(j, -t, 0.0)
        logs = {"learners/seconds": time.monotonic() - begin, "learners/used": len(answers),
                "learners/restarts": self.restarts}
        return *decode(C[[*answers]], torch.stack([*answers.values()]), self.args.max_grad_norm), logs

    def replace(self, j):
        self.busy[j] = 0
        self.restarts += 1
        self.kill(j)
        self.start(j)

    def close(self):
        for j in self.process:
            self.kill(j)

    def publish(self, job):
        if self.job is None:
            P = job.critic.shape[1] + job.actor.shape[1]  # a row of Y: what encode() gives
            self.job = Job(*(tensor.cpu().clone().share_memory_() for tensor in job))
            self.Y = torch.zeros(len(self.C), P + 2 * len(job.actor), dtype=torch.float64).share_memory_()
            for j in self.busy:
                self.start(j)
        for ours, new in zip(self.job, job):
            ours.copy_(new)

    def start(self, j):
        self.pipe[j], theirs = self.context.Pipe()
        given = (theirs, self.job, self.Y[j], self.C[j], self.spec)
        process = self.context.Process(target=learner, args=given, daemon=True)
        process.start()
        theirs.close()
        self.process[j] = process  # only now: a second Ctrl-C may come in between

    def send(self, j, *message):
        with contextlib.suppress(OSError):  # dead: receive() sees the end of the pipe
            self.pipe[j].send(message)

    def receive(self, seconds):
        """(learner, update, answer or None) of each that has spoken; update 0: ready, -1: dead."""
        owner = {pipe: j for j, pipe in self.pipe.items()}
        for pipe in connection.wait([*owner], seconds):
            j = owner[pipe]
            try:
                t, done = pipe.recv()
                yield j, t, self.Y[j] if done else None
            except (EOFError, OSError):
                yield j, -1, None

    def kill(self, j):
        self.process[j].kill()
        self.process[j].join()
        self.pipe[j].close()


def learner(pipe, job, out, row, spec):
    """A learner process: one job after another, until the controller hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def cancelled(seconds):
        return pipe.poll(seconds) and bool(pipe.recv())  # only a cancel can come amid a job

    with contextlib.suppress(EOFError, OSError):
        pipe.send((0, False))  # ready
        while True:
            t, hold = pipe.recv()
            if t > 0:  # else it is a cancel that came after the answer
                answer = encode(row, job, spec, t, cancelled, hold)
                if answer is not None:
                    out.copy_(answer)
                pipe.send((t, answer is not None))


def make_engine(args, spec):
    """Who computes X."""
    N, M = args.num_learners, len(spec.obs)
    if not N:
        return Central(np.eye(M), spec, args)
    C = make_code(args.scheme, N, M, args.seed, args.code_p)
    load = np.count_nonzero(C, axis=1)
    if args.num_stragglers > len(C):
        fail(f"--num-stragglers {args.num_stragglers}: there is work for {len(C)} learners only")
    print(f"{args.scheme}: {len(C)} learners, {load.min()} to {load.max()} agents each", flush=True)
    return Central(C, spec, args) if args.engine == "inline" else Learners(C, spec, args)


@torch.no_grad()
def apply_update(nets, X, t, args):
    """eqs. (10) and (11), in place; row i of X (M, P) is [g_q, g_p] of agent i."""
    widths = nets["critic"].shape[1], nets["actor"].shape[1]
    for kind, g in zip(("critic", "actor"), X.split(widths, 1)):  # g (M, width)
        change, m, v = adam(g, nets[f"m_{kind}"], nets[f"v_{kind}"], t, args.lr)
        nets |= {f"m_{kind}": m, f"v_{kind}": v}
        nets[kind] += change
        nets[f"target_{kind}"].lerp_(nets[kind], args.tau)


def due(args, step):
    """How many updates there have been after so many transitions."""
    return max(0, (step - args.learning_starts) // args.update_every + 1)


def iterate(env, spec, nets, replay, engine, args, iteration):
    """The updates that are due, then an episode in each env. Returns {tag: value}."""
    logs, size = {}, args.num_envs * args.horizon  # transitions of an iteration
    step = (iteration - 1) * size
    for t in range(due(args, step - size) + 1, due(args, step) + 1):
        job = make_job(spec, nets, replay.sample(args.seed, t, args.batch_size), t)
        X, losses, logs = engine.solve(t, job)
        apply_update(nets, X.to(args.device), t, args)
        logs |= zip(("losses/critic", "losses/actor"), losses.mean(0))

    # the next episodes
    episodes, returns = rollout(env, spec, nets["actor"], (args.seed, iteration, PLAY))
    replay.append(episodes)
    logs |= {f"charts/episodic_return/agent_{i}": r for i, r in enumerate(returns.mean(0).tolist())}
    return logs | {"charts/episodic_return": returns.sum(1).mean()}  # over agents, as the original's


# ================================================================ 6. Evaluation
# Actions are sampled as in training, as the original does. Evaluation has its own envs and random streams, so
# it does not change what is learned. A net of zeros is the random policy. A sum over opponents measures
# nothing: their returns are shown apart, and each side also plays against a random other side.
def evaluate(args, spec, actor):
    """{tag: value}: returns of learned and random policies, and what the env measures at an episode's end."""
    env, flat, K = make_env(args, args.eval_episodes), {}, spec.adversaries
    policies = {"eval": actor, "eval/random": 0 * actor}
    if K:
        adversary = (torch.arange(len(actor), device=actor.device) < K)[:, None]  # (M, 1)
        policies |= {"eval/random_good": actor * adversary, "eval/random_adversaries": actor * ~adversary}
    for name, policy in policies.items():
        with torch.random.fork_rng():
            torch.manual_seed(args.seed % 2**32 + 10_000)
            _, returns = rollout(env, spec, policy, (args.seed, 0, EVAL))  # (B, M)
        sides = {"adversaries": returns[:, :K].sum(1), "good": returns[:, K:].sum(1)}
        values = sides if K else {"return": returns.sum(1)}  # (B,) each
        values |= {f"return/agent_{i}": r for i, r in enumerate(returns.T)}
        values |= env.measures() if hasattr(env, "measures") else {}
        for tag, value in values.items():
            ci95 = 1.96 * value.std(correction=min(1, len(value) - 1)).item() / math.sqrt(len(value))
            flat |= {f"{name}/{tag}": value.mean().item(), f"{name}/{tag}_ci95": ci95}
    return flat


def report(args, flat, folder, step):
    """Print what evaluate() found, a column a policy, and write eval.json."""
    policies = [tag.removesuffix("/return/agent_0") for tag in flat if tag.endswith("/return/agent_0")]
    heads = ["learned", *(policy[5:].replace("_", " ") for policy in policies[1:])]
    print(f"{args.env}: mean of {args.eval_episodes} episodes, ± 95 % interval")
    print(" " * 20 + "".join(f"{head:>22s}" for head in heads))
    tags = [path.removeprefix("eval/random/") for path in flat if path.startswith("eval/random/")]
    for tag in tags[::2]:  # behind each stands its interval
        cells = [f"{flat[f'{policy}/{tag}']:.2f} ± {flat[f'{policy}/{tag}_ci95']:.2f}" for policy in policies]
        print(f"{tag.replace('_', ' '):20s}" + "".join(f"{cell:>22s}" for cell in cells))
    write_eval(folder, flat | {"global_step": step, "seed": args.seed})


def film(args, spec, actor, folder):
    """play.gif: three episodes side by side."""
    camera = envs.Camera(make_env(args, 1))
    for k in range(3):
        rollout(camera, spec, actor, (args.seed, 1 + k, EVAL))
    print(camera.save(folder / "play.gif", {f"episode {k + 1}": k for k in range(3)}, skip=1))


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
    env = make_env(args, args.num_envs)
    playable(args, env)
    spec = make_spec(args, env)
    nets, replay = make_nets(spec, args.device), Replay(args, spec)

    # an earlier run, to continue or to evaluate
    state, iteration, step = None, 0, 0
    if path := args.resume or args.evaluate:
        state = load(path)
        for name in nets:
            nets[name].copy_(state["nets"][name])
        iteration, step = state["iteration"], state["step"]
        replay.rows[: len(state["rows"])] = state["rows"]
        replay.stored = iteration * args.num_envs  # episodes
    if args.evaluate:
        report(args, evaluate(args, spec, nets["actor"]), state["folder"], step)
        return film(args, spec, nets["actor"], state["folder"]) if args.capture_video else None

    with contextlib.closing(make_engine(args, spec)) as engine, Run(args, state) as run:
        done = False
        while not (done or run.interrupted):  # an iteration: learn, play, evaluate, log, save
            iteration += 1
            logs = iterate(env, spec, nets, replay, engine, args, iteration)
            step += args.num_envs * args.horizon
            done = step >= args.total_steps
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            if milestone:
                results = evaluate(args, spec, nets["actor"])
                logs |= results
            run.log(logs, step, f"return {logs['charts/episodic_return']:.2f}", milestone)
            if done or run.interrupted or iteration % args.save_every == 0:
                run.save(step, nets=nets, rows=replay.rows[: replay.stored].clone(), iteration=iteration)
        if done:
            report(args, results, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
