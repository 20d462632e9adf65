"""The batched warehouse against rware 2.0 (where it is installed), step by step, and by hand."""


import numpy as np
import pytest
import torch
from test_parity import BOTH, bold, load, one_hot, place, text

from envs import make
from envs.warehouse import CELLS, GOALS, LAYOUTS, TURNS, WIDTH, may_move

equal = np.array_equal
NOTHING, FORWARD, LEFT, RIGHT, TOGGLE = range(5)
UP, DOWN, WEST, EAST = range(4)


def steps(env, rows):
    """Actions, one list a step, of B rows: (N lists of B)."""
    return [torch.tensor([r[i] for r in rows]) for i in range(env.num_agents)]


def xy(env, b=0):
    return [(int(c % WIDTH) - 2, int(c // WIDTH) - 2) for c in env.cell[b]]


# ---------------------------------------------------------------- parity with rware


# ---------------------------------------------------------------- moves by hand


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
    ([5, 15, 6, 30], [6, 6, 7, 30], [1, 0, 1, 1]),
])
def test_who_may_move(cell, target, wanted):
    cell, target = np.array([cell] * 2), np.array([target] * 2)
    assert may_move(cell, target).astype(int).tolist() == [wanted] * 2


def test_nobody_ever_shares_a_cell():
    torch.manual_seed(0)
    env, draw = make("rware", 50, num_agents=30), np.random.default_rng(0)
    env.reset()
    load(env, draw)
    for _ in range(100):
        before, action = env.cell.copy(), bold(env, draw)
        env.step(list(action.T))
        assert all(len(set(c)) == 30 for c in env.cell)
        for shelves, there in zip(env.shelf[:, :-1], env.there):
            assert len(set(shelves[there])) == there.sum() and (shelves[~there] == CELLS).all()
        swapped = (env.cell[:, :, None] == before[:, None]) & (env.cell[:, None] == before[:, :, None])
        assert not (swapped & ~np.eye(30, dtype=bool)).any()


def test_turns_and_walls():
    torch.manual_seed(0)
    env = make("rware", 1, num_agents=1)
    env.reset(one_hot("both"))
    place(env, 0, [(0, 0, UP)])
    env.step(steps(env, [[FORWARD]]))
    assert xy(env) == [(0, 0)]
    seen = []
    for _ in range(4):
        env.step(steps(env, [[RIGHT]]))
        seen.append(env.direction[0, 0])
    assert seen == [EAST, DOWN, WEST, UP] and equal(TURNS[LEFT][TURNS[RIGHT]], range(4))
    for action, wanted in (RIGHT, (0, 0)), (FORWARD, (1, 0)), (RIGHT, (1, 0)), (FORWARD, (1, 1)):
        env.step(steps(env, [[action]]))
        assert xy(env) == [wanted]


def test_a_delivery_by_hand():
    torch.manual_seed(0)
    env = make("rware", 2, num_agents=2)
    env.reset(one_hot("both", "both"))
    shelf = 26  # the 27th in reading order: (6, 7)
    for b in range(2):
        place(env, b, [(6, 7, DOWN), (5, 9, EAST)], [shelf, 0, 1, 2] if b == 0 else [0, 1, 2, 3])
    script = [(TOGGLE, NOTHING), (FORWARD, FORWARD), (RIGHT, FORWARD), (FORWARD, NOTHING), (LEFT, FORWARD),
              (FORWARD, NOTHING), (TOGGLE, FORWARD)]
    total, highway = 0, []
    for a in script:
        obs, reward, *_ = env.step(steps(env, [a, a]))
        total, highway = total + reward, [*highway, obs[0][0, 7].item()]
        assert obs[0][0, 2] == 1
    assert total.tolist() == [[1, 0], [0, 0]] and reward.sum() == 0  # once, and if asked for
    assert highway == [0, 1, 1, 1, 1, 1, 1] and (env.carries[:, 0] == shelf).all()  # no putting down there
    assert env.cell[0, 0] == GOALS[1]
    assert env.requested[0].sum() == 4 and not env.requested[0, shelf] and env.requested[0, :3].all()
    assert np.flatnonzero(env.requested[1]).tolist() == [0, 1, 2, 3]


def test_a_loaded_robot_does_not_pass_under_shelves():
    torch.manual_seed(0)
    env = make("rware", 2, num_agents=1)
    env.reset(one_hot("both", "both"))
    for b in range(2):
        place(env, b, [(2, 1, DOWN)])
    env.step(steps(env, [[TOGGLE], [NOTHING]]))
    env.step(steps(env, [[FORWARD], [FORWARD]]))
    assert xy(env, 0) == [(2, 1)] and xy(env, 1) == [(2, 2)]
    env.step(steps(env, [[TOGGLE], [TOGGLE]]))  # puts it back where shelves may stand; lifts the second one
    assert env.carries[0, 0] == 28 and env.carries[1, 0] == 4


# ---------------------------------------------------------------- layouts, observations, tasks, randomness


def test_five_layouts_and_their_sizes():
    env = make("rware", 5)
    obs = env.reset(env.all_tasks())
    assert env.there.sum(1).tolist() == [28, 14, 14, 16, 16]
    assert env.obs_dims == (183,) * 4 and all(o.shape == (5, 183) for o in obs)
    assert (env.num_agents, env.horizon, env.action_dims) == (4, 100, (5,) * 4)
    assert env.discrete and env.task_dim == 5
    for b, layout in enumerate(LAYOUTS):
        shelves = {(c % WIDTH - 2, c // WIDTH - 2) for c in env.shelf[b, :-1][env.there[b]]}
        drawn = text(layout).split("\n")
        assert shelves == {(x, y) for y in range(10) for x in range(10) if drawn[y][x] == "x"}
        assert env.highway[b].sum() == 100 - len(shelves)
        assert (env.requested[b].sum() == 4) and not env.requested[b, :-1][~env.there[b]].any()
    assert text("both") == BOTH
    with pytest.raises(ValueError):
        env.all_tasks("val")


def test_what_a_robot_sees():
    torch.manual_seed(0)
    env = make("rware", 1, num_agents=2)
    env.reset(one_hot("left"))
    place(env, 0, [(1, 1, EAST), (2, 0, WEST)], [0, 2, 4, 6])  # shelves 0, 1 are at (2, 1), (3, 1)
    seen = env._observe()[0][0]
    assert seen[:8].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    cells = seen[8:].reshape(5, 5, 7)  # y, x about oneself
    empty = [0, 1, 0, 0, 0, 0, 0]
    assert (cells[0] == torch.tensor(empty)).all() and (cells[:, 0] == torch.tensor(empty)).all()  # the walls
    assert cells[2, 2].tolist() == [1, 0, 0, 0, 1, 0, 0] and cells[1, 3].tolist() == [1, 0, 0, 1, 0, 0, 0]
    assert cells[2, 3].tolist() == [0, 1, 0, 0, 0, 1, 1] and cells[2, 4].tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert cells[1, 4].tolist() == empty


def test_starts_and_requests_are_uniform():
    torch.manual_seed(0)
    env = make("rware", 4000)
    env.reset(one_hot("bottom").expand(4000, -1))
    assert all(len(set(c)) == 4 for c in env.cell[:100])
    spots = np.bincount(env.cell.ravel(), minlength=CELLS)
    assert (spots > 0).sum() == 100 and 100 < spots[spots > 0].min() and spots.max() < 220  # 160 each
    assert np.abs(np.bincount(env.direction.ravel()) / 16000 - 0.25).max() < 0.02
    assert np.abs(env.requested[:, :16].mean(0) - 0.25).max() < 0.04 and not env.requested[:, 16:].any()


def test_picture():
    torch.manual_seed(0)
    env = make("rware", 2)
    env.reset(one_hot("left", "right"))
    place(env, 1, [(0, 0, UP), (9, 0, DOWN), (0, 9, WEST), (9, 9, EAST)])
    frame = env.render(1)
    assert frame.shape == (240, 240, 3) and frame.dtype == np.uint8
    middle = lambda x, y: frame[24 * y + 12, 24 * x + 12].tolist()
    assert middle(0, 0) == middle(9, 9) == [70, 120, 230]
    assert middle(4, 9) == [150] * 3 and middle(2, 3) == [235] * 3
    assert middle(6, 3) in ([180, 140, 100], [210, 70, 60])
    for x, y, dx, dy in (0, 0, 0, -1), (9, 0, 0, 1), (0, 9, -1, 0), (9, 9, 1, 0):
        stripe = [frame[24 * y + 12 + 7 * sy, 24 * x + 12 + 7 * sx].tolist() == [255] * 3
                  for sx, sy in ((dx, dy), (-dx, -dy), (dy, dx), (-dy, -dx))]
        assert stripe == [True, False, False, False]
