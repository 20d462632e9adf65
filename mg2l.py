"""
MG2L: agents infer the task from what each of them saw alone, and train by what all of them saw together.

  Paper      Zhao, Fu, Chai, Zhu, Zhao: meta multi-agent reinforcement learning by global-to-local task
             inference. IEEE TNNLS 36(8), 2025, DOI 10.1109/TNNLS.2025.3540758.
  Problem    Tasks k = 1..K differ in reward or dynamics; k is never observed. Agent i of n acts on its
             observation o^i and a latent z^i ~ q^i(.|c^i), where its context c^i is a set of B of its own
             transitions (o^i, a^i, r^i, o'^i - o^i). Only training may use z ~ q(.|c), c = (c^1..c^n).
  Algorithm  for each iteration: tasks k_1 .. k_R, side by side
               c: B joint transitions of each task's ring of episodes             (1)  -> Ring.sample()
               x^i = PI{E(c^i)}, z ~ q(.|PI{x^1..x^n}), z^i ~ q^i(.|x^i)          (2)  -> encode()
               PI{x} = Wo (sum_t softmax_t(Wa x_t) Wv x_t) + bo, for any order    (3)  -> pool()
               one episode of pi^i(a|o^i, z^i) in M rows; in the others (at first in all) z^i comes
               from the prior, N(0, I): their episodes go to the rings            (4)  -> rollout()
               A: generalised advantages of V^i(o^1..o^n, z)                      (5)  -> gae()
               returns, and what E reads, are normalised by running moments       (6)  -> RunningNorm.update()
               L_V = mean max(huber(e), huber(e clipped)), also through z         (7)  -> critic_loss()
               L_pi = -mean min(ratio A, clip(ratio) A) - 0.01 entropy            (8)  -> actor_loss()
               minibatches: Adam on (7) and (8), AdamW on the encoder by (7)      (9)  -> ppo_update()
               U times: queries z_m of random tasks, a key for each of the K tasks,
                 L_G = -mean log softmax_k(<z_m, z_k>) at k = k_m                 (10) -> info_nce()
                 L_L = the same for the pairs [sg z, z^i], agent by agent         (11) -> local_loss()
                 AdamW on L_G + L_L + alpha (KL(q || N) + KL(q^i || N))           (12) -> encoder_losses()
             test: episodes by the prior, then each agent infers z^i from its own
             transitions of the first s of them, and plays one more               (13) -> meta_test()
             MA-PEARL: z^i ~ prod_t N(E(c^i_t)), trained by (7) and the KL        (14) -> product()
  Symbols    o^i  obs     (n, T, R, O)    c    context  (n, M, B, F)     z    zc  (1, R, C)
             a^i  action  (n, T, R[, A])  x^i  x        (n, M, H)        z^i  zi  (n, R, C)
             n agents, R episodes, M of them with inferred latents, T steps, K tasks, F = 2 O + A + 1.
  Departures [D1] The paper was not open to us: this follows the authors' released code without its faults, a
                  third party's notes, and where both are silent our choice. Test and baselines are ours.
             [D2] Joint scores make z^i forget: where <z, z_k> alone tells the task, z^i gets no gradient but
                  from the KL, whose optimum is the prior. A random half of the queries must do without z.
             [D3] One encoder recipe for all envs: one E for all agents, on normalised numbers. Many rows fill
                  the rings: of few episodes E learns the places by heart, not the rewards. Queries are many
                  and short, keys are means of 32, alpha and sigma start small, the KL is of queries alone.
             [D4] A warm-up trains the encoder alone. Then it slows down, for actors follow latents that stand
                  still. With 4 rows of the prior beside 60, PPO taught actors to distrust their latents.
             [D5] z is drawn once an episode; agents step at once; the encoder follows the critics once a
                  pass; V counts at the horizon; an early end is a mask; tasks are shared out evenly.
             [D6] Actions begin with a deviation of 0.4, not 1, which hardly shrinks.
  Run        python mg2l.py --env spread                          # 3 minutes: -117; told nothing: -131
             python mg2l.py --env spread --method none            # task-given, pearl; --local-loss own, kl
             python mg2l.py --env hunting                         # or cheetah_dir, hopper_param, rware
             python mg2l.py --evaluate runs/x/checkpoint.pt --capture-video
  Licence    MIT. Please cite the paper above for the method.
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
from typing import Annotated, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
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
    """Defaults: a quick `spread`, minutes. PRESETS below has what other envs need."""

    # --- run: the same in all six scripts
    env: str = "spread"  # spread, hunting (both also _large), cheetah_dir, hopper_param, rware, or your own
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch, and of MuJoCo
    total_steps: Count = 7_600_000  # training transitions of all rows; step sizes fall to 0 at 95 % of them
    eval_every: within(int, 0) = 100  # iterations between evaluations; 0: only at the end
    eval_episodes: within(int, 2) = 64  # trials of each task in an evaluation
    save_every: Count = 25  # iterations between checkpoints; one is also written at the end and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    method: Literal["mg2l", "none", "task-given", "global-only", "pearl"] = "mg2l"  # what actors are told
    local_loss: Literal["joint", "own", "kl"] = "joint"  # eq. (11)
    pool: Literal["pia", "mean"] = "pia"  # weights of eq. (3): attention, or all alike
    num_envs: Count = 64  # M, rows of an iteration with inferred latents: PPO trains on these
    context_envs: within(int, 0) = 240  # rows beside them that the prior plays, to fill the rings
    horizon: Count = 100  # T, steps of an episode
    context_size: Count = 50  # B, transitions in a context
    query_size: Count = 8  # the same in a query or a key
    queries: Count = 288  # contexts in a step on eq. (12)
    ring_size: Count = 500  # episodes that the ring of a task holds, eq. (1)
    keys: Count = 32  # contexts of each task whose mean is the key in eqs. (10), (11)
    hidden: Count = 64  # units in both hidden layers of actors and critics
    latent_dim: Count = 16  # C, numbers in z and in z^i
    warm_up: within(int, 0) = 60  # first iterations, of the prior alone: the encoder learns, actors wait
    encoder_updates: within(int, 0) = 2  # U, steps on eq. (12), in the warm-up 5 times as many
    encoder_lr: Size = 3e-3  # step size of AdamW, eqs. (9) and (12); after the warm-up a tenth of it
    kl_coef: Size = 0.003  # alpha, weight of the KL terms in eq. (12)
    ppo_epochs: Count = 4  # passes over an iteration's episodes, eq. (9)
    minibatches: Count = 4  # parts, by episodes, of a pass
    lr: Size = 1e-3  # step size of Adam for actors and critics, eq. (9)
    gamma: Share = 0.99  # discount, eq. (5)
    gae_lambda: Share = 0.95  # lambda of eq. (5)
    clip_coef: Size = 0.2  # of ratios in eq. (8) and of values in eq. (7)
    ent_coef: Size = 0.01  # weight of the entropy in eq. (8)
    action_sd: within(float, 1e-3) = 0.4  # deviation of continuous actions at the start; then it is learned
    eval_context: Count = 400  # B in an evaluation
    eval_shots: Count = 8  # the most episodes of the prior that an agent infers from, eq. (13)


ROBOTS = dict(total_steps=2_560_000, num_envs=16, context_envs=16, horizon=200, hidden=256, lr=5e-4,
              ring_size=100, action_sd=1.0, eval_episodes=16)
PRESETS = {  # what differs from the defaults
    "cheetah_dir": ROBOTS,
    "hopper_param": ROBOTS | dict(eval_shots=32),
    "rware": dict(context_envs=64, hidden=128, lr=5e-4, ring_size=50, eval_episodes=16),
}


def preset(args):
    """What replaces the defaults where the command line is silent."""
    own = PRESETS.get(args.env, {}).copy()
    if args.method == "pearl":
        own["warm_up"] = 0  # its encoder learns from the critics
    elif args.method not in INFERS:  # no rings to fill: as many iterations, of M rows
        a = Args(**own)
        own["total_steps"] = a.total_steps * a.num_envs // (a.num_envs + a.context_envs)
        own["context_envs"] = 0
    return own


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
    # The contract (envs/__init__.py); bring your own env by returning an object with these members:
    #   num_envs B, horizon, num_agents n, obs_dims and action_dims (all agents' the same), discrete
    #   splits, the names of its sets of tasks;  all_tasks(split) -> (K, D)
    #   reset(task (B, D)) -> obs, n times (B, O)
    #   step(n times (B, A) or (B,)) -> obs, reward (B, n), terminated (B,), truncated (B,), info
    common = dict(horizon=args.horizon, device=args.device, threads=args.num_threads)
    try:
        return envs.make(args.env, num_envs, **common)
    except ValueError as error:
        fail(error)


def playable(args, env):
    """End in one line if this script cannot play the env."""
    agents = [*zip(env.obs_dims, env.action_dims)]
    if len(agents) < 2 or len(set(agents)) > 1:
        fail(f"{args.env}: two agents or more must see and act alike; (observed, acted) numbers are {agents}")
    if not hasattr(env, "all_tasks"):
        fail(f"{args.env} has no all_tasks(): there is no finite set of tasks to tell apart")


# ================================================================ 2. Networks
# A network is a dict of tensors. Those of all agents are stacked, agents first: weights (n, in, out), and one
# batched product serves all agents. The encoder is one dict too, with names "<part>.<tensor>".
INFERS = ("mg2l", "global-only", "pearl")  # methods with an encoder; pearl does without eqs. (10)-(12)
UNITS = 64  # H, units of the encoder
PRIOR = Normal(0.0, 1.0)  # of each number in a latent
Distribution.set_default_validate_args(False)  # checks would take a fifth of a rollout


def mlp(p, x, act=torch.relu, norm_inputs=True):
    """(LayerNorm ->) Linear -> act -> LayerNorm -> Linear -> ... of x (n, R, in), all agents at once."""
    layers = sum(name.startswith("w") for name in p)
    for l in range(layers):
        if l or norm_inputs:
            x = F.layer_norm(x, x.shape[-1:])  # the next layer has a scale and a shift already
        x = torch.baddbmm(p[f"b{l}"], x, p[f"w{l}"])
        if l < layers - 1:
            x = act(x)
    return x


def orthogonal(inputs, outputs, gain=1.0):
    return torch.nn.init.orthogonal_(torch.empty(inputs, outputs), gain)


def make_mlp(n, sizes, gain=1.0, head_gain=1.0):
    """Orthogonal weights (n, in, out), biases 0."""
    p = {}
    for l, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        scale = head_gain if l == len(sizes) - 2 else gain
        p[f"w{l}"] = torch.stack([orthogonal(inputs, outputs, scale) for _ in range(n)])  # (n, in, out)
        p[f"b{l}"] = torch.zeros(n, 1, outputs)
    return p


def policy(actor, obs, zi):
    """pi^i(a|o^i, z^i), n R distributions, at observations (n, R, O) and latents (n or 1, R, C)."""
    out = mlp(actor, torch.cat([obs, zi.expand(len(obs), -1, -1)], -1))  # (n, R, A)
    if "log_std" in actor:
        return Independent(Normal(out, actor["log_std"].exp()), 1)
    return Categorical(logits=out)


def values(critic, obs, z):
    """V^i(o^1..o^n, z), normalised, (n, R), at observations (n, R, O) and latents (n or 1, R, C)."""
    n = len(obs)
    joint = obs.transpose(0, 1).flatten(1)  # (R, n O)
    return mlp(critic, torch.cat([joint.expand(n, -1, -1), z.expand(n, -1, -1)], -1))[..., 0]


# ---- the encoder: E and the pools are the same for all agents [D3], the local nets are not
def make_pool(outputs):
    return {
        "wa": orthogonal(UNITS, 1),
        "wv": orthogonal(UNITS, UNITS),
        "bv": torch.zeros(UNITS),
        "wo": orthogonal(UNITS, outputs),
        "bo": torch.zeros(outputs),
    }


def make_sigma(C):
    """A layer that begins with sigmas of about 0.02: noise drowns scores [D3]."""
    return {"w": orthogonal(C, C, gain=0.5), "b": torch.full((C,), -4.0)}


def make_encoder(n, features, C, method):
    outputs = 2 * C if method == "pearl" else UNITS
    parts = {
        "transition": make_mlp(1, [features, UNITS, UNITS, UNITS, outputs]),  # E
        "pool": make_pool(UNITS),
        "agents": make_pool(C),
        "local": make_mlp(n, [UNITS, UNITS, C]),
        "sigma": make_sigma(C),
        "local_sigma": make_sigma(C),
    }
    return {f"{part}.{name}": x for part, p in parts.items() for name, x in p.items()}


def part_of(p, part):
    """The tensors of one part of the encoder, by their own names."""
    return {name.partition(".")[2]: x for name, x in p.items() if name.startswith(f"{part}.")}


def pool(p, x, kind="pia"):
    """eq. (3) over dimension -2: a set (..., S, H) -> (..., outputs). mean: equal weights."""
    weight = (x @ p["wa"] * (kind == "pia")).softmax(-2)  # (..., S, 1)
    mean = (weight * x).sum(-2)  # Wv comes after the sum: it is linear, and the weights sum to 1
    return (mean @ p["wv"] + p["bv"]) @ p["wo"] + p["bo"]


def encode(p, context, args):
    """eq. (2): context (n, M, B, F), normalised -> q(z|c), (1, M, C), and all q^i(z^i|c^i), (n, M, C)."""
    e = mlp(part_of(p, "transition"), context.flatten(0, 2)[None], F.gelu, False)
    e = e.view(*context.shape[:3], -1)  # (n, M, B, H)
    if args.method == "pearl":
        return product(e)
    x = pool(part_of(p, "pool"), e, args.pool)  # (n, M, H)
    mu = pool(part_of(p, "agents"), x.transpose(0, 1), args.pool)[None]  # (1, M, C)
    # The local path starts from constants: neither eq. (11) nor the actors reach what z is made of.
    mu_i = mlp(part_of(p, "local"), x.detach(), F.gelu, False)  # (n, M, C)
    sd = F.softplus(mu @ p["sigma.w"] + p["sigma.b"])
    sd_i = F.softplus(mu_i @ p["local_sigma.w"] + p["local_sigma.b"])
    return Normal(mu, sd), Normal(mu_i, sd_i)


def product(e):
    """eq. (14) of e (n, M, B, 2C) = [mu_t, rho_t]: 1 / sd^2 is tau_t = softplus(rho_t). Here z is z^i."""
    mu, rho = e.chunk(2, -1)
    tau = F.softplus(rho)
    total = tau.sum(-2)
    q = Normal((tau * mu).sum(-2) / total, total.rsqrt())  # (n, M, C)
    return q, q


def make_noise(env, args):
    """N(0, I) for z (1, R, C) and for z^i (n, R, C)."""
    return [torch.randn(k, env.num_envs, args.latent_dim).to(args.device) for k in (1, env.num_agents)]


def latents(encoder, tasks, context, noise, args):
    """In R rows: what actors are told, z^i (n or 1, R, C), a constant; what critics are told, z; (q, q^i).
    The first M infer from `context` (n, M, B, F), if there is one; the others get `noise`, the prior."""
    if args.method not in INFERS:
        given = tasks[None] if args.method == "task-given" else tasks[None, :, :0]
        return given, given, None
    if args.method == "pearl":  # there is no other z
        noise = noise[1], noise[1]
    z, zi = noise
    q = None
    if context is not None:
        M = context.shape[1]
        q = encode(encoder, context, args)
        z, zi = (torch.cat([d.mean + d.stddev * x[:, :M], x[:, M:]], 1) for d, x in zip(q, noise))
    if args.method == "global-only":
        zi = z.expand_as(zi)
    return zi.detach(), z, q


# ================================================================ 3. Rollout
# All episodes of an iteration are one batch of R rows: M with inferred latents, then those that the prior
# plays to fill the rings. A row keeps its latents for the whole episode [D5].
class Play(NamedTuple):
    obs: torch.Tensor  # (n, T + 1, R, O)
    action: torch.Tensor  # (n, T, R, A), or (n, T, R) where actions are numbers of choices
    logprob: torch.Tensor  # (n, T, R)
    reward: torch.Tensor  # (n, T, R), 0 after the end
    alive: torch.Tensor  # (T, R), 1 up to and with the last step of the episode
    ended: torch.Tensor  # (T, R), 1 where it ended for good, not by the horizon


@torch.no_grad()
def rollout(env, actor, tasks, zi):
    """eq. (4): one episode in each row; tasks (R, D), latents (n or 1, R, C)."""
    obs = torch.stack(tuple(env.reset(tasks)))  # (n, R, O)
    alive = torch.ones(env.num_envs, device=obs.device)
    observed, steps = [obs], []
    for _ in range(env.horizon):
        pi = policy(actor, obs, zi)
        action = pi.rsample() if pi.has_rsample else pi.sample()  # Normal.sample() stumbles over a NaN
        obs, reward, terminated, _, _ = env.step(tuple(action))
        # what comes after an end does not count
        ended = terminated.float() * alive
        steps.append((action, pi.log_prob(action), reward.T * alive, alive, ended))
        alive = alive - ended
        obs = torch.stack(tuple(obs))
        observed.append(obs)
        if not alive.any():
            break
    action, logprob, reward, alive, ended = zip(*steps)
    by_agent = [torch.stack(x, 1) for x in (observed, action, logprob, reward)]
    return Play(*by_agent, torch.stack(alive), torch.stack(ended))


def transitions(play, env):
    """(o, a, r, o' - o) of every step, (n, T, R, F)."""
    obs, after = play.obs[:, :-1], play.obs[:, 1:]
    action = F.one_hot(play.action, env.action_dims[0]).float() if env.discrete else play.action
    return torch.cat([obs, action, play.reward[..., None], after - obs], -1)


class RunningNorm:
    """eq. (6): running mean and deviation of each agent's numbers."""

    def __init__(self, *shape, device):
        self.sums = torch.zeros(3, *shape, device=device)  # of weights, numbers and squares

    def update(self, x, weight):
        """x (n, R, ...), weight (R,) that sums to 1."""
        weight = weight.view(-1, *[1] * (x.dim() - 2))
        new = [(weight * x**power).sum(1, keepdim=True) for power in range(3)]
        self.sums.mul_(0.99999).add_(torch.stack(new))

    def moments(self):
        weight, total, square = self.sums
        weight = weight.clamp(min=1)
        mean = total / weight
        return mean, (square / weight - mean**2).clamp(min=1e-4).sqrt()  # (n, 1, ...)

    def norm(self, x):
        mean, sd = self.moments()
        return (x - mean) / sd


class Ring:
    """The newest `size` episodes of each of K tasks; a transition is that of all agents at one time."""

    def __init__(self, n, K, size, horizon, features, device):
        self.data = torch.zeros(n, K, size, horizon, features, device=device)
        self.length = torch.zeros(K, size, dtype=torch.long)  # of each episode, 0: nothing there yet
        self.next = torch.zeros(K, dtype=torch.long)
        self.norm = RunningNorm(n, 1, features, device=device)  # of what the encoder reads

    def append(self, tasks, x, length):
        for r, k in enumerate(tasks.tolist()):  # x (n, T, R, F): row r, length[r] steps, is of tasks[r]
            slot = self.next[k].item()
            self.data[:, k, slot, : x.shape[1]] = x[:, :, r]
            self.length[k, slot] = length[r]
            self.next[k] = (slot + 1) % self.length.shape[1]

    def sample(self, tasks, B):
        """eq. (1): contexts (n, R, B, F), normalised. All transitions of a ring have the same chance."""
        length = self.length[tasks]  # (R, size)
        end = length.cumsum(1).double()  # episodes in a row
        u = torch.rand(len(tasks), B, dtype=torch.double) * end[:, -1:]  # which transition of all
        episode = torch.searchsorted(end, u, right=True)  # (R, B)
        time = (u - (end - length).gather(1, episode)).long()
        size, horizon = self.data.shape[2:4]
        index = ((tasks[:, None] * size + episode) * horizon + time).flatten()
        x = self.data.flatten(1, 3).index_select(1, index.to(self.data.device))  # (n, R B, F)
        return self.norm.norm(x).clamp(-10, 10).unflatten(1, u.shape)


# ================================================================ 4. Objectives
# Pure functions of tensors. Scores of eqs. (10) and (11) are plain dot products of sampled latents, without
# temperature. All queries meet the same K keys. log K - L_G bounds the mutual information of z and the task.
def info_nce(scores, tasks):
    """eq. (10): scores (..., M, K) of queries and keys, tasks (M,) the right ones -> loss and accuracy."""
    tasks = tasks.expand(scores.shape[:-1])
    loss = F.cross_entropy(scores.flatten(0, -2), tasks.flatten())
    return loss, (scores.argmax(-1) == tasks).float().mean()


def local_loss(z, z_key, zi, zi_key, tasks, keep=1.0):
    """eq. (11): z (M, C), z_key (K, C), zi (n, M, C), zi_key (n, K, C) -> loss and accuracy. z is frozen.
    keep (M, 1): 0 for the queries that must do without z's score [D2]; a plain 0: the kind `own`."""
    own = zi @ zi_key.mT  # (n, M, K)
    pair = (z @ z_key.T).detach() * keep + own  # of two concatenations: dot products add
    return info_nce(pair, tasks)


def gae(reward, value, alive, ended, gamma, gae_lambda):
    """eq. (5): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, and 0 after an end; the
    horizon is no end: there V_T counts [D5]. reward (n, T, R), value (n, T + 1, R), flags (T, R)."""
    delta = (reward + gamma * (1 - ended) * value[:, 1:] - value[:, :-1]) * alive
    adv = torch.empty_like(reward)
    acc = torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        acc = delta[:, t] + gamma * gae_lambda * acc  # 0 after an end, as the deltas are
        adv[:, t] = acc
    return adv


def critic_loss(value, old, target, weight, clip_coef):
    """eq. (7), for each agent: values, old values and returns (n, R), all normalised; weight (R,) -> (n,)."""
    clipped = old + (value - old).clamp(-clip_coef, clip_coef)
    errors = [F.huber_loss(v, target, reduction="none", delta=10.0) for v in (value, clipped)]
    return (torch.maximum(*errors) * weight).sum(1)


def actor_loss(logprob, old, adv, entropy, weight, clip_coef, ent_coef):
    """eq. (8), for each agent: (n, R) and weight (R,)  -> (n,)."""
    ratio = (logprob - old).exp()
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv)
    return -((gain + ent_coef * entropy) * weight).sum(1)


