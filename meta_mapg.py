"""
Meta-MAPG: a policy gradient that reckons with one's own learning and with the learning of the others.

  Paper      Kim, Liu, Riemer, Sun, Abdulhai, Habibi, Lopez-Cot, Tesauro, How: A Policy Gradient Algorithm for
             Learning to Learn in Multiagent Reinforcement Learning. ICML 2021, arXiv:2011.00382.
  Problem    Agent i meets peers who learn. All play K episodes, take one policy-gradient step, play again,
             L times. Choose the initial policy phi^i_0 (and own step sizes eta) to maximise the return AFTER
             the steps, J = E_{peers ~ p} sum_{l=1..L} V^i(phi_l), phi = (phi^i, phi^-i).
  Algorithm  for each outer iteration: draw C personas as peers; for each of C Markov chains, side by side:
               for l = 0 .. L:
                 tau_l ~ phi_l: K episodes of H steps                                      -> rollout()
                 b^a: linear feature baseline, fitted to the batch                    (1)  -> linear_baseline()
                 O^a = mean_k sum_t gamma^t [box(w_t) - box(w_t - s_t)] (R^a_t - b^a_t),
                       w_t = lambda w_{t-1} + s_t, s_t = sum of log pi(a_t|s_t)       (2)  -> dice_objective()
                 phi^a_{l+1} = phi^a_l + lr^a_l dO^a/dphi^a, for every agent a        (3)  -> ascend()
               A_l: generalised advantages of tau_l                                   (4)  -> gae()
               loss = -sum_l mean_k sum_t A_l (own learning + peer learning)          (5)  -> outer_loss()
             clip each chain's gradient, remove conflicts between chains (PCGrad)     (6)  -> pcgrad()
             phi^i_0, eta, critic: one AMSGrad step                                   (7)  -> amsgrad()
             Tables in a two-player game: V itself has a closed form                  (8)  -> exact_value()
             Opponent modelling: peers' parameters from their actions alone           (9)  -> fit_opponent()
  Symbols    phi^i_0  actor  {name: (C, ...)}    tau_l  Batch  (C, H, K[, N])    lr^i_l  step_sizes  (C, L)
             phi_l    players, N such dicts      s_t    nodes  (C, N, H, K)      r       reward   (C, N, H, K)
             C chains, L updates, K episodes, H steps, N agents, S states (or numbers that describe one),
             A actions. box(z) = exp(z - stop_gradient(z)): value 1, derivative that of z.
  Departures [D1] Eq. (1) pairs each time step with its own target. The authors' code pairs time-major features
                  with batch-major targets, at a third more noise. Solved in float64; o and o^2 of one-hot o
                  are one feature, times sqrt(2).
             [D2] Eq. (2) is Loaded DiCE (Farquhar et al., arXiv:1909.10549), the authors' is DiCE: the same
                  value and first derivative, a less noisy second one. lambda < 1 forgets old steps, a bias.
             [D3] Eq. (5) keeps the terms that carry signal in expectation, those of tau_l itself. The
                  authors' sum also pairs (t, k) of different batches.
             [D4] LSTMs: gradients are clipped at each link of the chain (20) and chain by chain at 300, not
                  10; chains grow (L = 1, 3, 7); step sizes fall to 0. benchmark/README.md has the effects.
             [D5] C chains make one synchronous step; the authors' five processes make five asynchronous ones.
                  So step sizes are about sqrt(C) times theirs, and PCGrad acts among the C chains.
             [D6] LOLA-DiCE, REINFORCE, "no own learning" and opponent modelling were never released. Ours:
                  LOLA scores the return after look_ahead steps of the peers alone, REINFORCE that of phi_0,
                  "no own learning" drops log pi^i(tau_l), opponents are fitted by maximum likelihood.
             [D7] RPS has H = 50, as in the authors' code (paper: 150). log-softmax, where they clamp. The
                  peers of half_cheetah_dir are ours (benchmark/make_peers.py): theirs are lost.
  Run        python meta_mapg.py --env ipd                    # 15 s: sums of about 7 and 4
             python meta_mapg.py --env ipd --method meta-pg   # 15 s: about -1 and -3, no peer learning
             python meta_mapg.py --env rps                    # 1 min: about 1.4
             python meta_mapg.py --env ipd --policy lstm      # the paper's networks, 45 min
             python meta_mapg.py --env rps --policy lstm      # the same, 45 min
             python meta_mapg.py --env half_cheetah_dir       # 15 min
             torchrun --nproc-per-node 2 meta_mapg.py --env ipd --policy lstm   # chains shared out
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

import envs
import torch
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tyro.constructors import PrimitiveConstructorSpec


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


@dataclass
class Args:
    """Defaults: tables in the prisoner's dilemma, exact gradient. presets below have everything else's."""

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
    method: Literal["meta-mapg", "meta-pg", "no-own-learning", "lola-dice", "reinforce"] = "meta-mapg"
    # ^ meta-pg: without peer learning. All methods adapt by eq. (3) when tested
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
    inner_lr: Size = 1.0  # initial value of eta, the own step sizes in eq. (3)
    peer_lr: Size = 1.0  # step size of the peers in eq. (3)
    outer_lr: Size = 0.02  # step size of phi_0 and eta in eq. (7)
    critic_lr: Size = 0.1  # step size of the critic in eq. (7)
    anneal_lr: bool = False  # let the two fall linearly to 0 over total_steps [D4]
    ent_coef: Size = 0.0  # weight of the entropy of phi_0, whose own return is not scored
    link_clip: Size = math.inf  # largest norm of a gradient between two updates of a chain [D4]
    max_grad_norm: Size = 10.0  # largest norm of a chain's gradient by actor, step sizes, critic, eq. (6)
    pcgrad: bool = True  # project away conflicts between the chains' gradients, eq. (6)
    reward_scale: Size = 1.0  # what agents see of a reward; tables and logs show the reward itself
    personas: Optional[str] = None  # .npz with arrays <class>_<split> (n, S, A) of log-probabilities, or peers
    persona_seed: within(int, 0) = 0  # of the population, the same for all run seeds
    ood: bool = False  # hold out the most extreme personas for the test instead of random ones


SAMPLED = dict(gradient="sampled", total_steps=92_160_000)
RPS = SAMPLED | dict(horizon=50, gamma=0.9)  # [D7]
PRESETS = {  # what differs from the defaults in each environment ...
    "ipd": {},
    "rps": RPS,
    "rps3": RPS,
    "rps4": RPS,
    "half_cheetah_dir": dict(
        policy="lstm", gradient="sampled", horizon=200, gamma=0.95, chain_length=2, inner_lr=0.005,
        peer_lr=0.005, outer_lr=1e-3, critic_lr=1e-3, num_chains=1, total_steps=15_000_000, eval_every=100,
        save_every=5, reward_scale=0.01)}
LSTM = dict(policy="lstm", gradient="sampled", num_chains=8, dice_lambda=0.9, link_clip=20.0, max_grad_norm=300.0,
            grow_chains=True, anneal_lr=True, eval_every=20, save_every=5, critic_lr=1.4e-3)  # [D2] [D4]
LSTM_PRESETS = {  # ... and, with --policy lstm, in games
    "ipd": LSTM | dict(inner_lr=0.1, outer_lr=8.5e-4, ent_coef=0.5, total_steps=100_000_000),
    "rps": RPS | LSTM | dict(inner_lr=0.01, outer_lr=2.8e-4, total_steps=100_000_000)}


def preset(args):
    """What replaces the defaults where the command line is silent."""
    if args.policy == "lstm" and args.env != "half_cheetah_dir":
        return LSTM_PRESETS.get(args.env[:3], LSTM)
    return (SAMPLED if args.gradient == "sampled" else {}) | PRESETS.get(args.env, {})


def check(args):
    """Refuse what no single argument can be blamed for."""
    cheetah = args.env == "half_cheetah_dir"
    if args.gradient == "exact" and (args.policy != "table" or args.env != "ipd" or args.opponent_model):
        fail("--gradient exact needs --env ipd, --policy table and no --opponent-model, which fits samples")
    if cheetah and (args.policy == "table" or args.opponent_model or args.ood):
        fail("half_cheetah_dir is played by LSTMs: no --policy table, --opponent-model or --ood")
    if args.capture_video and not cheetah:
        fail("--capture-video films half_cheetah_dir; a game has nothing to see but its table")
    if args.num_chains % WORLD:
        fail(f"--num-chains {args.num_chains} does not divide among {WORLD} processes")


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
def make_env(args, num_envs, part=(0, 1)):
    # The contract (envs/__init__.py). All agents observe the same. Bring your own game by returning an object
    # with these members:
    #   num_envs B, horizon, num_agents N, obs_dims, action_dims (equal for all agents), discrete, device
    #   reset() -> obs, step(action) -> obs, reward (B, N), terminated, truncated, info; episodes last H steps
    #   sample_tasks(n) -> (n, N-1, S, A) logits of the peers, and tasks_by_class(split) -> {class: such tasks}
    #   for the splits "val" and "test". In a discrete game obs[i] (B,) long is the state's index, action[i]
    #   (B,) long; else obs[i] (B, S), action[i] (B, A) and tasks (n, N-1, P), the weights of lstm_shapes().
    try:
        if args.env == "half_cheetah_dir":
            env = envs.make("half_cheetah_peers", num_envs, horizon=args.horizon, device=args.device,
                            peers=args.personas)
        else:
            env = envs.make(args.env, num_envs, horizon=args.horizon, device=args.device, index_obs=True,
                            personas=args.personas, persona_seed=args.persona_seed, ood=args.ood)
    except (ValueError, TypeError) as error:
        fail(error)
    if not hasattr(env, "tasks_by_class") or len({*env.obs_dims}) > 1 or len({*env.action_dims}) > 1:
        fail(f"{args.env} cannot be played: it needs peers as tasks and agents with equal spaces")
    return env


# ================================================================ 2. Networks
# A player is a dict of tensors with the chains in front. {"logits": (C, S, A)} is a table; anything else is
# the paper's actor: Linear(S -> 64), ReLU, LSTM(64 -> 64), Linear(64 -> A). With a "log_std" (C, A), which
# no input changes, the outputs are the means of a Gaussian. The critic has the same trunk and one output.
# States are S numbers each, or one index of S: then everything before the recurrence is a table of S rows,
# and a time step is a look-up and one product with W_hh. The recurrence is written out, because the fused
# ones of torch cannot be differentiated twice, which the outer step does.
def lstm_shapes(states, outputs, hidden=64, gaussian=False):
    """{name: shape}: weights (out, in), gates in the order i, f, g, o."""
    H = hidden
    shapes = {"w1": (H, states), "w_ih": (4 * H, H), "w_hh": (4 * H, H), "w2": (outputs, H)}
    shapes |= {"b1": (H,), "b_ih": (4 * H,), "b_hh": (4 * H,), "b2": (outputs,)}
    return shapes | ({"log_std": (outputs,)} if gaussian else {})


def make_lstm(states, outputs, hidden=64, gaussian=False):
    """Parameters {name: tensor}: weights Xavier-normal, biases and log_std 0."""
    return {k: torch.randn(shape) * math.sqrt(2 / sum(shape)) if len(shape) == 2 else torch.zeros(shape)
            for k, shape in lstm_shapes(states, outputs, hidden, gaussian).items()}


def look_up(table, state):
    """(C, S, X) rows at (C, T, K) states -> (C, T, K, X)."""
    index = state.flatten(1)[..., None].expand(-1, -1, table.shape[-1])
    return table.gather(1, index).unflatten(1, state.shape[1:])


def linear(x, weight, bias):
    """A layer of each chain: x (C, n, in) -> (C, n, out)."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def gate_inputs(p, state):
    """What the states (C, T, K[, S]) add to the LSTM's four gates -> (C, T, K, 4H)."""
    bias = p["b_ih"] + p["b_hh"]
    if state.is_floating_point():
        x = F.relu(linear(state.flatten(1, 2).to(p["w1"].dtype), p["w1"], p["b1"]))
        return linear(x, p["w_ih"], bias).unflatten(1, state.shape[1:3])
    x = F.relu(p["w1"].mT + p["b1"][:, None])  # (C, S, H): a one-hot state picks a column of w1
    return look_up(linear(x, p["w_ih"], bias), state)


