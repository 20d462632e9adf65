"""The maths of lemol.py: opponent model, critics and worlds, by hand and by scripted learners."""

import dataclasses
import importlib
import math
import random
from pathlib import Path
from types import SimpleNamespace

import oracles.lemol as twin
import pytest
import torch

import lemol
from lemol import OpponentModel, gumbel, gumbel_softmax

SMALL = dict(env="simple_push", batch_size=4, num_episodes=10, segment=3, traj_per_iter=2, chunk_length=2,
             num_units=8, max_episode_len=5, lstm_hidden_dim=6, in_ep_lstm_dim=4, num_traj_to_train=2,
             om_training_iters=1, eval_episodes=2, n_opp_cycles=2, agent_update_freq=5)

# for tests/test_scripts.py: three iterations are a cycle
TINY, STEPS = SMALL, 2 * 4 * 5
BAD = ["--agent-update-freq 1", "--chunk-length 2000", "--env simple_crypto", "--env simple_reference",
       "--good-policy lemol", "--gamma 2", "--bad-policy ddpg", "--om flat"]


def match(seed=1, iterations=0, **kw):
    """A Match after so many iterations, its world and its args."""
    args = lemol.Args(**(SMALL | dict(seed=seed) | kw))
    lemol.check(args)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    m = lemol.Match(args, lemol.make_env(args, 1))
    env = lemol.make_env(args, m.runs)
    for _ in range(iterations):
        lemol.iterate(m, env, args)
    return m, env, args


def lines(m):
    """{net: (R, P)}: the weights of each net of each run in a line."""
    return {name: torch.cat([p.detach().flatten(1) for p in net], 1) for name, net in m.theta.items()}


def model(kind="ep", obs=3, event=7, actions=4, length=5, H=6, U=4):
    torch.manual_seed(0)
    args = SimpleNamespace(max_episode_len=length, lstm_hidden_dim=H, in_ep_lstm_dim=U)
    return OpponentModel(kind, obs, event, actions, args)


# ---------------------------------------------------------------- the opponent model
def test_parameter_counts_of_the_paper():
    count = lambda *nets: sum(p.numel() for net in nets for p in net.parameters())
    om = model(obs=8, event=20, actions=5, length=25, H=64, U=32)
    assert count(om.block) == 43_520 + 2 * 4 * 64  # torch has two biases for each gate
    assert count(om.core) == 49_408 + 4 * 64
    assert count(om.episode) == 5_248 + 4 * 32
    assert count(om.head) == 10_693
    assert om.h0.numel() + om.u0.numel() == 192
    m, _, _ = match(num_units=64)
    assert {k: v.shape[1] for k, v in lines(m).items() if "target" not in k} == {
        "actor0": 5_381, "critic0": 6_657, "actor1": 5_765, "critic1": 6_657}


def test_no_event_reaches_the_guess_of_its_own_time():
    om = model()
    events, obs = torch.randn(2, 20, 7), torch.randn(2, 20, 3)
    base, _ = om(events, obs, om.start(2))
    changed = events.clone()
    changed[:, 7] += 1  # in block 1, steps 5 to 9
    logp, _ = om(changed, obs, om.start(2))
    assert torch.equal(base[:, :10], logp[:, :10])
    assert (base[:, 10:] - logp[:, 10:]).abs().amax(-1).min() > 0


def test_an_observation_reaches_only_later_steps_of_its_block():
    om = model("ep")
    events, obs = torch.randn(2, 20, 7), torch.randn(2, 20, 3)
    changed = obs.clone()
    changed[:, 7] += 1
    moved = (om(events, obs, om.start(2))[0] - om(events, changed, om.start(2))[0]).abs().amax((0, 2)) > 0
    assert moved.tolist() == [7 <= t < 10 for t in range(20)]


def test_chunks_with_carried_state_are_one_sequence():
    om = model()
    with torch.no_grad():
        om.h0.normal_()
    events, obs = torch.randn(2, 30, 7), torch.randn(2, 30, 3)
    whole, _ = om(events, obs, om.start(2))
    state, parts, fresh = om.start(2), [], []
    for t in range(0, 30, 10):
        logp, state = om(events[:, t : t + 10], obs[:, t : t + 10], state)
        parts.append(logp)
        fresh.append(om(events[:, t : t + 10], obs[:, t : t + 10], om.start(2))[0])
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-6)
    assert not torch.allclose(whole, torch.cat(fresh, 1), atol=1e-3)


