"""The particle worlds against mpe2 on the same states and actions, against the original's rules written out
for one world in plain Python, and against steps computed by hand."""

import math
import sys

import numpy as np
import pytest
import torch

from envs import WORLDS, make
from envs.adapters import from_pettingzoo, to_pettingzoo
from envs.particle import Particle, contact

B = 6  # worlds side by side
NAMES = [name for name, (module, _) in WORLDS.items() if module == "particle"]
close = np.testing.assert_allclose


def tupled(x):
    return (x,) if torch.is_tensor(x) else tuple(x)


def random_action(env, rng, soft):
    """Numbers (B,), or floats (B, A) in steps of 1 / 1024, whose differences mpe2's float32 holds exactly."""
    if soft:
        action = [torch.tensor(rng.integers(1025, size=(env.num_envs, n)) / 1024) for n in env.action_dims]
        action = [a.float() for a in action]
    else:
        action = [torch.tensor(rng.integers(math.prod(s), size=env.num_envs)) for s in env.action_splits]
    return tuple(action) if env.num_agents > 1 else action[0]


# ---------------------------------------------------------------- mpe2
def theirs(name, **options):
    """mpe2's world of that name. Skips the test where mpe2 is not installed."""
    pytest.importorskip("mpe2", reason="parity needs mpe2 (pip install mpe2)")
    version = 4 if name == "simple_speaker_listener" else 3
    module = __import__(f"mpe2.{name}_v{version}", fromlist=["parallel_env"])
    return module.parallel_env(max_cycles=1000, **options)


CASES = [  # our options, and those of mpe2 for the same world
    *((name, {}, {}) for name in NAMES),
    ("simple_spread", dict(num_agents=8), dict(N=8)),
    ("simple_tag", dict(num_agents=3), dict(num_good=1, num_adversaries=2, num_obstacles=1)),
    ("simple_tag", dict(num_agents=8, num_adversaries=5), dict(num_good=3, num_adversaries=5)),
    ("simple_adversary", dict(num_agents=8), dict(N=7)),
    ("simple_world_comm", dict(num_agents=8, num_adversaries=5), dict(num_good=3, num_adversaries=5)),
]


def goals_of(name, world):
    """The numbers of the landmarks that are goals (or the key) in mpe2's world, in the order of ours."""
    agents, number = world.agents, lambda x: next(i for i, m in enumerate(world.landmarks) if m is x)
    if name in ("simple_adversary", "simple_push"):
        return [number(agents[0].goal_a)]
    if name == "simple_crypto":
        return [number(agents[0].goal_a), int(agents[2].key.argmax())]
    if name in ("simple_speaker_listener", "simple_reference"):
        return [number(agent.goal_b) for agent in agents if agent._goal_b is not None]
    return []


def crowd(rng, worlds, env):
    """Puts mpe2's worlds and ours into the same random states, with the first two agents in contact and in a
    third of them nearly all bodies. Returns our observation."""
    for world in worlds:
        scale = rng.choice([0.15, 0.5, 1.1])
        for body in world.entities:
            body.state.p_pos = rng.uniform(-scale, scale, 2)
        for agent in world.agents[1:2]:
            agent.state.p_pos = world.agents[0].state.p_pos + rng.uniform(-0.06, 0.06, 2)
        for agent in world.agents:
            agent.state.p_vel = rng.uniform(-1.5, 1.5, 2) * agent.movable
    return tupled(env.set_state(dict(
        pos=[[body.state.p_pos for body in world.entities] for world in worlds],
        vel=[[agent.state.p_vel for agent in world.agents] for world in worlds],
        goal=[goals_of(env.name, world) for world in worlds],
        action=np.zeros((len(worlds), sum(env.action_dims))))))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name, ours, other", CASES)
