"""What points, discs and grids do, by hand, where tests/test_parity.py does not compare it."""

import math

import numpy as np
import pytest
import torch
from test_envs import actions, step, tupled
from test_parity import PARTICLES, TARGETS, bold, load, one_hot, put

from envs import make
from envs.base import STRIPES
from envs.targets import walls
from envs.warehouse import CELLS, may_move, number

close = torch.testing.assert_close
UP, DOWN, WEST, EAST = range(4)


# ---------------------------------------------------------------- nav2d, and all tasks on a box
def test_steps_of_the_point():
    env, goals = make("nav2d", 5, horizon=3), [[0.3, 0.4], [-0.1, 0], [0.009, 0.009], [0.011, 0], [0, -0.011]]
    close(env.reset(goals), torch.zeros(5, 2))
    action = torch.tensor([[0.05, -0.02], [-3.0, 0.005], [0, 0], [0, 0], [0, 0]])
    obs, reward, terminated, truncated, info = env.step(action)
    close(obs[:2], torch.tensor([[0.05, -0.02], [-0.1, 0.005]]))  # the second row is clipped
    close(reward[:2], -torch.tensor([[(0.25**2 + 0.42**2) ** 0.5], [0.005]]))
    assert terminated.tolist() == [False, True, True, False, False] and not truncated.any()  # both components
    obs, reward, *_ = env.step(torch.full((5, 2), 0.1))
    close(obs[:2], torch.tensor([[0.15, 0.08], [-0.1, 0.005]]))  # who has arrived rests, without reward
    close(reward[:2], torch.tensor([[-((0.15**2 + 0.32**2) ** 0.5)], [0.0]]))
    frame = env.render(row=0, size=100)  # of [-1, 1]^2
    colours = [frame[y, x].tolist() for y, x in ((30, 65), (46, 57), (80, 20))]
    assert colours == [[0, 160, 0], [0, 0, 0], [255, 255, 255]]  # goal, point, nothing


@pytest.mark.parametrize("name, low, high", [
    ("nav2d", -0.5, 0.5), ("half_cheetah_vel", 0, 2), ("ant_vel", 0, 3), ("ant_goal", -3, 3)])
def test_tasks_cover_a_box_evenly(name, low, high):
    torch.manual_seed(0)
    env, n, seen = make(name, 3), 50_000, {}
    for split in ("train", "test"):
        u = (env.sample_tasks(n, split).double() - low) / (high - low)
        assert 0 <= u.min() and u.max() <= 1
        close(u.mean(0), torch.full_like(u[0], 0.5), atol=0.01, rtol=0)
        close(u.std(0), torch.full_like(u[0], 1 / 12**0.5), atol=0.01, rtol=0)
        seen[split] = set((u[:, 0] * STRIPES).floor().long().tolist())
    assert not seen["train"] & seen["test"] and [len(seen[split]) for split in seen] == [80, 20]
    env.reset()
    assert len(np.unique(env.task, axis=0)) == 3  # one task a row
    state = torch.get_rng_state()
    if name == "nav2d":
        env.reset(env.task)
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn when the tasks are given


# ---------------------------------------------------------------- uav
def test_pursuit():
    """Of target and UAV: side by side, changing places, meeting, at the edge; then time is up."""
    env = make("uav", 9)
    env.reset()
    env.place[:] = 1  # all nine moves from the middle: stay, N, S, E, W, NE, SE, SW, NW
    env.step((torch.arange(9), torch.arange(9) % 5))
    wanted = [[1, 1], [0, 1], [2, 1], [1, 2], [1, 0], [0, 2], [2, 2], [2, 0], [0, 0]]
    assert env.place.tolist() == [wanted, wanted[:5] + wanted[:4]]
    torch.manual_seed(0)
    env = make("uav", 4, horizon=2)
    start = env.reset()
    assert (env.place[0, :, 1] == 2).all() and (env.place[1, :, 1] == 0).all()  # last and first column
    own = torch.nn.functional.one_hot(env.place, 3).flatten(2).float()  # (2, B, 6)
    assert all(torch.equal(o[:, :6], x) and (o[:, 6:9].sum(1) == 1).all() for o, x in zip(start, own))
    env.place[:] = torch.tensor([[[0, 2], [1, 1], [1, 2], [0, 2]], [[2, 0], [1, 0], [2, 1], [0, 0]]])
    target, uav = torch.tensor([8, 4, 2, 1]), torch.tensor([0, 3, 3, 1])  # NW; W, E; S, E; N, N
    *_, reward, terminated, truncated, _ = env.step((target, uav))
    assert env.place.tolist() == [[[0, 1], [1, 0], [2, 2], [0, 2]], [[2, 0], [1, 1], [2, 2], [0, 0]]]
    assert reward.tolist() == [[0, 0], [0, 0], [-1, 1], [0, 0]]
    assert terminated.tolist() == [False, False, True, False] and not truncated.any()
    *_, reward, terminated, truncated, _ = env.step((target, uav))
    assert reward.tolist() == [[1, -1], [1, -1], [0, 0], [1, -1]] and truncated.all()