def test_only_the_first_chunk_trains_the_initial_state():
    om, x = model(), torch.randn(2, 10, 10)
    first, state = om(x[..., :7], x[..., 7:], om.start(2))
    g, = torch.autograd.grad(first.sum(-1).square().sum(), om.h0)
    assert (g.abs().sum(1) > 0).all()  # h_0 and c_0, both
    later, _ = om(x[..., :7], x[..., 7:], state.detach())
    assert torch.autograd.grad(later.square().sum(), om.h0, allow_unused=True)[0] is None


@pytest.mark.parametrize("kw", [
    dict(), dict(om="ablated"), dict(env="uav", discrete_actions=True),
    dict(good_policy="lemol", bad_policy="mmmaddpg")])
def test_what_is_guessed_in_play_is_what_training_would_guess(kw):
    m, env, args = match(iterations=1, **kw)
    with torch.no_grad():  # so that nothing is at its neutral start
        for p in m.om.parameters():
            p.add_(0.1 * torch.randn_like(p))
        m.hc.copy_(m.om.start(m.runs))
    for _ in range(2):
        logs, _ = lemol.iterate(m, env, args)
    data = lemol.episodes(m, args.batch_size)
    events, obs, target, valid = lemol.parts_of(lemol.event_of(data, m.lemol).flatten(1, 2), m)
    with torch.no_grad():
        logp, _ = m.om(events, obs, m.om.start(m.runs))
    guess = data["guess"][:, :, :-1].flatten(1, 2)
    wanted = lemol.harden(logp) if args.discrete_actions else logp.exp()
    assert valid.sum() > 0 and torch.allclose(wanted * valid[..., None], guess * valid[..., None], atol=1e-5)
    # and so is what the cycle's end says of it
    each = [lemol.model_loss(*run).item() for run in zip(logp, target, valid)]
    assert logs["cycle/om_ce"] == pytest.approx(sum(each) / len(each), abs=1e-5)


def scripted(n, num_obs, blocks, length, drift, batch, beta=4.0):
    """Play of an opponent who learns by a rule: in block m he prefers action (s + m // drift + o) mod n, with
    an s of his own. A model without memory cannot know s, and so do no better than ln n."""
    s, o = torch.randint(n, (batch, 1)), torch.randint(num_obs, (batch, blocks * length))
    prefer = (s + torch.arange(blocks * length) // length // drift + o) % n
    p = (beta * torch.nn.functional.one_hot(prefer, n).float()).softmax(-1)
    action = torch.nn.functional.one_hot(torch.multinomial(p.view(-1, n), 1).view(batch, -1), n).float()
    obs = torch.nn.functional.one_hot(o, num_obs).float()
    return torch.cat([action, obs], -1), obs, action


@pytest.mark.parametrize("kind", ["ep", "ablated"])
def test_a_scripted_learner_is_foreseen_by_the_learning_state_alone(kind):
    n, num_obs, blocks, length = 4, 2, 12, 6
    om = model(kind, obs=num_obs, event=n + num_obs, actions=n, length=length, H=32, U=32)
    adam = torch.optim.Adam(om.parameters(), 3e-3)
    for _ in range(200 if kind == "ep" else 60):
        events, obs, action = scripted(n, num_obs, blocks, length, 3, 32)
        state = om.start(32)
        for t in range(0, blocks * length, 4 * length):
            part = slice(t, t + 4 * length)
            logp, state = om(events[:, part], obs[:, part], state)
            adam.zero_grad()
            lemol.model_loss(logp, action[:, part], torch.ones(logp.shape[:2])).backward()
            adam.step()
            state = state.detach()
    events, obs, action = scripted(n, num_obs, blocks, length, 3, 512)
    with torch.no_grad():
        ce = -(om(events, obs, om.start(512))[0] * action).sum(-1)
    if kind == "ablated":
        assert ce.mean() > 1.35  # ln 4 = 1.386: stationary, the actions are uniform
    else:
        assert ce.mean() < 0.7  # 0.356 is the best with a lag of one block
        assert abs(ce[:, :length].mean() - math.log(n)) < 0.1  # nothing is known in the first block


def test_soft_targets_are_fitted_down_to_the_entropy_of_their_mean():
    torch.manual_seed(0)
    logits, om = torch.tensor([[2.0, 0, 0, 0, 0]]), model("ablated", actions=5)
    adam, obs = torch.optim.Adam(om.parameters(), 1e-2), torch.zeros(256, 5, 3)
    for _ in range(200):
        action = gumbel_softmax(logits, gumbel(256, 5, 5))
        loss = lemol.model_loss(om(None, obs, om.start(256))[0], action, torch.ones(256, 5))
        adam.zero_grad(), loss.backward(), adam.step()
    action = gumbel_softmax(logits, gumbel(20_000, 1, 5))
    logp = om(None, obs[:1], om.start(1))[0][:, :1].detach()
    ce = lemol.model_loss(logp.expand_as(action), action, torch.ones(20_000, 1))
    assert ce == pytest.approx(1.380, abs=0.02)
    assert logp.exp()[0, 0, 0] == pytest.approx(0.504, abs=0.02)  # not 0.649, the policy's


# ---------------------------------------------------------------- actions, oracle
def test_gumbel_softmax():
    torch.manual_seed(0)
    y = gumbel_softmax(torch.tensor([2.0, 0, 0, 0, 0]), gumbel(100_000, 5))
    assert (y.argmax(1) == 0).float().mean() == pytest.approx(0.649, abs=0.01)
    assert y[:, 0].mean() == pytest.approx(0.504, abs=0.01)
    assert torch.equal(lemol.harden(y).argmax(1), y.argmax(1)) and (lemol.harden(y).sum(1) == 1).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_what_the_oracles_and_the_uninformed_guess(discrete):
    torch.manual_seed(0)
    m, _, _ = match(om="oracle", discrete_actions=discrete)
    truth, logits = torch.rand(20_000, 5), torch.randn(20_000, 5)

    def guess(om):
        m.args.om = om
        return lemol.make_guess(m, None, truth, logits)

    noise = guess("uninformed")
    assert guess("oracle") is truth
    policy = logits.softmax(1)
    assert torch.equal(guess("policy"), policy)
    assert noise.mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.015)
    assert noise.sum(1).tolist() == pytest.approx([1] * 20_000)
    if discrete:
        assert (noise.max(1).values == 1).all()
    else:
        assert noise.var(0).tolist() == pytest.approx([4 / 150] * 5, abs=0.002)  # of Dirichlet(1)