def test_the_same_steps_as_mpe2(name, ours, other, soft):
    env, rng = make(name, B, horizon=1000, **ours), np.random.default_rng(0)
    copies = [theirs(name, continuous_actions=soft, **other) for _ in range(B)]
    raw, pushes = [copy.unwrapped for copy in copies], 0
    assert env.agents == copies[0].possible_agents
    assert env.obs_dims == tuple(copies[0].observation_space(a).shape[0] for a in env.agents)
    for episode in range(4):
        for b, copy in enumerate(copies):
            copy.reset(seed=100 * episode + b)
        obs = crowd(rng, [r.world for r in raw], env)
        for _ in range(12):
            for i, agent in enumerate(env.agents):
                close(obs[i], np.stack([r.observe(agent) for r in raw]), rtol=1e-6, atol=1e-7)
            action, before = random_action(env, rng, soft), env.dist[: len(env.touch)]
            pushes += (before < env.touch[:, :, None]).sum()
            obs, reward, *_ = env.step(action)
            obs, pos = tupled(obs), env.state()["pos"]
            for b, copy in enumerate(copies):
                moves = {a: x[b].numpy() if soft else int(x[b]) for a, x in zip(env.agents, tupled(action))}
                gain = list(copy.step(moves)[1].values())
                close(pos[b], [body.state.p_pos for body in raw[b].world.entities], rtol=0, atol=1e-9)
                close(env.gain[:, b], gain, rtol=0, atol=1e-9)
                close(reward[b], gain, rtol=1e-6, atol=1e-6)
    assert pushes > 4 * B or not len(env.touch)  # the forces were there


def test_an_episode_begins_like_theirs():
    """Where bodies and goals may be: every coordinate of every entity, over many worlds."""
    for name in NAMES:
        env, copy = make(name, 400), theirs(name)
        env.reset()
        starts, goals = [], []
        for seed in range(400):
            copy.reset(seed=seed)
            starts.append([body.state.p_pos for body in copy.unwrapped.world.entities])
            goals.append(goals_of(name, copy.unwrapped.world))
        ours, starts = env.state(), np.array(starts)
        close(ours["pos"].min(0), starts.min(0), atol=0.06)  # 0.9 and 1 are told apart
        close(ours["pos"].max(0), starts.max(0), atol=0.06)
        assert not ours["vel"].any() and not ours["action"].any()
        for mine, their in zip(ours["goal"].T, np.array(goals).T):
            share = np.bincount(their) / 400
            close(np.bincount(mine, minlength=len(share)) / 400, share, atol=0.15)


def test_from_pettingzoo_plays_their_world_as_ours():
    theirs("simple_push")
    from mpe2 import simple_push_v3

    env = from_pettingzoo(lambda: simple_push_v3.parallel_env(max_cycles=10), 3, horizon=10)
    ours, rng = make("simple_push", 3, horizon=10), np.random.default_rng(0)
    for member in ("num_envs", "horizon", "num_agents", "obs_dims", "action_dims", "discrete"):
        assert getattr(env, member) == getattr(ours, member), member
    obs = env.reset()
    worlds = [copy.unwrapped.world for copy in env.envs]
    mine = ours.set_state(dict(pos=[[body.state.p_pos for body in w.entities] for w in worlds],
                               goal=[goals_of("simple_push", w) for w in worlds]))
    for t in range(10):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(obs, mine))
        action = random_action(ours, rng, False)
        obs, reward, terminated, truncated, _ = env.step(action)
        mine, gain, ended, cut, _ = ours.step(action)
        assert torch.allclose(reward, gain, atol=1e-5)
        assert torch.equal(terminated, ended) and torch.equal(truncated, cut) and cut.all() == (t == 9)


# ---------------------------------------------------------------- the dialect of 2017
def original_step(env, b, action):
    """One step of world b by the rules of 2017, one body after the other: positions and velocities then."""
    state, N = env.state(), env.num_agents
    pos, vel = state["pos"][b].tolist(), state["vel"][b].tolist()
    force = []
    for i, a in enumerate(action):
        a = a[b].tolist()
        force.append([env.thrust[i, 0] * (a[1] - a[2]), env.thrust[i, 0] * (a[3] - a[4])])
    for i in range(N):
        for j in range(len(env.touch)):
            if i != j:
                dx, dy = pos[i][0] - pos[j][0], pos[i][1] - pos[j][1]
                d = math.hypot(dx, dy)
                depth = (env.radii[i] + env.radii[j] - d) / 1e-3
                strength = 100 * 1e-3 * (math.log1p(math.exp(-abs(depth))) + max(depth, 0)) / d
                force[i] = [force[i][0] + strength * dx, force[i][1] + strength * dy]
    for i in range(N):
        vel[i] = [0.75 * v + 0.1 * f for v, f in zip(vel[i], force[i])]
        top = math.inf if env.limit is None else env.limit[i, 0]
        speed = math.hypot(*vel[i])
        vel[i] = [v * min(1, top / speed) for v in vel[i]]
        pos[i] = [x + 0.1 * v for x, v in zip(pos[i], vel[i])]
    return pos, vel


