"""
Meta-MAPG: a policy gradient that accounts for one's own learning and for the learning of the others.

  Paper      Kim, Liu, Riemer, Sun, Abdulhai, Habibi, Lopez-Cot, Tesauro, How: A Policy Gradient Algorithm for
             Learning to Learn in Multiagent Reinforcement Learning. ICML 2021, arXiv:2011.00382.
  Problem    Agent i meets peers who learn. All play K episodes, take one policy-gradient step, play again,
             L times. Choose the initial policy phi^i_0 (and own step sizes eta) to maximise the return AFTER
             the steps, J = E_{peers ~ p} sum_{l=1..L} V^i(phi_l), phi = (phi^i, phi^-i).
  Algorithm  for each outer iteration: draw C personas as peers; for each of C Markov chains, side by side:
               for l = 0 .. L:
                 tau_l ~ phi_l: K episodes of H steps                                 -> rollout()
                 b^a: linear feature baseline, fitted to the batch               (1)  -> linear_baseline()
                 O^a = mean_k sum_t gamma^t [box(w_t) - box(w_t - s_t)] (R^a_t - b^a_t),
                       w_t = lambda w_{t-1} + s_t, s_t = sum of log pi(a_t|s_t)  (2)  -> dice_objective()
                 phi^a_{l+1} = phi^a_l + lr^a_l dO^a/dphi^a, for every agent a   (3)  -> ascend()
               A_l: generalised advantages of tau_l                              (4)  -> gae()
               loss = -sum_l mean_k sum_t A_l (own learning + peer learning)     (5)  -> outer_loss()
             clip each chain's gradient, remove conflicts between chains         (6)  -> pcgrad()
             phi^i_0, eta, critic: one AMSGrad step                              (7)  -> amsgrad()
             Tables in a two-player game: V itself has a closed form             (8)  -> exact_value()
             Opponent modelling: peers' policies from their actions alone        (9)  -> fit_opponent()
  Symbols    phi^i_0  actor (P,)   phi_l  N Players (C, P)   s_t  nodes (C, N, H, K)   lr^i_l  eta (C, L)
             C chains, L updates, K episodes, H steps, N agents, S states (or numbers that describe one),
             A actions, P parameters. box(z) = exp(z - stop_gradient(z)): value 1, derivative that of z.
  Departures [D1] In (1) the authors' code pairs time-major features with batch-major targets: more noise.
             [D2] Eq. (2) is Loaded DiCE (Farquhar et al., arXiv:1909.10549), theirs DiCE: a second
                  derivative with less noise. lambda < 1 forgets old steps, a bias.
             [D3] Eq. (5) keeps the terms of tau_l, whose expectation is not 0. Theirs has more terms.
             [D4] LSTMs: gradients are clipped at each link of the chain (80; 20 was no worse) and chain by
                  chain at 300, not 10; chains grow (L = 1, 3, 7); step sizes fall to 0.
             [D5] C chains make one synchronous step, so step sizes are about sqrt(C) times theirs.
             [D6] Never released, so ours: LOLA-DiCE (the return after look_ahead steps of the peers alone),
                  REINFORCE (that of phi_0), "no own learning" (no log pi^i in (5)), opponent modelling.
             [D7] RPS has H = 50, as in their code (paper: 150). Policies are logits; they clamp
                  probabilities. half_cheetah_dir has peers of benchmark/make_peers.py: theirs are lost.
  Run        python meta_mapg.py --env ipd                    # 15 s: +6.9 (cooperative), +4.2 (defective)
             python meta_mapg.py --env ipd --method meta-pg   # 15 s: sums -0.7 and -3.2, no peer learning
             python meta_mapg.py --env rps                    # 1 min: sum +1.4
             python meta_mapg.py --env ipd --policy lstm      # the paper's networks: 40 min, 12 GB
             python meta_mapg.py --env half_cheetah_dir       # 15 to 19 min
             torchrun --nproc-per-node 2 meta_mapg.py --env rps --policy lstm   # chains shared out
             python meta_mapg.py --evaluate runs/x/checkpoint.pt                # the table of a finished run
"""

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Annotated, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Independent, Normal
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
Method = Literal["meta-mapg", "meta-pg", "no-own-learning", "lola-dice", "reinforce"]