# ---------------------------------------------------------------- critics and actors
def test_m3ddpg_goes_a_length_eps_down_a_linear_q():
    w = torch.randn(3, 1, 5, dtype=torch.float64)
    a = torch.rand(3, 7, 5, dtype=torch.float64)
    eps = torch.tensor([1e-3, 0.0, 0.5], dtype=torch.float64).view(3, 1, 1)
    q_of = lambda x: (w * x).sum(2)
    change = q_of(lemol.adversary(q_of, a, eps)) - q_of(a)
    assert torch.allclose(change, (-eps * w.norm(dim=2, keepdim=True))[..., 0].expand(3, 7), atol=1e-12)


def test_m3ddpg_first_order_drop_of_a_random_critic():
    torch.manual_seed(0)
    net = lemol.xavier(1, (37, 64, 64, 1))
    rest, a = torch.randn(1, 1024, 32), torch.rand(1, 1024, 5, requires_grad=True)
    q_of = lambda x: lemol.mlp(net, torch.cat([rest, x], 2))[..., 0]
    slope, = torch.autograd.grad(q_of(a).sum(), a)
    worse = q_of(lemol.adversary(q_of, a, 1e-3)) - q_of(a)
    assert worse.mean().item() == pytest.approx(-1e-3 * slope.norm(dim=2).mean().item(), rel=0.02)
    assert (worse < 1e-7).all()
    assert torch.equal(lemol.adversary(lambda x: 0 * x.sum(2), a, 1e-3), a)


def test_m3ddpg_with_eps_0_is_maddpg_and_its_released_actor_too():
    def weights(**kw):
        return lines(match(iterations=3, **(dict(bad_policy="maddpg") | kw))[0])

    plain, none = weights(good_policy="maddpg"), weights(good_policy="mmmaddpg", adv_eps=0.0)
    code = weights(good_policy="mmmaddpg", adv_eps=0.5)
    assert all(torch.equal(plain[k], none[k]) for k in plain)
    assert not torch.equal(plain["critic1"], code["critic1"])
    assert not torch.equal(plain["actor1"], code["actor1"])  # through its critic