def original_reward(env, pos):
    """The rewards of 2017 from positions, agent by agent."""
    N, K, L = env.num_agents, env.num_adversaries, env.landmarks
    far = lambda i, j: math.dist(pos[i], pos[j])
    touch = lambda i, j: far(i, j) < env.radii[i] + env.radii[j]
    goal = [N + g for g in env.goal[:, 0]]
    if env.name == "simple_spread":
        cover = sum(min(far(i, N + l) for i in range(N)) for l in range(L))
        return [sum(-cover - sum(touch(i, j) for j in range(N)) for i in range(N))] * N  # also j = i
    if env.name == "simple_adversary":
        good = sum(far(k, goal[0]) for k in range(K)) - min(far(i, goal[0]) for i in range(K, N))
        return [-(far(k, goal[0]) ** 2) for k in range(K)] + [good] * (N - K)
    if env.name == "simple_push":
        return [min(far(i, goal[0]) for i in range(K, N)) - far(k, goal[0]) for k in range(K)] + \
            [-far(i, goal[0]) for i in range(K, N)]
    if env.name == "simple_speaker_listener":
        return [-2 * far(1, goal[0]) ** 2] * 2
    if env.name == "simple_reference":
        return [-(far(1, goal[0]) ** 2) - far(0, goal[1]) ** 2] * 2
    assert env.name == "simple_world_comm"
    ramp = lambda x: 0 if x < 0.9 else 10 * (x - 0.9) if x < 1 else min(math.exp(2 * x - 2), 10)
    meals = range(N + 1, N + 3)
    caught = [sum(touch(k, i) for k in range(K)) for i in range(K, N)]
    return [5 * sum(caught) - 0.1 * min(far(k, i) for i in range(K, N)) for k in range(K)] + \
        [2 * sum(touch(i, m) for m in meals) - 5 * caught[i - K] - 2 * sum(ramp(abs(x)) for x in pos[i])
         + 0.05 * min(far(i, m) for m in meals) for i in range(K, N)]


@pytest.mark.parametrize("name", ["simple_spread", "simple_tag", "simple_push", "simple_adversary"])
def test_steps_of_the_original(name):
    env, rng = make(name, 5, dialect="mpe"), np.random.default_rng(1)
    env.reset()
    env.set_state(dict(pos=0.3 * env.state()["pos"], vel=rng.uniform(-1, 1, (5, env.num_agents, 2))))
    for _ in range(10):
        action = random_action(env, rng, True)
        wanted = [original_step(env, b, action) for b in range(5)]
        env.step(action)
        for b, (pos, vel) in enumerate(wanted):
            close(env.state()["pos"][b], pos, rtol=0, atol=1e-9)
            close(env.state()["vel"][b], vel, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in ("simple_spread", "simple_adversary", "simple_push", "simple_speaker_listener",
                              "simple_reference", "simple_world_comm")),
    *((name, dict(num_agents=7, num_adversaries=3)) for name in ("simple_adversary", "simple_push",
                                                                "simple_world_comm"))])
