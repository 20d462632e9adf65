"""
MAML for reinforcement learning: initial weights from which one gradient step on a few episodes solves a task.

  Papers     Finn, Abbeel, Levine: Model-Agnostic Meta-Learning. ICML 2017, arXiv:1703.03400 (MAML).
             Meta-SGD arXiv:1707.09835, E-MAML 1803.01118, MAESN 1802.07245, DiCE 1802.05098, ProMP
             1810.06784, TRPO 1502.05477.
  Problem    Tasks i ~ p(i) are MDPs that differ in their rewards or dynamics. Choose theta (and step sizes
             alpha) such that K policy-gradient steps on a few episodes of a new task give a high return.
  Algorithm  for each meta-iteration: draw M tasks; for all of them side by side, with phi_0 = theta:
               for k = 0 .. K-1:
                 D_k ~ phi_k: E episodes of H steps                                -> rollout()
                 b: linear feature baseline, fitted to the batch itself        (1) -> linear_baseline()
                 A: generalised advantages, normalised in each task            (2) -> gae()
                 L_in: loglik, ratio or dice                                   (3) -> inner_loss()
                 phi_{k+1} = phi_k - alpha * g_k,  g_k = dL_in/dphi_k          (4) -> adapt()
               V ~ phi_K: E more episodes, processed in the same way
             L = -mean_V [pi_{phi_K(theta)}(a|s) / pi_old(a|s) * A]            (5) -> surrogate()
             dL/d[theta, alpha]: autograd, back through all K steps            (6) -> meta_gradient()
             TRPO: least L with KL(pi_old || pi_{phi_K(theta)}) <= delta       (7) -> gaussian_kl()
               F v = J' M J v, J = d(mean, log std on V)/d[theta, alpha]       (8) -> fisher_product()
               F x = dL/dtheta by conjugate gradients                          (9) -> conjugate_gradient()
               theta <- theta - r^j sqrt(2 delta / x'Fx) x, the first good j  (10) -> trpo_step()
             PPO and ProMP: Adam on the clipped L, (4) done anew each epoch   (11) -> ppo_update()
             extra terms: E-MAML's score of D, ProMP's KL on D, MAESN's |z|^2 (12) -> outer_objective()
  Symbols    phi_k  (M, P), one row per task     alpha  step sizes, shaped as theta     g_k  (M, P)
             D_k, V  batches (M, H, E)           z  latent (d,), input to pi
             M tasks, K inner steps, E episodes, H steps, A actions, P numbers in a policy.
  Departures [D1] (8) is exact, but on every tenth episode only, with robots every fifth (--fisher-every).
                  The authors take finite differences of the KL's gradient, on all episodes.
             [D2] --inner-grad ratio is the default. The MAML paper's loglik has a wrong second derivative;
                  that of ratio lacks the terms across time; that of dice is complete, but noisy.
             [D3] All steps of a task weigh the same; steps after an early end weigh nothing.
             [D4] MAESN's latent is a variable with one start z_0 for all tasks.
             [D5] E-MAML weighs the score of D by the return after adaptation, centred over the tasks.
             [D6] nav2d: an action is a displacement, relu 64-64, alpha 0.1, delta 0.02, 36 iterations; the
                  second command is the authors' way. Robots: tanh, an action of 1 is a tenth of full torque.
  Run        python maml_rl.py --env nav2d    # 40 seconds of one core: -39, -14, -11, -10 after 0 .. 3 steps
             python maml_rl.py --env nav2d --action-scale 0.1 --inner-lr 0.5 --hidden 100 --delta 0.01
             python maml_rl.py --env nav2d --method meta-sgd        # or maesn, or pretrained: the control
             python maml_rl.py --env nav2d --first-order            # FOMAML; --e-maml: E-MAML
             python maml_rl.py --env half_cheetah_dir               # 500 iterations, about two hours
             python maml_rl.py --evaluate runs/x --capture-video    # the table, and play.gif
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
from torch import Tensor
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence
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
    """Defaults: nav2d [D6]. PRESETS below has what differs in the other environments."""

    # --- run: the same in all six scripts
    env: str = "nav2d"  # nav2d, half_cheetah_dir or _vel, ant_dir, _vel or _goal, or your own: see make_env()
    seed: int = 1  # of torch, and with it of environments and networks
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: Count = int(os.environ.get("OMP_NUM_THREADS", 1))  # of torch, and of MuJoCo
    total_steps: Count = 2_880_000  # training transitions of all environments, those of inner loops included
    eval_every: within(int, 0) = 0  # iterations between evaluations; 0: only at the end
    eval_episodes: Count = 40  # episodes of each task in an evaluation
    save_every: Count = 5  # iterations between checkpoints; one is also written at the end and on Ctrl-C
    run_dir: Optional[str] = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: Optional[str] = None  # checkpoint.pt, or its folder, to continue bit-exactly
    evaluate: Optional[str] = None  # checkpoint.pt, or its folder, to evaluate: prints the table
    capture_video: bool = False  # with --evaluate: write play.gif
    track: bool = False  # log to Weights & Biases too
    # --- algorithm
    method: Literal["maml", "meta-sgd", "maesn", "pretrained"] = "maml"  # what adapts: the policy; the policy
    # with learned step sizes; a latent with learned step sizes; nothing in training
    outer: Literal["trpo", "ppo", "promp"] = "trpo"  # outer step, eqs. (7)-(10) or (11); promp: eq. (12) too
    inner_grad: Literal["loglik", "ratio", "dice"] = "ratio"  # inner loss, eq. (3); e_maml needs loglik
    first_order: bool = False  # FOMAML: take the inner gradients of eq. (6) as constants
    e_maml: bool = False  # count how theta's own sampling explores, eq. (12)
    inner_steps: Count = 1  # K, inner steps in training
    num_tasks: Count = 20  # M, tasks per meta-iteration, over all processes
    num_episodes: Count = 20  # E, episodes of a task in a batch
    horizon: Count = 100  # H, steps of an episode
    action_scale: Size = 1.0  # factor on the policy's actions; full torque is 1, a nav2d step at most 0.1
    gamma: Share = 0.99  # discount, eqs. (1) and (2)
    gae_lambda: Share = 1.0  # lambda of eq. (2)
    inner_lr: Size = 0.1  # alpha of eq. (4), or its initial value where it is learned
    hidden: Count = 64  # units in each of the policy's two hidden layers
    activation: Literal["tanh", "relu"] = "relu"  # of the hidden layers
    latent_dim: Count = 8  # d, numbers in MAESN's latent z
    latent_coef: Size = 0.01  # weight of mean z^2 of the adapted latent, eq. (12)
    delta: Size = 0.02  # bound on the mean KL (nats) of an outer step, eq. (7)
    fisher_every: Count = 10  # every so many-th episode enters the Fisher products of eq. (8); 1: all [D1]
    cg_iters: Count = 10  # conjugate-gradient iterations, eq. (9)
    damping: Size = 1e-5  # added to the diagonal of F, eq. (9)
    epochs: Count = 5  # passes over the batches, eq. (11)
    clip_coef: Size = 0.3  # ratios are clipped to 1 -+ this, eq. (11)
    outer_lr: Size = 1e-3  # Adam's step size, eq. (11)
    kl_coef: Size = 5e-4  # weight of ProMP's KL on D, eq. (12)
    eval_tasks: Count = 40  # held-out tasks in an evaluation, the same in all of them
    eval_steps: Count = 3  # inner steps in an evaluation
    eval_later_lr: Size = 0.5  # factor on alpha in evaluation, in inner steps beyond those of training


ROBOT = dict(total_steps=80_000_000, eval_every=50, eval_episodes=20, horizon=200, action_scale=0.1,
             activation="tanh", delta=0.01, fisher_every=5)  # [D6]
PRESETS = dict.fromkeys(("half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_vel", "ant_goal"), ROBOT)


def preset(args):
    """What replaces the defaults where the command line is silent."""
    latent = {"inner_lr": 1.0} if args.method == "maesn" else {}  # takes larger steps than a policy
    return PRESETS.get(args.env, {}) | latent | ({"inner_grad": "loglik"} if args.e_maml else {})


def check(args):
    """Refuse what no single argument can be blamed for."""
    if args.num_tasks % WORLD:
        fail(f"--num-tasks {args.num_tasks} does not divide among {WORLD} processes")
    if args.e_maml and args.inner_grad != "loglik" or args.outer == "promp" and args.inner_grad != "ratio":
        fail("--e-maml needs --inner-grad loglik, --outer promp needs ratio")


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
    # The contract (envs/__init__.py); bring your own env by returning an object with these members:
    #   num_envs B, horizon, num_agents 1, discrete False, obs_dims (O,), action_dims (A,), device
    #   reset(task) -> obs (B, O), one task a row;  sample_tasks(n, split) -> (n, task_dim)
    #   step(action (B, A)) -> obs, reward (B, 1), terminated (B,), truncated (B,), info
    try:
        return envs.make(args.env, num_envs, args.horizon, args.device, args.num_threads, part)
    except ValueError as error:
        fail(error)


def playable(env):
    """Refuse an environment that this script cannot play."""
    if env.num_agents != 1 or env.discrete or not hasattr(env, "sample_tasks"):
        fail("this script needs an environment with one agent, continuous actions and tasks to sample")


# ================================================================ 2. Networks
# A policy is a dict {name: tensor}; the policies of M tasks are one dict with the tasks in front, and a layer
# is one batched product for all tasks and rows. The inner and outer steps (section 5) see the same numbers as
# a vector phi of length P.
class Net(NamedTuple):
    shapes: dict  # {name: shape} in the order of the flat vector
    adapts: Tensor  # (P,), 1 where the inner steps move phi, else 0
    activation: str

    def unflatten(self, phi):
        """(..., P) -> {name: (..., *shape)}, views."""
        parts = phi.split([shape.numel() for shape in self.shapes.values()], -1)
        return {k: part.unflatten(-1, shape) for (k, shape), part in zip(self.shapes.items(), parts)}

    def __call__(self, phi, obs):
        """The Gaussians of policies phi (M, P) at obs (M, ..., O): mean and log_std, (M, ..., A)."""
        p, act = self.unflatten(phi), getattr(torch, self.activation)
        x = obs.flatten(1, -2)  # (M, R, O), R rows
        if "z" in p:
            x = torch.cat([x, p["z"][:, None].expand(-1, x.shape[1], -1)], -1)  # (M, R, O + d)
        for l in range(3):
            x = torch.baddbmm(p[f"b{l}"][:, None], x, p[f"w{l}"])  # (M, R, hidden), at last (M, R, A)
            x = act(x) if l < 2 else x
        log_std = p["log_std"][:, None].expand_as(x).clamp(min=math.log(1e-6))
        return [y.unflatten(1, obs.shape[1:-1]) for y in (x, log_std)]


def make_policy(obs_dim, action_dim, hidden, latent_dim):
    """{name: tensor} of O (+ d) -> hidden -> hidden -> mean, and a log_std that no input changes: weights
    Xavier-uniform, the rest 0. latent_dim > 0 adds MAESN's z, a random direction of norm 0.01."""
    p = {}
    for l, (n, m) in enumerate([(obs_dim + latent_dim, hidden), (hidden, hidden), (hidden, action_dim)]):
        p[f"w{l}"] = torch.nn.init.xavier_uniform_(torch.empty(n, m))
        p[f"b{l}"] = torch.zeros(m)
    p["log_std"] = torch.zeros(action_dim)
    if latent_dim:
        z = torch.randn(latent_dim)
        p["z"] = 0.01 * z / z.norm()  # [D4]
    return p