@pytest.mark.parametrize("stay, nu", [(False, (0.45, 0.3)), (True, (0.35, 0.2))])
def test_how_often_the_other_is_seen_where_it_is(stay, nu):
    torch.manual_seed(0)
    env = make("uav", 20_000)
    env.reset()
    obs, *_ = env.step((torch.full((20_000,), 3 - 3 * stay), torch.full((20_000,), 4 - 4 * stay)))
    for i in range(2):
        seen = torch.nn.functional.one_hot(env.place[1 - i], 3).float() * obs[i][:, 6:].view(-1, 2, 3)
        right = seen.sum(2)[~env.terminated]  # (n, 2): row and column
        assert torch.equal(right[:, 0], right[:, 1]) and abs(right.mean() - 1 + nu[i]) < 0.015


# ---------------------------------------------------------------- particles
def test_bodies_on_one_spot_do_not_explode():
    env = make("simple_spread", 1)
    put(env, pos=np.zeros((1, 6, 2)))
    obs, reward, *_ = env.step(tuple(torch.tensor([k]) for k in (0, 1, 2)))
    assert all(x.isfinite().all() for x in (*obs, reward))


@pytest.mark.parametrize("x, price", [(-0.5, 0), (0.95, 0.5), (-1.25, math.exp(0.5)), (2.1, math.exp(2.2)),
                                      (-2.2, 10), (1e3, 10)])
def test_the_price_of_leaving_the_square(x, price):
    """Of tag's prey, on each axis; nobody touches it."""
    env = make("simple_tag", 1)
    put(env, pos=[[[5, 5], [6, 6], [7, 7], [x, 0.1], [-5, 5], [-6, 5]]])
    np.testing.assert_allclose(env.reward(env.dist)[:, 0], [0, 0, 0, -price], atol=1e-12)


@pytest.mark.parametrize("eve, bob, reward", [
    ([1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0]), ([0, 1, 0, 0], [1, 0, 0, 0], [-2, 2, 2]),
    ([1, 0, 0, 0], [0, 0, 1, 0], [0, -2, -2]), ([0.5, 0.5, 0, 0], [1, 0, 0, 0], [-0.5, 0.5, 0.5]),
    ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0])])  # silence costs nothing
@pytest.mark.parametrize("dialect", ["mpe", "mpe2"])
def test_rewards_of_crypto(eve, bob, reward, dialect):
    env = make("simple_crypto", 1, dialect=dialect)
    put(env, goal=[[0, 1]])
    said = tuple(torch.tensor([x], dtype=torch.float32) for x in (eve, bob, [0, 0, 0, 1]))
    close(env.step(said)[1], torch.tensor([reward]).float())