def test_rewards_of_the_original(name, options):
    env, rng = make(name, 1, dialect="mpe", **options), np.random.default_rng(2)
    for scale in (0.2, 0.5, 1, 2):
        env.reset()
        env.set_state(dict(pos=scale * env.state()["pos"]))
        for _ in range(10):
            env.step(random_action(env, rng, True))
            close(env.gain[:, 0], original_reward(env, env.state()["pos"][0].tolist()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["simple_tag", "simple_push", "simple_crypto"])
def test_dialects_share_the_other_rewards(name):
    """One state and no movement: what differs between the dialects is then the reward alone."""
    one, two = make(name, 4, dialect="mpe"), make(name, 4, dialect="mpe2")
    one.reset()
    two.set_state(one.state())
    still = tuple(torch.zeros(4, n) for n in one.action_dims)
    for env in (one, two):
        env.touch[:] = -np.inf  # no contact
        env.step(still)
    assert np.array_equal(one.state()["pos"], two.state()["pos"])
    one.touch[:] = two.touch[:] = 1.0  # who is nearer than 1 collides
    assert np.array_equal(one.reward(one.dist), two.reward(two.dist))


# ---------------------------------------------------------------- by hand
def push_far_apart(dialect):
    env = make("simple_push", 1, horizon=25, dialect=dialect)
    env.set_state(dict(pos=[[[0, 0], [9, 9], [1, 0], [0, 2]]], vel=np.zeros((1, 2, 2)), goal=[[1]]))
    return env


def test_a_push_from_rest():
    """v_k = 2 (1 - 0.75^k), x_k = 0.2 k - 0.6 (1 - 0.75^k); mpe2 has x a step behind, and 2 to the right."""
    right, stay = torch.tensor([1]), torch.tensor([0])
    env, late = push_far_apart("mpe"), push_far_apart("mpe2")
    where = lambda env: [env.state()["pos"][0, 0, 0], env.state()["vel"][0, 0, 0]]
    v = lambda k: 2 * (1 - 0.75**k)
    x = lambda k: 0.2 * k - 0.6 * (1 - 0.75**k)
    for k in range(1, 26):
        env.step((right, stay))
        late.step((torch.tensor([2]), stay))
        close(where(env), [x(k), v(k)], atol=1e-12)
        close(where(late), [x(k - 1), v(k)], atol=1e-12)
        assert env.state()["pos"][0, 0, 1] == 0 and (env.state()["pos"][0, 1] == 9).all()
    close([x(1), v(1), x(2), v(2), x(3), v(3)], [0.05, 0.5, 0.1375, 0.875, 0.253125, 1.15625])
    close([x(25), v(25)], [4.400452, 1.998495], atol=1e-6)


@pytest.mark.parametrize("dialect, way", [("mpe2", [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]),
                                          ("mpe", [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])])
def test_the_five_moves_as_numbers_and_as_one_hot_floats(dialect, way):
    for k, direction in enumerate(way):
        for action in (torch.tensor([k]), torch.eye(5)[[k]]):
            env = push_far_apart(dialect)
            env.step((action, action))
            close(env.state()["vel"][0, 0], 0.5 * np.array(direction), atol=1e-15)


@pytest.mark.parametrize("d, force", [(0.1, 0.0693147), (0.09, 1.0000045), (0.101, 0.0313262), (0.3, 0.0)])
def test_contact_force(d, force):
    """Of two discs of radius 0.05: 100 * 0.001 * log(1 + exp((0.1 - d) / 0.001)), opposite on the two."""
    env = make("simple_push", 1)
    env.set_state(dict(pos=[[[0.6 * d, 0.8 * d], [0, 0], [5, 5], [5, 5]]]))
    out = np.zeros((2, 2, 1))
    contact(out, env.rel, env.dist, env.touch)
    close(out[:, 0, 0], [0.6 * force, 0.8 * force], atol=1e-7)
    close(out[:, 1, 0], [-0.6 * force, -0.8 * force], atol=1e-7)


def test_bodies_on_one_spot_do_not_explode():
    env = make("simple_spread", 1)
    env.set_state(dict(pos=np.zeros((1, 6, 2))))
    obs, reward, *_ = env.step(tuple(torch.tensor([k]) for k in (0, 1, 2)))
    assert all(x.isfinite().all() for x in (*obs, reward))


def test_observation_and_reward_of_push():
    env = make("simple_push", 1)
    obs = env.set_state(dict(pos=[[[0.5, 0], [0, 0.25], [1, 0], [0, 2]]], vel=[[[1, 2], [3, 4]]], goal=[[1]]))
    close(obs[0][0], [1, 2, 0.5, 0, -0.5, 2, -0.5, 0.25])
    close(obs[1][0], [3, 4, 0, 1.75, 0.25, 0.25, 0.75, 1, -0.25, 0, 1.75,
                      0.1, 0.9, 0.1, 0.1, 0.1, 0.9, 0.5, -0.25])
    own, good = math.hypot(0.5, 2), 1.75
    close(env.reward(env.dist)[:, 0], [good - own, -good])
    assert env.obs_dims == (8, 19)


@pytest.mark.parametrize("x, price", [(-0.5, 0), (0.95, 0.5), (-1.25, math.exp(0.5)), (2.1, math.exp(2.2)),
                                      (-2.2, 10), (1e3, 10)])
def test_the_price_of_leaving_the_square(x, price):
    """Of tag's prey, on each axis; nobody touches it."""
    env = make("simple_tag", 1)
    env.set_state(dict(pos=[[[5, 5], [6, 6], [7, 7], [x, 0.1], [-5, 5], [-6, 5]]]))
    close(env.reward(env.dist)[:, 0], [0, 0, 0, -price], atol=1e-12)


@pytest.mark.parametrize("eve, bob, reward", [
    ([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0]), ([0, 1, 0, 0], [1, 0, 0, 0], [-2, 2, 2]),
    ([1, 0, 0, 0], [0, 0, 1, 0], [0, -2, -2]), ([0.5, 0.5, 0, 0], [1, 0, 0, 0], [-0.5, 0.5, 0.5]),
    ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0])])  # silence costs nothing