@dataclass
class Args:
    """Defaults: tables in the prisoner's dilemma, exact gradient. PRESETS has the other settings."""

    # --- run: the same in all six scripts
    env: str = "ipd"  # ipd, rps, rps3, rps4, half_cheetah_dir, or your own: see make_env()
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch, and of MuJoCo
    total_steps: Count = 4_320_000  # training transitions of all environments, inner-loop ones included
    eval_every: within(int, 0) = 25  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 64  # episodes of each batch in an evaluation
    save_every: Count = 25  # iterations between checkpoints; one is also written at the end and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate in half_cheetah_dir: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    method: Method = "meta-mapg"  # meta-pg: no peer learning. In tests all adapt by eq. (3)
    look_ahead: Count = 1  # steps of the peers that lola-dice looks ahead; the paper tries 1, 3, 5
    opponent_model: bool = False  # Meta-MAPG-OM: peers are known by their actions alone, eq. (9)
    policy: Literal["table", "lstm"] = "table"  # agent i: logits of each state, or the paper's LSTM
    gradient: Literal["exact", "sampled"] = "exact"  # eq. (8), for tables in ipd, or eqs. (1)-(5)
    chain_length: Count = 7  # L, updates in a chain
    grow_chains: bool = False  # train chains of 1, of 3, then of L updates, see GROWTH [D4]
    num_chains: Count = 24  # C, chains (one persona each) in an outer step, over all processes
    num_episodes: Count = 64  # K, episodes in a batch; fewer: noisier updates
    horizon: Count = 150  # H, steps of an episode
    gamma: Share = 0.96  # discount, eqs. (2) and (4)
    gae_lambda: Share = 0.95  # lambda of eq. (4)
    dice_lambda: Share = 1.0  # lambda of eq. (2)
    inner_lr: Size = 1.0  # initial value of eta, agent i's step sizes in eq. (3)
    peer_lr: Size = 1.0  # step size of the peers in eq. (3)
    outer_lr: Size = 0.02  # step size of phi_0 and eta in eq. (7)
    critic_lr: Size = 0.1  # step size of the critic in eq. (7)
    anneal_lr: bool = False  # let these two fall linearly to 0 over total_steps [D4]
    ent_coef: Size = 0.0  # weight of the entropy of phi_0, whose own return is not scored
    link_clip: Size = math.inf  # largest norm of a gradient between two updates of a chain [D4]
    max_grad_norm: Size = 10.0  # largest norm of a chain's gradient by actor, step sizes, critic, eq. (6)
    reward_scale: Size = 1.0  # of the rewards that agents learn from; logs show them unscaled
    personas: Optional[str] = None  # .npz: <class>_<split> (n, S, A) log-probabilities, or peers
    ood: bool = False  # hold out the most extreme personas for the test instead of random ones


SAMPLED = dict(gradient="sampled", total_steps=92_160_000)
RPS = SAMPLED | dict(horizon=50, gamma=0.9)  # [D7]
CHEETAH = dict(
    policy="lstm", gradient="sampled", horizon=200, gamma=0.95, chain_length=2, num_chains=1, inner_lr=0.005,
    peer_lr=0.005, outer_lr=1e-3, critic_lr=1e-3, reward_scale=0.01, total_steps=15_000_000, eval_every=100)
PRESETS = {"ipd": {}, "rps": RPS, "rps3": RPS, "rps4": RPS, "half_cheetah_dir": CHEETAH}  # what differs ...
LSTM = dict(  # [D2] [D4]
    policy="lstm", gradient="sampled", num_chains=16, critic_lr=2e-3, total_steps=72_000_000, eval_every=10,
    dice_lambda=0.9, link_clip=80.0, max_grad_norm=300.0, grow_chains=True, anneal_lr=True)
LSTM_PRESETS = {  # ... and with --policy lstm in games
    "ipd": LSTM | dict(inner_lr=0.1, outer_lr=1.2e-3, ent_coef=0.5),
    "rps": RPS | LSTM | dict(inner_lr=0.01, outer_lr=4e-4)}


def preset(args):
    """What replaces the defaults where the command line is silent."""
    if args.policy == "lstm" and args.env != "half_cheetah_dir":
        return LSTM_PRESETS.get(args.env[:3], LSTM)
    return (SAMPLED if args.gradient == "sampled" else {}) | PRESETS.get(args.env, {})


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
def make_env(args, num_envs, part=(0, 1)):
    # The contract (envs/__init__.py). All agents observe the same. Bring your own game with these members:
    #   num_envs B, horizon, num_agents N, obs_dims, action_dims (all agents' alike), discrete, device
    #   reset() -> obs (B,) long, the state's index;  step(action (B,) long) -> obs, reward (B, N), ...
    #   sample_tasks(n) -> (n, N-1, S, A) logits of the peers; tasks_by_class("val", "test") -> {class: tasks}
    # or, not discrete, obs (B, S), action (B, A) and tasks (n, N-1, P), the weights of lstm_shapes().
    common = dict(horizon=args.horizon, device=args.device, threads=args.num_threads, part=part)
    try:
        if args.env == "half_cheetah_dir":
            return envs.make("half_cheetah_peers", num_envs, peers=args.personas, **common)
        return envs.make(args.env, num_envs, index_obs=True, personas=args.personas, ood=args.ood, **common)
    except ValueError as error:
        fail(error)


