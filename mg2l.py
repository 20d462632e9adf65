"""
MG2L: agents infer the task from what each of them saw alone, and train by what all of them saw together.

  Paper      Zhao, Fu, Chai, Zhu, Zhao: meta multi-agent reinforcement learning by global-to-local task
             inference. IEEE TNNLS 36(8), 2025, DOI 10.1109/TNNLS.2025.3540758.
  Problem    Tasks k = 1..K differ in reward or dynamics; k is never observed. Agent i of n acts on its
             observation o^i and a latent z^i ~ q^i(.|c^i), where its context c^i is a set of B of its own
             transitions (o^i, a^i, r^i, o'^i). Only training may use z ~ q(.|c) of all agents' contexts c.
  Algorithm  first: one episode of each task, or more, with z^i ~ N(0, I), into the rings of contexts
             for each iteration: tasks k_1 .. k_M, side by side
               c: B joint transitions of each task's ring                         (1)  -> Ring.sample()
               x^i = PI{E_tran(c^i)}, z ~ q(.|PI{x^1..x^n}), z^i ~ q^i(.|x^i)     (2)  -> encode()
               PI{x} = Wo (sum_t softmax_t(Wa x_t) Wv x_t) + bo, for any order    (3)  -> pool()
               one episode of pi^i(a|o^i, z^i); beside it some with z^i ~ N(0, I), which go to the rings
               A: generalised advantages of V^i(o^1..o^n, z)                      (4)  -> gae()
               returns are normalised by running moments                          (5)  -> ValueNorm.update()
               L_V = mean max(huber(e), huber(e clipped)), also through z         (6)  -> critic_loss()
               L_pi = -mean min(ratio A, clip(ratio) A) - 0.01 entropy            (7)  -> actor_loss()
               epochs of Adam on (6) and (7), and of AdamW on the encoder by (6)  (8)  -> ppo_update()
               U times: a query z_m for each k_m, a key for each of the K tasks,
                 L_G = -mean log softmax_k(<z_m, z_k>) at k = k_m                 (9)  -> info_nce()
                 L_L = the same for the pairs [sg z, z^i], agent by agent         (10) -> local_loss()
                 AdamW on L_G + L_L + alpha (KL(q || N) + KL(q^i || N))           (11) -> encoder_losses()
             test: episodes with z^i ~ N(0, I), then each agent infers z^i from
             its own transitions of the first s of them, and plays one more       (12) -> meta_test()
             MA-PEARL: z^i ~ prod_t N(E_tran(c^i_t)), trained by (6) and the KL   (13) -> product()
             Mix-MATE: z^i_t of a recurrent autoencoder of i's episode so far     (14) -> mate_loss()
  Symbols    o^i  obs     (n, T, M, O)    c    context  (n, M, B, F)     z    zc  (M, C)
             a^i  action  (n, T, M[, A])  x^i  x        (n, M, H)        z^i  zi  (n, M, C)
             n agents, M episodes, T steps, K tasks, B transitions, F = 2 O + A + 1, C and H units.
  Methods    --method mg2l | none (no latent) | task-given (k for both latents) | global-only (actors get z) |
             pearl | mate.  --local-loss joint | own | kl, eq. (10).  --pool pia | mean | poe and --n-blocks 2
             (attention before it), eq. (3).  --encoder-updates 0: z by critics alone.  --priority, eq. (1).
  Departures [D1] The paper was not open to us. What stands here follows the authors' released code, a third
                  party's notes on the paper, and where both are silent our choice; no number of the paper is
                  known. Test protocol, baselines, ablations were never released: eqs. (12)-(14) are ours.
             [D2] The released code pools agents before time, so that z^i is made of one transition of all
                  agents; its local loss mixes agents; its weights of gain 0.01 have no gradient; its KL has
                  rho for ln sigma; its Huber loss is 0 below -10; its surrogate counts twice for two action
                  numbers; latents are drawn anew at every step, so that ratios do not begin at 1. We differ
                  in all of this; --as-coded restores it, for comparison.
             [D3] Without --paper: smaller actors and critics, fewer epochs, larger steps. Of gather only a
                  film was published: sizes are ours, and its agents share networks that begin with an eye.
             [D4] The paper's contexts, of ten episodes in a ring, are learned by heart: on new ones z tells
                  spread's task no better than chance. In quick runs of spread and hunting the encoder learns
                  alone at first, rings are larger and fed in every iteration, queries come from 1 to 32
                  episodes, keys are means of several contexts, alpha is 0.003, E_tran has two hidden layers
                  and is one for all agents, as in the paper (else one agent's may stay blind: z has the
                  other's), latents are of 16 numbers, lest they drown the observation. In all runs but those
                  as coded sigma starts small: noise drowns scores.
             [D5] z is drawn once an episode; all agents step at once, and each critic step takes the encoder
                  along; V counts at the horizon; an early end is a mask, not a reset; tasks are stratified.
             [D6] Attention has no biases. Mix-MATE's mixer weighs the errors of all agents' latents, not of
                  a sampled one, which gives it no gradient; it shares AdamW and alpha with the rest.
  Run        python mg2l.py --env spread                          # three minutes
             python mg2l.py --env spread --method task-given
             python mg2l.py --env spread --method none
             python mg2l.py --env spread --method global-only
             python mg2l.py --env spread --method pearl
             python mg2l.py --env spread --method mate
             python mg2l.py --env spread --local-loss joint
             python mg2l.py --env spread --as-coded
             python mg2l.py --env hunting
             python mg2l.py --env spread --paper                  # the authors' sizes, 1000 iterations
             python mg2l.py --env cheetah_dir                     # five minutes
             python mg2l.py --env hopper_param
             python mg2l.py --env rware                           # half an hour
             python mg2l.py --env gather
             python mg2l.py --evaluate runs/x/checkpoint.pt --capture-video    # latents.png and play.gif
  Expect     spread, seeds 1, 2, 3, after 8 episodes of the prior: return -81, -102, -106 (by hand: random
             -284, without knowing the task -113, knowing it -17); by the means of q^i -79, -98, -104; the
             prior's own episodes -197, -201, -211. Of new trials one agent's z^i tells the task in 0.95,
             0.95, 0.97 (chance 0.33) and z in 0.99; after a single episode z^i tells 0.60 to 0.67. 190 s of
             one core. Means of three seeds: -96; task-given -70, global-only -83, joint -122, pearl -136,
             none -141, as coded -147, its z^i at chance. hunting: 118 (random -43, by hand 238); task-given
             164, global-only 110, pearl 104, none 76, joint 28, as coded 9.
             One seed, half an hour, the prior's return, after 8 episodes, and how often z^i tells the task:
             cheetah_dir --total-steps 7600000 --decay 7600000 -126, 263, 0.92 (of 2); rware 2.0, 2.6, 0.74
             (of 5); hopper_param --total-steps 2500000 --decay 2500000 56, 200, and 0.11 (of 10): chance.
  Licence    MIT. Please cite the paper above for the method.
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
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

# Threads that wait do not spin, large pages for torch, and no freed memory given back by glibc.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(Exception):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import envs

# ================================================================ 0. Arguments
Env = Literal["spread", "spread_large", "hunting", "hunting_large", "cheetah_dir", "hopper_param", "rware",
              "gather"]
Method = Literal["mg2l", "none", "task-given", "global-only", "pearl", "mate"]

# What an argument left at None becomes: with --paper the authors' value, else the quick one, ours. [D3]
COMMON = dict(num_envs=32, context_envs=4, hidden=256, latent_dim=64, ppo_epochs=15, minibatches=1, lr=5e-4,
              encoder_lr=5e-4, encoder_units=64, encoder_layers=1, kl_coef=0.1, local_loss="joint", mix="all",
              keys=1, warm_up=0, share_params=False, share_tran=False, horizon=100, iterations=1000,
              eval_every=50, save_every=25, eval_episodes=16, eval_context=None, num_threads=1)
PAPER = {
    "spread": dict(context_size=100, encoder_updates=50, ring_size=10),
    "hunting": dict(context_size=32, encoder_updates=20, ring_size=5),
    "cheetah_dir": dict(context_size=512, encoder_updates=20, ring_size=20, horizon=1000),
    "hopper_param": dict(context_size=512, encoder_updates=20, ring_size=20, horizon=1000),
    "rware": dict(context_size=64, encoder_updates=20, ring_size=20),
    "gather": dict(context_size=32, encoder_updates=10, ring_size=3, num_envs=8, ppo_epochs=5, hidden=64,
                   share_params=True),
}
TEAM = dict(hidden=64, latent_dim=16, ppo_epochs=8, lr=1e-3, encoder_lr=2e-3, encoder_layers=2,
            share_tran=True, kl_coef=0.003, local_loss="own", mix="few", keys=8, context_envs=64,
            context_size=100, encoder_updates=10, ring_size=500, warm_up=100, iterations=500,
            eval_episodes=64, eval_context=400)
ROBOTS = dict(num_envs=16, horizon=200, ppo_epochs=5, minibatches=4, context_size=64, encoder_updates=10,
              ring_size=20, iterations=300)
QUICK = {"spread": TEAM, "hunting": TEAM, "cheetah_dir": ROBOTS, "hopper_param": ROBOTS,
         "rware": dict(hidden=128, share_params=True, ppo_epochs=5, minibatches=4, encoder_updates=10,
                       iterations=1400),
         "gather": dict(iterations=100)}
for presets in PAPER, QUICK:
    presets |= {"spread_large": presets["spread"], "hunting_large": presets["hunting"]}


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
    method: Method = "mg2l"
    """what the actors and critics are told about the task; see Methods above"""
    local_loss: Optional[Literal["joint", "own", "kl"]] = None
    """eq. (10): scores of the pair (z, z^i), of z^i alone, or KL(q(z|c) || q^i(z^i|c^i))"""
    as_coded: bool = False
    """the released mathematics with its faults, for one comparison; see [D2]"""
    paper: bool = False
    """the authors' sizes instead of quick ones"""
    pool: Literal["pia", "mean", "poe"] = "pia"
    """eq. (3): attention, the plain mean, or a product of Gaussians (precisions as weights, per number)"""
    n_blocks: int = 0
    """blocks of self-attention among the transitions, or the agents, before each pool; the paper draws 2"""
    priority: bool = False
    """draw contexts again in proportion to the weights of eq. (3), agent by agent"""
    share_params: Optional[bool] = None
    """one network for all agents instead of one each, with convolutions before it where agents see pictures;
    default: in gather, and in a quick rware"""
    num_envs: Optional[int] = None
    """M, episodes of an iteration that train actors and critics"""
    context_envs: Optional[int] = None
    """episodes beside them that are played by the prior, to fill the rings"""
    horizon: Optional[int] = None
    """T, steps of an episode"""
    context_size: Optional[int] = None
    """B, transitions in a context"""
    ring_size: Optional[int] = None
    """episodes that the ring of a task holds, eq. (1)"""
    mix: Optional[Literal["all", "few"]] = None
    """whether queries and keys come from all episodes of a ring, or each from 1 to 32 of them [D4]"""
    keys: Optional[int] = None
    """J, contexts of each task whose mean latent is the key in eqs. (9) and (10) [D4]"""
    hidden: Optional[int] = None
    """units in both hidden layers of actors and critics"""
    latent_dim: Optional[int] = None
    """C, numbers in z and in z^i"""
    share_tran: Optional[bool] = None
    """one E_tran for all agents, as the paper has it, not one each, as the released code: [D4]"""
    encoder_units: Optional[int] = None
    """H, units in all layers of the encoder"""
    encoder_layers: Optional[int] = None
    """hidden layers of E_tran, eq. (2)"""
    encoder_updates: Optional[int] = None
    """U, steps on eq. (11) in an iteration; 0: the encoder learns from the critics alone"""
    warm_up: Optional[int] = None
    """iterations at first in which all rows are played by the prior and only the encoder learns [D4]"""
    encoder_lr: Optional[float] = None
    """step size of AdamW, eqs. (8) and (11)"""
    kl_coef: Optional[float] = None
    """weight of the KL terms in eq. (11)"""
    ppo_epochs: Optional[int] = None
    """passes over an iteration's episodes, eq. (8)"""
    minibatches: Optional[int] = None
    """parts, by episodes, into which a pass is cut"""
    lr: Optional[float] = None
    """step size of Adam for actors and critics, eq. (8)"""
    decay: Optional[int] = None
    """step sizes fall linearly to 0 at 95 % of so many transitions; 0: never; default: the preset's run"""
    gamma: float = 0.99
    """discount, in [0, 1], eq. (4)"""
    gae_lambda: float = 0.95
    """lambda of eq. (4)"""
    clip_coef: float = 0.2
    """ratios stay in 1 -+ this in eq. (7), new values within this of the old ones in eq. (6)"""
    ent_coef: float = 0.01
    """weight of the entropy in eq. (7)"""
    max_grad_norm: float = 10.0
    """each agent's gradient of actor and of critic is clipped to this norm"""
    eval_context: Optional[int] = None
    """B in an evaluation: pooling takes any number; default: --context-size"""
    eval_tasks: int = 10
    """tasks of each split in an evaluation: the first ones, or all if there are fewer"""