# ================================================================ 5. Update
MAX_NORM = 10.0  # of each agent's gradient of actor and of critic


class Learner(NamedTuple):
    """All that training changes."""

    params: dict  # {"actor", "critic", "encoder": {name: tensor}}
    optimizers: dict  # one for each of them
    norm: RunningNorm  # of returns
    ring: Ring

    def tensors(self):
        """{name: tensor} of all but the optimisers, for checkpoints."""
        ring = self.ring
        rings = {"data": ring.data, "length": ring.length, "next": ring.next, "sums": ring.norm.sums}
        parts = {**self.params, "ring": rings, "returns": {"sums": self.norm.sums}}
        return {f"{part}.{name}": x.detach() for part, p in parts.items() for name, x in p.items()}


def build(args, env):
    """Networks, optimisers, running moments and rings, as they are at the start."""
    n, O, A, tasks = env.num_agents, env.obs_dims[0], env.action_dims[0], env.all_tasks("train")
    features, infers = 2 * O + A + 1, args.method in INFERS
    told = {"none": 0, "task-given": tasks.shape[1]}.get(args.method, args.latent_dim)
    sizes = [args.hidden, args.hidden]
    actor = make_mlp(n, [O + told, *sizes, A], math.sqrt(2), 0.01)  # gains are MAPPO's
    actor |= {} if env.discrete else {"log_std": torch.full((n, 1, A), math.log(args.action_sd))}  # [D6]
    critic = make_mlp(n, [n * O + told, *sizes, 1], math.sqrt(2))
    encoder = make_encoder(n, features, args.latent_dim, args.method) if infers else {}
    params = {"actor": actor, "critic": critic, "encoder": encoder}
    for p in params.values():
        p |= {name: x.to(args.device).requires_grad_() for name, x in p.items()}
    optimizers = {}
    for group in "actor", "critic":
        optimizers[group] = torch.optim.Adam(params[group].values(), args.lr, eps=1e-5)
    if infers:
        optimizers["encoder"] = torch.optim.AdamW(params["encoder"].values(), args.encoder_lr)
    size = (len(tasks), args.ring_size, env.horizon) if infers else (1, 1, 1)  # else: no rings are needed
    norm = RunningNorm(n, 1, device=args.device)
    return Learner(params, optimizers, norm, Ring(n, *size, features, args.device))