def playable(args, env):
    """End with one line if the arguments do not fit this env, which may be your own."""
    table = args.policy == "table"
    if not hasattr(env, "tasks_by_class"):
        fail(f"{args.env} has no peers as tasks")
    if len(set(env.obs_dims)) > 1 or len(set(env.action_dims)) > 1:
        fail(f"{args.env}: all agents must have observations and actions of the same size")
    if args.gradient == "exact" and (not table or args.env != "ipd" or args.opponent_model):
        fail("--gradient exact needs --env ipd, --policy table and no --opponent-model, which fits samples")
    if not env.discrete and (table or args.opponent_model):
        fail(f"{args.env} is played by LSTMs: no --policy table, no --opponent-model")
    if args.capture_video and not hasattr(env, "render"):
        fail("--capture-video films half_cheetah_dir; a game has nothing to see but its table")
    if args.num_chains % WORLD:
        fail(f"--num-chains {args.num_chains} does not divide among {WORLD} processes")


# ================================================================ 2. Networks
# A network is one flat vector; C chains are C rows of a matrix. A table has logits (S, A). The paper's actor
# is Linear(S -> 64), ReLU, LSTM, Linear(64 -> A); with a "log_std" its outputs are a Gaussian's means. The
# critic has the same trunk. The recurrence is written out: torch's fused ones cannot be differentiated twice.
# Inside it features come before episodes, (C, H, K) with H = 64: so each gate is one block of memory.
class Player(NamedTuple):
    """One agent's network, a row for each chain."""

    flat: torch.Tensor  # (C, P)
    shapes: dict  # {name: shape} in the order of the flat vector
    def parts(self):
        """{name: (C, *shape)}, views."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = {}
        for (name, shape), x in zip(self.shapes.items(), self.flat.split(sizes, 1)):
            parts[name] = x.unflatten(1, shape)
        return parts
    def constant(self):
        """The same numbers, cut off from what made them."""
        return self._replace(flat=self.flat.detach().clone().requires_grad_())


def lstm_shapes(states, outputs, gaussian=False):
    """{name: shape}: weights (out, in), gates in the order i, f, g, o."""
    H = 64
    shapes = {
        "w1": (H, states), "w_ih": (4 * H, H),
        "w_hh": (4 * H, H), "w2": (outputs, H),
        "b1": (H,), "b_ih": (4 * H,),
        "b_hh": (4 * H,), "b2": (outputs,)}
    if gaussian:
        shapes["log_std"] = (outputs,)
    return shapes


def networks(args, env):
    """The shapes of agent i's actor and critic."""
    S, A = env.obs_dims[0], env.action_dims[0]
    if args.policy == "table":
        return {"table": (S, A)}, {"table": (S, 1)}
    return lstm_shapes(S, A, gaussian=not env.discrete), lstm_shapes(S, 1)


def initial(shapes):
    """(P,): the matrices of an LSTM Xavier-normal, everything else 0."""
    parts = []
    for name, shape in shapes.items():
        x = torch.zeros(shape)
        if name.startswith("w"):
            torch.nn.init.xavier_normal_(x)
        parts.append(x.flatten())
    return torch.cat(parts)


def look_up(table, state):
    """(C, S, X) rows at (C, T, K) states -> (C, T, K, X)."""
    index = state.flatten(1)[..., None]  # (C, TK, 1)
    rows = table.gather(1, index.expand(-1, -1, table.shape[-1]))
    return rows.unflatten(1, state.shape[1:])


def lstm_inputs(p, state):
    """What the recurrence reads at states (C, T, K[, S]): x (C, T, X, K), and its weights (C, 4H, X)."""
    w1, b1 = p["w1"], p["b1"][..., None]
    if not state.is_floating_point():  # x is one-hot, so both layers are worked out for S columns
        x = F.one_hot(state, w1.shape[-1]).to(w1.dtype)
        return x.mT, p["w_ih"] @ F.relu(w1 + b1)
    x = w1[:, None] @ state.to(w1.dtype).mT  # (C, T, H, K)
    return F.relu(x + b1[:, None]), p["w_ih"]


def outputs(player, state, memory=None):
    """(C, T, K[, S]) states -> (C, T, K, A), and the LSTM's memory (h, c) after the last, each (C, H, K)."""
    p, out = player.parts(), []
    if "table" in p:
        return look_up(p["table"], state), None
    x, w_in = lstm_inputs(p, state)
    w_hh, w2, b2 = p["w_hh"], p["w2"], p["b2"][..., None]
    bias = (p["b_ih"] + p["b_hh"])[..., None]  # (C, 4H, 1)
    zero = w_hh.new_zeros(len(w_hh), w_hh.shape[-1], x.shape[-1])
    h, c = memory or (zero, zero)
    for x_t in x.unbind(1):  # (C, X, K)
        z = torch.baddbmm(bias, w_in, x_t)
        z = torch.baddbmm(z, w_hh, h)
        i, f, g, o = z.chunk(4, 1)  # each (C, H, K)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(torch.baddbmm(b2, w2, h))  # w2 after a stack of all h would be slow to differentiate twice
    return torch.stack(out, 1).mT, (h, c)


def policy(player, out):
    """pi(.|s), a torch distribution, from the outputs (C, T, K, A) of the network."""
    if "log_std" not in player.shapes:
        return Categorical(logits=out, validate_args=False)  # [D7]
    std = player.parts()["log_std"].exp()[:, None, None]  # (C, 1, 1, A): the same in every state
    return Independent(Normal(out, std, validate_args=False), 1)


