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
                 the GRU: hard sigmoid, reset before the recurrent product         (4)  -> gru()
                 D_k ~ pi_psi(a|o, z): E episodes; b: linear feature baseline      (5)  -> linear_baseline()
                 A: generalised advantages of D_k, not normalised                  (6)  -> gae()
                 L_in = -mean log pi_psi(a|o, z) A                                 (7)  -> inner_loss()
                 g += dL_in/dphi_i, clipped to norm 60; B: eq. (1) with D_k        (8)  -> adapt()
               V ~ pi_psi(a|o, z) with the z of eqs. (2) and (3) once more; V does not enter B
             L = mean_i [PPO's clipped loss on V_i + eta mean z_i^2]               (9)  -> surrogate()
             dL/d[phi, alpha, psi] through eqs. (2) and (3), g_i and B_i fixed     (10) -> outer_gradient()
             19 steps of Adam; of the 20 iterates the one stays whose clipped loss,
             without the penalty, is lowest among those with KL(old || new) < 0.01 (11) -> meta_update()
  Symbols    phi    encoder (P,)       g      (M, P)           B       Episodes (M, L, H, F)     z  (M, d)
             alpha  (P,)               phi_i  (M, P)           D_k, V  Batch (M, R), R <= H E    A  adv
             psi    policy (Q,)        x      [phi, alpha, psi], the vector that Adam moves
             M tasks, E episodes, H steps, J fast updates, L buffered episodes, O obs, A actions, U GRU units,
             d numbers in z, F = O + 2A + 1: observation, mean and log std that acted, reward.
  Baselines  --method maml: phi is the policy, one fixed alpha. meta-sgd: the policy, alpha learned.
             maesn: phi is z itself. All are first order, without W and B; the rest is the same.
  Departures [D1] Each row plays one episode and is masked after its end. The authors' sampler starts rows
                  again until it has 5,000 steps of finished episodes, which favours short, good ones.
             [D2] All tasks are one batch, shared out by torchrun; the authors run 20 Ray workers, one a task.
             [D3] wheeled by default is small (10 tasks, 20 episodes, 64 and 32 units, Adam 0.001), to learn
                  in minutes. Evaluations take 20 goals of each set, the authors' all 100 (--eval-tasks 100).
             [D4] Positions come from the state after the step; the authors' lag it by a physics step.
  Run        python tesp.py --env wheeled                              # 7 minutes
             python tesp.py --env wheeled --method meta-sgd            # or maml, maesn
             python tesp.py --env wheeled --paper                      # the paper's sizes, 600 iterations
             python tesp.py --env small_ant                            # the paper's ant; reacher2, reacher4
             python tesp.py --env nav2d                                # a point, seconds
             torchrun --nproc-per-node 2 tesp.py --env wheeled         # the same tasks, shared out
             python tesp.py --evaluate runs/x/checkpoint.pt --capture-video
  Licence    MIT. Please cite the paper above for the method.
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
import tyro
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
    """Defaults: a quick `wheeled`, minutes on two cores [D3]. PRESETS below has those of other envs."""

    # --- run: the same in all six scripts
    env: str = "wheeled"  # wheeled, small_ant, reacher2, reacher4, nav2d, or your own: see make_env()
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch, and of MuJoCo
    total_steps: Count = 5_000_000  # training transitions of all environments, those of inner loops included
    eval_every: within(int, 0) = 10  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 20  # episodes of each task in an evaluation
    save_every: Count = 5  # iterations between checkpoints; one is also written at the end and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    method: Literal["tesp", "maml", "meta-sgd", "maesn"] = "tesp"  # TESP or one of its baselines
    paper: bool = False  # the paper's sizes in wheeled and nav2d; the other envs always have them
    inner_steps: within(int, 0) = 3  # J, fast updates, eqs. (2)-(8); 0: the warm-up's embedding as it is
    adapt_policy: bool = False  # the paper's variant of tesp: fast updates move the policy too
    learn_alpha: bool = True  # learn the step sizes of eq. (2); off: they stay at inner_lr
    inner_lr: Size = 1e-3  # initial value of every step size alpha, eq. (2)
    buffer: Literal["best", "last", "all"] = "best"  # episodes the encoder reads, eq. (1)
    buffer_size: Count = 8  # L, episodes in the buffer `best`
    num_tasks: Count = 10  # M, tasks per meta-iteration, over all processes
    num_episodes: Count = 20  # E, episodes of a task in a batch
    horizon: Count = 200  # H, steps of an episode
    hidden: Count = 64  # units in each of the policy's two hidden layers
    gru_units: Count = 32  # U, units of the encoder's GRU
    latent_dim: Count = 8  # d, numbers in the embedding z
    latent_coef: Size = 0.01  # eta, weight of mean z^2 in eq. (9)
    gamma: Share = 0.99  # discount, eqs. (5) and (6)
    gae_lambda: Share = 0.97  # lambda of eq. (6)
    epochs: Count = 20  # evaluations of eq. (9) per meta-iteration; one Adam step fewer
    clip_coef: Size = 0.15  # ratios are clipped to 1 -+ this, eq. (9)
    delta: Size = 0.01  # largest mean KL (nats) of an iterate that may be kept, eq. (11)
    outer_lr: Size = 1e-3  # Adam's step size, eq. (11)
    eval_tasks: within(int, 1, 100) = 20  # goals of each set in an evaluation


PAPER = dict(total_steps=300_000_000, eval_every=25, eval_episodes=25, num_tasks=20,
             num_episodes=25, buffer_size=16, hidden=256, gru_units=256, outer_lr=3e-4)
PRESETS = {  # what differs from the defaults; sizes and eta are the supplement's
    "wheeled": {},
    "nav2d": dict(total_steps=750000, eval_episodes=10, num_episodes=10, horizon=50, hidden=32, gru_units=16),
    "small_ant": PAPER | dict(hidden=512, latent_dim=32),
    "reacher2": PAPER | dict(latent_coef=0.005),
    "reacher4": PAPER | dict(hidden=512, latent_dim=16, latent_coef=0.005),
}


def preset(args):
    """What replaces the defaults where the command line is silent."""
    if args.paper and args.env in ("wheeled", "nav2d"):
        return PAPER
    own = {"latent_coef": 0.001} if (args.env, args.method) == ("reacher2", "maesn") else {}
    return PRESETS.get(args.env, {}) | own


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
    # The contract (envs/__init__.py); bring your own by returning an object with these members:
    #   num_envs, horizon, num_agents, obs_dims, action_dims, discrete, device; splits, its sets of tasks
    #   reset(task) -> obs (B, O), one task a row;  sample_tasks(n, split) -> (n, task_dim)
    #   step(action (B, A)) -> obs, reward (B, 1), terminated (B,), truncated (B,), info
    # part: this process's share under torchrun; random starts are drawn for the whole batch and then cut
    try:
        return envs.make(args.env, num_envs, horizon=args.horizon, device=args.device,
                         threads=args.num_threads, part=part)
    except ValueError as error:
        fail(error)


# ================================================================ 2. Networks
# Three flat vectors hold all numbers: phi (P,), what the fast updates move, with a step size alpha for each
# entry, and psi (Q,), the shared policy; x = [phi, alpha, psi]. The encoders of M tasks are one (M, P), and
# every layer is one batched product over the tasks. Where fast updates move the policy, phi is [encoder,
# policy] and psi is empty; the policies are then (M, Q), a row for each task. The encoder of a baseline is
# the variable z alone: d numbers in maesn, none in maml and meta-sgd.
class Net(NamedTuple):
    encoder: dict  # {name: shape} in the order of the flat vector
    policy: dict
    adapt_policy: bool

    def split(self, x):
        """x (2P + Q,) -> phi (P,), alpha (P,), psi (Q,)."""
        P, Q = size(self.encoder), size(self.policy)
        return x.split([P + Q, P + Q, 0] if self.adapt_policy else [P, P, Q])

    def parts(self, phi, psi):
        """phi (M, P) and psi (Q,) -> weights of the encoders {name: (M, ...)} and of the policy {name: ...},
        with M in front if there is one for each task."""
        P = size(self.encoder)
        own = phi[:, P:] if self.adapt_policy else psi
        return unflatten(phi[:, :P], self.encoder), unflatten(own, self.policy)


def size(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def unflatten(x, shapes):
    """(..., P) -> {name: (..., *shape)}, views."""
    parts = x.split([math.prod(shape) for shape in shapes.values()], -1)
    return {name: part.unflatten(-1, shapes[name]) for name, part in zip(shapes, parts)}


def columns(n, m, norm):
    """(n, m) normal numbers, each column scaled to `norm`."""
    w = torch.randn(n, m)
    return norm * w / w.norm(dim=0)


def make_encoder(features, units, latent_dim):
    """Gates in the order z, r, candidate. Glorot-uniform wx, wh of orthonormal rows, small wp, biases 0."""
    limit = math.sqrt(6 / (features + 3 * units))
    return {
        "wx": (2 * torch.rand(features, 3 * units) - 1) * limit,
        "wh": torch.nn.init.orthogonal_(torch.empty(units, 3 * units)),
        "b": torch.zeros(3 * units),
        "wp": columns(units, latent_dim, 0.01),
        "bp": torch.zeros(latent_dim),
    }


def make_policy(obs_dim, action_dim, hidden, latent_dim):
    """O + d -> hidden -> hidden -> A means, A log stds; columns of norm 1, in the last layer 0.01."""
    sizes, p = [obs_dim + latent_dim, hidden, hidden, 2 * action_dim], {}
    for l in range(3):
        p[f"w{l}"] = columns(sizes[l], sizes[l + 1], 0.01 if l == 2 else 1.0)
        p[f"b{l}"] = torch.zeros(sizes[l + 1])
    return p


def policy(p, obs, z):
    """mean, log_std (M, R, A) of one policy {name: (...)} or of M policies {name: (M, ...)} at observations
    (M, R, O) with embeddings z (M, d)."""
    w_obs, w_z = p["w0"].split([obs.shape[-1], z.shape[-1]], -2)
    same = z[:, None] @ w_z + p["b0"].unsqueeze(-2)  # (M, 1, hidden): z is the same for all rows of a task
    x = torch.tanh(obs @ w_obs + same)
    x = torch.tanh(x @ p["w1"] + p["b1"].unsqueeze(-2))
    x = x @ p["w2"] + p["b2"].unsqueeze(-2)
    return x.chunk(2, -1)


def gru(wx, wh, b, x, length):
    """eq. (4): z = hs(x Wz + h Uz + bz), r = hs(x Wr + h Ur + br), n = tanh(x Wn + (r * h) Un + bn),
    h <- z * h + (1 - z) * n, from h = 0, with hs(v) = clip(v / 5 + 1/2, 0, 1). [Wz Wr Wn] is wx (M, F, 3U),
    [Uz Ur Un] wh (M, U, 3U), b (M, 3U). x (M, L, H, F) -> the state at each episode's end, (M, L, U)."""
    L, H, U = x.shape[1], x.shape[2], wh.shape[1]
    inputs = x.flatten(1, 2) @ wx + b[:, None]  # one product for all steps
    inputs = inputs.unflatten(1, (L, H)).unbind(2)  # H times (M, L, 3U); [:, t] would be slow backwards
    u_gates, u_candidate = wh.split([2 * U, U], -1)
    h = torch.zeros_like(inputs[0][..., :U])
    for t in range(length.max()):
        gates, candidate = inputs[t].split([2 * U, U], -1)
        z, r = (0.2 * (gates + h @ u_gates) + 0.5).clamp(0, 1).chunk(2, -1)
        n = torch.tanh(candidate + (r * h) @ u_candidate)
        alive = (t < length)[..., None]  # the state stays as it is once an episode is over
        h = torch.where(alive, z * h + (1 - z) * n, h)
    return h


def encode(p, buffer):
    """eq. (3): z (M, d), the mean over the buffered episodes of the GRU's last state, projected. An empty
    buffer (None) gives z = 0. In a baseline z is a variable itself."""
    if "z" in p:
        return p["z"]
    if buffer is None:
        return torch.zeros_like(p["bp"])
    last = gru(p["wx"], p["wh"], p["b"], buffer.x, buffer.length)  # (M, L, U)
    return (last.mean(1, keepdim=True) @ p["wp"])[:, 0] + p["bp"]


def build(args, env):
    """The net, x = [phi, alpha, psi] (2P + Q,) and Adam."""
    if env.discrete or env.num_agents > 1 or not hasattr(env, "sample_tasks"):
        fail(f"{args.env}: this script plays one agent with continuous actions and tasks to sample")
    O, A = env.obs_dims[0], env.action_dims[0]
    of_policy = args.method in ("maml", "meta-sgd")
    d = 0 if of_policy else args.latent_dim
    if args.method == "tesp":
        encoder = make_encoder(O + 2 * A + 1, args.gru_units, d)
    else:
        encoder = {"z": columns(d, 1, 0.01)[:, 0]}
    actor = make_policy(O, A, args.hidden, d)
    shapes = [{name: tuple(v.shape) for name, v in p.items()} for p in (encoder, actor)]
    net = Net(*shapes, adapt_policy=args.adapt_policy or of_policy)
    phi, psi = (torch.cat([v.flatten() for v in p.values()]) for p in (encoder, actor))
    if net.adapt_policy:
        phi, psi = torch.cat([phi, psi]), psi[:0]
    x = torch.cat([phi, torch.full_like(phi, args.inner_lr), psi]).to(args.device)
    return net, x, torch.optim.Adam([x], lr=args.outer_lr)


# ================================================================ 3. Rollout
# All tasks and episodes are played as one batch of B = M E rows [D2], one episode a row [D1]; row r belongs
# to task r // E. z is computed once and stays for the whole batch. No graph is recorded while playing.
# Positions are as in [D4]. Noise is drawn for all tasks before processes share them out, so that what is
# learned does not depend on how many there are.
class Play(NamedTuple):
    obs: torch.Tensor  # (M, H, E, O)
    action: torch.Tensor  # (M, H, E, A)
    mean: torch.Tensor  # (M, H, E, A) of the policy that acted
    log_std: torch.Tensor  # (M, H, E, A)
    reward: torch.Tensor  # (M, H, E), 0 after the end
    mask: torch.Tensor  # (M, H, E), 1 until the last step of the episode and in it, 0 after it
    arrived: torch.Tensor  # (M, E), 1 where the goal was reached


@torch.no_grad()
def rollout(env, p, z, goals, noise):
    """Play one batch with policy p and embeddings z (M, d) on goals (M, D); noise (M, H, E, A) is what the
    actions are drawn with."""
    M, H, E, _ = noise.shape
    obs = env.reset(goals.repeat_interleave(E, 0))
    alive = torch.ones(M, E, device=z.device)
    noise = noise.to(z.device).unbind(1)
    steps = []
    for t in range(H):
        x = obs.view(M, E, -1)
        mean, log_std = policy(p, x, z)
        action = mean + log_std.exp() * noise[t]  # the env clips its own copy
        obs, reward, terminated, _, info = env.step(action.flatten(0, 1))
        steps.append((x, action, mean, log_std, reward.view(M, E) * alive, alive))
        alive = alive * ~terminated.view(M, E)
    arrived = info.get("arrived", terminated).view(M, E).float()
    return Play(*(torch.stack(x, 1) for x in zip(*steps)), arrived)


# ================================================================ 4. Objectives
# Pure functions of tensors, for each task. While time matters they are (M, H, E), time in dimension 1; then
# only the valid steps are kept, as rows (M, R), and `weight` is that of each in its task's mean.
def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension 1."""
    out = reward.clone()
    for t in reversed(range(reward.shape[1] - 1)):
        out[:, t] += gamma * out[:, t + 1]
    return out


def linear_baseline(obs, target, mask, ridge=1e-5):
    """eq. (5): ridge regression of target (M, H, E) on [o, o^2, t, t^2, t^3, 1], t in hundreds of steps and o
    (M, H, E, O) clipped to +-10, for each task -> its values (M, H, E), 0 outside of mask. In float64."""
    o = obs.double().clamp(-10, 10)
    t = torch.arange(target.shape[1], device=obs.device).double() / 100
    t = t.view(1, -1, 1, 1).expand(*target.shape, 1)
    x = torch.cat([o, o**2, t, t**2, t**3, torch.ones_like(t)], -1)
    x = (x * mask[..., None]).flatten(1, 2)  # (M, H E, 2O + 4)
    y = target.double().flatten(1, 2)[..., None]  # (M, H E, 1)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    w = torch.linalg.solve(gram, x.mT @ y)
    return (x @ w).view_as(target).to(target.dtype)


def gae(reward, value, mask, gamma, gae_lambda):
    """eq. (6): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t; v = 0 after the
    last step: arrival, a fall, and the time limit, because the baseline knows the time. All (M, H, E)."""
    value = value * mask
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = (reward + gamma * next_value - value) * mask
    return returns_to_go(delta, gamma * gae_lambda)


def log_prob(mean, log_std, action):
    """log N(action; mean, std), summed over the last dimension: (..., A) -> (...)."""
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean_0, log_std_0, mean_1, log_std_1):
    """KL(N_0 || N_1), summed over the last dimension: (..., A) -> (...)."""
    ratio = ((mean_0 - mean_1) ** 2 + (2 * log_std_0).exp()) * (-2 * log_std_1).exp()
    return (log_std_1 - log_std_0 + 0.5 * (ratio - 1)).sum(-1)


def inner_loss(mean, log_std, rows):
    """eq. (7): -mean log pi A -> (M,). No entropy bonus, no value loss, no penalty on z."""
    return -(rows.weight * log_prob(mean, log_std, rows.action) * rows.adv).sum(1)


def surrogate(mean, log_std, rows, clip_coef):
    """eq. (9) without its penalty: -mean min(ratio A, clip(ratio) A) -> (M,), and KL(old || new) (M,)."""
    ratio = torch.exp(log_prob(mean, log_std, rows.action) - rows.logprob)
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    gain = torch.minimum(ratio * rows.adv, clipped * rows.adv)
    kl = gaussian_kl(rows.mean, rows.log_std, mean, log_std)
    return -(rows.weight * gain).sum(1), (rows.weight * kl).sum(1)


# ================================================================ 5. Update
# All of it is first order: g enters phi_i = phi - clip(alpha) * g as a constant, so no gradient of a gradient
# is ever taken, and one backward pass through policy and encoder gives everything.
INNER_CLIP = 60.0  # largest norm of a task's inner gradient
ALPHA_BOUND = 0.1  # largest size of a step size


class Batch(NamedTuple):  # the valid steps of a Play first, in dimension 1
    obs: torch.Tensor  # (M, R, O)
    action: torch.Tensor  # (M, R, A)
    mean: torch.Tensor  # (M, R, A) of the policy that acted, as are the next two
    log_std: torch.Tensor  # (M, R, A)
    logprob: torch.Tensor  # (M, R)
    adv: torch.Tensor  # (M, R)
    weight: torch.Tensor  # (M, R): 1 / (number of valid steps), 0 for what is not valid


class Episodes(NamedTuple):  # what a buffer holds
    x: torch.Tensor  # (M, L, H, F): observation, mean and log std that acted, reward; 0 after the end
    length: torch.Tensor  # (M, L)
    ret: torch.Tensor  # (M, L), undiscounted


@torch.no_grad()
def process(play, args):
    """Play -> Batch: eqs. (5) and (6)."""
    value = linear_baseline(play.obs, returns_to_go(play.reward, args.gamma), play.mask)
    adv = gae(play.reward, value, play.mask, args.gamma, args.gae_lambda)
    logprob = log_prob(play.mean, play.log_std, play.action)

    # the valid steps first; what no task needs is cut off
    mask = play.mask.flatten(1)  # (M, H E)
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]  # (M, R)
    logprob, adv, mask = (x.flatten(1).gather(1, order) for x in (logprob, adv, play.mask))
    vectors = (play.obs, play.action, play.mean, play.log_std)
    rows = [torch.take_along_dim(x.flatten(1, 2), order[..., None], 1) for x in vectors]
    return Batch(*rows, logprob, adv, mask / mask.sum(1, keepdim=True))


def episodes(play):
    """Play -> Episodes, one of each row."""
    x = torch.cat([play.obs, play.mean, play.log_std, play.reward[..., None]], -1)
    x = (x * play.mask[..., None]).transpose(1, 2)  # (M, E, H, F)
    return Episodes(x, play.mask.sum(1).long(), play.reward.sum(1))


def keep(old, new, kind, size):
    """eq. (1): the buffer (None: empty) after a batch of Episodes. best: the `size` episodes with the largest
    return, ties by age; last: the new ones; all."""
    both = new
    if old is not None and kind != "last":
        both = Episodes(*(torch.cat(pair, 1) for pair in zip(old, new)))
    if kind != "best":
        return both
    order = both.ret.argsort(dim=1, descending=True, stable=True)[:, :size]  # (M, L)
    task = torch.arange(len(order), device=order.device)[:, None]
    return Episodes(*(x[task, order] for x in both))


def adapted(phi, alpha, g):
    """eq. (2): (P,), (P,), (M, P) -> (M, P)."""
    return phi - alpha.clamp(-ALPHA_BOUND, ALPHA_BOUND) * g


def adapt(net, x, M, play, args):
    """eq. (8) and all before it, the fast updates of M tasks. play(actor, z) plays W, D_0 .. D_{J-1} and V
    with a policy and embeddings z. The k-th gradient sees the buffer without D_k. Returns the sum g (M, P) of
    the inner gradients, the buffer, V as a Batch and all plays."""
    phi, alpha, psi = net.split(x.detach())
    g = phi.new_zeros(M, len(phi))
    buffer, plays = None, []
    first = 0 if args.method == "tesp" else 1  # a baseline has no warm-up
    for phase in range(first, args.inner_steps + 2):
        # play with the weights of eq. (2)
        phi_i = adapted(phi, alpha, g).requires_grad_()
        encoder, actor = net.parts(phi_i, psi)
        z = encode(encoder, buffer)
        plays.append(play(actor, z))
        if phase > args.inner_steps:
            return g, buffer, process(plays[-1], args), plays

        # the fast update, from z on; then the buffer
        if phase > 0:
            batch = process(plays[-1], args)
            loss = inner_loss(*policy(actor, batch.obs, z), batch)
            g_k = torch.autograd.grad(loss.sum(), phi_i)[0]
            norm = g_k.norm(dim=1, keepdim=True)
            g = g + g_k * (INNER_CLIP / norm).clamp(max=1)  # 60 / 0 is clamped to 1 as well
        if args.method == "tesp":
            buffer = keep(buffer, episodes(plays[-1]), args.buffer, args.buffer_size)


def outer_gradient(net, x, g, buffer, batch, args):
    """eqs. (9) and (10): the clipped loss without its penalty, KL(old || new), means over the tasks of all
    processes, and dL/dx (2P + Q,)."""
    x = x.detach().requires_grad_()
    phi, alpha, psi = net.split(x)
    if args.method == "maml" or not args.learn_alpha:
        alpha = alpha.detach()
    encoder, actor = net.parts(adapted(phi, alpha, g), psi)
    z = encode(encoder, buffer)
    loss, kl = surrogate(*policy(actor, batch.obs, z), batch, args.clip_coef)
    penalty = args.latent_coef * (z**2).sum() / max(z.numel(), 1)  # maml and meta-sgd have no z
    gradient = torch.autograd.grad(loss.mean() + penalty, x)[0]
    numbers = torch.stack([loss.mean(), kl.mean()]).detach()
    flat = mean_over_processes(torch.cat([numbers, gradient]))
    return *flat[:2], flat[2:]


# Under torchrun every process plays a share of the tasks [D2]; all average the same numbers and take the
# same step, so no weights need to be sent. Only the first process (RANK 0) keeps its run folder.
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0


def mean_over_processes(x):
    if WORLD == 1:
        return x
    total = x.detach().cpu().clone()
    torch.distributed.all_reduce(total)
    return (total / WORLD).to(x.device)


def meta_update(env, net, x, optimizer, args):
    """One meta-iteration; x changes in place. Returns {tag: value} and the mean return of each phase."""
    M = args.num_tasks // WORLD
    mine = slice(RANK * M, RANK * M + M)  # the tasks of this process
    goals = env.sample_tasks(args.num_tasks)[mine]

    def play(actor, z):
        noise = torch.randn(args.num_tasks, args.horizon, args.num_episodes, env.action_dims[0])
        return rollout(env, actor, z, goals, noise[mine])

    # the inner loop, then PPO on V with the best-iterate rule of eq. (11)
    g, buffer, batch, plays = adapt(net, x, M, play, args)
    best, best_loss, logs = x.clone(), math.inf, {"losses/outer": math.inf}
    for n in range(args.epochs):
        loss, kl, gradient = outer_gradient(net, x, g, buffer, batch, args)
        if n == 0:
            logs["grad/norm_outer"] = gradient.norm()
        if kl < args.delta and loss < best_loss:
            best, best_loss = x.clone(), loss
            logs |= {"losses/outer": loss, "losses/kl": kl, "losses/iterate": n}
        if n < args.epochs - 1:
            x.grad = gradient
            optimizer.step()
    x.copy_(best)  # Adam's moments are not restored

    # what is logged: means over the tasks of all processes
    measures = {
        "grad/norm_inner": g.norm(dim=1).mean(),
        "charts/log_std": plays[-1].log_std.mean(),
        "charts/arrived": plays[-1].arrived.mean(),
        "adapt/alpha": net.split(x)[1].abs().mean(),
    }
    logs |= zip(measures, mean_over_processes(torch.stack([*measures.values()])))
    return logs, mean_over_processes(torch.stack([play.reward.sum(1).mean() for play in plays]))


# ================================================================ 6. Evaluation
# Meta-test: the whole inner procedure on goals of each set, D (trained on), D' (held out) and D'' (farther
# away than any in training), without an outer step. All methods and seeds meet the same goals. TESP's warm-up
# costs episodes too: compare methods at equal numbers of episodes seen. Own env, own random numbers.
TEST_SEED = 1
SETS = {"train": "D, goals of training", "test": "D', held out", "test2": "D'', farther away"}


def phases(args):
    """Names of the batches that are played for a task. The k-th follows k E episodes seen."""
    warmup = ["warmup"] if args.method == "tesp" else []
    return warmup + [str(k) for k in range(args.inner_steps + 1)]


def evaluate(args, net, x, split="test", env=None):
    """Adapt to args.eval_tasks goals of a split -> the plays of all phases."""
    n, E = args.eval_tasks, args.eval_episodes
    env = env or make_env(args, n * E)
    with torch.random.fork_rng():
        torch.manual_seed(TEST_SEED)
        goals = env.sample_tasks(n, split)

        def play(actor, z):
            return rollout(env, actor, z, goals, torch.randn(n, args.horizon, E, env.action_dims[0]))

        return adapt(net, x, n, play, args)[-1]


def evaluate_all(args, net, x, splits=None):
    """{split: (returns, arrived)}, by default of all: each (n, phases), means over a task's episodes."""
    results = {}
    for split in splits or make_env(args, 1).splits:
        plays = evaluate(args, net, x, split)
        returns = [play.reward.sum(1).mean(1) for play in plays]
        arrived = [play.arrived.mean(1) for play in plays]
        results[split] = torch.stack(returns, 1), torch.stack(arrived, 1)
    return results


def interval(x):
    """Half width of the 95 % interval of the mean of (n,)."""
    return 1.96 * x.std(correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(results, args):
    """{tag: value} of evaluate_all()."""
    flat = {}
    for split, (returns, arrived) in results.items():
        for name, column in zip(phases(args), returns.T):
            flat[f"eval/{split}/return_{name}"] = column.mean().item()
            flat[f"eval/{split}/return_{name}_ci95"] = interval(column).item()
        flat[f"eval/{split}/arrived"] = arrived[:, -1].mean().item()
    return flat


def table(results, args):
    """Return against the episodes of a goal seen before, on each set."""
    heads = [f"{k * args.eval_episodes} seen" for k in range(len(phases(args)))] + ["arrived"]
    lines = [f"{args.env}, {args.method}: return on {args.eval_tasks} goals a set, by the episodes seen"]
    lines.append(" " * 24 + "".join(f"{head:>16s}" for head in heads))
    for split, (returns, arrived) in results.items():
        cells = [f"{column.mean():.1f} ± {interval(column):.1f}" for column in returns.T]
        cells.append(f"{100 * arrived[:, -1].mean():.0f} %")
        lines.append(f"{SETS[split]:24s}" + "".join(f"{cell:>16s}" for cell in cells))
    return "\n".join(lines)


def film(args, net, x, folder):
    """play.gif: the first batch beside the last."""
    camera = envs.Camera(make_env(args, args.eval_tasks * args.eval_episodes))
    evaluate(args, net, x, env=camera)
    print(camera.save(folder / "play.gif", {"at first": 0, f"after {args.inner_steps} updates": -1}))


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
    print(table(results, args))
    write_eval(folder, summary(results, args) | {"global_step": step, "seed": args.seed})


def train(args):
    if args.num_tasks % WORLD:
        fail(f"--num-tasks {args.num_tasks} does not divide among {WORLD} processes")
    torch.manual_seed(args.seed % 2**64)
    torch.set_num_threads(args.num_threads)
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    env = make_env(args, args.num_tasks // WORLD * args.num_episodes, (RANK, WORLD))
    net, x, optimizer = build(args, env)

    # an earlier run, to continue or to evaluate
    state, iteration, step = None, 0, 0
    if path := args.resume or args.evaluate:
        state = load(path)
        x.copy_(state["x"])
        optimizer.load_state_dict(state["optimizer"])
        iteration, step = state["iteration"], state["step"]
    if args.evaluate:
        report(args, evaluate_all(args, net, x), state["folder"], step)
        return film(args, net, x, state["folder"]) if args.capture_video else None
    if RANK:  # computes what the first process does, and keeps nothing
        sys.stdout = open(os.devnull, "w")
        args = replace(args, run_dir=tempfile.mkdtemp())
        state = state and state | {"folder": Path(args.run_dir)}

    with Run(args, state) as run:
        stop = False
        while not stop:
            logs, returns = meta_update(env, net, x, optimizer, args)
            iteration += 1
            step += args.num_tasks * args.num_episodes * env.horizon * len(returns)
            logs |= {f"adapt/return_{name}": value for name, value in zip(phases(args), returns)}
            logs["charts/episodic_return"] = returns[-1]  # after the last update
            done = step >= args.total_steps
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            stop = done or mean_over_processes(torch.tensor([1.0 * run.interrupted])) > 0
            if milestone:
                results = evaluate_all(args, net, x, None if done else ["test"])
                logs |= summary(results, args)
            run.log(logs, step, f"iteration {iteration}: {returns[0]:.1f} -> {returns[-1]:.1f}", milestone)
            if stop or iteration % args.save_every == 0:
                run.save(step, x=x, optimizer=optimizer.state_dict(), iteration=iteration)
        if done:
            report(args, results, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