def clip_by_agent(grads):
    """Scales (n, ...) gradients, in place: those of each agent together get norm MAX_NORM at most."""
    for own in zip(*grads):  # views: those of one agent
        norm = torch.stack([g.norm() for g in own]).norm()
        for g in own:
            g *= (MAX_NORM / (norm + 1e-6)).clamp(max=1)


def descend(learner, loss, group):
    """One step of the optimiser of `group`; what the loss does not reach stays, without weight decay."""
    learner.optimizers[group].zero_grad()
    loss.backward()
    if group != "encoder":
        clip_by_agent([x.grad for x in learner.params[group].values()])
    learner.optimizers[group].step()


@torch.no_grad()
def targets(learner, play, z, args):
    """(n, T, R) each: normalised values; returns; advantages, of mean 0 and deviation 1 for each agent."""
    steps, R = play.obs.shape[1:3]  # T + 1
    old = values(learner.params["critic"], play.obs.flatten(1, 2), z.repeat(1, steps, 1))
    mean, sd = learner.norm.moments()
    value = (old * sd + mean).view(-1, steps, R)  # (n, T + 1, R)
    adv = gae(play.reward, value, play.alive, play.ended, args.gamma, args.gae_lambda)
    ret = adv + value[:, :-1]
    weight = play.alive / play.alive.sum()  # (T, R)
    adv = adv - (adv * weight).sum((1, 2), keepdim=True)
    sd = (adv**2 * weight).sum((1, 2), keepdim=True).sqrt()
    return old.view(-1, steps, R)[:, :-1], ret, adv / (sd + 1e-5)