def test_rewards_of_crypto(eve, bob, reward):
    env = make("simple_crypto", 1)
    env.set_state(dict(goal=[[0, 1]]))
    said = tuple(torch.tensor([x], dtype=torch.float32) for x in (eve, bob, [0, 0, 0, 1]))
    close(env.step(said)[1][0], reward)


def test_no_op_returns_of_push():
    """Standing still, agent 1 scores -26.07 in an episode (the mean of 20,000, to 0.1) and agent 0 nothing in
    expectation, by symmetry."""
    torch.manual_seed(0)
    env = make("simple_push", 20_000, dialect="mpe")
    env.reset()
    still = (torch.zeros(20_000, dtype=torch.long),) * 2
    total = sum(env.step(still)[1] for _ in range(env.horizon)).mean(0)
    assert abs(total[0]) < 0.5 and abs(total[1] + 26.07) < 0.4


# ---------------------------------------------------------------- the contract, beyond tests/test_envs.py
@pytest.mark.parametrize("name, options", [
    ("simple_spread", dict(num_agents=1)), ("simple_spread", dict(num_agents=10)),
    ("simple_tag", dict(num_agents=2)), ("simple_tag", dict(num_agents=10, num_adversaries=9)),
    ("simple_adversary", dict(num_agents=5, num_adversaries=2)), ("simple_push", dict(num_agents=8)),
    ("simple_world_comm", dict(num_agents=2)), *((name, {}) for name in NAMES)])
def test_worlds_do_not_depend_on_their_neighbours(name, options):
    """One world of a batch alone plays the same episode, with numbers and with floats, in both dialects."""
    rng = np.random.default_rng(0)
    for dialect in ("mpe", "mpe2"):
        many, one = make(name, 4, dialect=dialect, **options), make(name, 1, dialect=dialect, **options)
        many.reset()
        obs = tupled(one.set_state({k: x if k == "t" else x[[2]] for k, x in many.state().items()}))
        assert [o.shape[1] for o in obs] == list(many.obs_dims)
        for t in range(6):
            action = random_action(many, rng, soft=t % 2)
            alone = tuple(a[[2]] for a in tupled(action))
            a, b = many.step(action), one.step(alone if many.num_agents > 1 else alone[0])
            assert all(torch.equal(x[[2]], y) for x, y in zip(tupled(a[0]), tupled(b[0])))
            assert torch.equal(a[1][[2]], b[1])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_one_hot_floats(name):
    one, two, rng = make(name, 3), make(name, 3), np.random.default_rng(0)
    one.reset()
    two.set_state(one.state())
    for _ in range(3):
        action, hot = random_action(one, rng, False), []
        for a, split in zip(tupled(action), one.action_splits):
            blocks, eye = [], lambda n: torch.eye(n)
            for n in split:
                blocks.append(eye(n)[a % n])
                a = a // n
            hot.append(torch.cat(blocks, 1))
        a, b = one.step(action), two.step(tuple(hot) if one.num_agents > 1 else hot[0])
        assert all(map(torch.equal, tupled(a[0]), tupled(b[0]))) and torch.equal(a[1], b[1])


def test_splits_of_the_actions():
    splits = {name: make(name, 1).action_splits for name in NAMES}
    assert splits["simple_spread"] == ((5,),) * 3 and splits["simple_crypto"] == ((4,),) * 3
    assert splits["simple_speaker_listener"] == ((3,), (5,))
    assert splits["simple_reference"] == ((5, 10), (5, 10))
    assert splits["simple_world_comm"] == ((5, 4), *[(5,)] * 5)
    assert make("simple_reference", 1).action_dims == (15, 15)


