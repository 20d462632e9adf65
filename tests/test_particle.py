"""The particle worlds against mpe2 on the same states and actions, against the original's rules written out
for one world in plain Python, and against steps computed by hand."""

import math

import numpy as np
import pytest
import torch
from test_parity import PARTICLES, random_action, tupled

from envs import make
from envs.adapters import to_pettingzoo
from envs.particle import Particle, contact

close = np.testing.assert_allclose


# ---------------------------------------------------------------- mpe2


# ---------------------------------------------------------------- the dialect of 2017


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


@pytest.mark.parametrize("name", PARTICLES)
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


def test_render_shows_who_is_far_out_and_who_speaks():
    env = make("simple_reference", 1)
    env.reset()
    silent = env.render()
    env.step((torch.tensor([5 * 3]), torch.tensor([5 * 7])))
    spoken = env.render()
    assert (silent != spoken).any()
    env.set_state(dict(pos=[[[4.9, 0], [0, 0], [1, 1], [-1, 1], [1, -1]]]))
    assert (env.render(size=200)[100, 198] < 200).any()  # the square shown is [-5, 5]^2


@pytest.mark.parametrize("call, message", [
    (lambda: make("simple", 1, num_agents=2), "1 agents, 0 of them"),
    (lambda: make("simple_crypto", 1, num_agents=4), "3 agents, 1 of them"),
    (lambda: make("simple_reference", 1, num_adversaries=1), "0 of them adversaries, not 2 and 1"),
    (lambda: make("simple_tag", 1, num_agents=3, num_adversaries=3), "not 3 of 3 agents"),
    (lambda: make("simple_push", 1, num_adversaries=0), "not 0 of 2 agents"),
    (lambda: make("simple_spread", 1, num_adversaries=1), "no adversaries, not 1 of 3"),
    (lambda: make("simple_spread", 1, num_agents=0), "needs an agent"),
    (lambda: make("simple", 1, dialect="mpe3"), "'mpe2' or 'mpe', not 'mpe3'"),
    (lambda: make("simple_push", 2).step((torch.tensor([0, 5]),) * 2), r"in 0 .. \[4, 4\]"),
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