# ================================================================ 3. Rollout
# All C chains and K episodes are one batch of games. No graph is recorded: section 5 recomputes log pi.
class Batch(NamedTuple):
    state: torch.Tensor  # (C, H, K[, S]) what all agents saw
    action: torch.Tensor  # (C, H, K, N[, A])
    reward: torch.Tensor  # (C, N, H, K) as the environment gives it


def thresholds(logits):
    """(..., A) -> (..., A-1): a number from U(0, 1) that exceeds n of them means action n."""
    return logits.softmax(-1).cumsum(-1)[..., :-1]


@torch.no_grad()
def rollout(env, players, part=(0, 1)):
    """Play one batch. Every process, part = (rank, world), draws for all chains and keeps its own."""
    rank, world = part
    C = len(players[0].flat)
    shape = [env.horizon, world * C, env.num_envs // C, env.num_agents]
    noise = torch.rand(shape) if env.discrete else torch.randn(shape + [env.action_dims[0]])
    noise = noise.to(env.device)[:, rank * C : (rank + 1) * C]  # (H, C, K, N[, A])
    # memory: a table's thresholds in all its states, an LSTM's (h, c)
    memory = [thresholds(p.parts()["table"]) if "table" in p.shapes else None for p in players]
    obs, steps = env.reset(), []
    for t in range(env.horizon):
        state = obs[0].unflatten(0, (C, -1))  # (C, K[, S])
        now, actions = state[:, None], []  # N times (C, K[, A])
        for a, p in enumerate(players):
            u = noise[t, :, :, a]  # (C, K[, A])
            if "table" in p.shapes:
                limits = look_up(memory[a], now)
            else:
                out, memory[a] = outputs(p, now, memory[a])
                limits = thresholds(out)
            if env.discrete:
                actions.append((u[..., None] > limits[:, 0]).sum(-1))  # the inverse transform
            else:
                pi = policy(p, out)
                actions.append(pi.mean[:, 0] + pi.stddev[:, 0] * u)
        obs, reward, *_ = env.step([action.flatten(0, 1) for action in actions])
        steps.append((state, torch.stack(actions, 2), reward.unflatten(0, (C, -1))))
    state, action, reward = (torch.stack(x, 1) for x in zip(*steps))
    return Batch(state, action, reward.movedim(-1, 1))


# ================================================================ 4. Objectives
# Pure functions of tensors. Time is dimension -2 and the episode dimension -1 in (..., H, K).
def decay(x, factor):
    """(H, H) of factor^(t-u), t >= u, for x (..., H, K): decay @ x sums the past, decay.mT @ x the future."""
    t = torch.arange(x.shape[-2]).to(x)
    return (factor ** (t[:, None] - t).clamp(min=0)).tril()


def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension -2."""
    return decay(reward, gamma).mT @ reward


def gae(reward, value, gamma, gae_lambda):
    """eq. (4): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t, and v_H = 0."""
    next_value = F.pad(value[..., 1:, :], (0, 0, 0, 1))
    delta = reward + gamma * next_value - value
    return returns_to_go(delta, gamma * gae_lambda)


def linear_baseline(state, reward, gamma, ridge=1e-5):
    """eq. (1): ridge regression of the return-to-go on [s, s^2, 1, t, t^2, t^3], t in hundreds of steps, for
    each chain and agent. state (C, H, K[, S]), reward (C, N, H, K) -> (C, N, H, K), constant for autograd."""
    C, N, H, K = reward.shape
    s = state if state.is_floating_point() else F.one_hot(state)
    t = torch.arange(H, device=s.device).double() / 100
    time = t[:, None, None] ** torch.arange(4, device=s.device)  # (H, 1, 4)
    x = torch.cat([s, s**2, time.expand(C, H, K, 4)], -1)
    x = x.flatten(1, 2)  # (C, HK, 2S+4), doubles
    ret = returns_to_go(reward.double(), gamma)
    target = ret.flatten(2).mT  # (C, HK, N) [D1]
    eye = torch.eye(x.shape[-1]).to(x)
    w = torch.linalg.solve(x.mT @ x + ridge * eye, x.mT @ target)  # (C, 2S+4, N)
    fitted = (x @ w).mT.reshape(C, N, H, K)
    return fitted.to(reward).detach()


def dice_objective(nodes, reward, baseline, gamma, dice_lambda=1.0):
    """eq. (2), all (C, N, H, K) -> (C, N). `nodes`: the log-probabilities through which samples depend on
    parameters, own ones or those of all agents. Its value is 0, its derivative the policy gradient. [D2]"""
    assert nodes.shape == reward.shape == baseline.shape
    w = decay(nodes, dice_lambda) @ nodes
    adv = returns_to_go(reward, gamma) - baseline
    discount = decay(nodes, gamma)[:, :1]  # (H, 1): gamma^t
    boxes = [torch.exp(z - z.detach()) for z in (w, w - nodes)]
    gain = discount * (boxes[0] - boxes[1]) * adv
    return gain.sum(-2).mean(-1)


def outer_loss(logprob, adv, method):
    """eq. (5) of one scored batch tau_l: logprob (C, N, H, K), adv (C, H, K) -> (C,). [D3]"""
    assert adv.shape == logprob[:, 0].shape
    score = 0.0
    if method != "no-own-learning":  # phi^i_l depends on phi^i_0, for l = 0 directly
        score = score + logprob[:, 0]
    if method not in ("meta-pg", "reinforce"):  # peer learning: so does phi^-i_l
        score = score + logprob[:, 1:].sum(1)
    return -(adv * score).sum(-2).mean(-1)


def exact_value(x, y, reward_table, gamma, horizon):
    """eq. (8): V = sum_{t<H} gamma^t d_t R, where d_{t+1} = d_t P is the distribution of joint actions.
    x, y (C, S, A) logits of player 0 and 1, reward_table (S, 2) -> V (C, 2)."""
    p, q = x.softmax(-1), y.softmax(-1)
    joint = p[..., :, None] * q[..., None, :]  # (C, S, A, A)
    joint = joint.flatten(2)  # (C, S, AA): the next state is 1 + the joint action
    start, P = joint[:, :1], joint[:, 1:] * gamma
    # the upper right block of [[P, I], [0, I]]^H is I + P + ... + P^(H-1)
    n = P.shape[-1]
    eye = torch.eye(n).to(P).expand_as(P)
    upper = torch.cat([P, eye], -1)
    lower = torch.cat([0 * P, eye], -1)
    power = torch.linalg.matrix_power(torch.cat([upper, lower], -2), horizon)
    visits = (start @ power[:, :n, n:])[:, 0]  # (C, AA), discounted
    return visits @ reward_table[1:].to(x.dtype)


# ================================================================ 5. Update
# create_graph keeps every inner update differentiable: one backward pass walks the whole chain. Each chain
# has its own copies of phi_0 and eta, so that gradients come out chain by chain, as eq. (6) needs them.
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes of torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
GROWTH = ((0.0, 1), (0.2, 3), (0.45, math.inf))  # (from this share of all steps on, updates) [D4]


class Chain(NamedTuple):
    """The results of C chains."""
    loss: torch.Tensor  # (C,) of actor and step sizes, eq. (5)
    critic_loss: torch.Tensor  # (C,)
    reward: torch.Tensor  # (C, L+1, N) as the environment gives it, mean over the steps of a batch


def chain_plan(args, progress):
    """-> the updates in a chain, the first l that is scored, and whether agent i learns. Peers always do."""
    if args.method == "reinforce":  # [D6] the return of phi_0
        return 0, 0, False
    if args.method == "lola-dice":  # [D6] the return after steps of the peers alone
        return args.look_ahead, args.look_ahead, False
    grown = max(n for share, n in GROWTH if progress >= share)
    return min(args.chain_length, grown if args.grow_chains else math.inf), 1, True


def log_probs(players, batch):
    """log pi^a of the actions that were taken, (C, N, H, K)."""
    out = []  # N times (C, H, K)
    for p, action in zip(players, batch.action.unbind(3)):
        if "table" in p.shapes:  # normalise S rows instead of HK
            log_pi = p.parts()["table"].log_softmax(-1)  # (C, S, A)
            index = batch.state * log_pi.shape[-1] + action
            out.append(look_up(log_pi.flatten(1)[..., None], index)[..., 0])
        else:
            out.append(policy(p, outputs(p, batch.state)[0]).log_prob(action))
    return torch.stack(out, 1)


def ascend(players, objective, lrs, create_graph):
    """eq. (3): each agent follows its own column of objective (C, N). lrs[a]: (C, 1), or a number."""
    new = []
    for p, own, lr in zip(players, objective.unbind(1), lrs):
        gradient, = torch.autograd.grad(own.sum(), p.flat, retain_graph=True,
                                        create_graph=create_graph)  # (C, P)
        new.append(p._replace(flat=p.flat + gradient * lr))
    return new


def inner_update(players, logprob, batch, lrs, args, training):
    """eqs. (1)-(3): one policy-gradient step of every agent on one batch, whose log_probs are given. In
    training those of all agents are nodes (not in Meta-PG): this changes derivatives, not the step."""
    reward = batch.reward * args.reward_scale  # (C, N, H, K)
    nodes = logprob
    if training and args.method != "meta-pg":
        nodes = logprob.sum(1, keepdim=True).expand_as(logprob)
    baseline = linear_baseline(batch.state, reward, args.gamma)
    objective = dice_objective(nodes, reward, baseline, args.gamma, args.dice_lambda)
    return ascend(players, objective, lrs, create_graph=training)


def clip(gradients, max_norm):
    """(C, P) gradients, each chain scaled down to norm max_norm; and the norms before, (C,)."""
    norm = gradients.norm(dim=1)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return gradients * scale[:, None], norm


def link(players, max_norm):
    """The same players, but the gradient that flows back through all of them together is clipped, chain by
    chain. Without this, a product of many Hessians would choose the direction. [D4]"""
    def on_the_way_back(gradient):
        return clip(gradient, max_norm)[0]
    flat = torch.cat([p.flat for p in players], 1)  # (C, all P)
    flat.register_hook(on_the_way_back)
    parts = flat.split([p.flat.shape[1] for p in players], 1)
    return [p._replace(flat=x) for p, x in zip(players, parts)]


def fit_opponent(model, batch, agent):
    """eq. (9): the frequencies of one agent's actions; the `model` counts as one more visit of each state.
    New values replace the old ones, but the derivative of the model's last step by phi_0 is kept."""
    S, A = model.shapes["table"]
    state = F.one_hot(batch.state, S).flatten(1, 2)  # (C, HK, S)
    action = F.one_hot(batch.action[..., agent], A).flatten(1, 2)
    counts = state.mT.float() @ action.float()  # (C, S, A)
    fitted = (counts + model.parts()["table"].softmax(-1)).log().flatten(1)
    return model._replace(flat=model.flat + (fitted - model.flat).detach())


def peers_of(tasks, env):
    """(C, N-1, S, A) logits, or (C, N-1, P) weights of Gaussian LSTMs -> N-1 players."""
    S, A = env.obs_dims[0], env.action_dims[0]
    shapes = {"table": (S, A)} if env.discrete else lstm_shapes(S, A, gaussian=True)
    tasks = tasks.flatten(2)  # (C, N-1, P)
    return [Player(weights, shapes).constant() for weights in tasks.unbind(1)]


def sampled_chain(env, actor, eta, critic, tasks, plan, args, part=(0, 1), training=True):
    """eqs. (1)-(5) for each row of `tasks`. When not training, no derivative passes from batch to batch."""
    length, first, learns = plan
    loss = critic_loss = 0.0
    players = [actor, *peers_of(tasks, env)]
    rewards = []
    models = peers_of(torch.zeros_like(tasks), env) if args.opponent_model and training else []
    for l in range(length + 1):
        batch = rollout(env, players, part)
        rewards.append(batch.reward.mean((2, 3)))
        # differentiate through the models, if there are any, instead of the peers that they imitate
        models = [fit_opponent(model, batch, 1 + j) for j, model in enumerate(models)]
        seen = [players[0], *models] if models else players
        logprob = log_probs(seen, batch)
        # score the batch, and train the critic: one for all l
        if training and l >= first:
            reward = batch.reward[:, 0] * args.reward_scale  # (C, H, K)
            value = outputs(critic, batch.state)[0][..., 0]
            adv = gae(reward, value.detach(), args.gamma, args.gae_lambda)
            loss = loss + outer_loss(logprob, adv, args.method)
            error = value - returns_to_go(reward, args.gamma)
            critic_loss = critic_loss + (error**2).mean((1, 2))
        elif training and l == 0:
            entropy = policy(actor, outputs(actor, batch.state)[0]).entropy()
            loss = loss - args.ent_coef * entropy.sum(1).mean(-1)
        # every agent learns from it; peers who are only modelled take a step of their own
        if l < length:
            lrs = [eta[:, [l]] if learns else 0.0] + [args.peer_lr] * (env.num_agents - 1)
            new = inner_update(seen, logprob, batch, lrs, args, training)
            new = link(new, args.link_clip) if training else [p.constant() for p in new]
            if models:
                models, logprob = new[1:], log_probs(players, batch)
                real = inner_update(players, logprob, batch, lrs, args, training=False)
                new[1:] = [p.constant() for p in real[1:]]
            players = new
    return Chain(loss / len(rewards), critic_loss / len(rewards), torch.stack(rewards, 1))


def exact_chain(env, actor, eta, critic, tasks, plan, args, part=(0, 1), training=True):
    """The same with expected updates: tables, eqs. (3) and (8); nothing is sampled and no critic needed."""
    length, first, learns = plan
    loss = 0.0
    players = [actor, *peers_of(tasks, env)]
    rewards = []
    for l in range(length + 1):
        x, y = (p.parts()["table"] for p in players)
        pay, H = env.reward_table, args.horizon
        value = exact_value(x, y, pay, args.gamma, H)  # (C, 2)
        rewards.append(exact_value(x, y, pay, 1.0, H).detach() / H)
        if l >= first and args.method == "no-own-learning":  # [D6]
            loss = loss - exact_value(x.detach(), y, pay, args.gamma, H)[:, 0]
        elif l >= first:
            loss = loss - value[:, 0]
        # one step of both; its derivatives are dropped in a test, and for the peer in Meta-PG
        if l < length:
            lrs = [eta[:, [l]] if learns else 0.0, args.peer_lr]
            players = ascend(players, value, lrs, training)
            if not training:
                players[0] = players[0].constant()
            if not training or args.method == "meta-pg":
                players[1] = players[1].constant()
    loss = loss / len(rewards)
    return Chain(loss, torch.zeros_like(loss), torch.stack(rewards, 1))


CHAINS = {"exact": exact_chain, "sampled": sampled_chain}


def pcgrad(gradients, order):
    """eq. (6): each chain's gradient loses its component against any other chain it conflicts with, in random
    order (Yu et al., arXiv:2001.06782). gradients (C, P), order (C, C): a permutation a row -> (C, P)."""
    out = gradients
    for others in order.T:  # its own turn changes nothing: <g, g> >= 0
        g = gradients[others]
        product = (out * g).sum(1)  # (C,), negative in a conflict
        share = product / ((g * g).sum(1) + 1e-8)
        out = out - share.clamp(max=0)[:, None] * g
    return out


def amsgrad(moments, gradient, lr, k, eps=1e-3):
    """eq. (7): (P,) gradient -> (P,) change in step k = 1, 2, .. eps is inside the bias correction, as in the
    authors' code: torch.optim.Adam(amsgrad=True) begins with steps up to four times larger."""
    m, v, v_max = moments  # (3, P), rows that change in place
    m += 0.1 * (gradient - m)
    v += 0.001 * (gradient**2 - v)
    torch.maximum(v_max, v, out=v_max)
    lr = lr * math.sqrt(1 - 0.999**k) / (1 - 0.9**k)
    return -lr * m / (v_max.sqrt() + eps)


def gather(x):
    """(n, ...) of each process -> (n * WORLD, ...) of all, in order of rank."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, device="cpu") for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x.detach().cpu().contiguous())
    return torch.cat(parts).to(x.device)


def build(args, env):
    """What is learned and the moments of AMSGrad, in the groups that are clipped and stepped separately."""
    actor, critic = map(initial, networks(args, env))
    eta = torch.full((args.chain_length,), args.inner_lr)
    params = copies({"actor": actor, "critic": critic, "step_sizes": eta}, args.device)
    moments = {group: x.new_zeros(3, len(x)) for group, x in params.items()}
    return params, moments


def copies(tensors, device):
    return {group: x.to(device, copy=True) for group, x in tensors.items()}


def outer_update(env, params, moments, args, iteration, progress):
    """One outer iteration, the algorithm box; params {"actor", "critic", "step_sizes": (P,)} change in place.
    Returns {tag: value} and the mean reward per step of each agent along the chain, (L+1, N)."""
    # every process draws for all chains and keeps its own
    C = args.num_chains // WORLD
    tasks = env.sample_tasks(args.num_chains)[RANK * C : (RANK + 1) * C]
    order = torch.rand(args.num_chains, args.num_chains, device=env.device).argsort(1)
    # play, learn, play again; each chain with a copy of everything that is learned
    own = {group: x.expand(C, -1).clone().requires_grad_() for group, x in params.items()}
    shapes = networks(args, env)
    actor = Player(own["actor"], shapes[0])
    critic = Player(own["critic"], shapes[1])
    plan = chain_plan(args, progress)
    chain = CHAINS[args.gradient](env, actor, own["step_sizes"], critic, tasks, plan, args, (RANK, WORLD))
    # each chain's gradient, in one backward pass for actor and step sizes and another for the critic
    leaves = own["actor"], own["step_sizes"]  # the latter is unused where agent i does not learn
    g = torch.autograd.grad(chain.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    gradients = {"actor": g[0], "step_sizes": g[1]}
    if args.gradient == "sampled":
        gradients["critic"], = torch.autograd.grad(chain.critic_loss.sum(), own["critic"])
    # eqs. (6) and (7), group by group
    logs = {}
    falling = 1 - progress if args.anneal_lr else 1  # [D4]
    for group, g in gradients.items():
        g, norm = clip(gather(g), args.max_grad_norm)  # (all C, P)
        lr = args.outer_lr if group != "critic" else args.critic_lr  # [D5]
        g = pcgrad(g, order).mean(0)  # (P,)
        params[group] += amsgrad(moments[group], g, lr * falling, iteration + 1)
        logs["grad/norm_outer" if group == "actor" else f"grad/norm_{group}"] = norm.mean()
    loss, critic_loss, reward = (gather(x.detach()).mean(0) for x in chain)  # means over all chains
    logs |= {"losses/actor": loss, "losses/critic": critic_loss}
    return logs, reward


# ================================================================ 6. Evaluation
# Meta-test: one chain for each held-out persona; every agent learns from its own samples alone. It has its
# own random stream, so the number of evaluations does not change what is learned.
def adapt(env, params, tasks, args):
    """What the paper reports of n chains, (n, L+1, N): reward per step, for cheetahs an episode's return."""
    actor = Player(params["actor"].expand(len(tasks), -1), networks(args, env)[0]).constant()
    eta = params["step_sizes"].expand(len(tasks), -1)
    plan = args.chain_length, 1, True  # all methods adapt here
    chain = CHAINS[args.gradient](env, actor, eta, None, tasks, plan, args, training=False)
    return chain.reward * (args.horizon if args.env == "half_cheetah_dir" else 1)


def evaluate(args, params, split):
    """{tag: value} on the personas of "val" or "test": each class, and all of them."""
    flat, results = {}, {}  # results: {beginning of the tags: (n, L+1, N)}
    episodes = 1 if args.gradient == "exact" else args.eval_episodes
    with torch.random.fork_rng():
        torch.manual_seed((args.seed + 10_000) % 2**64)
        for name, tasks in make_env(args, 1).tasks_by_class(split).items():
            env = make_env(args, len(tasks) * episodes)
            results[f"eval/{name}/"] = adapt(env, params, tasks, args)
    results["eval/"] = torch.cat([*results.values()])
    for tag, reward in results.items():
        own = reward[..., 0]
        error = own.std(0, correction=0) / max(len(own) - 1, 1) ** 0.5
        flat |= numbered(tag + "return_{}", own.mean(0))
        flat |= numbered(tag + "return_{}_ci95", 1.96 * error)
        flat |= numbered(tag + "peer_return_{}", reward[..., 1].mean(0))
        flat[tag + "sum_after_phi_0"] = own[:, 1:].sum(1).mean().item()
    return flat


def numbered(tag, values):
    return {tag.format(n): value for n, value in enumerate(values.tolist())}


def table(flat, args):
    """The adaptation table of an evaluation: what agent i and its first peer get after 0..L updates."""
    what = "return of an episode" if args.env == "half_cheetah_dir" else "reward per step"
    lines = [f"{args.env}: {what} against held-out personas"]
    numbers = range(args.chain_length + 1)
    lines.append(" " * 25 + "".join(f"phi_{l}    " for l in numbers) + "sum from phi_1")
    for tag in flat:
        if tag.endswith("return_0"):  # of agent i or of the peer, against a class or all
            row = [flat[f"{tag[:-1]}{l}"] for l in numbers]
            row.append(sum(row[1:]))
            lines.append(f"{tag[5:-2]:25s}" + "".join(f"{x:<+9.3f}" for x in row))
    return "\n".join(line.rstrip() for line in lines)


def report(args, params, folder, step):
    """Print the table of held-out personas and write eval.json."""
    values = evaluate(args, params, "test")
    print(table(values, args))
    write_eval(folder, values | {"global_step": step, "seed": args.seed})


def film(args, params, folder):
    """play.gif: agent i with the first held-out peer under phi_0 and, beside it, phi_L."""
    camera = envs.Camera(make_env(args, args.eval_episodes))
    adapt(camera, params, camera.tasks_by_class("test")["left"][:1], args)
    print(camera.save(folder / "play.gif", {"before": 0, "after": -1}))


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
def train(args):
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    episodes = 1 if args.gradient == "exact" else args.num_episodes  # an expected update plays no games
    env = make_env(args, args.num_chains // WORLD * episodes, (RANK, WORLD))
    playable(args, env)
    # from the beginning, or from a checkpoint
    params, moments = build(args, env)
    best, best_score = copies(params, args.device), -math.inf
    state, iteration, step = None, 0, 0
    if path := args.resume or args.evaluate:
        state = load(path)
        params, moments, best = (copies(state[x], args.device) for x in ("params", "moments", "best"))
        iteration, step, best_score = state["iteration"], state["step"], state["best_score"]
    if args.evaluate:
        report(args, best, state["folder"], step)
        return film(args, best, state["folder"]) if args.capture_video else None
    if RANK:  # computes what the first process does, and keeps nothing
        sys.stdout, args = open(os.devnull, "w"), replace(args, run_dir=tempfile.mkdtemp())
        state = state and state | {"folder": Path(args.run_dir)}
    with Run(args, state) as run:
        stop = False
        while not stop:
            logs, reward = outer_update(env, params, moments, args, iteration, step / args.total_steps)
            iteration += 1
            step += len(reward) * args.num_chains * episodes * args.horizon
            # returns of an episode: of agent i along the chain, and of each agent, mean over it
            returns = reward * args.horizon  # (L+1, N)
            logs |= numbered("adapt/return_{}", returns[:, 0])
            logs |= numbered("charts/episodic_return/agent_{}", returns.mean(0))
            logs["charts/episodic_return"] = returns[:, 0].mean()
            # keep the parameters that adapt best to validation personas
            done = step >= args.total_steps
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            stop = done or bool(gather(torch.tensor([run.interrupted])).any())  # of any process
            if milestone:
                logs |= evaluate(args, params, "val")
                if logs["eval/sum_after_phi_0"] > best_score:
                    best, best_score = copies(params, args.device), logs["eval/sum_after_phi_0"]
            text = f"reward {reward[0, 0]:+.3f} -> {reward[-1, 0]:+.3f}"
            run.log(logs, step, f"{text}, best validation sum {best_score:+.2f}", milestone)
            if stop or iteration % args.save_every == 0:
                run.save(step, params=params, moments=moments, best=best, best_score=best_score,
                         iteration=iteration)
        if done:
            report(args, best, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