def lstm(p, state, memory=None):
    """(C, T, K[, S]) states -> outputs (C, T, K, A) and the memory (h, c) after the last, each (C, K, H)."""
    steps = gate_inputs(p, state).unbind(1)  # T times (C, K, 4H)
    w_hh, outputs = p["w_hh"].mT, []
    h, c = memory or [steps[0].new_zeros(*steps[0].shape[:2], w_hh.shape[1])] * 2
    for z in steps:
        i, f, g, o = torch.baddbmm(z, h, w_hh).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    out = linear(torch.cat(outputs, 1), p["w2"], p["b2"])  # (C, TK, A)
    return out.unflatten(1, (len(steps), -1)), (h, c)


def policy(p, state, memory=None):
    """log pi(.|s) or a Gaussian's means at (C, T, K[, S]) states -> (C, T, K, A); and the memory."""
    if "logits" in p:
        return look_up(p["logits"].log_softmax(-1), state), None
    out, memory = lstm(p, state, memory)
    return out if "log_std" in p else out.log_softmax(-1), memory  # [D7]


def std_of(p):
    """Standard deviations of a Gaussian policy, (C, 1, 1, A)."""
    return p["log_std"].clamp(min=math.log(1e-6)).exp()[:, None, None]


def log_prob(p, state, action):
    """log pi(a|s) of the actions (C, T, K) or, of a Gaussian, (C, T, K, A) -> (C, T, K)."""
    out, _ = policy(p, state)
    if "log_std" not in p:
        return out.gather(-1, action[..., None])[..., 0]
    std = std_of(p)
    return -(0.5 * ((action - out) / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(p, state):
    """That of pi(.|s) -> (C, T, K), or (C, 1, 1) for a Gaussian, where it is the same in every state."""
    if "log_std" in p:
        return (std_of(p).log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    log_pi, _ = policy(p, state)
    return -(log_pi.exp() * log_pi).sum(-1)


def critic_value(p, state):
    """v(s_t) at (C, T, K) states, each episode read from its start -> (C, T, K)."""
    return (look_up(p["values"], state) if "values" in p else lstm(p, state)[0])[..., 0]


# ================================================================ 3. Rollout
# All C chains and K episodes are played as one batch of B = C K games. Nobody learns during a batch, so no
# graph is recorded here: section 5 recomputes the log-probabilities from (state, action) to differentiate.
class Batch(NamedTuple):
    state: torch.Tensor  # (C, H, K[, S]) what all agents saw
    action: torch.Tensor  # (C, H, K, N[, A])
    reward: torch.Tensor  # (C, N, H, K) as the environment gives it


@torch.no_grad()
def rollout(env, players, num_episodes, part=(0, 1)):
    """Play one batch with N players, agent 0 first. part: (rank, world) if other processes play other chains.
    Every process draws for all chains and keeps its own: a chain does not depend on who plays it."""
    rank, world = part
    C, K, N = env.num_envs // num_episodes, num_episodes, env.num_agents
    draw, shape = (torch.rand, ()) if env.discrete else (torch.randn, env.action_dims[:1])
    noise = draw(env.horizon, world * C, K, N, *shape, device=env.device)[:, rank * C : (rank + 1) * C]
    obs, memory, steps = env.reset(), [None] * N, []
    for t in range(env.horizon):
        state, actions = obs[0].unflatten(0, (C, K)), []  # (C, K[, S])
        for a, p in enumerate(players):
            out, memory[a] = policy(p, state[:, None], memory[a])
            if env.discrete:  # the inverse transform of U(0, 1)
                action = (noise[t, :, :, a, None] > out[:, 0].exp().cumsum(-1)[..., :-1]).sum(-1)
            else:
                action = out[:, 0] + std_of(p)[:, 0] * noise[t, :, :, a]
            actions.append(action)
        obs, reward, _, _, _ = env.step([a.flatten(0, 1) for a in actions])
        steps.append((state, torch.stack(actions, 2), reward.view(C, K, N)))
    state, action, reward = (torch.stack(x, 1) for x in zip(*steps))
    return Batch(state, action, reward.movedim(-1, 1))


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


def linear_baseline(state, reward, num_states, gamma, ridge=1e-5):
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
    target = returns_to_go(reward.double(), gamma).reshape(C, N, H * K).mT  # (C, HK, N)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    w = torch.linalg.solve(gram, x.mT @ target)
    return (x @ w).mT.reshape(C, N, H, K).to(reward.dtype).detach()


def box(z):
    """DiCE's magic box: value 1, derivative that of z."""
    return torch.exp(z - z.detach())


def dice_objective(nodes, reward, baseline, gamma, dice_lambda=1.0):
    """eq. (2), for each chain and agent: all (C, N, H, K) -> (C, N). `nodes` are the log-probabilities
    through which the samples depend on parameters: the own ones, or those of all agents, which lets our
    policy shape their step. Its value is 0, its first derivative the policy gradient. [D2]"""
    assert nodes.shape == reward.shape == baseline.shape
    t = torch.arange(nodes.shape[-2], device=nodes.device)
    discount = gamma ** t.to(nodes.dtype)[:, None]
    decay = (dice_lambda ** (t[:, None] - t).clamp(min=0).to(nodes.dtype)).tril()  # (H, H): lambda^(t-u)
    w = decay @ nodes
    adv = returns_to_go(reward, gamma) - baseline
    return (discount * (box(w) - box(w - nodes)) * adv).sum(-2).mean(-1)


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
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: 0, 1 without
GROWTH = ((0.0, 1), (0.4, 3), (0.75, math.inf))  # share of total_steps from which on chains have so many updates


class Plan(NamedTuple):
    """What a chain of training looks like."""

    length: int  # updates
    first: int  # l of the first batch whose return is scored; all later ones are, too
    learns: bool  # whether agent i updates its policy along the chain; the peers always do


def chain_plan(args, progress):
    """The plan of args.method after a share `progress` of all steps."""
    if args.method == "reinforce":  # [D6] the return of phi_0
        return Plan(0, 0, False)
    if args.method == "lola-dice":  # [D6] the return after steps of the peers alone
        return Plan(args.look_ahead, args.look_ahead, False)
    grown = max(n for share, n in GROWTH if progress >= share)
    return Plan(min(args.chain_length, grown) if args.grow_chains else args.chain_length, 1, True)


def log_probs(players, batch):
    """log pi^a of the actions that were taken, (C, N, H, K)."""
    return torch.stack([log_prob(p, batch.state, a) for p, a in zip(players, batch.action.unbind(3))], 1)


def ascend(players, objective, lrs, create_graph):
    """eq. (3): phi^a + lr^a dO^a/dphi^a for objective (C, N): each agent follows its own column and no other.
    lrs[a]: (C,), a number, or None for an agent that stands still."""
    new = list(players)
    for a, lr in enumerate(lrs):
        if lr is None:
            continue
        gradients = torch.autograd.grad(objective[:, a].sum(), [*players[a].values()], retain_graph=True,
                                        create_graph=create_graph)
        new[a] = {}
        for (name, value), g in zip(players[a].items(), gradients):
            rate = lr.view(-1, *[1] * (g.dim() - 1)) if torch.is_tensor(lr) else lr
            new[a][name] = value + g * rate
    return new


def inner_update(players, batch, lrs, args, num_states, shaping, create_graph):
    """eqs. (1)-(3): one policy-gradient step of every agent on one batch. Returns log_probs and new players.
    With `shaping` all agents' log-probabilities are nodes: this changes derivatives, not the step."""
    logprob, reward = log_probs(players, batch), batch.reward * args.reward_scale  # (C, N, H, K)
    baseline = linear_baseline(batch.state, reward, num_states, args.gamma)
    nodes = logprob.sum(1, keepdim=True).expand_as(logprob) if shaping else logprob
    objective = dice_objective(nodes, reward, baseline, args.gamma, args.dice_lambda)
    return logprob, ascend(players, objective, lrs, create_graph)


class LinkClip(torch.autograd.Function):
    """Hands players on unchanged. On the way back the gradient of each chain, over all tensors together, is
    scaled down to norm max_norm: so a product of many Hessians does not choose the direction. [D4]"""

    @staticmethod
    def forward(ctx, max_norm, *tensors):
        ctx.max_norm = max_norm
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        flat = torch.cat([g.flatten(1) for g in gradients], 1)  # (C, P)
        scale = (ctx.max_norm / (flat.norm(dim=1) + 1e-6)).clamp(max=1)
        return None, *(g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients)


def link(players, max_norm):
    """The players of the next batch, behind a LinkClip."""
    tensors = iter(LinkClip.apply(max_norm, *(x for p in players for x in p.values())))
    return [{name: next(tensors) for name in p} for p in players]


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


def constants(p, *copies):
    """Leaves to differentiate by, cut off from what made them: {name: (*copies, ...)}."""
    return {k: v.expand(*copies, *v.shape).detach().clone().requires_grad_() for k, v in p.items()}


def peers_of(tasks, env):
    """(C, N-1, S, A) logits, or (C, N-1, P) weights of Gaussian LSTMs -> N-1 players."""
    if env.discrete:
        return [constants({"logits": logits}) for logits in tasks.unbind(1)]
    shapes = lstm_shapes(env.obs_dims[0], env.action_dims[0], gaussian=True)
    sizes = [math.prod(shape) for shape in shapes.values()]
    return [constants({k: v.unflatten(1, shape) for (k, shape), v in zip(shapes.items(), flat.split(sizes, 1))})
            for flat in tasks.unbind(1)]


def sampled_chain(env, actor, step_sizes, critic, tasks, plan, args, part=(0, 1)):
    """eqs. (1)-(5) for each row of `tasks`. Returns the losses (C,) of actor and critic, and the batches."""
    players, batches, loss, critic_loss = [actor, *peers_of(tasks, env)], [], 0.0, 0.0
    models = peers_of(torch.zeros_like(tasks), env) if args.opponent_model else []
    shaping = args.method != "meta-pg"
    for l in range(plan.length + 1):
        batch = rollout(env, players, args.num_episodes, part)
        batches.append(batch)
        models = [fit_opponent(model, batch, 1 + j) for j, model in enumerate(models)]
        seen = [players[0], *models] if models else players  # OM: only the peers' actions are known

        # every agent learns from the batch
        if l < plan.length:
            lrs = [step_sizes[:, l] if plan.learns else None] + [args.peer_lr] * (env.num_agents - 1)
            logprob, new = inner_update(seen, batch, lrs, args, env.obs_dims[0], shaping, True)
        else:
            logprob, new = log_probs(seen, batch), None

        # score it, and train the critic: one for all l
        if l >= plan.first:
            reward, value = batch.reward[:, 0] * args.reward_scale, critic_value(critic, batch.state)
            ret = returns_to_go(reward, args.gamma)
            critic_loss = critic_loss + ((value - ret) ** 2).mean((-2, -1))
            adv = gae(reward, value.detach(), args.gamma, args.gae_lambda)
            loss = loss + outer_loss(logprob, adv, args.method)
        elif args.ent_coef and l == 0:
            loss = loss - args.ent_coef * entropy(actor, batch.state).expand_as(logprob[:, 0]).sum(1).mean(-1)

        # the players of the next batch, of which the peers depend on us if we shape them
        if new and models:
            real = inner_update(players, batch, [None, *lrs[1:]], args, env.obs_dims[0], False, False)[1]
            new = link(new, args.link_clip)
            models, players = new[1:], [new[0], *map(constants, real[1:])]
        elif new:
            new = new if shaping else [new[0], *map(constants, new[1:])]
            players = link(new, args.link_clip) if shaping else [*link(new[:1], args.link_clip), *new[1:]]
    return loss / (plan.length + 1), critic_loss / (plan.length + 1), batches


def exact_chain(actor, step_sizes, tasks, env, plan, args, training=True):
    """The same with expected updates: tables, eqs. (3) and (8), nothing sampled. Returns the loss (C,) and
    the joint policies [(x_l, y_l)] for l = 0..L."""
    players, policies, loss = [actor, *peers_of(tasks, env)], [], 0.0
    for l in range(plan.length + 1):
        x, y = (p["logits"] for p in players)
        policies.append((x, y))
        value = exact_value(x, y, env.reward_table, args.gamma, args.horizon)[0]  # (C, 2)
        if l >= plan.first and args.method == "no-own-learning":  # [D6] phi^i_l is held, phi^-i_l moves with phi^i_0
            loss = loss - exact_value(x.detach(), y, env.reward_table, args.gamma, args.horizon)[0][:, 0]
        elif l >= plan.first:
            loss = loss - value[:, 0]
        if l < plan.length:
            lrs = [step_sizes[:, l] if plan.learns else None, args.peer_lr]
            players = ascend(players, value, lrs, training)
            if not training:
                players = [constants(p) for p in players]
            elif args.method == "meta-pg":
                players[1] = constants(players[1])
    return loss / (plan.length + 1), policies


def clip(gradients, max_norm):
    """(C, P) gradients, each chain scaled down to norm max_norm; and the norms before, (C,). eq. (6)"""
    norm = gradients.norm(dim=1)
    return gradients * (max_norm / (norm + 1e-6)).clamp(max=1)[:, None], norm


def pcgrad(gradients, order):
    """eq. (6): each chain's gradient loses its component against any other chain it conflicts with, in random
    order (Yu et al., arXiv:2001.06782). gradients (C, P), order (C, C): a permutation a row. -> (C, P)."""
    out = gradients
    for others in order.T:  # its own turn changes nothing: <g, g> >= 0
        g = gradients[others]
        out = out - ((out * g).sum(1) / ((g * g).sum(1) + 1e-8)).clamp(max=0)[:, None] * g
    return out


def amsgrad(moments, gradient, lr, eps=1e-3):
    """eq. (7): Adam with the running maximum of v, and eps = 1e-3 inside the bias correction, as in the
    authors' code: torch.optim.Adam(amsgrad=True, eps=1e-3) begins with steps up to four times larger.
    moments {"k", "m", "v", "v_max"} change in place. gradient (P,) of a loss -> (P,) change of parameters."""
    moments["k"] += 1
    moments["m"] = 0.9 * moments["m"] + 0.1 * gradient
    moments["v"] = 0.999 * moments["v"] + 0.001 * gradient**2
    moments["v_max"] = torch.maximum(moments["v_max"], moments["v"])
    rate = lr * math.sqrt(1 - 0.999 ** moments["k"]) / (1 - 0.9 ** moments["k"])
    return -rate * moments["m"] / (moments["v_max"].sqrt() + eps)


def gather(x):
    """(n, ...) of each process -> (n * WORLD, ...) of all, in order of rank."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, device="cpu") for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x.detach().cpu().contiguous())
    return torch.cat(parts).to(x.device)


def outer_update(env, params, moments, args, progress):
    """One outer iteration, the algorithm box; params {"actor", "critic", "step_sizes": {name: tensor}} change
    in place. Returns {tag: value} and the mean reward per step of each agent along the chain, (L+1, N)."""
    # every process draws for all chains and keeps its own
    C, all_chains = args.num_chains // WORLD, args.num_chains
    tasks = env.sample_tasks(all_chains)[RANK * C : (RANK + 1) * C]
    order = torch.rand(all_chains, all_chains, device=env.device).argsort(1)
    actor, critic, steps = (constants(params[group], C) for group in ("actor", "critic", "step_sizes"))

    # play, learn, play again
    plan = chain_plan(args, progress)
    if args.gradient == "exact":
        loss, policies = exact_chain(actor, steps["eta"], tasks, env, plan, args)
        reward = [exact_value(*xy, env.reward_table, 1.0, args.horizon)[0] / args.horizon for xy in policies]
        critic_loss = torch.zeros_like(loss)
    else:
        loss, critic_loss, batches = sampled_chain(env, actor, steps["eta"], critic, tasks, plan, args, (RANK, WORLD))
        reward = [batch.reward.mean((2, 3)) for batch in batches]  # (C, N)

    # each chain's gradient, in one backward pass for actor and step sizes and another for the critic
    by = torch.autograd.grad(loss.sum(), [*actor.values(), steps["eta"]], allow_unused=True,
                             materialize_grads=True)
    gradients = {"actor": by[:-1], "step_sizes": by[-1:]}
    if args.gradient == "sampled":
        gradients["critic"] = torch.autograd.grad(critic_loss.sum(), [*critic.values()])

    # eqs. (6) and (7), group by group
    logs = {}
    for group, g in gradients.items():
        g, norm = clip(gather(torch.cat([x.flatten(1) for x in g], 1)), args.max_grad_norm)  # (all C, P)
        lr = (args.critic_lr if group == "critic" else args.outer_lr) * (1 - progress if args.anneal_lr else 1)
        change = amsgrad(moments[group], (pcgrad(g, order) if args.pcgrad else g).mean(0), lr)
        for value, d in zip(params[group].values(), change.split([v.numel() for v in params[group].values()])):
            value += d.view_as(value)
        logs[f"grad/norm_{'outer' if group == 'actor' else group}"] = norm.mean()
    columns = torch.cat([loss[:, None], critic_loss[:, None], torch.stack(reward, 1).flatten(1)], 1)
    mean = gather(columns.detach()).mean(0)
    return logs | {"losses/actor": mean[0], "losses/critic": mean[1]}, mean[2:].view(-1, env.num_agents)


# ================================================================ 6. Evaluation
# Meta-test: one chain for each held-out persona, every agent learning from its own samples alone, without
# derivatives through learning. Own games and own random stream: how often one evaluates does not change what
# is learned.
def score(reward, args):
    """What the paper reports for a mean reward per step: the same, in half_cheetah_dir an episode's return."""
    return reward * args.horizon if args.env == "half_cheetah_dir" else reward


def adapt(env, params, tasks, args):
    """Scores (n, L+1, N) and action frequencies (n, L+1, N, A or, if not discrete, 0) along the chains of n
    tasks."""
    n, L, A = len(tasks), args.chain_length, env.action_dims[0]
    actor, eta, rewards, freqs = constants(params["actor"], n), params["step_sizes"]["eta"].expand(n, L), [], []
    if args.gradient == "exact":
        for x, y in exact_chain(actor, eta, tasks, env, Plan(L, 1, True), args, training=False)[1]:
            value, visits = exact_value(x, y, env.reward_table, 1.0, args.horizon)
            rewards.append(value.detach() / args.horizon)
            joint = visits.detach().view(n, A, A) / args.horizon
            freqs.append(torch.stack([joint.sum(2), joint.sum(1)], 1))
        return torch.stack(rewards, 1), torch.stack(freqs, 1)
    players, lrs = [actor, *peers_of(tasks, env)], [args.peer_lr] * (env.num_agents - 1)
    for l in range(L + 1):
        batch = rollout(env, players, args.eval_episodes)
        rewards.append(score(batch.reward.mean((2, 3)), args))
        action = F.one_hot(batch.action, A).float() if env.discrete else batch.action[..., :0]
        freqs.append(action.mean((1, 2)))
        if l < L:  # every agent takes its own step, and forgets how it came there
            players = inner_update(players, batch, [eta[:, l], *lrs], args, env.obs_dims[0], False, False)[1]
            players = [constants(p) for p in players]
    return torch.stack(rewards, 1), torch.stack(freqs, 1)


def evaluate(args, params, split):
    """{persona class: (rewards (n, L+1, N), action frequencies (n, L+1, N, A))} on "val" or "test"."""
    with torch.random.fork_rng():
        torch.manual_seed((args.seed + 10_000) % 2**64)
        results = {}
        for name, tasks in make_env(args, 1).tasks_by_class(split).items():
            parts = tasks.split(5 if args.env == "half_cheetah_dir" else len(tasks))  # a peer there takes 0.2 GB
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

    def row(name, values, form):
        return f"{name:22s}" + "".join(f"{format(v, form):9s}" for v in values)

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
def build(args, env):
    """Parameters and the moments of AMSGrad, in the three groups that are clipped and stepped separately."""
    S, A = env.obs_dims[0], env.action_dims[0]
    if args.policy == "table":
        actor, critic = {"logits": torch.zeros(S, A)}, {"values": torch.zeros(S, 1)}
    else:
        actor, critic = make_lstm(S, A, gaussian=not env.discrete), make_lstm(S, 1)
    params = {"actor": actor, "critic": critic,
              "step_sizes": {"eta": torch.full((args.chain_length,), args.inner_lr)}}
    params, moments = copy_of(params, args.device), {}
    for group, p in params.items():
        zeros = torch.zeros(sum(v.numel() for v in p.values()), device=args.device)
        moments[group] = {"k": 0} | {name: zeros.clone() for name in ("m", "v", "v_max")}
    return params, moments


def copy_of(tensors, device):
    """Nested dicts of tensors, copied."""
    if isinstance(tensors, dict):
        return {k: copy_of(v, device) for k, v in tensors.items()}
    return tensors.to(device, copy=True) if torch.is_tensor(tensors) else tensors


def report(args, params, folder, step):
    """Print the table of held-out personas and write eval.json."""
    results = evaluate(args, params, "test")
    print(table(results, args))
    write_eval(folder, summary(results) | {"global_step": step, "seed": args.seed})


def film(args, params, folder):
    """play.gif: agent i with the first held-out peer under phi_0 and, beside it, phi_L."""
    camera = envs.Camera(make_env(args, args.eval_episodes))
    tasks = next(iter(camera.tasks_by_class("test").values()))
    adapt(camera, params, tasks[:1], args)
    print(camera.save(folder / "play.gif", {"phi_0": 0, f"phi_{args.chain_length}": -1}))


def train(args):
    check(args)
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    episodes = 1 if args.gradient == "exact" else args.num_episodes
    env = make_env(args, args.num_chains // WORLD * episodes, (RANK, WORLD))
    params, moments = build(args, env)
    state, iteration, step, best, best_score = None, 0, 0, copy_of(params, args.device), -math.inf
    if path := args.resume or args.evaluate:
        state = load(path)
        params, moments, best = (copy_of(state[k], args.device) for k in ("params", "moments", "best"))
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
            logs, reward = outer_update(env, params, moments, args, step / args.total_steps)
            iteration += 1
            step += len(reward) * args.num_chains * episodes * args.horizon

            # the return of an episode of each agent, mean over the chain; of agent i also along it
            logs |= {f"adapt/return_{l}": v for l, v in enumerate(score(reward[:, 0], args))}
            returns = reward.mean(0) * args.horizon  # (N,)
            logs |= {f"charts/episodic_return/agent_{a}": v for a, v in enumerate(returns)}
            logs["charts/episodic_return"] = returns[0]

            # keep the parameters that adapt best to validation personas
            done = step >= args.total_steps
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            stop = done or bool(gather(torch.tensor([run.interrupted])).any())
            if milestone:
                logs |= summary(evaluate(args, params, "val"))
                if logs["eval/sum_after_phi_0"] > best_score:
                    best, best_score = copy_of(params, args.device), logs["eval/sum_after_phi_0"]
            text = f"reward {score(reward[0, 0], args):+.3f} -> {score(reward[-1, 0], args):+.3f}"
            run.log(logs, step, f"{text}, best validation sum {best_score:+.2f}", milestone)
            if stop or iteration % args.save_every == 0:
                run.save(step, params=params, moments=moments, best=best, best_score=best_score,
                         iteration=iteration)
        if done:
            report(args, best, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