def build(args, env):
    """The net, x = [theta, alpha] (2P,) and Adam."""
    latent = args.latent_dim if args.method == "maesn" else 0
    p = make_policy(env.obs_dims[0], env.action_dims[0], args.hidden, latent)
    theta = torch.cat([v.flatten() for v in p.values()])
    adapts = torch.ones_like(theta)
    if latent:
        adapts[:-latent] = 0  # only z, the last entry of p, takes inner steps
    net = Net({k: v.shape for k, v in p.items()}, adapts.to(args.device), args.activation)
    x = torch.cat([theta, torch.full_like(theta, args.inner_lr)]).to(args.device)
    return net, x, torch.optim.Adam([x], lr=args.outer_lr)


# ================================================================ 3. Rollout
# All tasks and episodes are played as one batch of B = M E rows; row r belongs to task r // E. No graph is
# recorded while playing: what is differentiated is computed anew from (obs, action), in one piece.
@torch.no_grad()
def rollout(env, net, phi, tasks, noise, args):
    """Play policies phi (M, P) on tasks (M, D), with noise (H, M, E, A) in the actions -> obs (M, H, E, O);
    action, mean, log_std (M, H, E, A); reward (M, H, E); mask (M, H, E), 1 until an episode has ended."""
    H, M, E, _ = noise.shape
    noise = noise.to(phi)
    steps = []
    obs = env.reset(tasks.repeat_interleave(E, 0))  # (B, O)
    alive = torch.ones(M, E).to(phi)
    for t in range(H):
        x = obs.to(phi).view(M, E, -1)
        mean, log_std = net(phi, x)
        action = mean + log_std.exp() * noise[t]  # (M, E, A)
        obs, reward, terminated, *_ = env.step(args.action_scale * action.flatten(0, 1).float())
        steps.append((x, action, mean, log_std, reward.view(M, E) * alive, alive))
        alive = alive * ~terminated.view(M, E)
    return [torch.stack(x, 1) for x in zip(*steps)]