def test_m3ddpg_has_another_eps_for_a_team_mate():
    pair = dict(bad_policy="maddpg", good_policy="mmmaddpg", adv_eps=0.25, adv_eps_s=0.5)
    assert match(**pair)[0].eps == 0.25 and match(env="simple_speaker_listener", **pair)[0].eps == 0.5


def test_critic_target_by_hand(monkeypatch):
    m, _, args = match(iterations=2)
    monkeypatch.setattr(lemol, "gumbel", lambda *shape, device: torch.zeros(shape))
    now, after = lemol.sample(lemol.episodes(m, 0), 20)
    reward, done = now["reward"][..., 0], now["done"]
    q = m.q("critic0_target", after, lemol.target_actions(m, 0, after))
    y = lemol.critic_target(reward, done, q, args.gamma)
    for r in range(m.runs):
        for b in range(20):
            o0, o1 = after["obs0"][r, b], after["obs1"][r, b]
            other = by_hand(m.theta["actor1_target"], r, o1).softmax(0)
            mine = by_hand(m.theta["actor0_target"], r, torch.cat([o0, other])).softmax(0)
            value = by_hand(m.theta["critic0_target"], r, torch.cat([o0, o1, mine, other]))[0]
            assert y[r, b] == pytest.approx((reward[r, b] + 0.95 * (1 - done[r, b]) * value).item(), abs=1e-5)
    assert (done == 1).any() and torch.equal(y[done == 1], reward[done == 1])


def by_hand(net, r, x):
    """The net of run r on one input."""
    for k in (0, 2, 4):
        x = (x[:, None] * net[k][r]).sum(0) + net[k + 1][r, 0]
        x = x.clamp(min=0) if k < 4 else x
    return x


def test_the_actor_reads_guesses_made_anew_with_the_present_h():
    """After some episodes the present h would guess otherwise than was guessed in play."""
    new, old = (match(iterations=2, stored_guesses=stored)[0] for stored in (False, True))
    assert not torch.equal(lines(new)["actor0"], lines(old)["actor0"])
    for m in (new, old):
        first = lemol.episodes(m, m.args.batch_size)
        z, guess = (first[name][:, 0, :-1] for name in ("z", "guess"))  # of the first one after exploration
        m.hc = m.om.start(m.runs)
        assert torch.allclose(m.ask(z), guess, atol=1e-6)
        m.hc = m.hc + 1
        assert not torch.allclose(m.ask(z), guess, atol=1e-3)


def test_clipping_is_by_run_and_tensor():
    grad = torch.randn(2, 3, 4) * torch.tensor([10.0, 0.01]).view(2, 1, 1)
    out = lemol.clip(grad)
    assert torch.equal(out[1], grad[1])
    assert torch.allclose(out[0], grad[0] * 0.5 / grad[0].square().sum().sqrt())
    shapes = [tuple(p.shape) for p in lemol.xavier(2, (2, 3, 1))]
    assert shapes == [(2, 2, 3), (2, 1, 3), (2, 3, 1), (2, 1, 1)]


def first_rows(valid, number):
    """The index of the valid row of that number: (R, n), (R, B) -> (R, B)"""
    return torch.stack([v.nonzero()[:, 0][k] for v, k in zip(valid, number)])


def test_stacked_runs_are_separate_runs(monkeypatch):
    """Three runs side by side and each of them alone: the same start, noise and minibatches, 20 updates."""
    m, _, args = match(iterations=2, traj_per_iter=3, good_policy="maddpg", lr=0.1)
    pieces = []
    for r in range(3):
        one, _, one_args = match(iterations=0, traj_per_iter=1, good_policy="maddpg", lr=0.1)
        for name, x in one.tensors().items():  # players and replay; all have the same models
            x.copy_(m.tensors()[name][r : r + 1] if x.shape != m.tensors()[name].shape else x)
        one.episode, one.hc = m.episode, m.hc[:, r : r + 1]
        for k in one.sizes:  # nothing of the past in the optimisers
            one.adam[k].state.clear(), m.adam[k].state.clear()
        pieces.append((one, one_args))
    m.data["reward"] *= 50  # gradients above the clipping norm
    for one, _ in pieces:
        one.data["reward"] *= 50
    draws, true_rand = {}, torch.rand
    monkeypatch.setattr(torch, "rand", lambda *s: draws["next"](s[0] if len(s) == 1 else s))
    picks = lambda x, n, **_: (draws["next"]((len(x), n)) * x.sum(1, keepdim=True)).long()
    monkeypatch.setattr(torch, "multinomial", lambda x, n, **kw: first_rows(x, picks(x, n)))
    for step in range(20):
        def of_runs(shape, runs, step=step):
            """Random numbers that belong to a run, whoever asks."""
            draws["count"] += 1
            seeds = [1000 * step + 17 * run + draws["count"] for run in runs]
            streams = [torch.Generator().manual_seed(k) for k in seeds]
            return torch.stack([true_rand(*shape[1:], generator=g) for g in streams])

        for j in (0, 1):
            draws.update(count=0, next=lambda s, of_runs=of_runs: of_runs(s, range(3)))
            lemol.learn(m, j, args)
            for r, (one, one_args) in enumerate(pieces):
                draws.update(count=0, next=lambda s, r=r, of_runs=of_runs: of_runs(s, [r]))
                lemol.learn(one, j, one_args)
    for r, (one, _) in enumerate(pieces):
        for k, weights in lines(one).items():
            assert torch.allclose(lines(m)[k][r], weights[0], atol=1e-4, rtol=1e-4), k