def ppo_update(learner, play, tasks, zi, z, context, noise, args):
    """eq. (9): all agents at once [D5], on all rows [D4]; the critics' z is made anew of `context`."""
    params, norm = learner.params, learner.norm
    T, R = play.alive.shape

    def part(x, rows):
        return x[:, :T, rows].flatten(1, 2)  # (n, T, R, ...) -> (n, T r, ...)

    before = targets(learner, play, z, args)
    for _ in range(args.ppo_epochs):
        kl = 0.0
        if context is not None:
            _, z, q = latents(params["encoder"], tasks, context, noise, args)
            if args.method == "pearl":
                kl = args.kl_coef * kl_divergence(q[1], PRIOR).mean()
        told = z.detach().requires_grad_()  # collects the critics' gradient of the pass
        for rows in torch.randperm(R).chunk(args.minibatches):
            obs, action, old_logprob = (part(x, rows) for x in (play.obs, play.action, play.logprob))
            old, ret, adv = (part(x, rows) for x in before)  # (n, T r) each
            alive = play.alive[:, rows]
            weight = (alive / alive.sum()).flatten()
            # the actors' step
            pi = policy(params["actor"], obs, zi[:, rows].repeat(1, T, 1))
            logprob, entropy = pi.log_prob(action), pi.entropy()  # (n, T r)
            loss = actor_loss(logprob, old_logprob, adv, entropy, weight, args.clip_coef, args.ent_coef)
            descend(learner, loss.sum(), "actor")
            # the critics' step
            norm.update(ret, weight)  # at every step, as in the released code
            target = norm.norm(ret)
            value = values(params["critic"], obs, told[:, rows].repeat(1, T, 1))
            v_loss = critic_loss(value, old, target, weight, args.clip_coef).sum()
            descend(learner, v_loss, "critic")
        if z.requires_grad:  # the encoder's step, by the chain rule
            descend(learner, (z * told.grad).sum() + kl, "encoder")
    logs = {  # of the last step
        "losses/actor": loss.mean(),
        "losses/critic": v_loss,
        "losses/entropy": entropy.mean(),
        "charts/explained_variance": 1 - ((target - old).var(1) / target.var(1)).mean(),
    }
    return {tag: x.detach() for tag, x in logs.items()}