# ================================================================ 4. Objectives
# Pure functions of tensors, for each task: (M, H, E) in, time in dimension 1, and (M,) out. `weight` is that
# of each step in its task's mean: 1 / (number of valid steps), or 0 after an early end [D3].
def returns_to_go(reward, gamma):
    """R_t = sum_{u >= t} gamma^(u-t) r_u over dimension 1."""
    out, acc = torch.empty_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        acc = reward[:, t] + gamma * acc
        out[:, t] = acc
    return out


def linear_baseline(obs, target, mask, ridge=1e-5):
    """eq. (1): ridge regression of target (M, H, E) on [o, o^2, t, t^2, t^3, 1], t in hundreds of steps and o
    (M, H, E, O) clipped to +-10, for each task -> its values (M, H, E), 0 outside of mask. In float64, by a
    solver that stands singular features: an environment that never moves has them."""
    M, H, E = target.shape
    o = obs.double().clamp(-10, 10)
    t = (torch.arange(H).to(o) / 100)[:, None, None].expand(M, H, E, 1)
    x = torch.cat([o, o * o, t, t**2, t**3, t**0], -1) * mask[..., None]
    # the normal equations of each task
    x, y = x.flatten(1, 2), target.double().flatten(1, 2)[..., None]  # (M, HE, 2O + 4), (M, HE, 1)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1]).to(x)
    numbers = [n.nan_to_num().cpu() for n in (gram, x.mT @ y)]  # LAPACK takes no NaN; the loss will show it
    w = torch.linalg.lstsq(*numbers, driver="gelsd").solution.to(x)
    return (x @ w).view_as(target).to(target)


