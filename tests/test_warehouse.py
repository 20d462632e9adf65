"""The batched warehouse against rware 2.0 (where it is installed), step by step, and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs import make
from envs.warehouse import CELLS, GOALS, LAYOUTS, SHELVES, TURNS, WIDTH, may_move, number

equal = np.array_equal
NOTHING, FORWARD, LEFT, RIGHT, TOGGLE = range(5)
UP, DOWN, WEST, EAST = range(4)
BOTH = "\n".join([".........."] + ["..xx..xx.."] * 7 + ["..........", "....gg...."])
HALVES = {"both": "..xx..xx..", "right": "......xx..", "left": "..xx......"}


def text(layout):
    """The layout as rware reads it."""
    rows = BOTH.split("\n")
    for y in range(1, 8):
        kept = layout in HALVES or (y < 5 if layout == "top" else y > 3)
        rows[y] = HALVES.get(layout, HALVES["both"]) if kept else ".........."
    return "\n".join(rows)


def one_hot(*layouts):
    return torch.eye(5)[[list(LAYOUTS).index(k) for k in layouts]]


def steps(env, rows):
    """Actions, one list a step, of B rows: (N lists of B)."""
    return [torch.tensor([r[i] for r in rows]) for i in range(env.num_agents)]


def place(env, b, robots, requested=None):
    """Puts robots (x, y, direction) into row b; they carry nothing."""
    env.cell[b] = [number(x, y) for x, y, _ in robots]
    env.direction[b] = [d for *_, d in robots]
    if requested is not None:
        env.requested[b] = False
        env.requested[b, requested] = True


def xy(env, b=0):
    return [(int(c % WIDTH) - 2, int(c // WIDTH) - 2) for c in env.cell[b]]


# ---------------------------------------------------------------- parity with rware


class Luck:
    """Stands for rware's random generator: chooses what our row chose."""

    def __init__(self, env, b):
        self.env, self.b = env, b

    def choice(self, candidates):
        u = self.env.luck[self.b, 2 * (self.env.t - 1) + self.goal(candidates)]
        return candidates[int(u * len(candidates))]

    def goal(self, candidates):
        """Which goal asks. It asks with the list as it is, so the shelf on the first goal is still on it."""
        first = self.world.grid[1, 9, 4]
        return 0 if first and self.world.shelfs[first - 1] in self.world.request_queue else 1