def encoder_losses(p, ring, tasks, args):
    """eq. (12): queries of tasks (M,), `keys` contexts of each of the K tasks. The loss, and {tag: value}."""
    M, K = len(tasks), len(ring.length)
    every = torch.cat([tasks, torch.arange(K).repeat(args.keys)])
    q = encode(p, ring.sample(every, args.query_size), args)
    z, zi = (d.rsample() for d in q)  # (1, M + J K, C), (n, M + J K, C)
    z_key, zi_key = (x[:, M:].unflatten(1, (args.keys, K)).mean(1) for x in (z, zi))  # means [D3]; (., K, C)
    tasks = tasks.to(z.device)
    loss, accuracy = info_nce(z[0, :M] @ z_key[0].T, tasks)  # z learns to tell the tasks
    pairs = z[0, :M], z_key[0], zi[:, :M], zi_key, tasks  # queries, keys
    loss_i, accuracy_i = local_loss(*pairs, keep=0.0)  # each z^i learns it: kind own
    if args.local_loss == "joint":
        keep = (torch.rand(M, 1, device=z.device) < 0.5).float()  # [D2]
        loss_i, _ = local_loss(*pairs, keep)
    if args.local_loss == "kl":
        loss_i = kl_divergence(Normal(q[0].mean.detach(), q[0].stddev.detach()), q[1]).mean()
    kl = sum(kl_divergence(d, PRIOR)[:, :M].mean() for d in q)  # of the queries
    logs = {
        "losses/global": loss,
        "losses/local": loss_i,
        "losses/kl": kl,
        "latent/accuracy_z": accuracy,
        "latent/accuracy_zi": accuracy_i,
    }
    return loss + loss_i + args.kl_coef * kl, {tag: x.detach() for tag, x in logs.items()}