def gae(reward, value, mask, gamma, gae_lambda):
    """eq. (2): A_t = sum_u (gamma lambda)^u delta_{t+u}, delta_t = r_t + gamma v_{t+1} - v_t; v = 0 after the
    last step, the time limit's too: the baseline knows the time. All (M, H, E)."""
    value = value * mask
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return returns_to_go((reward + gamma * next_value - value) * mask, gamma * gae_lambda)


def normalize(adv, weight):
    """adv (M, H, E) with mean 0 and standard deviation 1 over the valid steps of each task, and the standard
    deviation that it had, (M, 1, 1)."""
    adv = (adv - (weight * adv).sum((1, 2), keepdim=True)) * (weight > 0)
    std = ((weight * adv**2).sum((1, 2), keepdim=True) + 1e-16).sqrt()
    return adv / std, std


def gaussian_kl(mean_0, log_std_0, mean_1, log_std_1):
    """eq. (7): KL(N_0 || N_1), summed over the last dimension: (..., A) -> (...)."""
    old, new = Normal(mean_0, log_std_0.exp(), False), Normal(mean_1, log_std_1.exp(), False)
    return kl_divergence(old, new).sum(-1)


def inner_loss(logprob, old_logprob, adv, weight, kind):
    """eq. (3): -mean w_t A_t -> (M,). The gradient at the sampling policy is the same for the three kinds of
    w_t; only the second derivatives differ [D2]."""
    if kind == "loglik":
        w = logprob
    elif kind == "ratio":
        w = torch.exp(logprob - old_logprob)
    else:  # box(c_t) - box(c_{t-1}), c the sum of log-probabilities so far: the score of one step alone
        c = logprob.cumsum(1)
        box = torch.exp(c - c.detach())  # DiCE's magic box: value 1, derivative that of c
        w = box.diff(dim=1, prepend=torch.ones_like(c[:, :1]))
    return -(weight * w * adv).sum((1, 2))