def resolve(args):
    """Fill what was left at None and refuse what cannot be."""
    if args.env not in PAPER:
        fail(f"--env must be one of {', '.join(PAPER)}, not {args.env}: it needs a finite set of tasks")
    preset = COMMON | PAPER[args.env] | ({} if args.paper else QUICK[args.env])
    released = dict(local_loss="joint", mix="all", keys=1, kl_coef=0.1, encoder_layers=1, share_tran=False)
    preset |= released if args.as_coded else {}
    iterations = preset.pop("iterations")
    if args.method not in WITH_CONTEXT:  # nobody would read the rings
        args.context_envs = 0
    if args.method not in CONTRASTIVE:
        args.warm_up = 0
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_context = args.eval_context or args.context_size
    for name in "total_steps", "decay":
        if getattr(args, name) is None:
            setattr(args, name, iterations * steps_per_iteration(args))
    for name in ("num_envs", "horizon", "context_size", "ring_size", "hidden", "latent_dim", "ppo_epochs",
                 "minibatches", "eval_tasks", "eval_context", "keys", "encoder_units", "encoder_layers",
                 "num_threads", "save_every", "total_steps"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("encoder_updates", "warm_up", "n_blocks", "kl_coef", "ent_coef", "decay", "seed"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(args, name)}")
    for name in ("lr", "encoder_lr", "clip_coef", "max_grad_norm"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.method in WITH_CONTEXT and args.context_envs < 1:
        fail("--context-envs 0 leaves the rings of contexts empty; it must be at least 1")
    if args.eval_episodes < 2:
        fail(f"--eval-episodes must be at least 2, not {args.eval_episodes}: a query and a key")
    if args.num_envs % args.minibatches:
        fail(f"--num-envs {args.num_envs} episodes do not divide into {args.minibatches} minibatches")
    if args.encoder_units % HEADS and args.n_blocks:
        fail(f"--encoder-units {args.encoder_units} does not divide among the {HEADS} heads of --n-blocks")
    same = args.method == "mg2l" and all(getattr(args, k) == v for k, v in released.items())
    if args.as_coded and (not same or args.n_blocks or args.priority):
        fail("--as-coded is one method: it takes no other --method, loss, pool, blocks, keys or --priority")
    return args


def steps_per_iteration(args):
    return (args.num_envs + args.context_envs) * args.horizon


# ================================================================ 1. Environment
def make_env(args, num_envs):
    # The contract (envs/__init__.py); bring your own worlds by returning an object with these members:
    #   num_envs B, horizon, num_agents n, obs_dims and action_dims (all agents' the same), discrete, device
    #   all_tasks(split) -> (K, D);  reset(task (B, D)) -> obs, n times (B, O)
    #   step(n times (B, A) or (B,)) -> obs, reward (B, n), terminated (B,), truncated (B,), info
    #   optional: render(row) -> (H, W, 3) uint8
    try:
        env = envs.make(args.env, num_envs, horizon=args.horizon, device=args.device)
    except (ImportError, ValueError) as e:  # an ImportError says which package to install
        fail(e)
    if len(set(env.obs_dims)) > 1 or len(set(env.action_dims)) > 1:
        fail(f"{args.env}: agents must see and act alike, but observe {tuple(env.obs_dims)} and act with "
             f"{tuple(env.action_dims)} numbers")
    if len(env.all_tasks()) < 2:
        fail(f"{args.env} has one task only: there is nothing to infer")
    return env


# ================================================================ 2. Networks
# A network is a dict of tensors. What every agent has for itself is stacked, agents first: weights
# (G, in, out) with G = n, or G = 1 when all agents share them, and one batched product serves all agents.
# Layer norms carry no scale and shift of their own into the data: these are folded into the weights of the
# linear layer that follows, which is the same function and spares two passes over the activations.
HEADS, MIX = 4, 32  # heads of self-attention; the most episodes in a context of `few`
PICTURE = (15, 15, 5)  # what an agent sees in gather
WITH_CONTEXT = ("mg2l", "global-only", "pearl")
CONTRASTIVE = ("mg2l", "global-only")


def linear(x, w, b):
    """x (n or 1, R, in), w (G, in, out), b (G, 1, out) -> (max(n, G), R, out)."""
    n = max(len(x), len(w))
    return torch.baddbmm(b, x.expand(n, -1, -1), w.expand(n, -1, -1))


def normed(p, l, x):
    """LayerNorm, then layer l, as (x normed, w, b) for linear()."""
    w = p[f"w{l}"]
    return F.layer_norm(x, x.shape[-1:]), p[f"scale{l}"] * w, p[f"shift{l}"] @ w + p[f"b{l}"]


def mlp(p, x):
    """LayerNorm -> Linear -> ReLU -> LayerNorm -> Linear -> ReLU -> LayerNorm -> Linear."""
    for l in range(2):
        x = linear(*normed(p, l, x)).relu()
    return linear(*normed(p, 2, x))


def orthogonal(shape, gain):
    w = torch.empty(shape)
    for part in w.view(-1, *shape[-2:]):
        torch.nn.init.orthogonal_(part, gain)
    return w


def make_mlp(G, sizes, head_gain):
    p = {}
    for l, (n, m) in enumerate(zip(sizes, sizes[1:])):
        p |= {f"w{l}": orthogonal((G, n, m), head_gain if l == 2 else math.sqrt(2)),
              f"b{l}": torch.zeros(G, 1, m), f"scale{l}": torch.ones(G, n, 1),
              f"shift{l}": torch.zeros(G, 1, n)}
    return p


def make_eye(channels=(PICTURE[-1], 16, 32)):
    """Two 3 x 3 convolutions, the same for all agents: the other networks' first layers, where they see
    pictures."""
    return {f"eye{l}": orthogonal((1, m, 9 * n), math.sqrt(2)) for l, (n, m) in
            enumerate(zip(channels, channels[1:]))}


def see(p, obs):
    """Observations (n, R, O) as they are or, with an eye, pictures as (n, R, 288) numbers."""
    if "eye0" not in p:
        return obs
    x = obs.reshape(-1, *PICTURE).movedim(-1, 1)
    for w in p["eye0"], p["eye1"]:
        x = F.conv2d(x, w.view(w.shape[1], -1, 3, 3), stride=2).relu()
    return x.reshape(*obs.shape[:2], -1)


def make_actor(G, inputs, hidden, actions, discrete):
    head = {} if discrete else {"log_std": torch.zeros(G, 1, actions)}
    return make_mlp(G, [inputs, hidden, hidden, actions], 0.01) | head


def actor(p, obs, zi):
    """Means or logits (n, R, A) at observations (n, R, O) and latents (n or 1, R, C)."""
    return mlp(p, torch.cat([see(p, obs), zi.expand(len(obs), -1, -1)], -1))


def critic(p, obs, zc):
    """Normalised values (n, R) at all agents' observations (n, R, O) and latents (n or 1, R, C)."""
    joint = see(p, obs).transpose(0, 1).flatten(1).expand(len(zc), -1, -1)  # (., R, n O), the same for all
    value = mlp(p, torch.cat([joint, zc], -1))[..., 0]
    return value.expand(len(obs), -1)


def log_prob_entropy(p, out, action):
    """log pi(action) and the entropy, (n, R) each, of a network's output (n, R, A)."""
    if "log_std" not in p:
        log_pi = out.log_softmax(-1)
        return log_pi.gather(-1, action[..., None])[..., 0], -(log_pi.exp() * log_pi).sum(-1)
    log_std = p["log_std"]
    log_prob = -0.5 * ((action - out) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    return log_prob.sum(-1), entropy.expand(out.shape[:-1])


# ---- the encoder
def make_encoder(G, features, C, args):
    """E_tran (unless shared) and the local maps stand once for each agent, pools and heads of sigma once."""
    gain = 0.01 if args.as_coded else 1.0  # [D2]
    p, H = {}, args.encoder_units
    tran = [features, *[H] * args.encoder_layers, 2 * C if args.method == "pearl" else H]
    for name, g, sizes in ("tran", 1 if args.share_tran else G, tran), ("local", G, [H, H, C]):
        for l, (n, m) in enumerate(zip(sizes, sizes[1:])):
            p |= {f"{name}.w{l}": orthogonal((g, n, m), gain), f"{name}.b{l}": torch.zeros(g, 1, m)}
            if l:
                p |= {f"{name}.scale{l}": torch.ones(g, n, 1), f"{name}.shift{l}": torch.zeros(g, 1, n)}
    for name, out in ("agg", H), ("glob", C):
        p |= {f"{name}.wa": orthogonal((H, H if args.pool == "poe" else 1), gain),
              f"{name}.wv": orthogonal((H, H), gain), f"{name}.bv": torch.zeros(H),
              f"{name}.wo": orthogonal((H, out), gain), f"{name}.bo": torch.zeros(out)}
        for l in range(args.n_blocks):
            p |= {f"{name}.{l}.qkv": orthogonal((H, 3 * H), 1.0), f"{name}.{l}.o": orthogonal((H, H), 1.0),
                  f"{name}.{l}.f0": orthogonal((H, H), 1.0), f"{name}.{l}.f1": orthogonal((H, H), 1.0)}
    for name in "rho_g", "rho_l":  # as torch's default layer
        p |= {f"{name}.w": (2 * torch.rand(C, C) - 1) / math.sqrt(C),
              f"{name}.b": (2 * torch.rand(C) - 1) / math.sqrt(C) - (0 if args.as_coded else 4)}  # [D4]
    return p


def under(p, name):
    """The part of a dict whose names begin with `name.`, without that."""
    return {k.removeprefix(f"{name}."): v for k, v in p.items() if k.startswith(f"{name}.")}


def gelu_mlp(p, x):
    """Linear -> GELU -> LayerNorm -> ... -> Linear of x (n, R, in) but for the last product: the arguments
    of its linear(), (n, R, C), (G, C, out), (G, 1, out)."""
    x = F.gelu(linear(x, p["w0"], p["b0"]))
    for l in range(1, last := sum(k[0] == "w" for k in p) - 1):
        x = F.gelu(linear(*normed(p, l, x)))
    return normed(p, last, x)


def attend(p, x):
    """One block of self-attention over dimension -2 of (..., S, C), without positions: any order will do."""
    C, norm = x.shape[-1], lambda x: F.layer_norm(x, x.shape[-1:])
    q, k, v = ((x @ p["qkv"]).unflatten(-1, (3, HEADS, C // HEADS)).movedim(-3, 0).transpose(-3, -2))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)  # (..., S, C)
    x = norm(x + mixed @ p["o"])
    return norm(x + norm(F.gelu(x @ p["f0"])) @ p["f1"])


def pool(p, x, kind="pia", last=None):
    """eq. (3) over dimension -2: a set (..., S, C) -> (..., C), and the weights (..., S). As the weights sum
    to 1, linear maps of the elements commute with the sum: Wv comes after it, and so does `last` = (w, b), a
    layer (n, C, C) that the elements (n, R, S, C) still have to pass: S times less to multiply."""
    blocks = sum(name.endswith(".qkv") for name in p)
    if last and (blocks or kind == "poe"):
        x, last = (x.flatten(1, 2) @ last[0] + last[1]).view_as(x), None
    for l in range(blocks):
        x = attend(under(p, str(l)), x)
    score = x @ (p["wa"] if last is None else (last[0] @ p["wa"])[:, None])  # (..., S, 1); poe: (..., S, C)
    if kind == "poe":  # the mean of the product of Gaussians N(Wv x_t + bv, 1 / tau_t), number by number
        weight = F.softplus(score) / F.softplus(score).sum(-2, keepdim=True)
        y = (weight * (x @ p["wv"] + p["bv"])).sum(-2)
        return y @ p["wo"] + p["bo"], weight.mean(-1)
    weight = torch.full_like(score, 1 / x.shape[-2]) if kind == "mean" else score.softmax(-2)
    y = (weight.mT @ x)[..., 0, :]
    y = linear(y, *last) if last else y
    return (y @ p["wv"] + p["bv"]) @ p["wo"] + p["bo"], weight[..., 0]


class Latent(NamedTuple):
    """What R contexts say: the parameters of q(z|c) and of q^i(z^i|c^i)."""

    mu_g: torch.Tensor  # (R, C)
    sd_g: torch.Tensor
    mu_l: torch.Tensor  # (n, R, C)
    sd_l: torch.Tensor
    weight: torch.Tensor  # (n, R, B), of the transitions in eq. (3)

    def sample(self, eps_g, eps_l):
        """z (R, C) and z^i (n, R, C) from standard normal numbers of the same shapes."""
        return self.mu_g + self.sd_g * eps_g, self.mu_l + self.sd_l * eps_l


def encode(p, context, args):
    """eq. (2): context (n, R, B, F) -> Latent. The local path starts from constants: neither eq. (10) nor the
    actors reach what z is made of."""
    n, R, B, _ = context.shape
    tran, agg, glob = (under(p, name) for name in ("tran", "agg", "glob"))
    x = context.flatten(1, 2)
    if "eye0" in tran:
        O = math.prod(PICTURE)
        x = torch.cat([see(tran, x[..., :O]), x[..., O:-O], see(tran, x[..., -O:])], -1)
    e, *last = gelu_mlp(tran, x)  # (n, R B, H), and what is still to be done to it
    if args.method == "pearl":
        return product(linear(e, *last).unflatten(1, (R, B)))
    if args.as_coded:  # [D2] agents are pooled first; z^i is made of one transition, the i-th, of all agents
        u, _ = pool(agg, linear(e, *last).unflatten(1, (R, B)).movedim(0, -2), args.pool)  # (R, B, H)
        mu_g, weight = pool(glob, u, args.pool)
        x, weight = u[:, :n].transpose(0, 1), weight.expand(n, -1, -1)
    else:
        x, weight = pool(agg, e.unflatten(1, (R, B)), args.pool, last)  # (n, R, H)
        mu_g, _ = pool(glob, x.transpose(0, 1), args.pool)  # (R, C)
    sigma = lambda name, mu: F.softplus(mu @ p[f"{name}.w"] + p[f"{name}.b"])
    mu_l = linear(*gelu_mlp(under(p, "local"), x.detach()))
    return Latent(mu_g, sigma("rho_g", mu_g), mu_l, sigma("rho_l", mu_l), weight)


def product(e):
    """eq. (13): N(mu, sd^2) proportional to prod_t N(mu_t, 1 / tau_t) of e (n, R, B, 2C) = [mu_t, rho_t],
    tau = softplus(rho); there is no z of all agents."""
    mu, tau = e[..., : e.shape[-1] // 2], F.softplus(e[..., e.shape[-1] // 2 :])
    total = tau.sum(-2)
    mean, sd = (tau * mu).sum(-2) / total, total.rsqrt()
    return Latent(mean.mean(0), sd.mean(0), mean, sd, tau.mean(-1) / tau.mean(-1).sum(-1, keepdim=True))


def latents(p, context, eps, args):
    """z^i for the actors (n, R, C), a constant, and z for the critics (1 or n, R, C), of R contexts and
    standard normal numbers eps = (R, C), (n, R, C)."""
    z, zi = encode(p, context, args).sample(*eps)
    if args.method == "pearl":
        return zi.detach(), zi
    return (z.expand_as(zi) if args.method == "global-only" else zi).detach(), z[None]


# ================================================================ 3. Rollout
# All episodes of an iteration are one batch of R = M + context_envs rows; the last rows are played by the
# prior and fill the rings. A row keeps its latents for the whole episode [D5]. No graph is recorded while
# playing: z^i is data for the actors; the critics' z is computed anew from `context` and `eps` in eq. (8).
class Play(NamedTuple):
    obs: torch.Tensor  # (n, T + 1, R, O)
    action: torch.Tensor  # (n, T, R, A), or (n, T, R) where actions are numbers of choices
    logprob: torch.Tensor  # (n, T, R)
    reward: torch.Tensor  # (n, T, R), 0 after the end
    alive: torch.Tensor  # (T, R), 1 up to and with the last step of the episode
    ended: torch.Tensor  # (T, R), 1 where it ended for good, not by the horizon
    zi: torch.Tensor  # (n or 1, T, R, .), what the actors were told
    zc: torch.Tensor  # (n or 1, T + 1, R, .), what the critics are told


def randn(*shape, device):
    """Standard normal numbers from torch's global CPU stream, the same on every device."""
    return torch.randn(shape).to(device)


def constant(zi, zc):
    """The latents of rollout() for rows that keep theirs: (n or 1, R, .) each."""
    return lambda obs, action, reward: (zi, zc)


@torch.no_grad()
def rollout(env, theta, tasks, latent, frames=None, frame_rows=(0,)):
    """One episode in each row; tasks (R, D). latent(obs, action, reward) -> z^i, z is asked at every step and
    told the step before (None at first). frames: a list that receives pictures of some rows at each step."""
    obs, discrete = torch.stack(tuple(env.reset(tasks))), env.discrete  # (n, R, O)
    n, R, A, steps = len(obs), env.num_envs, env.action_dims[0], []
    noise = torch.rand(env.horizon, n, R, A).log_().neg_() if discrete else torch.randn(env.horizon, n, R, A)
    noise, alive, action, reward = noise.to(obs.device), torch.ones(R, device=obs.device), None, None
    for t in range(env.horizon):
        zi, zc = latent(obs, action, reward)
        out = actor(theta, obs, zi)
        action = (out - noise[t].log()).argmax(-1) if discrete else out + theta["log_std"].exp() * noise[t]
        logprob = log_prob_entropy(theta, out, action)[0]
        after, reward, terminated, _, _ = env.step(tuple(action))
        reward, ended = reward.T * alive, terminated.float() * alive
        steps.append((obs, action, logprob, reward, alive, ended, zi, zc))
        obs, alive = torch.stack(tuple(after)), alive - ended
        if frames is not None:
            frames.append([env.render(r) for r in frame_rows])
        if not alive.any():
            break
    *columns, zs, zcs = zip(*steps)
    last = latent(obs, action, reward)[1]
    obs_, action_, logprob_, reward_ = (torch.stack(x, 1) for x in columns[:4])
    return Play(torch.cat([obs_, obs[:, None]], 1), action_, logprob_, reward_, torch.stack(columns[4]),
                torch.stack(columns[5]), torch.stack(zs, 1), torch.stack([*zcs, last], 1))


def transitions(play, choices=None):
    """(o, a, r, o') of every step, (n, T, R, F); choices: A, if actions are numbers of choices."""
    action = F.one_hot(play.action, choices).float() if choices else play.action
    return torch.cat([play.obs[:, :-1], action, play.reward[..., None], play.obs[:, 1:]], -1)


class Ring:
    """The newest `size` episodes of each of K tasks; a transition is that of all agents at one time."""

    def __init__(self, n, K, size, horizon, features, device):
        self.data = torch.zeros(n, K, size, horizon, features, device=device)
        self.length = torch.zeros(K, size, dtype=torch.long)  # of each episode, 0: nothing there yet
        self.next = torch.zeros(K, dtype=torch.long)

    def append(self, tasks, x, length):
        """x (n, T, R, F): row r, an episode of length[r] steps, goes to the ring of tasks[r]."""
        for r, (k, steps) in enumerate(zip(tasks.tolist(), length.long().tolist())):
            slot = self.next[k].item()
            self.data[:, k, slot, :steps] = x[:, :steps, r]
            self.length[k, slot], self.next[k] = steps, (slot + 1) % self.length.shape[1]

    def sample(self, tasks, B, mix):
        """eq. (1): (n, R, B, F), drawn with replacement; all agents' transitions are of the same times. Those
        of a row come from all episodes of its ring, or, for mix "few", from 1, 2, 4 .. or 32 of them [D4]."""
        tasks, filled = tasks.cpu(), (self.length > 0).sum(1)
        if empty := [k for k in tasks.tolist() if not filled[k]]:
            raise ValueError(f"the ring of task {empty[0]} is empty: no episode of it has been played yet")
        R, filled = len(tasks), filled[tasks, None]
        if mix == "few":
            chosen = (torch.rand(R, MIX) * filled).long()  # (R, MIX)
            several = 2 ** torch.randint(MIX.bit_length(), (R, 1))
            episode = chosen.gather(1, (torch.rand(R, B) * several).long())
        else:
            episode = (torch.rand(R, B) * filled).long()
        at = (torch.rand(R, B) * self.length[tasks[:, None], episode]).long()
        _, _, size, H, _ = self.data.shape
        index = ((tasks[:, None] * size + episode) * H + at).flatten().to(self.data.device)
        return self.data.flatten(1, 3).index_select(1, index).unflatten(1, (R, B))


def draw_context(p, sample, B, args):
    """A context from sample(B) -> (n, R, B, F). With --priority each agent draws B of 4 B transitions again,
    in proportion to its own weights in eq. (3)."""
    if not args.priority:
        return sample(B)
    many = sample(4 * B)
    with torch.no_grad():
        weight = encode(p, many, args).weight.flatten(0, 1)  # (n R, 4 B)
    index = torch.multinomial(weight.cpu(), B, replacement=True).to(many.device)
    return many.flatten(0, 1)[torch.arange(len(index), device=many.device)[:, None], index].unflatten(
        0, many.shape[:2])


# ================================================================ 4. Objectives
# Pure functions of tensors. Scores of eqs. (9) and (10) are plain dot products of sampled latents, without
# temperature. Each of the M queries meets the same K keys, one a task, instead of K keys of its own: the same
# expectation, and K + M contexts to encode instead of M (K + 1). As queries' tasks are uniform, log K - L_G
# is a lower bound of the mutual information between z and the task.
def info_nce(scores, tasks):
    """eq. (9): scores (..., M, K) of queries and keys, tasks (M,) the right ones -> loss and accuracy."""
    tasks = tasks.expand(scores.shape[:-1])
    loss = F.cross_entropy(scores.flatten(0, -2), tasks.flatten())
    return loss, (scores.argmax(-1) == tasks).float().mean()


def local_loss(z, z_key, zi, zi_key, tasks, kind="joint"):
    """eq. (10): z (M, C), z_key (K, C), zi (n, M, C), zi_key (n, K, C) -> loss, and accuracies of the pair
    (z, z^i) and of z^i alone. z is frozen: in kind `joint` only what z^i adds to it is learned."""
    own = zi @ zi_key.mT  # (n, M, K)
    pair = (z @ z_key.T).detach() + own  # of two concatenations: dot products add
    loss, accuracy = info_nce(pair, tasks)
    alone, accuracy_own = info_nce(own, tasks)
    return alone if kind == "own" else loss, accuracy, accuracy_own


def kl_standard(mu, sd):
    """KL(N(mu, sd^2) || N(0, 1)), the mean over all numbers."""
    return 0.5 * (mu**2 + sd**2 - 2 * sd.log() - 1).mean()


def kl_distil(mu, sd, mu_i, sd_i):
    """eq. (10), kind kl: KL(N(mu, sd^2) || N(mu_i, sd_i^2)), z's side frozen, the mean over all numbers."""
    mu, sd = mu.detach(), sd.detach()
    return ((sd_i / sd).log() + (sd**2 + (mu - mu_i) ** 2) / (2 * sd_i**2) - 0.5).mean()


def gae(reward, value, alive, ended, gamma, gae_lambda):
    """eq. (4): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, without what follows an
    end; the horizon is no end, there V_T counts [D5]. reward (n, T, M), value (n, T + 1, M), flags (T, M)."""
    assert value.shape[1] == reward.shape[1] + 1 and alive.shape == ended.shape == reward.shape[1:]
    delta = (reward + gamma * (1 - ended) * value[:, 1:] - value[:, :-1]) * alive
    adv, acc = torch.empty_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        acc = adv[:, t] = delta[:, t] + gamma * gae_lambda * (1 - ended[t]) * acc
    return adv


class ValueNorm:
    """eq. (5): running mean and mean square of each agent's returns, with Adam's correction of the start."""

    def __init__(self, n, device):
        self.mean, self.square = torch.zeros(2, n, 1, device=device)
        self.weight = torch.zeros((), device=device)  # sum of the weights so far, below 1

    def update(self, ret, weight, beta=0.99999):
        """ret (n, R), weight (R,) that sums to 1."""
        self.mean.lerp_((ret * weight).sum(1, keepdim=True), 1 - beta)
        self.square.lerp_((ret**2 * weight).sum(1, keepdim=True), 1 - beta)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - beta)

    def moments(self):
        mean = self.mean / self.weight.clamp(min=1e-5)
        sd = (self.square / self.weight.clamp(min=1e-5) - mean**2).clamp(min=1e-2).sqrt()
        return mean, sd  # (n, 1) each

    def norm(self, x):
        mean, sd = self.moments()
        return (x - mean) / sd

    def denorm(self, x):
        mean, sd = self.moments()
        return x * sd + mean


def huber(e, delta=10.0, one_sided=False):
    """e^2 / 2 up to delta, then linear. one_sided: 0 below -delta, as the released code has it [D2]."""
    loss = F.huber_loss(e, torch.zeros_like(e), reduction="none", delta=delta)
    return torch.where(e < -delta, 0.0, loss) if one_sided else loss


def critic_loss(value, old, target, weight, clip_coef, one_sided=False):
    """eq. (6), for each agent: normalised values, those of before the update and normalised returns (n, R),
    weight (R,) -> (n,)."""
    clipped = old + (value - old).clamp(-clip_coef, clip_coef)
    plain, cut = (huber(target - v, one_sided=one_sided) for v in (value, clipped))
    return (torch.maximum(plain, cut) * weight).sum(1)


def actor_loss(logprob, old, adv, entropy, weight, clip_coef, ent_coef, scale=1):
    """eq. (7), for each agent: (n, R) and weight (R,) -> (n,). scale: of the surrogate alone, see [D2]."""
    ratio = (logprob - old).exp()
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv)
    return -((scale * gain + ent_coef * entropy) * weight).sum(1)


# ---- [D2] the released losses of latents: rows of different agents and tasks are paired
def as_coded_losses(z, zi, keys):
    """z (3 parts: query (M, C), positive (M, C), negatives (M, K - 1, C)), zi the same with agents first.
    Returns the global loss, the local one, and the accuracies of z, of the pair, of z^i alone."""
    (zq, zp, zn), (iq, ip, in_) = z, zi
    n, M, C = iq.shape
    dot = lambda a, b: (a * b).sum(-1)
    scores_g = torch.cat([dot(zq, zp)[:, None], dot(zq[:, None], zn)], 1)  # (M, K), the right one first
    tiled = scores_g.detach().repeat(n, 1)  # (M n, K): agent by agent, row by row ...
    rows = lambda x: x.transpose(0, 1).flatten(0, 1)  # (M n, C): ... but this one row by row, agent by agent
    negatives = in_.movedim(0, 2).reshape(M * n, keys - 1, C)  # was (M, K - 1, n, C): agents among the keys
    own = torch.cat([dot(rows(iq), rows(ip))[:, None], dot(rows(iq)[:, None], negatives)], 1)
    right = torch.zeros(M * n, dtype=torch.long, device=zq.device)
    loss_g, acc_g = info_nce(scores_g, right[:M])
    loss_l, acc_pair = info_nce(tiled + own, right)
    return loss_g, loss_l, acc_g, acc_pair, info_nce(own, right)[1]


def kl_as_coded(mu, rho):
    """The released KL: the number before the softplus stands where ln sigma belongs [D2]."""
    return 0.5 * (mu**2 + F.softplus(rho) ** 2 - 2 * rho - 1).mean()


# ================================================================ 5. Update
def clip_by_agent(grads, max_norm):
    """Scales (G, ...) gradients, in place: those of each agent together get norm max_norm at most."""
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)  # (G,)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for g in grads:
        g *= scale.view(-1, *[1] * (g.dim() - 1))
    return norm.mean()


def step(optimizers, loss, groups, max_norm=None):
    """One step on `loss` for the dicts of tensors in `groups`. What the loss does not reach stays, without
    weight decay. max_norm: clips, agent by agent, the gradients of the first group; returns their norm."""
    tensors = [x for p in groups for x in p.values()]
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    for x, g in zip(tensors, grads):
        x.grad = g
    norm = clip_by_agent(grads[: len(groups[0])], max_norm) if max_norm else None
    for o in optimizers:
        o.step()
    return norm


def over_agents(loss, args):
    """(n,) losses to one: separate networks each follow their own, a shared one their mean."""
    return loss.mean() if args.share_params else loss.sum()


@torch.no_grad()
def targets(psi, norm, play, M, args):
    """Of the first M rows: old values (n, T, M), normalised by the moments of now; returns and advantages."""
    n, steps = play.obs.shape[:2]
    old = critic(psi, play.obs[:, :, :M].flatten(1, 2), play.zc[:, :, :M].flatten(1, 2)).view(n, steps, M)
    alive, value = play.alive[:, :M], norm.denorm(old.flatten(1)).view_as(old)
    adv = gae(play.reward[..., :M], value, alive, play.ended[:, :M], args.gamma, args.gae_lambda)
    ret, weight = adv + value[:, :-1], alive / alive.sum()
    mean = (adv * weight).sum((1, 2), keepdim=True)
    sd = ((adv - mean) ** 2 * weight).sum((1, 2), keepdim=True).sqrt()
    return old[:, :-1], ret, (adv - mean) / (sd + 1e-5)


def ppo_update(params, optimizers, norm, play, M, draw, args):
    """eq. (8): all agents at once, actors and critics [D5]; with each step of the critics one of the encoder,
    through their z, made anew of draw = (context, eps) of the M training rows (None: z is what was played).
    Returns {tag: value}."""
    theta, psi, phi = params["theta"], params["critic"], params["encoder"]
    old, ret, adv = targets(psi, norm, play, M, args)
    T, logs = old.shape[1], {}
    scale = play.action.shape[-1] if args.as_coded and "log_std" in theta else 1  # [D2]
    for _ in range(args.ppo_epochs):
        order = torch.randperm(M) if args.minibatches > 1 else torch.arange(M)
        for rows in order.to(old.device).chunk(args.minibatches):
            part = lambda x, rows=rows: x[:, :T, rows].flatten(1, 2)  # (n, T, R, ...) -> (n, T m, ...)
            obs, zi, zc, target = part(play.obs), part(play.zi), part(play.zc), part(ret)
            weight = (play.alive[:, rows] / play.alive[:, rows].sum()).flatten()
            context, eps = draw or (None, None)
            if draw and args.as_coded:
                eps = [torch.randn_like(x, device="cpu").to(x.device) for x in eps]
            norm.update(target, weight)
            if draw:
                eps = [x[..., rows, :] for x in eps]
                fresh, z = (x[:, None].expand(-1, T, -1, -1).flatten(1, 2)
                            for x in latents(phi, context[:, rows], eps, args))
                zc, zi = z, fresh if args.as_coded else zi
            logprob, entropy = log_prob_entropy(theta, actor(theta, obs, zi), part(play.action))
            loss = actor_loss(logprob, part(play.logprob), part(adv), entropy, weight, args.clip_coef,
                              args.ent_coef, scale)
            ratio = (logprob.detach() - part(play.logprob)).exp()
            if not logs:
                logs["losses/first_ratio_sd"] = ratio.std()
            logs["grad/norm_actor"] = step([optimizers["theta"]], over_agents(loss, args), [theta],
                                           args.max_grad_norm)
            value = critic(psi, obs, zc)
            v_loss = over_agents(critic_loss(value, part(old), norm.norm(target), weight, args.clip_coef,
                                             one_sided=args.as_coded), args)
            if draw and args.method == "pearl":
                q = encode(phi, context[:, rows], args)
                v_loss = v_loss + args.kl_coef * kl_standard(q.mu_l, q.sd_l)
            moved = ("critic", "encoder") if draw else ("critic",)
            logs["grad/norm_critic"] = step([optimizers[k] for k in moved], v_loss,
                                            [params[k] for k in moved], args.max_grad_norm)
    error = (norm.norm(ret.flatten(1)) - old.flatten(1)).var(1) / norm.norm(ret.flatten(1)).var(1)
    return logs | {"losses/actor": loss.detach().mean(), "losses/critic": v_loss.detach(),
                   "losses/entropy": entropy.detach().mean(),
                   "losses/clipped": ((ratio - 1).abs() > args.clip_coef).float().mean(),
                   "losses/explained_variance": (1 - error).mean()}


def encoder_losses(p, ring, tasks, args):
    """eq. (11) for the tasks (M,) of the iteration: the loss, and {tag: value}."""
    M, K, device = len(tasks), ring.data.shape[1], ring.data.device
    if args.as_coded:  # [D2] a positive and K - 1 negatives for each row
        others = torch.stack([torch.cat([torch.arange(k), torch.arange(k + 1, K)]) for k in tasks.tolist()])
        every = torch.cat([tasks, tasks, others.flatten()])
    else:
        every = torch.cat([tasks, torch.arange(K).repeat(args.keys)])
    q = encode(p, draw_context(p, lambda B: ring.sample(every, B, args.mix), args.context_size, args), args)
    z, zi = draw_latents(q)
    if args.as_coded:
        cut = lambda x: (x[..., :M, :], x[..., M : 2 * M, :], x[..., 2 * M :, :].unflatten(-2, (M, K - 1)))
        loss_g, loss_l, *accuracy = as_coded_losses(cut(z), cut(zi), K)
        rho = lambda sd: sd + (-(-sd).expm1()).log()  # softplus, backwards
        kl = kl_as_coded(q.mu_g, rho(q.sd_g)) + kl_as_coded(q.mu_l, rho(q.sd_l))
    else:
        right = tasks.to(device)
        key, key_i = (x[..., M:, :].unflatten(-2, (args.keys, K)).mean(-3) for x in (z, zi))  # [D4]
        loss_g, accuracy_z = info_nce(z[:M] @ key.T, right)
        loss_l, *accuracy = local_loss(z[:M], key, zi[:, :M], key_i, right, args.local_loss)
        accuracy = [accuracy_z, *accuracy]
        if args.local_loss == "kl":
            loss_l = kl_distil(q.mu_g, q.sd_g, q.mu_l, q.sd_l)
        kl = kl_standard(q.mu_g, q.sd_g) + kl_standard(q.mu_l, q.sd_l)
    keys = slice(M, M + K)  # one context of each task (as coded: of the rows' tasks)
    logs = {"losses/global": loss_g, "losses/local": loss_l, "losses/kl": kl,
            "latent/bound": math.log(K) - loss_g, "latent/sd_z": q.sd_g.mean(), "latent/sd_zi": q.sd_l.mean(),
            "latent/between_z": q.mu_g[keys].std(0).mean(),  # 0: the same for all tasks
            "latent/between_zi": q.mu_l[:, keys].std(1).mean(),
            "latent/weight_entropy": -(q.weight * (q.weight + 1e-12).log()).sum(-1).mean()}
    logs |= {f"latent/accuracy_{name}": x for name, x in zip(("z", "pair", "zi"), accuracy)}
    return loss_g + loss_l + args.kl_coef * kl, {k: v.detach() for k, v in logs.items()}


# ---- Mix-MATE, after Schaefer, Christianos, Storkey, Albrecht (2022): each agent's recurrent encoder of its
# own episode so far; a joint decoder predicts all next observations and rewards from the latent of one agent,
# and a mixer says whose. z^i and the critics' z are both (mu^i, log variance^i), constants for them. [D6]
MATE_LATENT, MATE_UNITS = 10, 64


def make_mate(G, n, O, A):
    d, U = MATE_LATENT, MATE_UNITS
    layers = {"in": (G, O + A + 1, U), "x": (G, U, 3 * U), "h": (G, U, 3 * U), "out": (G, U, 2 * d),
              "d0": (1, d + n * (O + A), U), "d1": (1, U, U), "d2": (1, U, n * (O + 1)), "m0": (1, n * O, U),
              "m1": (1, U, n)}
    return {f"{k}.{w}": orthogonal(shape, 1.0) if w == "w" else torch.zeros(shape[0], 1, shape[2])
            for k, shape in layers.items() for w in "wb"}


def mate_step(p, h, obs, action, reward):
    """One step of the GRU: h (n, R, U), o_t, a_{t-1}, r_{t-1} (n, R, .) -> h and (mu, log variance)."""
    layer, U = lambda k, x: linear(x, p[f"{k}.w"], p[f"{k}.b"]), MATE_UNITS
    x, g = layer("x", layer("in", torch.cat([obs, action, reward[..., None]], -1)).relu()), layer("h", h)
    update, reset = (x + g)[..., : 2 * U].sigmoid().chunk(2, -1)
    h = torch.lerp((x[..., 2 * U :] + reset * g[..., 2 * U :]).tanh(), h, update)
    return h, layer("out", h)


def mate_latent(p, n, R, A, discrete, device):
    """The latents of rollout(), made as the episode goes."""
    h = torch.zeros(n, R, MATE_UNITS, device=device)

    def latent(obs, action, reward):
        nonlocal h
        if action is None:
            action, reward = torch.zeros(n, R, A, device=device), torch.zeros(n, R, device=device)
        elif discrete:
            action = F.one_hot(action, A).float()
        h, out = mate_step(p, h, obs, action, reward)
        return out, out

    return latent


def mate_loss(p, x, obs, alive, kl_coef):
    """eq. (14): x = [o, a, r, o'] (n, T, M, F), obs (n, T + 1, M, O), alive (T, M) -> the mixture's mean
    squared error and the KL. All agents' errors count, by the mixer's weights: so it learns too [D6]."""
    n, T, M, F_ = x.shape
    O, A = obs.shape[-1], F_ - 2 * obs.shape[-1] - 1
    action, reward = x[..., O : O + A], x[..., O + A]
    before = lambda v: torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], 1)
    h, stats, a, r = x.new_zeros(n, M, MATE_UNITS), [], before(action), before(reward)
    for t in range(T):
        h, out = mate_step(p, h, obs[:, t], a[:, t], r[:, t])
        stats.append(out)
    mu, logvar = torch.stack(stats, 1).chunk(2, -1)  # (n, T, M, d)
    z = mu + (0.5 * logvar).exp() * randn(*mu.shape, device=mu.device)
    together = lambda v: v.movedim(0, 2).flatten(2).flatten(0, 1)  # (n, T, M, k) -> (T M, n k)
    layer = lambda k, v: linear(v, p[f"{k}.w"], p[f"{k}.b"])
    seen, target = together(obs[:, :-1]), together(torch.cat([obs[:, 1:], reward[..., None]], -1))
    joint = torch.cat([seen, together(action)], -1).expand(n, -1, -1)
    hidden = layer("d1", layer("d0", torch.cat([z.flatten(1, 2), joint], -1)).relu()).relu()
    error = ((layer("d2", hidden) - target) ** 2).mean(-1)  # (n, T M): each agent's latent decoded
    mix = layer("m1", layer("m0", seen[None]).relu())[0].softmax(-1).T  # (n, T M)
    weight = (alive / alive.sum()).flatten()
    kl = 0.5 * (mu**2 + logvar.exp() - logvar - 1).mean(-1).flatten(1)
    error, kl = ((mix * error).sum(0) * weight).sum(), (kl.mean(0) * weight).sum()
    return error + kl_coef * kl, {"losses/prediction": error.detach(), "losses/kl": kl.detach()}


# ---- one iteration
def choose_tasks(K, M, rest, warm_up):
    """Numbers of the tasks of M training rows and of the rest. As many rows of each task as of any other, so
    far as that goes. warm_up: None, or how many rows have been played, all tasks in turn."""
    if warm_up is not None:
        return (warm_up + torch.arange(M + rest)) % K
    fair = lambda rows: torch.cat([torch.arange(K).repeat(rows // K), torch.randperm(K)[: rows % K]])
    return torch.cat([fair(M), fair(rest)])


def make_latent(env, params, ring, index, tasks, warm_up, args):
    """What rollout() asks for the rows of tasks index (R,), and (context, eps) of the first M, or None."""
    phi, device, n, R = params["encoder"], args.device, env.num_agents, env.num_envs
    if args.method == "mate":
        return mate_latent(phi, n, R, env.action_dims[0], env.discrete, device), None
    if args.method not in WITH_CONTEXT:
        told = (tasks if args.method == "task-given" else tasks[:, :0])[None]  # (1, R, D) or (1, R, 0)
        return constant(told, told), None
    C, M = args.latent_dim, 0 if warm_up else args.num_envs
    prior = randn(n, R - M, C, device=device)
    prior_z = prior if args.method == "pearl" else randn(1, R - M, C, device=device)
    if warm_up:
        return constant(prior, prior_z), None

    def draw():
        context = draw_context(phi, lambda B: ring.sample(index[:M], B, "all"), args.context_size, args)
        return context, (randn(M, C, device=device), randn(n, M, C, device=device))

    def beside_the_prior(drawn):
        zi, zc = latents(phi, *drawn, args)
        return torch.cat([zi, prior], 1), torch.cat([zc, prior_z], 1)

    drawn = draw()
    with torch.no_grad():
        if not args.as_coded:
            return constant(*beside_the_prior(drawn)), drawn
    return lambda *_: beside_the_prior(draw()), drawn  # [D2] a new context and new noise at each step


def iterate(env, params, optimizers, norm, ring, tasks, iteration, args):
    """One iteration of the algorithm box: plays, updates, fills the rings. Returns {tag: value} and how many
    transitions were played."""
    R, M, K, logs = env.num_envs, args.num_envs, len(tasks), {}
    warm_up = args.method in WITH_CONTEXT and (iteration < args.warm_up or iteration * R < K)
    index = choose_tasks(K, M, R - M, iteration * R if warm_up else None)
    latent, draw = make_latent(env, params, ring, index, tasks[index.to(tasks.device)], warm_up, args)
    play = rollout(env, params["theta"], tasks[index.to(tasks.device)], latent)
    x = transitions(play, env.action_dims[0] if env.discrete else None)
    if not warm_up:
        logs |= ppo_update(params, optimizers, norm, play, M, draw, args)
    if args.method in CONTRASTIVE and bool(ring.length[:, 0].all()):
        for _ in range(args.encoder_updates):
            loss, tags = encoder_losses(params["encoder"], ring, index[:M], args)
            step([optimizers["encoder"]], loss, [params["encoder"]])
            logs |= tags
    for _ in range(args.encoder_updates if args.method == "mate" else 0):
        loss, tags = mate_loss(params["encoder"], x, play.obs, play.alive, args.kl_coef)
        step([optimizers["encoder"]], loss, [params["encoder"]])
        logs |= tags
    if args.method in WITH_CONTEXT:
        first = 0 if warm_up else M
        ring.append(index[first:], x[:, :, first:], play.alive[:, first:].sum(0))
    returns = play.reward.sum(1)  # (n, R)
    logs |= {f"charts/episodic_return/agent_{i}": v for i, v in enumerate(returns[:, :M].mean(1))}
    logs["charts/episodic_return"] = returns[:, :M].mean()
    if R > M:
        logs |= {"adapt/return_0": returns[:, 0 if warm_up else M :].mean()}
        logs |= {} if warm_up else {"adapt/return_1": returns[:, :M].mean()}
    return logs, int(play.alive.sum())


# ================================================================ 6. Evaluation
# Meta-test: nothing is trained any more. A trial is one task: some episodes are played by the prior, then
# every agent draws its context from its own part of the first s of them, and plays one episode; s = 0 is the
# prior itself [D1]. Own worlds, own random stream: how often one evaluates does not change what is learned.
SHOTS = (0, 1, 2, 4, 8)


class Test(NamedTuple):
    tasks: torch.Tensor  # (K, D)
    returns: dict  # {"random", "0" .. "8", "mean": by the means of q^i: (K, E)}, means over agents
    accuracy: dict  # {"z_1", "pair_1", "zi_1", ... "zi_8": share of held-out contexts told from other tasks'}
    mu_l: Optional[torch.Tensor]  # (n, K, E, C)


@torch.no_grad()
def meta_test(args, params, split, frames=None):
    """eq. (12): eval_episodes trials of each task of a split. frames: a dict that receives pictures of the
    first episode by the prior, "0", and of that by the means of q^i, "mean", at every step, of one trial of
    each of up to four tasks."""
    with torch.random.fork_rng():
        torch.manual_seed(args.seed + 10_000)
        every = make_env(args, 1).all_tasks(split)[: args.eval_tasks]
        K, E, phi = len(every), args.eval_episodes, params["encoder"]
        env, tasks = make_env(args, K * E), every.repeat_interleave(E, 0)
        rows, choices = [k * E for k in range(min(K, 4))], env.action_dims[0] if env.discrete else None
        plays, returns, accuracy, mu_l = [], {}, {}, None

        def play(name, latent, theta=params["theta"]):
            pictures = None
            if frames is not None and name in ("0", "mean") and name not in frames:
                pictures = frames[name] = []
            out = rollout(env, theta, tasks, latent, pictures, rows)
            returns.setdefault(name, []).append(out.reward.sum(1).mean(0).view(K, E))
            return out

        prior = lambda: make_latent(env, params, None, None, tasks, True, args)[0]
        for _ in range(max(SHOTS) if args.method in WITH_CONTEXT else 1):
            p = play("0", prior())
            x = F.pad(transitions(p, choices), (0, 0, 0, 0, 0, env.horizon - len(p.alive)))  # (n, T, R, F)
            plays.append((x, p.alive.sum(0)))
        for shots in SHOTS[1:] if args.method in WITH_CONTEXT else ():
            seen, lengths = zip(*plays[:shots])
            q, key = (infer_from(phi, torch.stack(seen, 1), torch.stack(lengths), args) for _ in range(2))
            z, zi = draw_latents(q)
            told = accuracies((z, zi), draw_latents(key), K, E, args.keys)
            accuracy |= {f"{name}_{shots}": v for name, v in told.items()}
            play(f"{shots}", constant(z.expand_as(zi) if args.method == "global-only" else zi, zi[:1]))
        if args.method in WITH_CONTEXT:
            best = q.mu_g.expand_as(q.mu_l) if args.method == "global-only" else q.mu_l
            play("mean", constant(best, best[:1]))
            mu_l = q.mu_l.unflatten(1, (K, E))
        play("random", prior(), {k: torch.zeros_like(v) for k, v in params["theta"].items()})
        returns = {k: torch.stack(returns[k]).mean(0) for k in ("random", *returns)}
        return Test(every, returns, accuracy, mu_l)


def infer_from(phi, x, lengths, args):
    """The Latent of each trial, from B of the transitions x (n, s, T, R, F) of its own s episodes."""
    n, s, T, R, features = x.shape

    def own(B):  # (n, R, B, F)
        episode = torch.randint(s, (R, B)).to(x.device)
        length = lengths.T.gather(1, episode)
        at = (torch.rand(R, B).to(x.device) * length).long()
        return x.flatten(1, 2)[:, episode * T + at, torch.arange(R, device=x.device)[:, None]]

    return encode(phi, draw_context(phi, own, args.eval_context, args), args)


def draw_latents(q):
    device = q.mu_g.device
    return q.sample(randn(*q.mu_g.shape, device=device), randn(*q.mu_l.shape, device=device))


def accuracies(query, key, K, E, keys):
    """{name: share}: latents (z, z^i) of K E trials, and those of another draw of them for keys: the mean of
    some trials of each task, of others than the query's."""
    (z, zi), (z_key, zi_key) = ([v.unflatten(-2, (K, E)) for v in pair] for pair in (query, key))
    others = range(1, 1 + min(keys, E - 1))
    z_key, zi_key = (sum(v.roll(j, -2) for j in others) / len(others) for v in (z_key, zi_key))
    scores = torch.einsum("kec,jec->kej", z, z_key)
    own = torch.einsum("nkec,njec->nkej", zi, zi_key)
    right = torch.arange(K, device=z.device)[:, None]
    return {name: (s.argmax(-1) == right).float().mean().item()
            for name, s in (("z", scores), ("pair", scores + own), ("zi", own))}


def splits_of(args):
    """The splits whose tasks differ."""
    env = make_env(args, 1)
    train, test = env.all_tasks("train"), env.all_tasks("test")
    return ("train",) if train.shape == test.shape and torch.equal(train, test) else ("train", "test")


def interval(x):
    """Half width of the 95 % interval of the mean over dimension 0."""
    return 1.96 * x.std(0, correction=min(1, len(x) - 1)) / math.sqrt(len(x))


def summary(results):
    """{tag: value} of {split: Test}."""
    flat = {}
    for split, test in results.items():
        for name, x in test.returns.items():
            flat |= {f"eval/{split}/return_{name}": x.mean().item(),
                     f"eval/{split}/return_{name}_ci95": interval(x.flatten()).item()}
        flat |= {f"eval/{split}/accuracy_{name}": v for name, v in test.accuracy.items()}
    return flat


def table(results, args):
    """Return of an episode after s episodes of the prior, and how often latents tell the task."""
    row = lambda name, values: f"{name:26s}" + "".join(f"{v:>10s}" for v in values).rstrip()
    lines = [f"{args.env}, {args.method}: mean return of the agents after s episodes of the prior"]
    for split, test in results.items():
        lines += [row(f"{len(test.tasks)} {split} tasks, s =", test.returns),
                  row("return", [f"{x.mean():.1f}" for x in test.returns.values()]),
                  row("  ± 95 %", [f"{interval(x.flatten()):.1f}" for x in test.returns.values()])]
        for name, label in ("z", "task told by z"), ("pair", "  by z and z^i"), ("zi", "  by z^i alone"):
            if test.accuracy:
                told = [f"{test.accuracy[f'{name}_{s}']:.3f}" for s in SHOTS[1:]]
                lines.append(row(label, ["", "", *told]))
    return "\n".join(lines)


def capture(args, params, folder):
    """--capture-video: latents.png, the first two principal components of each agent's mu^i, a colour a task;
    where the world can be drawn also play.gif, a column a task: above played by the prior, below adapted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    written, pictures, frames, split = [], [], {}, splits_of(args)[-1]
    try:
        test = meta_test(args, params, split, frames)
        for rows in list(zip(frames["0"], frames.get("mean", frames["0"])))[::2]:
            tiles = [np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0))) for f in row], 1) for row in rows]
            picture = Image.fromarray(np.concatenate(tiles))
            picture = picture.reduce(1 + picture.width // 800)
            pictures.append(picture.quantize(48, Image.Quantize.FASTOCTREE))
        pictures[0].save(folder / "play.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0)
        written.append(f"{folder / 'play.gif'}")
    except (AttributeError, RuntimeError) as e:  # no render(), or no renderer
        test = meta_test(args, params, split)
        written.append(f"(no GIF: {e})")
    if test.mu_l is not None:
        figure, axes = plt.subplots(1, len(test.mu_l), figsize=(4 * len(test.mu_l), 4), squeeze=False)
        for i, (ax, mu) in enumerate(zip(axes[0], test.mu_l.cpu())):
            K, E, C = mu.shape
            x = mu.flatten(0, 1) - mu.mean((0, 1))
            where = x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T
            ax.scatter(*where.T, c=torch.arange(K).repeat_interleave(E), cmap="turbo", s=12)
            ax.set(title=f"agent {i}: latent means, by task")
        figure.savefig(folder / "latents.png", dpi=100)
        written.append(f"{folder / 'latents.png'}")
    return " ".join(written)


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
    """Parameters {"theta", "critic", "encoder": {name: tensor}}, their optimisers, the running moments of
    returns, and the rings."""
    n, O, A, K = env.num_agents, env.obs_dims[0], env.action_dims[0], len(env.all_tasks())
    G, C, features = 1 if args.share_params else n, args.latent_dim, 2 * O + A + 1
    if args.as_coded and args.context_size < n:
        fail(f"--as-coded reads the i-th transition for agent i: --context-size must be at least {n}")
    told = {"none": 0, "task-given": env.all_tasks().shape[1], "mate": 2 * MATE_LATENT}.get(args.method, C)
    eye = make_eye if args.share_params and getattr(env, "obs_shape", None) == PICTURE else dict
    seen = see(eye(), torch.zeros(1, 1, O)).shape[-1]
    params = {"theta": make_actor(G, seen + told, args.hidden, A, env.discrete) | eye(),
              "critic": make_mlp(G, [n * seen + told, args.hidden, args.hidden, 1], 1.0) | eye(),
              "encoder": {}}
    if args.method == "mate":
        params["encoder"] = make_mate(G, n, O, A)
    elif args.method in WITH_CONTEXT:
        params["encoder"] = make_encoder(G, 2 * seen + A + 1, C, args)
        params["encoder"] |= {f"tran.{k}": w for k, w in eye().items()}
    params = {group: {k: x.to(args.device).requires_grad_() for k, x in p.items()}
              for group, p in params.items()}
    optimizers = {group: torch.optim.Adam([*params[group].values()], args.lr, eps=1e-5, fused=True)
                  for group in ("theta", "critic")}
    if params["encoder"]:
        optimizers["encoder"] = torch.optim.AdamW([*params["encoder"].values()], args.encoder_lr,
                                                  weight_decay=0.01, fused=True)
    size = (K, args.ring_size, env.horizon) if args.method in WITH_CONTEXT else (1, 1, 1)
    return params, optimizers, ValueNorm(n, args.device), Ring(n, *size, features, args.device)


def copy_of(params):
    return {group: {k: x.detach().clone() for k, x in p.items()} for group, p in params.items()}


def set_lr(optimizers, global_step, args):
    """All step sizes fall linearly to 0 at 95 % of --decay."""
    left = max(0.0, 1 - global_step / (0.95 * args.decay)) if args.decay else 1.0
    for group, o in optimizers.items():
        for g in o.param_groups:
            g["lr"] = left * (args.encoder_lr if group == "encoder" else args.lr)
    return left


def restore(path, args, params, optimizers=None, norm=None, ring=None):
    """Put a checkpoint's tensors in place; returns the checkpoint."""
    state = load(path)
    try:
        with torch.no_grad():
            for group, p in params.items():
                for k in p:
                    p[k].copy_(state["params"][group][k])
        if optimizers:
            for group, o in optimizers.items():
                o.load_state_dict(state["optimizers"][group])
            for name, thing in ("norm", norm), ("ring", ring):
                for k, x in vars(thing).items():
                    x.copy_(state[name][k])
    except (KeyError, RuntimeError, ValueError):
        was = state["args"]
        fail(f"{path} holds {was['method']} for {was['env']} with {was['hidden']} and {was['latent_dim']} "
             f"units, not {args.method} for {args.env} with {args.hidden} and {args.latent_dim}")
    return state


def evaluate_checkpoint(args):
    """--evaluate: the table of a finished run, and its eval.json."""
    params = build(args, make_env(args, 1))[0]
    state, folder = restore(args.evaluate, args, params), Path(args.evaluate).parent
    results = {split: meta_test(args, params, split) for split in splits_of(args)}
    print(table(results, args))
    write_eval(folder, summary(results), state["global_step"], args.seed)
    if args.capture_video:
        print(capture(args, params, folder))
    return params


def train(args):
    set_up(resolve(args))
    if args.evaluate:
        return evaluate_checkpoint(args)
    env = make_env(args, args.num_envs + args.context_envs)
    params, optimizers, norm, ring = build(args, env)
    tasks, iteration, global_step = env.all_tasks(), 0, 0
    if args.resume:
        state = restore(args.resume, args, params, optimizers, norm, ring)
        iteration, global_step = state["iteration"], state["global_step"]
        set_rng(state)
    log, stop, done = Log(args, global_step), False, global_step >= args.total_steps

    while not stop and not done:
        left = set_lr(optimizers, global_step, args)
        logs, steps = iterate(env, params, optimizers, norm, ring, tasks, iteration, args)
        iteration += 1
        global_step += steps
        logs |= {"charts/SPS": log.sps(global_step), "charts/lr": left * args.lr}
        stop, done = log.stop(), global_step >= args.total_steps
        results = {}
        if done:
            results = {split: meta_test(args, params, split) for split in splits_of(args)}
        elif args.eval_every and iteration % args.eval_every == 0:
            results = {"train": meta_test(args, params, "train")}
        logs |= summary(results)
        log.scalars(logs, global_step)
        text = f"return {logs['charts/episodic_return']:.1f}"
        if results:
            text += f", in the test {logs['eval/train/return_0']:.1f}"
            if args.method in WITH_CONTEXT:
                text += f" -> {logs['eval/train/return_8']:.1f}"
                text += f", z^i tells {logs['eval/train/accuracy_zi_8']:.2f}"
        log.progress(global_step, text, bool(results))
        if stop or done or iteration % args.save_every == 0:
            save(log.dir / "checkpoint.pt", dict(
                params=copy_of(params), optimizers={group: o.state_dict() for group, o in optimizers.items()},
                norm=vars(norm), ring=vars(ring), iteration=iteration, global_step=global_step), args)
    if done and results:
        write_eval(log.dir, summary(results), global_step, args.seed)
        print(f"{table(results, args)}\n{log.dir}: {global_step} steps")
    log.close()
    return copy_of(params)


if __name__ == "__main__":
    train(cli(Args, __doc__))