def test_targets_follow_and_start_where_they_should():
    m, _, args = match(polyak=1e-4)
    m.restart()
    assert all(torch.equal(lines(m)[k], lines(m)[f"{k}_target"]) for k in m.sizes)
    target, online = torch.zeros(1), torch.ones(1)
    for _ in range(10_000):
        target.lerp_(online, 1e-4)
    assert target.item() == pytest.approx(0.632139, abs=1e-3)
    m.episode = args.num_episodes
    lemol.iterate(m, lemol.make_env(args, 2), args)
    before = lines(m)
    lemol.learn(m, 0, args)
    after = lines(m)
    for k in ("actor0", "critic0"):
        want = (1 - 1e-4) * before[f"{k}_target"] + 1e-4 * after[k]
        assert torch.allclose(after[f"{k}_target"], want, atol=1e-7)
        assert not torch.equal(before[k], after[k])
    assert all(torch.equal(before[k], after[k]) for k in before if "1" in k)


# ---------------------------------------------------------------- play
def test_no_gradient_crosses_between_model_and_players():
    m, env, args = match(iterations=2)
    before = [p.clone() for p in m.om.parameters()]
    lemol.iterate(m, env, args)
    assert all(p.grad is None for p in m.om.parameters())
    assert all(map(torch.equal, before, m.om.parameters()))  # frozen while they play
    assert m.episode == args.num_episodes
    players = lines(m)
    logs = lemol.train_models(m, args)
    assert all(torch.equal(players[k], v) for k, v in lines(m).items())
    assert not any(map(torch.equal, before, m.om.parameters())) and len(logs) == 2
    lemol.iterate(m, env, args)
    assert not any(torch.equal(players[k], v) for k, v in lines(m).items())
    assert not any(m.adam[k].state for k in m.sizes)  # the next cycle's players are new


def test_replay_successor_is_the_next_row():
    m, env, args = match(iterations=2)
    L, data = args.max_episode_len, lemol.episodes(m, 0)
    now, after = lemol.sample(data, 2000)
    assert m.episode == 7 and data["valid"].sum((1, 2)).tolist() == [7 * L] * 2
    assert torch.equal(data["done"][:, :, :L], (torch.arange(L) == L - 1).float().expand(2, 7, L))
    assert (now["done"] == 1).any()
    # x <- x + 0.1 v', own velocity first in the observation: the successor's explains how the landmarks move
    moved = now["obs0"][..., 2:4] - after["obs0"][..., 2:4]
    assert torch.allclose(moved, 0.1 * after["obs0"][..., :2], atol=1e-5)


def test_early_ends_are_masked():
    m, *_ = match(iterations=3, env="uav", discrete_actions=True, max_episode_len=8,
                  agent_update_freq=8, num_episodes=30, batch_size=20, segment=5)
    data = lemol.episodes(m, 0)
    done, valid = data["done"][..., :-1], data["valid"][..., :-1]
    assert torch.equal(valid[..., 1:], valid[..., :-1] * (1 - done[..., :-1])) and (valid[..., 0] == 1).all()
    assert 0 < valid.mean() < 1
    now, _ = lemol.sample(data, 500)
    assert (now["valid"] == 1).all()
    event = lemol.event_of(data, m.lemol)
    assert (event[valid == 0] == 0).all() and (event[valid == 1][:, -1] == 1).all()