def surrogate(logprob, old_logprob, adv, weight, clip_coef=None):
    """eq. (5): -mean ratio A -> (M,); with clip_coef the pessimistic clipped form of PPO, eq. (11)."""
    ratio = torch.exp(logprob - old_logprob)
    gain = ratio * adv
    if clip_coef is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv)
    return -(weight * gain).sum((1, 2))


# ================================================================ 5. Update
# phi_K is a function of x = [theta, alpha] through all inner steps, and autograd keeps it as one graph. The
# outer gradient goes back through that graph; the Fisher product goes forward and back along it. Each task
# has its own copy of x, a row of (M, 2P), so that one backward pass gives the gradients of all tasks.
class Batch(NamedTuple):
    obs: Tensor  # (M, H, E, O)
    action: Tensor  # (M, H, E, A)
    ret: Tensor  # (M, 1, 1), the mean undiscounted return of an episode
    weight: Tensor  # (M, H, E)
    adv: Tensor  # (M, H, E), normalised
    scale: Tensor  # (M, 1, 1), the standard deviation of adv before that
    mean: Tensor  # (M, H, E, A) of the policy that acted, as are the next two
    log_std: Tensor  # (M, H, E, A)
    logprob: Tensor  # (M, H, E)


class Chain(NamedTuple):
    x: Tensor  # (M, 2P), [theta, alpha] of each task, the leaf of the graph
    phis: list  # phi_0 .. phi_K, (M, P)
    batches: list  # D_0 .. D_{K-1}, V


# Under torchrun every process draws the tasks and the noise of all, plays its share, chunk(WORLD)[RANK],
# gathers the means over all tasks and takes the same step: no weights are sent. Rank 0 keeps the run folder.
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0