@pytest.mark.parametrize("name, options, wanted", [
    ("simple_tag", {}, (4, 3, 2)), ("simple_tag", dict(num_agents=3), (3, 2, 1)),
    ("simple_tag", dict(num_agents=8), (8, 4, 2)), ("simple_tag", dict(num_agents=12), (12, 6, 3)),
    ("simple_adversary", {}, (3, 1, 2)), ("simple_adversary", dict(num_agents=8), (8, 1, 7)),
    ("simple_push", dict(num_agents=8), (8, 4, 2)),
    ("simple_push", dict(num_agents=3, num_adversaries=1), (3, 1, 2)),
    ("simple_spread", dict(num_agents=10), (10, 0, 10)), ("simple_world_comm", dict(num_agents=8), (8, 4, 5)),
])
def test_default_numbers(name, options, wanted):
    env = make(name, 1, **options)
    assert (env.num_agents, env.num_adversaries, env.landmarks) == wanted
    assert sum(a.startswith(("adversary", "leadadversary")) for a in env.agents) == wanted[1]


def test_reset_draws_from_the_global_stream_or_from_a_generator():
    env = make("simple_adversary", 3)
    torch.manual_seed(5)
    first, state = env.reset(), torch.get_rng_state()
    again = env.reset(generator=torch.Generator().manual_seed(5))
    assert all(map(torch.equal, first, again)) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(env.reset()[0], first[0])
    talk = make("simple_reference", 2)
    for _ in range(2):
        assert not talk.reset()[0][:, [0, 1, *range(-10, 0)]].any()  # still and silent, also the second time
        assert not talk.step(random_action(talk, np.random.default_rng(0), True))[3].any() and talk.t == 1
    assert len({tuple(o) for o in first[0].tolist()}) == 3  # the worlds differ


def test_state_goes_on_bit_by_bit():
    env, other = (make("simple_world_comm", 3, horizon=6) for _ in range(2))
    rng, obs = np.random.default_rng(0), env.reset()
    for t in range(6):
        if t == 3:
            assert all(map(torch.equal, other.set_state(env.state()), obs))
        action = random_action(env, rng, True)
        obs, reward, _, truncated, _ = env.step(action)
        if t >= 3:
            out = other.step(action)
            assert all(map(torch.equal, out[0], obs)) and torch.equal(out[1], reward)
            assert torch.equal(out[3], truncated)
    assert truncated.all()


def test_what_was_handed_out_does_not_change():
    env, rng = make("simple_spread", 2), np.random.default_rng(0)
    obs = env.reset()
    kept = [o.clone() for o in obs]
    later, reward, *_ = env.step(random_action(env, rng, False))
    gain = reward.clone()
    env.step(random_action(env, rng, False))
    assert all(map(torch.equal, obs, kept)) and torch.equal(reward, gain)
    assert not torch.equal(later[0], obs[0])


def test_every_tensor_is_on_the_device():
    env = make("simple_push", 2, device="meta")
    assert {o.device.type for o in env.reset()} == {"meta"}
    out = env.step(tuple(torch.zeros(2, dtype=torch.long) for _ in range(2)))
    assert {x.device.type for x in (*out[0], *out[1:4])} == {"meta"}


def test_memory_is_linear_in_worlds():
    size = lambda n: sum(x.nbytes for x in vars(make("simple_spread", n)).values()
                         if isinstance(x, np.ndarray) and x.base is None)
    assert 3.9 < (size(4096) - size(64)) / (size(1072) - size(64)) < 4.1