@pytest.mark.parametrize("name", PARTICLES)
def test_numbers_are_one_hot_floats(name):
    one, two, draw = make(name, 3), make(name, 3), torch.Generator().manual_seed(0)
    for env in one, two:
        torch.manual_seed(0)
        env.reset()
    for _ in range(3):
        action, hot = actions(one, draw), []
        for a, split in zip(action, one.action_splits):  # a move, or a word, or move + 5 * word
            blocks = zip((a % split[0], a // split[0]), split)
            hot.append(torch.cat([torch.eye(n)[k] for k, n in blocks], 1))
        a, b = step(one, action), step(two, hot)
        assert all(map(torch.equal, tupled(a[0]), tupled(b[0]))) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("name, options, wanted", [
    ("simple_tag", {}, (4, 3, 2)), ("simple_tag", dict(num_agents=3), (3, 2, 1)),
    ("simple_tag", dict(num_agents=8), (8, 4, 2)), ("simple_tag", dict(num_agents=12), (12, 6, 3)),
    ("simple_adversary", {}, (3, 1, 2)), ("simple_adversary", dict(num_agents=8), (8, 1, 7)),
    ("simple_push", dict(num_agents=8), (8, 4, 2)),
    ("simple_push", dict(num_agents=3, num_adversaries=1), (3, 1, 2)),
    ("simple_spread", dict(num_agents=10), (10, 0, 10)),
    ("simple_world_comm", dict(num_agents=8), (8, 4, 5))])
def test_default_numbers(name, options, wanted):
    env = make(name, 1, **options)
    assert (env.num_agents, env.num_adversaries, env.landmarks) == wanted


def test_measures_of_particles():
    """Two of three agents touch, one is on a landmark; an adversary is on its prey, far from the goal."""
    env = make("simple_spread", 2)
    put(env, pos=[[[0, 0], [0.2, 0], [1, 1], [0, 0], [0.2, 0.5], [1, 0]]] * 2)
    wanted = {"collisions": 1, "landmark_distance": (0 + 0.5 + 0.8) / 3, "occupied_landmarks": 1}
    got = env.measures()
    assert got.keys() == wanted.keys() and all(got[k].tolist() == [pytest.approx(wanted[k])] * 2 for k in got)
    env = make("simple_push", 1)
    put(env, pos=[[[0, 0], [0.05, 0], [3, 0], [0, 4]]], goal=[[1]])
    got = {k: v.item() for k, v in env.measures().items()}
    assert got["caught"] == got["collisions"] == 1 and got["goal_distance_adversary"] == 4


def test_a_picture_shows_who_is_far_out_and_who_speaks():
    env = make("simple_reference", 1)
    env.reset()
    silent = env.render()
    env.step((torch.tensor([5 * 3]), torch.tensor([5 * 7])))
    assert (silent != env.render()).any()
    put(env, pos=[[[4.9, 0], [0, 0], [1, 1], [-1, 1], [1, -1]]])
    assert (env.render(size=200)[100, 198] < 200).any()  # the square shown is [-5, 5]^2


# ---------------------------------------------------------------- hidden targets
def test_walls_push_inwards_up_to_them_and_outwards_beyond():
    pos = np.array([[[1.19, 1.21, -1.19, -1.21, 0.0, 0.849, 0.9]], [[0.0] * 7]])
    force = walls(pos, np.array([0.15]))[0, 0]
    assert (np.sign(force[:4]) == [-1, 1, 1, -1]).all() and force[4] == 0
    assert -0.1 < force[5] < 0 and force[6] == pytest.approx(-5, abs=1e-3)  # 5 units, 0.05 into the ramp


@pytest.mark.parametrize("name", TARGETS)
def test_nobody_sees_the_task_but_the_reward_tells(name):
    env = make(name, 2)
    tasks = env.all_tasks()
    assert len(tasks) == {"spread": 3, "spread_large": 4, "hunting": 2, "hunting_large": 3}[name]
    assert (tasks.sum(1) == (env.num_agents if "spread" in name else 1)).all()
    env.reset(tasks[:2])
    env.pos[:, :, 1] = env.pos[:, :, 0]
    assert all(torch.equal(o[0], o[1]) for o in env._observe())
    gain = env.reward()
    assert not np.allclose(gain[:, 0], gain[:, 1])


# ---------------------------------------------------------------- the warehouse
@pytest.mark.parametrize("cell, target, wanted", [
    ([1, 5], [2, 5], [1, 1]),  # free; staying
    ([1, 2], [2, 1], [0, 0]),  # face to face
    ([1, 2, 3], [2, 1, 2], [0, 0, 0]),  # and who follows them
    ([1, 2, 3], [2, 3, 4], [1, 1, 1]),  # a chain
    ([1, 2, 3], [2, 3, 3], [0, 0, 1]),  # behind one who stays
    ([1, 2, 12, 11], [2, 12, 11, 1], [1, 1, 1, 1]),  # a ring
    ([1, 2, 12, 11, 0], [2, 12, 11, 1, 1], [1, 1, 1, 1, 0]),  # and who follows it
    ([1, 3], [2, 2], [1, 0]),  # equals: the first
    ([3, 1], [2, 2], [1, 0]),
    ([1, 3, 4], [2, 2, 3], [0, 1, 1]),  # the longer chain
    ([3, 12, 22, 1], [2, 2, 12, 2], [0, 1, 1, 0]),
    ([40, 1, 50, 3], [41, 2, 51, 2], [1, 1, 1, 0]),
    ([1, 3, 4, 5, 0], [2, 2, 3, 4, 1], [0, 1, 1, 1, 0]),  # three against two
    # two chains of two: 0 behind 3 (cell 3) and 1 behind 2 (cell 1). Cell 3 enters as robot 0's target.
    ([4, 0, 1, 3], [3, 1, 2, 2], [1, 0, 0, 1]),
    # here 2's cell enters with robot 0, as its target, before that of robot 1, and both chains have two
    ([4, 1, 3, 0], [3, 2, 2, 1], [1, 0, 1, 0]),
    # within a chain: two want the place of a third who moves
    ([5, 15, 6, 30], [6, 6, 7, 30], [1, 0, 1, 1])])
def test_who_may_move(cell, target, wanted):
    cell, target = np.array([cell] * 2), np.array([target] * 2)
    assert may_move(cell, target).astype(int).tolist() == [wanted] * 2


def test_nobody_ever_shares_a_cell():
    torch.manual_seed(0)
    env, draw = make("rware", 20, num_agents=30), np.random.default_rng(0)
    env.reset()
    load(env, draw)
    for _ in range(60):
        before, action = env.cell.copy(), bold(env, draw)
        env.step(list(action.T))
        assert all(len(set(c)) == 30 for c in env.cell)
        for shelves, there in zip(env.shelf[:, :-1], env.there):
            assert len(set(shelves[there])) == there.sum() and (shelves[~there] == CELLS).all()
        swapped = (env.cell[:, :, None] == before[:, None]) & (env.cell[:, None] == before[:, :, None])
        assert not (swapped & ~np.eye(30, dtype=bool)).any()


def test_starts_and_requests_are_uniform():
    torch.manual_seed(0)
    env = make("rware", 4000)
    env.reset(one_hot("bottom").expand(4000, -1))
    assert all(len(set(c)) == 4 for c in env.cell[:100])
    spots = np.bincount(env.cell.ravel(), minlength=CELLS)
    assert (spots > 0).sum() == 100 and 100 < spots[spots > 0].min() and spots.max() < 220  # 160 each
    assert np.abs(np.bincount(env.direction.ravel()) / 16000 - 0.25).max() < 0.02
    assert (env.requested.sum(1) == 4).all() and not env.requested[:, 16:].any()
    assert np.abs(env.requested[:, :16].mean(0) - 0.25).max() < 0.04


def test_picture_of_the_warehouse():
    torch.manual_seed(0)
    env = make("rware", 2)
    env.reset(one_hot("left", "right"))
    env.cell[1], env.direction[1] = [number(x, y) for x in (0, 9) for y in (0, 9)], [UP, WEST, DOWN, EAST]
    frame = env.render(1)
    middle = lambda x, y: frame[24 * y + 12, 24 * x + 12].tolist()
    assert middle(0, 0) == middle(9, 9) == [70, 120, 230] and middle(6, 3) in ([180, 140, 100], [210, 70, 60])
    assert middle(4, 9) == [150] * 3 and middle(2, 3) == [235] * 3
    for x, y, dx, dy in (0, 0, 0, -1), (9, 0, 0, 1), (0, 9, -1, 0), (9, 9, 1, 0):
        stripe = [frame[24 * y + 12 + 7 * sy, 24 * x + 12 + 7 * sx].tolist() == [255] * 3
                  for sx, sy in ((dx, dy), (-dx, -dy), (dy, dx), (-dy, -dx))]
        assert stripe == [True, False, False, False]