def gather(x):
    """(n, ...) of each process -> (n * WORLD, ...) of all, in order of rank."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x, device="cpu") for _ in range(WORLD)]
    torch.distributed.all_gather(parts, x.detach().cpu().contiguous())
    return torch.cat(parts).to(x.device)


def distribution(net, phi, obs, action):
    """mean, log_std (M, H, E, A) and the log-probability (M, H, E) of the actions taken, under phi (M, P)."""
    mean, log_std = net(phi, obs)
    return mean, log_std, Normal(mean, log_std.exp(), False).log_prob(action).sum(-1)


@torch.no_grad()
def process(play, args):
    """A rollout -> Batch: eqs. (1) and (2), and the policy that acted."""
    obs, action, mean, log_std, reward, mask = play
    weight = mask / mask.sum((1, 2), keepdim=True)  # [D3]
    value = linear_baseline(obs, returns_to_go(reward, args.gamma), mask)
    adv, scale = normalize(gae(reward, value, mask, args.gamma, args.gae_lambda), weight)
    ret = reward.sum(1, keepdim=True).mean(2, keepdim=True)
    logprob = Normal(mean, log_std.exp(), False).log_prob(action).sum(-1)
    return Batch(obs, action, ret, weight, adv, scale, mean, log_std, logprob)


def adapt(net, x, source, num_steps, args, second_order=False):
    """eq. (4), num_steps times from x (M, 2P) -> Chain. source(phi) gives a batch: it plays a new one, or
    hands out a stored one. With second_order each g_k stays a function of x; else it is a constant."""
    x = x.detach().clone().requires_grad_()
    phi, alpha = x.chunk(2, -1)
    if args.method not in ("meta-sgd", "maesn"):
        alpha = alpha.detach()  # not learned
    chain = Chain(x, [phi], [source(phi.detach())])
    for k in range(num_steps):
        # the inner gradient: the tasks' losses are summed, and each row of phi sees its own
        D = chain.batches[k]
        start = phi if second_order else phi.detach().requires_grad_()
        *_, logprob = distribution(net, start, D.obs, D.action)
        loss = inner_loss(logprob, D.logprob, D.adv, D.weight, args.inner_grad).sum()
        g = grad(loss, start, create_graph=second_order)[0]  # (M, P)

        # the step, and the batch that the new policy plays
        factor = 1.0 if k < args.inner_steps else args.eval_later_lr
        phi = phi - factor * alpha * net.adapts * g
        chain.phis.append(phi)
        chain.batches.append(source(phi.detach()))
    return chain


def readapt(net, x, batches, args, second_order=False):
    """The inner steps anew from x (2P,), on stored batches."""
    stored = iter(batches)
    source = lambda phi: next(stored)
    return adapt(net, x.expand(len(batches[0].obs), -1), source, len(batches) - 1, args, second_order)


def outer_objective(net, chain, scores, args):
    """eqs. (5) and (12): the outer loss (M,), and KL(pi_old || pi) on V (M,)."""
    V = chain.batches[-1]
    mean, log_std, logprob = distribution(net, chain.phis[-1], V.obs, V.action)
    loss = surrogate(logprob, V.logprob, V.adv, V.weight, None if args.outer == "trpo" else args.clip_coef)
    kl = (V.weight * gaussian_kl(V.mean, V.log_std, mean, log_std)).sum((1, 2))

    # what was sampled on the way there
    wanted = args.e_maml or args.outer == "promp"
    for phi, D in zip(chain.phis, chain.batches[:-1]) if wanted else ():
        mean, log_std, logprob = distribution(net, phi, D.obs, D.action)
        if args.e_maml:  # the log-probabilities of E episodes add up; steps are averaged, as in eq. (5)
            loss = loss - scores * D.adv.shape[2] * (D.weight * (logprob - D.logprob)).sum((1, 2))
        if args.outer == "promp":
            kl_D = (D.weight * gaussian_kl(D.mean, D.log_std, mean, log_std)).sum((1, 2))
            loss = loss + args.kl_coef / args.inner_steps * kl_D
    if args.method == "maesn":
        loss = loss + args.latent_coef * (net.unflatten(chain.phis[-1])["z"] ** 2).mean(1)
    return loss, kl


def meta_gradient(net, chain, scores, args):
    """The means over all tasks of the loss, of the KL, and of dL/dx (2P,), eq. (6)."""
    loss, kl = outer_objective(net, chain, scores, args)
    g = grad(loss.sum(), chain.x)[0]  # (M, 2P)
    means = gather(torch.column_stack([loss, kl, g]).detach()).mean(0)
    return *means[:2], means[2:]


def thin(batch, every):
    """Every so many-th episode of a Batch; the weights of a task sum to 1 again."""
    batch = Batch(*(x[:, :, ::every] for x in batch))
    return batch._replace(weight=batch.weight / batch.weight.sum((1, 2), keepdim=True))


def fisher_product(net, chain, damping):
    """eq. (8) as a function v -> F v + damping v, (2P,) -> (2P,). KL and its gradient vanish at pi_old, so
    its Hessian is J' M J, with M that of the KL by (mean, log std): diag(1 / std^2, 2) [D1]."""
    V = chain.batches[-1]
    mean, log_std = net(chain.phis[-1], V.obs)
    out = torch.cat([mean, log_std], -1)  # (M, H, E, 2A)
    metric = torch.cat([(-2 * log_std).exp(), 0 * log_std + 2], -1).detach()
    # J'u is linear in u, so its derivative by u, at any u, is J: a forward derivative from two backward ones
    u = torch.zeros_like(out, requires_grad=True)
    transposed = grad(out, chain.x, u, create_graph=True)[0]  # (M, 2P)

    def product(v):
        jv = grad(transposed, u, v.expand_as(chain.x), retain_graph=True)[0]
        weighted = V.weight[..., None] * metric * jv  # (M, H, E, 2A)
        return gather(grad(out, chain.x, weighted, retain_graph=True)[0]).mean(0) + damping * v

    return product


def conjugate_gradient(product, g, iters):
    """eq. (9): x with product(x) = g, approximately. All (n,)."""
    x = torch.zeros_like(g)
    r = p = g
    rr = r @ r
    for _ in range(iters):
        if rr < 1e-10:
            break
        z = product(p)
        step = rr / (p @ z)
        x = x + step * p
        r = r - step * z
        p = r + (r @ r) / rr * p
        rr = r @ r
    return x


def trpo_step(x, loss, g, product, trial, delta, cg_iters, backtrack=0.8, trials=15):
    """eq. (10): the first x - backtrack^j s, j = 0..trials-1, with a lower loss and KL <= delta; x itself if
    there is none. trial(x) -> loss, KL. Returns the new x, its loss and its KL."""
    d = conjugate_gradient(product, g, cg_iters)
    step = (2 * delta / (d @ product(d)).clamp(min=1e-30)).sqrt() * d
    for j in range(trials):
        new = x - backtrack**j * step
        new_loss, kl = trial(new)
        if new_loss < loss and kl <= delta:
            return new, new_loss, kl
    return x, loss, 0.0