def iterate(env, learner, tasks, iteration, args):
    """One iteration of the algorithm box. Returns {tag: value} and how many transitions were played."""
    R, K = env.num_envs, len(tasks)
    ring = learner.ring
    infers = args.method in INFERS
    filled = ring.length[:, 0].all()  # the ring of every task
    # tasks: in turn until then, and later shared out at random, as evenly as can be [D5]
    order = torch.randperm(K) if filled else torch.arange(K)
    index = order[(iteration * R + torch.arange(R)) % K]
    rows = tasks[index.to(tasks.device)]  # (R, D)
    M = args.num_envs if filled and iteration >= args.warm_up or not infers else 0
    context = ring.sample(index[:M], args.context_size) if infers and M else None
    noise = make_noise(env, args)
    with torch.no_grad():
        zi, z, _ = latents(learner.params["encoder"], rows, context, noise, args)
    # play, and learn to act from the first M rows [D4]
    play = rollout(env, learner.params["actor"], rows, zi)
    logs = {}
    if M:
        first = Play(*(x[:, :, :M] for x in play[:4]), *(x[:, :M] for x in play[4:]))
        zi, z, *noise = (x[:, :M] for x in (zi, z, *noise))
        logs = ppo_update(learner, first, rows[:M], zi, z, context, noise, args)
    # the prior's episodes go to the rings
    if infers:
        x = transitions(play, env)[:, :, M:]  # (n, T, R - M, F)
        alive = play.alive[:, M:]
        ring.norm.update(x.flatten(1, 2), alive.flatten() / alive.sum())
        ring.append(index[M:], x, alive.sum(0))
    # learn to infer, most of all before others rely on it [D3]
    if filled and args.method != "pearl":
        for _ in range(args.encoder_updates * (5 if iteration < args.warm_up else 1)):
            queries = torch.randint(K, (args.queries,))
            loss, tags = encoder_losses(learner.params["encoder"], ring, queries, args)
            descend(learner, loss, "encoder")
            logs |= tags
    returns = play.reward.sum(1)  # (n, R)
    logs["charts/episodic_return"] = returns[:, : M or R].mean()  # at first of the prior
    return logs, int(play.alive.sum())