def twin(rware, env, b, layout):
    """rware's world in the state of row b."""
    world = rware.Warehouse(3, 8, 1, env.num_agents, 0, 2, 4, None, None, rware.RewardType.INDIVIDUAL,
                            layout=text(layout))
    world.reset(seed=0)
    world._np_random = Luck(env, b)
    world._np_random.world = world
    where = lambda cell: (int(cell % WIDTH) - 2, int(cell // WIDTH) - 2)
    standing = sorted((s.y, s.x) for s in world.shelfs)
    assert standing == sorted((c // WIDTH - 2, c % WIDTH - 2) for c in SHELVES[list(LAYOUTS).index(layout)])
    assert [(s.y, s.x) for s in world.shelfs] == standing  # in reading order, as ours
    for s, shelf in enumerate(world.shelfs):
        shelf.x, shelf.y = where(env.shelf[b, s])
    for i, robot in enumerate(world.agents):
        robot.x, robot.y = where(env.cell[b, i])
        robot.dir = rware.Direction(int(env.direction[b, i]))
        s = env.carries[b, i]
        robot.carrying_shelf = world.shelfs[s] if s < env.shelf.shape[1] - 1 else None
    world.request_queue = [world.shelfs[s] for s in np.flatnonzero(env.requested[b])]
    world._recalc_grid()
    return world


def load(env, draw):
    """Robots that stand on no shelf get one to carry, mostly a requested one, so that much is delivered."""
    for b in range(env.num_envs):
        free = [s for s in np.flatnonzero(env.there[b]) if env.shelf[b, s] not in env.cell[b]]
        free.sort(key=lambda s: (not env.requested[b, s], draw.random()))
        for i in range(env.num_agents):
            if draw.random() < 0.7 and free and env.cell[b, i] not in env.shelf[b]:
                s = free.pop(0)
                env.shelf[b, s], env.carries[b, i] = env.cell[b, i], s


def bold(env, draw):
    """(B, N) actions. Who carries what is asked for mostly goes to the goals; the others wander about."""
    shape, (x, y) = env.cell.shape, (env.cell % WIDTH - 2, env.cell // WIDTH - 2)
    heading = np.where(y < 9, DOWN, np.where(x < 4, EAST, WEST))
    heading = np.where((x < 4) & (draw.random(shape) < 0.5), EAST, heading)
    heading = np.where((x > 5) & (draw.random(shape) < 0.5), WEST, heading)
    seek = np.where(env.direction == heading, FORWARD, draw.choice([LEFT, RIGHT], shape))
    wander = draw.choice(5, shape, p=[0.05, 0.6, 0.15, 0.15, 0.05])
    eager = env.requested[env.row, env.carries] & (draw.random(shape) < 0.8)
    return torch.tensor(np.where(eager, seek, wander))


def same_order(monkeypatch, rware):
    """rware's graph library lists a part of a graph in the graph's own order, not in that of a Python set."""
    import networkx

    class Graph(networkx.DiGraph):
        def subgraph(self, nodes):
            part = networkx.DiGraph()
            part.add_edges_from(edge for edge in self.edges if edge[0] in nodes)
            return part

    monkeypatch.setattr(rware, "nx", SimpleNamespace(
        DiGraph=Graph, weakly_connected_components=networkx.weakly_connected_components,
        algorithms=networkx.algorithms, NetworkXNoCycle=networkx.NetworkXNoCycle))


def same(env, worlds, b):
    world, none = worlds[b], env.shelf.shape[1] - 1
    where = lambda cell: (int(cell % WIDTH) - 2, int(cell // WIDTH) - 2)
    carried = [r.carrying_shelf.id - 1 if r.carrying_shelf else none for r in world.agents]
    assert [(r.x, r.y) for r in world.agents] == [where(c) for c in env.cell[b]]
    assert [r.dir.value for r in world.agents] == env.direction[b].tolist()
    assert carried == env.carries[b].tolist()
    assert [(s.x, s.y) for s in world.shelfs] == [where(c) for c in env.shelf[b, : len(world.shelfs)]]
    assert {s.id - 1 for s in world.request_queue} == set(np.flatnonzero(env.requested[b]))


@pytest.mark.parametrize("N, episodes", [(4, 12), (12, 6)])
def test_same_as_rware_step_by_step(N, episodes, monkeypatch):
    rware = pytest.importorskip("rware.warehouse")
    same_order(monkeypatch, rware)
    torch.manual_seed(N)
    draw, layouts, paid, stuck, B = np.random.default_rng(N), list(LAYOUTS) * 2, 0, 0, 10
    env = make("rware", B, num_agents=N)
    for _ in range(episodes):
        env.reset(one_hot(*layouts))
        load(env, draw)
        obs = env._observe()
        worlds = [twin(rware, env, b, layouts[b]) for b in range(B)]
        theirs = [[w._make_obs(a) for a in w.agents] for w in worlds]
        for _ in range(30):
            for b in range(B):
                assert all(equal(o[b].numpy(), t) for o, t in zip(obs, theirs[b]))
            action, before = bold(env, draw), env.cell.copy()
            obs, reward, terminated, truncated, _ = env.step(list(action.T))
            for b in range(B):
                theirs[b], wanted, done, late, _ = worlds[b].step(action[b].tolist())
                assert reward[b].tolist() == wanted and not done and not late and not terminated[b]
                same(env, worlds, b)
            paid += reward.sum().item()
            stuck += ((action.numpy() == FORWARD) & (env.cell == before)).sum()
    assert paid > 10 * episodes and stuck > 1000  # deliveries and collisions were compared


def test_rware_as_it_comes_differs_only_between_equal_chains():
    rware = pytest.importorskip("rware.warehouse")
    torch.manual_seed(0)
    draw, layouts, differ, B = np.random.default_rng(0), list(LAYOUTS) * 2, 0, 10
    env = make("rware", B, horizon=500)
    env.reset(one_hot(*layouts))
    load(env, draw)
    worlds = [twin(rware, env, b, layouts[b]) for b in range(B)]
    for _ in range(500):
        before, action = env.cell.copy(), bold(env, draw)
        obs, reward, *_ = env.step(list(action.T))
        for b in range(B):
            theirs, wanted, *_ = worlds[b].step(action[b].tolist())
            now = np.array([number(r.x, r.y) for r in worlds[b].agents])
            if equal(now, env.cell[b]):
                assert all(equal(o[b].numpy(), t) for o, t in zip(obs, theirs))
                continue
            differ += 1
            mine = env.cell[b]
            assert (now != before[b]).sum() == (mine != before[b]).sum()  # as many robots move
            assert {*mine} - {*before[b]} == {*now} - {*before[b]}  # into the same cells
            worlds[b] = twin(rware, env, b, layouts[b])  # it goes on from our state
    assert differ < 0.005 * 500 * B


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


def test_everything_random_is_drawn_at_the_start_row_by_row():
    def run(n, first, total, seed=0):
        torch.manual_seed(seed)
        env = make("rware", n, horizon=40)
        env.reset(one_hot("top").expand(n, -1), part=(first, total))
        state = torch.get_rng_state()
        for b in range(n):  # someone stands on a goal, with a shelf that is wanted
            place(env, b, [(4, 8, DOWN), (0, 0, UP), (1, 0, UP), (2, 0, UP)], [0, 5, 6, 7])
            env.carries[b], env.shelf[b, 0] = [0, 28, 28, 28], env.cell[b, 0]
        env.step(steps(env, [[FORWARD, NOTHING, NOTHING, NOTHING]] * n))
        assert torch.equal(state, torch.get_rng_state())
        return env.requested.copy(), env.luck

    whole, part = run(5, 0, 5), run(3, 2, 5)
    assert equal(whole[0][2:], part[0]) and equal(whole[1][2:], part[1])
    assert not whole[0][:, 0].any() and (whole[0].sum(1) == 4).all()
    assert len(np.unique(whole[0], axis=0)) > 1 and not equal(whole[0], run(5, 0, 5, 1)[0])


def test_starts_and_requests_are_uniform():
    torch.manual_seed(0)
    env = make("rware", 4000)
    env.reset(one_hot("bottom").expand(4000, -1))
    assert all(len(set(c)) == 4 for c in env.cell[:100])
    spots = np.bincount(env.cell.ravel(), minlength=CELLS)
    assert (spots > 0).sum() == 100 and 100 < spots[spots > 0].min() and spots.max() < 220  # 160 each
    assert np.abs(np.bincount(env.direction.ravel()) / 16000 - 0.25).max() < 0.02
    assert np.abs(env.requested[:, :16].mean(0) - 0.25).max() < 0.04 and not env.requested[:, 16:].any()


def test_tasks():
    torch.manual_seed(0)
    env = make("rware", 1)
    for split in "train", "test":
        assert torch.equal(env.all_tasks(split), torch.eye(5))
        drawn = env.sample_tasks(5000, split)
        assert (drawn.sum(1) == 1).all() and (drawn.mean(0) - 0.2).abs().max() < 0.03


@pytest.mark.parametrize("call", [
    lambda: make("rware", 2, horizon=0), lambda: make("rware", 2, num_agents=0),
    lambda: make("rware", 2).reset(torch.zeros(2, 5)), lambda: make("rware", 2).reset(torch.ones(2, 4)),
    lambda: make("rware", 1).reset(torch.tensor([[2.0, -1, 0, 0, 0]])),
    lambda: make("rware", 1).sample_tasks(2, "val"),
    lambda: [env := make("rware", 2), env.reset(), env.step([torch.zeros(2).long()])]])
def test_bad_input_is_one_clear_line(call):
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value)


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