def trpo_update(net, chain, x, scores, args):
    """The outer step of eqs. (5)-(10). Changes x (2P,) in place."""
    loss, _, g = meta_gradient(net, chain, scores, args)
    few = [thin(batch, args.fisher_every) for batch in chain.batches]  # for the curvature [D1]
    again = readapt(net, x, few, args, not args.first_order)
    fisher = fisher_product(net, again, args.damping)

    def trial(new):
        again = readapt(net, new, chain.batches, args)
        with torch.no_grad():
            return gather(torch.stack(outer_objective(net, again, scores, args), 1)).mean(0)  # loss, KL

    new, loss, kl = trpo_step(x, loss, g, fisher, trial, args.delta, args.cg_iters)
    x.copy_(new)
    return {"losses/outer": loss, "losses/kl": kl, "grad/norm_outer": g.norm()}


def ppo_update(net, chain, x, scores, optimizer, args):
    """eq. (11): `epochs` steps of Adam on the clipped loss. The batches stay; the inner steps are taken anew
    from the x that Adam has reached. Changes x (2P,) in place."""
    for epoch in range(args.epochs):
        if epoch:
            chain = readapt(net, x, chain.batches, args, not args.first_order)
        loss, kl, x.grad = meta_gradient(net, chain, scores, args)
        optimizer.step()
    return {"losses/outer": loss, "losses/kl": kl, "grad/norm_outer": x.grad.norm()}


def meta_update(env, net, x, optimizer, args):
    """One meta-iteration, the algorithm box; x = [theta, alpha] (2P,) changes in place. Returns {tag: value}
    and the mean return of an episode after 0..K inner steps, (K + 1,)."""
    tasks = env.sample_tasks(args.num_tasks).chunk(WORLD)[RANK]  # (M, D)

    def play(phi):
        noise = torch.randn(env.horizon, args.num_tasks, args.num_episodes, env.action_dims[0])
        mine = noise.chunk(WORLD, 1)[RANK]  # (H, M, E, A)
        return process(rollout(env, net, phi, tasks, mine, args), args)

    # inner steps; the control takes none
    K = args.inner_steps * (args.method != "pretrained")
    chain = adapt(net, x.expand(len(tasks), -1), play, K, args, not args.first_order)
    returns = gather(torch.cat([batch.ret for batch in chain.batches], 1)).mean(0).flatten()  # (K + 1,)

    # outer step; E-MAML's scores are in units of V's advantages: of all tasks, a single one's may be 0 [D5]
    V = chain.batches[-1]
    scores = ((V.ret - returns[-1]) / gather(V.scale).mean()).flatten()  # (M,)
    if args.outer == "trpo":
        return trpo_update(net, chain, x, scores, args), returns
    return ppo_update(net, chain, x, scores, optimizer, args), returns


# ================================================================ 6. Evaluation
# Meta-test: held-out tasks, the same in every evaluation and for every seed; inner steps without derivatives
# through them; beyond the steps of training alpha shrinks (eval_later_lr), as in the MAML authors' code. Own
# environment and own random stream: evaluations do not change what is learned.
def evaluate(args, net, x, env=None):
    """Adapt x (2P,) to test tasks -> the tasks (n, D) and their batches after 0..eval_steps inner steps."""
    n, E = args.eval_tasks, args.eval_episodes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        env = env or make_env(args, n * E)
        tasks = env.sample_tasks(n, "test")
        torch.manual_seed((args.seed + 10_000) % 2**64)

        def play(phi):
            noise = torch.randn(env.horizon, n, E, env.action_dims[0])
            return process(rollout(env, net, phi, tasks, noise, args), args)

        return tasks, adapt(net, x.expand(n, -1), play, args.eval_steps, args).batches


def evaluate_all(args, net, x, start):
    """statistics() of what was learned, and of the control: the run's own random start (2P,)."""
    control = statistics("eval/random", *evaluate(args, net, start))
    return statistics("eval", *evaluate(args, net, x)) | control