def test_a_step_has_no_loop_over_worlds_or_agents():
    """As many calls for 64 worlds as for 2, and for 10 agents as for 3."""
    counts = []
    for options in (dict(num_envs=2), dict(num_envs=64), dict(num_envs=64, num_agents=10)):
        env, n = make("simple_spread", **options), [0]
        env.set_state(dict(pos=np.zeros(env.state()["pos"].shape)))  # all in contact
        action = tuple(torch.zeros(env.num_envs, dtype=torch.long) for _ in range(env.num_agents))

        def count(frame, event, arg, n=n):
            n[0] += event in ("call", "c_call")

        sys.setprofile(count)
        env.step(action)
        sys.setprofile(None)
        counts.append(n[0])
    assert len(set(counts)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_render_shows_every_body(name):
    env = make(name, 2)
    env.reset()
    N, E = env.num_agents, env.num_agents + env.landmarks
    grid = np.stack(np.meshgrid(np.linspace(-0.8, 0.8, 4), np.linspace(-0.8, 0.8, 4)), -1).reshape(-1, 2)
    env.set_state(dict(pos=[grid[:E], grid[::-1][:E]]))
    frame = env.render(row=1, size=110)
    assert frame.shape == (110, 110, 3) and frame.dtype == np.uint8
    for i, (x, y) in enumerate(grid[::-1][:E]):
        pixel = frame[int((1.1 - y) * 50), int((x + 1.1) * 50)].astype(int)
        assert pixel.min() < 230, (name, i)  # not the white ground
        if i < N:
            assert pixel[0] > pixel[2] if env.adversary[i] else pixel[2] > pixel[0]
    assert (frame[[0, -1]] == 255).all()
    assert not np.array_equal(frame, env.render(row=0, size=110))


def test_render_shows_who_is_far_out_and_who_speaks():
    env = make("simple_reference", 1)
    env.reset()
    silent = env.render()
    env.step((torch.tensor([5 * 3]), torch.tensor([5 * 7])))
    spoken = env.render()
    assert (silent != spoken).any()
    env.set_state(dict(pos=[[[4.9, 0], [0, 0], [1, 1], [-1, 1], [1, -1]]]))
    assert (env.render(size=200)[100, 198] < 200).any()  # the square shown is [-5, 5]^2


def test_to_pettingzoo_and_back():
    env = to_pettingzoo(make("simple_tag", 1, horizon=5), render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    assert [len(o) for o in obs.values()] == list(make("simple_tag", 1).obs_dims)
    assert env.render().shape == (240, 240, 3)


@pytest.mark.parametrize("call, message", [
    (lambda: make("simple", 1, num_agents=2), "1 agents, 0 of them"),
    (lambda: make("simple_crypto", 1, num_agents=4), "3 agents, 1 of them"),
    (lambda: make("simple_reference", 1, num_adversaries=1), "0 of them adversaries, not 2 and 1"),
    (lambda: make("simple_tag", 1, num_agents=3, num_adversaries=3), "not 3 of 3 agents"),
    (lambda: make("simple_push", 1, num_adversaries=0), "not 0 of 2 agents"),
    (lambda: make("simple_spread", 1, num_adversaries=1), "no adversaries, not 1 of 3"),
    (lambda: make("simple_spread", 1, num_agents=0), "needs an agent"),
    (lambda: make("simple", 1, horizon=0), "horizon must be at least 1"),
    (lambda: make("simple", 1, dialect="mpe3"), "'mpe2' or 'mpe', not 25 and 'mpe3'"),
    (lambda: make("simple", 1).reset(task=1), "has no tasks"),
    (lambda: make("simple_push", 2).step((torch.zeros(2).long(),) * 3), "actions must be"),
    (lambda: make("simple_push", 2).step((torch.zeros(2, 4),) * 2), "actions must be"),
    (lambda: make("simple_push", 2).step((torch.tensor([0, 5]),) * 2), r"in 0 .. \[4, 4\]"),
    (lambda: make("simple_push", 2).step((torch.tensor([0, -1]),) * 2), r"in 0 .. \[4, 4\]"),
])
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_world_of_ones_own_is_a_few_lines():
    class Chase(Particle):
        standard, fixed = (2, 1), False

        def observation(self, i, see):
            return [see.vel[i], see.rel[i, see.others[i]]]

        def reward(self, dist):
            return np.stack([-dist[1, 0], dist[0, 1]])

    env = Chase("chase", 3)
    env.reset()
    obs, reward, *_ = env.step((torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])))
    assert env.obs_dims == (4, 4) and torch.allclose(reward[:, 0], -obs[0][:, 2:].norm(dim=1), atol=1e-6)


def test_pettingzoo_offers_every_move_with_every_word():
    world = to_pettingzoo(make("simple_reference", 1))
    assert world.action_space(world.possible_agents[0]).n == 50
    world.reset(seed=1)
    world.step({name: 49 for name in world.possible_agents})