def test_replay_holds_the_latest_steps(monkeypatch):
    m, _, args = match(iterations=2, replay_buffer_capacity=2 * 5)
    true_sample, seen = lemol.sample, []
    monkeypatch.setattr(lemol, "sample", lambda data, n: seen.append(data) or true_sample(data, n))
    lemol.learn(m, 0, args)
    assert torch.equal(seen[0]["obs0"], m.data["obs0"][:, m.episode - 2 : m.episode])


@pytest.mark.parametrize("kw", [
    dict(om="oracle"), dict(om="policy"), dict(om="uninformed"), dict(bad_policy="maddpg")])
def test_every_kind_of_run_trains(kw):
    m, env, args = match(iterations=2, **kw)
    first = lines(m)
    logs = [lemol.iterate(m, env, args)[0] for _ in range(3)]  # over the end of a cycle
    assert not any(torch.equal(first[k], v) for k, v in lines(m).items())
    assert all(math.isfinite(float(v)) for log in logs for v in log.values())


def test_replay_rows_are_drawn_uniformly_among_the_valid_ones():
    valid = torch.tensor([[[1.0, 1, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]]])  # (R, E, L + 1)
    number = torch.arange(12.0).view(2, 2, 3)
    now, after = lemol.sample(dict(valid=valid, obs0=number, obs1=number), 30_000)
    assert torch.equal(after["obs1"], now["obs1"] + 1)
    for r, rows in enumerate(([0, 1, 3], [6, 7, 9, 10])):
        found, counts = now["obs0"][r].unique(return_counts=True)
        assert found.tolist() == rows and (counts / 30_000 - 1 / len(rows)).abs().max() < 0.02


def test_ctrl_c_ends_the_training_of_the_models_at_the_next_chunk():
    m, env, args = match(iterations=3)
    assert m.episode == args.num_episodes
    assert lemol.iterate(m, env, args, SimpleNamespace(interrupted=True)) == (None, 0)