# ================================================================ 6. Evaluation
# Meta-test [D1]: in a trial of a task the prior plays some episodes; then every agent draws its context from
# its own part of the first s of them and plays one more. "wrong": by another task's latents.
@torch.no_grad()
def meta_test(args, learner, film=None):
    """eq. (13): trials of each task of the set "test", which may be that of training -> {tag: value}."""
    with torch.random.fork_rng():
        torch.manual_seed((args.seed + 10_000) % 2**64)
        tasks = make_env(args, 1).all_tasks("test")
        K, E = len(tasks), args.eval_episodes
        rows = tasks.repeat_interleave(E, 0)  # (K E, D)
        env = make_env(args, K * E)
        if film:
            env = envs.Camera(env)
        infers = args.method in INFERS
        numbers = torch.arange(K * E)  # a ring for each trial
        features = learner.ring.data.shape[-1]
        trials = Ring(env.num_agents, K * E, args.eval_shots, env.horizon, features, args.device)
        trials.norm = learner.ring.norm
        returns, results = {}, {}

        def infer(context):
            return latents(learner.params["encoder"], rows, context, make_noise(env, args), args)[:2]

        def play(name, zi):
            out = rollout(env, learner.params["actor"], rows, zi)
            returns.setdefault(name, []).append(out.reward.sum(1).mean(0).view(K, E))  # over agents
            return out

        for played in range(1, args.eval_shots + 1 if infers else 2):
            out = play("0", infer(None)[0])
            trials.append(numbers, transitions(out, env), out.alive.sum(0))
            # after 1, 2, 4 .. episodes: infer from what has been seen; keys come from another draw
            if infers and played.bit_count() == 1:
                query, key = (infer(trials.sample(numbers, args.eval_context)) for _ in range(2))
                for name, z, z_key in zip(("zi", "z"), query, key):
                    results[f"eval/test/accuracy_{name}_{played}"] = share_told(z, z_key, K, E)
                play(f"{played}", query[0])
        if infers:
            play("wrong", query[0].roll(E, 1))
        if film:  # the first episode of the prior beside that after the most episodes
            print(env.save(film, {"before": 0, "after": -2 if infers else 0}))
        for name, episodes in returns.items():  # each (K, E)
            x = torch.stack(episodes).mean(0)
            results[f"eval/test/return_{name}"] = x.mean().item()
            results[f"eval/test/return_{name}_ci95"] = 1.96 * x.std().item() / math.sqrt(x.numel())
        return results