def statistics(name, tasks, batches):
    """{name: (mean return, half its 95 % interval over different tasks)}, both (steps + 1,). Where tasks
    repeat, as two directions do, each has a row of its own and counts the same in the mean."""
    returns = torch.cat([batch.ret for batch in batches], 1)[..., 0].cpu()  # (n, steps + 1)
    kinds, which = tasks.cpu().unique(dim=0, return_inverse=True)
    if 2 * len(kinds) > len(tasks):
        return {name: interval(returns)}
    rows = {}
    for i, kind in enumerate(kinds.tolist()):
        rows[f"{name}/task_" + "_".join(f"{v:g}" for v in kind)] = interval(returns[which == i])
    means, halves = (torch.stack(x) for x in zip(*rows.values()))
    return {name: (means.mean(0), halves.norm(dim=0) / len(kinds))} | rows


def interval(x):
    """The mean over dimension 0 and half the width of its 95 % interval."""
    return x.mean(0), 1.96 * x.std(0) / len(x) ** 0.5


def summary(results):
    """{tag: value} of {row: (mean, half)}."""
    flat = {}
    for name, (means, halves) in results.items():
        for k, (mean, half) in enumerate(zip(means.tolist(), halves.tolist())):
            flat |= {f"{name}/return_{k}": mean, f"{name}/return_{k}_ci95": half}
    return flat


def table(results, args):
    """The adaptation table: return of an episode before and after each inner step."""
    lines = [f"{args.env}, {args.method}: return on {args.eval_tasks} held-out tasks, ± 95 % interval",
             " " * 20 + "".join(f"{k:>10d} steps" for k in range(args.eval_steps + 1))]
    for name, row in results.items():
        lines.append(f"{name:20s}" + "".join(f"{mean:>8.1f} ± {half:<5.1f}" for mean, half in zip(*row)))
    return "\n".join(lines)


def report(args, results, folder, step):
    """Print the table of an evaluation and write eval.json."""
    print(table(results, args))
    write_eval(folder, summary(results) | {"global_step": step, "seed": args.seed})


def film(args, net, x, folder):
    """play.gif: one held-out task before and after an inner step."""
    camera = envs.Camera(make_env(args, args.eval_tasks * args.eval_episodes))
    evaluate(args, net, x, camera)
    print(camera.save(folder / "play.gif", {"before": 0, "after one inner step": 1}))


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
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    env = make_env(args, args.num_tasks // WORLD * args.num_episodes, (RANK, WORLD))
    playable(env)
    net, x, optimizer = build(args, env)
    start = x.clone()  # random, but the same whenever this run is resumed or evaluated
    state, iteration, step = None, 0, 0  # or those of an earlier run
    if path := args.resume or args.evaluate:
        state = load(path)
        x.copy_(state["x"])
        optimizer.load_state_dict(state["optimizer"])
        iteration, step = state["iteration"], state["step"]
    if args.evaluate:
        report(args, evaluate_all(args, net, x, start), state["folder"], step)
        return film(args, net, x, state["folder"]) if args.capture_video else None
    if RANK:  # computes what the first process does, and keeps nothing
        sys.stdout, args = open(os.devnull, "w"), replace(args, run_dir=tempfile.mkdtemp())
        state = state and state | {"folder": Path(args.run_dir)}

    with Run(args, state) as run:
        stop = False
        while not stop:
            logs, returns = meta_update(env, net, x, optimizer, args)
            iteration += 1
            step += args.num_tasks * args.num_episodes * env.horizon * len(returns)
            logs |= {f"adapt/return_{k}": v for k, v in enumerate(returns)}
            logs["charts/episodic_return"] = returns[-1]  # of the adapted policies
            done = step >= args.total_steps
            milestone = done or args.eval_every and iteration % args.eval_every == 0
            stop = done or gather(torch.tensor([run.interrupted])).any()
            if milestone:
                results = evaluate_all(args, net, x, start)
                logs |= summary(results)
            text = f"iteration {iteration}: return {returns[0]:.1f} -> {returns[-1]:.1f}"
            run.log(logs, step, text, milestone)
            if stop or iteration % args.save_every == 0:
                run.save(step, x=x, optimizer=optimizer.state_dict(), iteration=iteration)
        if done:
            report(args, results, run.dir, step)


if __name__ == "__main__" and "__file__" in globals():  # not in a notebook
    train(parse())