def test_defenders_with_equal_memory(monkeypatch):
    """compare_lemol.py: the models do not read the memory, and only one defender is told what is hidden."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmark")
    compare_lemol = importlib.import_module("compare_lemol")
    m, env, args = match(env="uav", discrete_actions=True, bad_policy="maddpg", good_policy="lemol")
    O, A, L = 12, 9, args.max_episode_len
    wide = OpponentModel("ep", O + 5, A + O + 5 + 7, A, args)
    state = compare_lemol.widened(m.models.state_dict(), "ep", O, A, 5)
    wide.load_state_dict({name[3:]: x for name, x in state.items() if name.startswith("om.")})
    act, obs, junk, rest = (torch.randn(2, 2 * L, n) for n in (A, O, 5, 7))
    logp, _ = m.om(torch.cat([act, obs, rest], 2), obs, m.om.start(2))
    obs = torch.cat([obs, junk], 2)
    assert torch.allclose(wide(torch.cat([act, obs, rest], 2), obs, wide.start(2))[0], logp, atol=1e-5)
    for told in (False, True):
        seen = compare_lemol.Remember(env, 1, m.models["ablated"], told)
        hidden = seen.reset()[1][:, -6:]
        assert hidden.sum() == told * 2 * len(hidden) and seen.obs_dims[1] == len(seen.reset()[1][0])


def test_the_released_options_have_their_names_here():
    readme = (Path(__file__).parents[1] / "benchmark" / "README.md").read_text()
    text = readme.split("| released | here | remark |\n|---|---|---|\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    listed = """
        scenario max-episode-len num-episodes num-adversaries good-policy bad-policy discrete-actions lr gamma
        batch-size num-units adv-eps adv-eps-s agent-update-freq polyak replay-buffer-capacity omlr
        lstm-hidden-dim lemol-save-path chunk-length num-traj-to-train traj-per-iter om-training-iters
        n-opp-cycles""".split()
    assert {f"`--{name}`" for name in listed} <= {name for row in rows for name in row[0].split(", ")}
    ours = {f"`--{field.name.replace('_', '-')}`" for field in dataclasses.fields(lemol.Args)}
    for released, here, remark in rows:
        names = released.split(", ") if here == "the same" else [here]
        assert set(names) <= ours or here == "none" and len(remark) > 20, here


# ---------------------------------------------------------------- the algorithm the obvious way
WHOLE = dict(num_units=64, lstm_hidden_dim=64, in_ep_lstm_dim=32, traj_per_iter=1)  # the twin's sizes


def test_the_twin_has_the_same_gradients(monkeypatch):
    """Both critics and actors, on the same rows of replay, without noise."""
    m, env, args = match(iterations=2, polyak=0.0, stored_guesses=True, **WHOLE)
    agents = [twin.Agent(i, env.obs_dims, env.action_dims, i == 0) for i in (0, 1)]
    rows = {name: x[0] for name, x in lemol.episodes(m, 0).items()}  # (E, L + 1, .)
    now = {name: x[:, :-1].flatten(0, 1) for name, x in rows.items()}  # (n, .)
    after = {name: rows[name][:, 1:].flatten(0, 1) for name in ("obs0", "obs1")}
    count = len(now["done"])
    for i, agent in enumerate(agents):
        for name in ("actor", "critic"):
            for k, p in enumerate(getattr(agent, name).parameters()):
                for end in ("", "_target"):  # theirs are (out, in)
                    m.theta[f"{name}{i}{end}"][k].data[0] = p.detach().mT if k % 2 == 0 else p.detach()
        columns = [now[f"obs{i}"], now[f"act{i}"], now["reward"][:, i], after[f"obs{i}"], now["done"]]
        for row in zip(*columns, *[now["guess"]] * (i == 0)):
            agent.buffer.add(*(x.numpy() for x in row))
    found, order = [], iter([*range(count)] * 2)

    def step(net, adam, loss):
        adam.zero_grad()
        loss.backward()
        for p in net.parameters():
            torch.nn.utils.clip_grad_norm_(p, 0.5)
        found.append(torch.cat([(p.grad.mT if p.dim() == 2 else p.grad).flatten() for p in net.parameters()]))

    monkeypatch.setattr(twin, "step", step)
    monkeypatch.setattr(twin, "sample", lambda logits: logits.softmax(-1))
    monkeypatch.setattr(random, "randint", lambda low, high: next(order))
    monkeypatch.setattr(lemol, "gumbel", lambda *shape, device: torch.zeros(shape))
    batch = [{name: x[None] for name, x in part.items()} for part in (now, after)]
    monkeypatch.setattr(lemol, "sample", lambda *_: batch)
    for adam in m.adam.values():
        monkeypatch.setattr(adam, "step", lambda: None)
    for i in (0, 1):
        twin.update(agents, i, count)
        lemol.learn(m, i, args)
    for name, theirs in zip(("critic0", "actor0", "critic1", "actor1"), found, strict=True):
        ours = torch.cat([p.grad[0].flatten() for p in m.theta[name]])
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name


def test_the_twin_has_the_same_opponent_model():
    """Its steps in play, and its weights after a sweep over a recorded run."""
    m, env, args = match(iterations=3, num_traj_to_train=8, **WHOLE)
    om = twin.OpponentModel(8, 20, 5)
    weights = {k: v.clone() for k, v in m.om.state_dict().items()}
    heads = [name for name in om.state_dict() if "head" in name]  # weights, (out, in) there, and biases
    theirs = {f"head.{heads.index(k)}" if k in heads else k: x.mT if k in heads[::2] else x
              for k, x in om.state_dict().items()}  # their present weights under our names
    for name, x in theirs.items():
        x.copy_(weights[name].view(x.shape))
    run = m.pool[0][..., :-1]  # (1, T, X)
    hc, u = m.om.start(1), m.om.begin(1)
    with torch.no_grad():
        state = om.advance(run[0, :5], (om.h0[:1], om.h0[1:]))
        hc = m.om.advance(run[:, :5], hc)
        assert torch.allclose(torch.cat(state), hc, atol=1e-6)
        guess, _ = om.predict(run[0, 5, 5:13], state, (om.u0[:1], om.u0[1:]))
        z, _ = lemol.unroll(m.om.episode, run[:, 5:6, 5:13], u)
        assert torch.allclose(guess, m.om.guess(z[:, 0], hc[0]).exp(), atol=1e-6)
    lemol.train_models(m, args)
    twin.train_model(om, torch.optim.Adam(om.parameters(), args.omlr), [run[0]], 10, 5, rounds=1)
    for name, ours in m.om.state_dict().items():
        assert torch.allclose(ours, theirs[name].reshape(ours.shape), atol=1e-5), name
        assert not torch.equal(ours, weights[name]), name