def share_told(z, z_key, K, E):
    """How often latents z (n or 1, K E, C) of E trials of each of K tasks have the largest dot product with
    their own task's key: the mean of up to 8 trials of another draw, never of the query's trial."""
    z, z_key = (x.unflatten(1, (K, E)) for x in (z, z_key))
    others = range(1, min(9, E))
    z_key = sum(z_key.roll(j, 2) for j in others) / len(others)  # (n or 1, K, E, C)
    scores = torch.einsum("nkec,njec->nkej", z, z_key).cpu()
    return (scores.argmax(-1) == torch.arange(K)[:, None]).float().mean().item()


def table(results):
    """Return of an episode after so many of the prior, and how often latents tell the task."""
    lines = ["episodes seen   return   ± 95 %    z tells  z^i alone"]
    for tag, mean in results.items():
        name = tag.partition("return_")[2]
        if f"{tag}_ci95" in results:
            told = [results.get(f"eval/test/accuracy_{z}_{name}", math.nan) for z in ("z", "zi")]
            lines.append(f"{name:13s}{mean:9.2f}{results[f'{tag}_ci95']:9.2f}{told[0]:11.2f}{told[1]:11.2f}")
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
        if isinstance(error, (OSError, KeyboardInterrupt)):
            fail(f"{kind.__name__} {error}; the last checkpoint.pt in {self.dir} is good", code=1)


# ================================================================ 8. Train
def report(args, results, folder, step):
    """Print the table of an evaluation and write eval.json."""
    print(f"{args.env}, {args.method}: mean return of the agents\n{table(results)}")
    write_eval(folder, results | {"global_step": step, "seed": args.seed})


def train(args):
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    env = make_env(args, args.num_envs + args.context_envs)
    playable(args, env)
    tasks = env.all_tasks("train")
    learner = build(args, env)
    state, iteration, step = None, 0, 0
    if path := args.resume or args.evaluate:  # from a checkpoint
        state = load(path)
        for name, x in learner.tensors().items():
            x.copy_(state["tensors"][name])
        for group, optimizer in learner.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][group])
        iteration, step = state["iteration"], state["step"]
    if args.evaluate:  # and no more
        film = state["folder"] / "play.gif" if args.capture_video else None
        return report(args, meta_test(args, learner, film), state["folder"], step)

    with Run(args, state) as run:
        stop = False
        while not stop:
            left = max(0.0, 1 - step / (0.95 * args.total_steps))  # all step sizes fall to 0 at 95 %
            slow = 0.1 if 0 < args.warm_up <= iteration else 1.0  # actors need latents that stand still [D4]
            for group, optimizer in learner.optimizers.items():
                lr = args.encoder_lr * slow if group == "encoder" else args.lr
                optimizer.param_groups[0]["lr"] = left * lr
            logs, played = iterate(env, learner, tasks, iteration, args)
            iteration += 1
            step += played
            done = step >= args.total_steps  # then it is evaluated, as at each milestone
            stop = done or run.interrupted
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            text = f"iteration {iteration}: return {logs['charts/episodic_return']:.1f}"
            if milestone:
                results = meta_test(args, learner)
                logs |= results
            run.log(logs, step, text, milestone)
            if stop or iteration % args.save_every == 0:
                states = {group: optimizer.state_dict() for group, optimizer in learner.optimizers.items()}
                run.save(step, tensors=learner.tensors(), optimizers=states, iteration=iteration)
        if done:
            report(args, results, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
