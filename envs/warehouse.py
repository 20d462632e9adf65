"""
A robotic warehouse ("rware", Papoudakis et al., 2021, arXiv:2006.07869; the package rware 2.0) with the five
layouts of MG2L (Zhao et al., 2025). Robots turn, drive one cell, and lift or put down a shelf. A robot that
brings a requested shelf to a goal is paid.

Grid      10 x 10. Shelves stand in the columns x = 2, 3 and 6, 7, in the rows y = 1 .. 7 (0 is on top); goals
          are (4, 9) and (5, 9). The rest is highway, where no shelf can be put down.
Task      a layout, one-hot: both (28 shelves), right (14: x = 6, 7), left (14: x = 2, 3), top (16: y < 5),
          bottom (16: y > 3). All five belong to both splits.
Actions   0 nothing, 1 forward, 2 turn left, 3 turn right, 4 lift or put down.
Moves     All robots move at once. A robot that carries a shelf does not drive under another one. A chain of
          robots moves if the cell before its head is free. If several want one cell, the longest chain moves
          and the others stay. A ring of four or more moves. Two robots that face each other stay, and so does
          a robot behind one that stays or moves in a ring. Between chains of one length the robots' numbers
          decide, see may_move().
Reward    1 to the robot whose shelf was on the list of 4 requests and is now on a goal. Another shelf, drawn
          uniformly, takes its place on the list.
Observed  (183): own x, y, carrying, direction (up, down, left, right), highway; then the 25 cells around, row
          by row: robot there, its direction (an empty cell: up), shelf there, requested. The window does not
          turn with the robot. Cells beyond the walls are empty.
Start     robots on different cells, in any direction; any requests. All random numbers of an episode, those
          of its later requests included, are drawn in reset() from torch's global CPU stream.
Time      H = 100 steps; never terminated.

The rules are those of rware 2.0, step by step, with one exception. Of chains of the same length rware takes
the one that its graph library lists first: in the order in which the robots' cells entered the graph or,
where the cells in question are less than half of it, in that of a Python set of coordinates. Here it is
always the former. This changes 6 of 10,000 steps of wandering robots.

All rows move at once, in numpy: (B, N) arrays of cells, (B, N, N) for which robot wants which place.
"""

import numpy as np
import torch

from .base import Env, FiniteTasks

SIZE, SIGHT = 10, 2  # the grid; how far a robot sees
WIDTH = SIZE + 2 * SIGHT  # cells are numbered in a grid with a margin that is never entered
CELLS = WIDTH * WIDTH  # cell number CELLS is nowhere: the place of shelves that a layout lacks
MOVES = np.array([-WIDTH, WIDTH, -1, 1])  # up, down, left, right
TURNS = np.array([range(4), range(4), [2, 3, 1, 0], [3, 2, 0, 1], range(4)])  # [action, direction]
NOTHING, FORWARD, LEFT, RIGHT, TOGGLE = range(5)
LAYOUTS = {"both": ((2, 3, 6, 7), range(1, 8)), "right": ((6, 7), range(1, 8)), "left": ((2, 3), range(1, 8)),
           "top": ((2, 3, 6, 7), range(1, 5)), "bottom": ((2, 3, 6, 7), range(4, 8))}  # columns, rows
REQUESTS = 4


def number(x, y):
    """The cell (x, y)."""
    return (y + SIGHT) * WIDTH + x + SIGHT


GOALS = number(4, 9), number(5, 9)
SHELVES = [[number(x, y) for y in rows for x in columns] for columns, rows in LAYOUTS.values()]
INSIDE = np.zeros(CELLS + 1, bool)
INSIDE[[number(x, y) for x in range(SIZE) for y in range(SIZE)]] = True
VIEW = range(-SIGHT, SIGHT + 1)
WINDOW = np.array([number(x, y) - number(0, 0) for y in VIEW for x in VIEW])


def may_move(cell, target):
    """Which robots get the cell that they want, (B, N) bool, from the cells (B, N) where they are and those
    that they want. A robot that wants its own cell gets it.

    Each robot points to the robot on its target, or to a free cell. The pointers lead round a ring (of length
    1: a robot that stays) or along a chain to a free cell.
    """
    N = cell.shape[1]
    wants = target[:, :, None] == cell[:, None, :]  # (B, N, N): [i, j], i wants j's cell
    ahead = np.where(wants.any(2), wants.argmax(2), N)  # (B, N): whose place i wants; N: a free cell
    ring, free = follow(ahead)
    turns = (ring == 1) | (ring > 2)  # all robots of a ring move; two that face each other do not
    moves = free & first_of_rivals(wants & ~np.eye(N, dtype=bool), target)
    granted = turns
    for _ in range(N):  # from the head of a chain to its end: a robot that moves makes room for the next
        granted = turns | moves & np.take_along_axis(beside(granted, True), ahead, axis=1)
    return granted


def beside(x, value):
    """(B, N) -> (B, N + 1): another column, for free cells."""
    return np.concatenate([x, np.full((len(x), 1), value)], axis=1)


def follow(ahead):
    """Where the pointers (B, N) lead: the length of the ring that robot i is part of, (B, N), 0 if there is
    none; and whether its chain ends at a free cell, (B, N) bool."""
    N, here = ahead.shape[1], ahead
    ring, pointer = np.zeros_like(ahead), beside(ahead, N)  # the free cell points to itself
    for length in range(1, N + 1):
        ring[(here == np.arange(N)) & (ring == 0)] = length
        here = np.take_along_axis(pointer, here, axis=1)
    return ring, here == N


def first_of_rivals(follows, target):
    """Of the robots that want one cell: which one heads the longest chain, (B, N) bool. follows (B, N, N):
    [i, j], i wants the place of another robot, j."""
    B, N, robot = *target.shape, np.arange(target.shape[1])
    chain = np.ones((B, N), int)  # robots in the longest chain that i heads
    for _ in range(N - 1):
        chain = 1 + (follows * chain[:, :, None]).max(1)
    # Between equals: which cell enters rware's graph first? Robot 0's cell, its target, robot 1's cell, ...
    as_target = np.where(follows, 2 * robot[:, None] + 1, 2 * N).min(1)
    weight = 2 * N * chain - np.minimum(2 * robot, as_target)
    rivals = target[:, :, None] == target[:, None, :]
    return ~(rivals & (weight[:, :, None] < weight[:, None, :])).any(2)


class Warehouse(FiniteTasks, Env):
    """B warehouses, H steps. reset(task) takes layouts, (B, 5), one a row; without them it draws some."""

    discrete, task_dim = True, len(LAYOUTS)
    tasks = dict.fromkeys(("train", "test"), np.eye(len(LAYOUTS)))

    def __init__(self, name, num_envs, num_agents=4, **common):
        super().__init__(name, num_envs, **common)
        if not 1 <= num_agents <= SIZE * SIZE:
            raise ValueError(f"{name}: num_agents must be from 1 to {SIZE * SIZE}, not {num_agents}")
        self.num_agents = num_agents
        self.obs_dims, self.action_dims = (8 + 7 * len(WINDOW),) * num_agents, (5,) * num_agents
        self.row = np.arange(num_envs)[:, None]  # (B, 1)
        # What each cell shows, 7 numbers; see _observe()
        self.blank = np.tile(np.float32([0, 1, 0, 0, 0, 0, 0]), (num_envs, CELLS + 1, 1))
        self.sheet = self.blank.copy()

    def reset(self, task=None):
        task = self.check_task(task).cpu().numpy()  # (B, 5)
        if not (((task == 0) | (task == 1)).all() and (task.sum(1) == 1).all()):
            raise ValueError(f"a task must be one-hot, a layout: {', '.join(LAYOUTS)}")
        self.task, layout, B, S = task, task.argmax(1), self.num_envs, max(map(len, SHELVES))
        draw = [torch.rand(self.total, n, dtype=torch.float64).numpy()[self.mine]
                for n in (SIZE * SIZE, self.num_agents, S, len(GOALS) * self.horizon)]
        spots = np.flatnonzero(INSIDE)
        self.cell = spots[draw[0].argsort(1)[:, : self.num_agents]]  # (B, N)
        self.direction = (4 * draw[1]).astype(int)  # (B, N)
        # Shelf S does not exist: a robot with carries[b, i] == S carries nothing. Layouts with fewer shelves
        # keep the others in the cell that is nowhere.
        self.shelf = np.array([s + [CELLS] * (S + 1 - len(s)) for s in SHELVES])[layout]  # (B, S + 1): cells
        self.there = self.shelf[:, :S] < CELLS
        self.carries = np.full((B, self.num_agents), S)
        self.highway = np.tile(INSIDE, (B, 1))  # (B, CELLS + 1)
        self.highway[self.row, self.shelf] = False
        rank = np.where(self.there, draw[2], 2).argsort(1).argsort(1)
        self.requested = np.concatenate([rank < REQUESTS, np.zeros((B, 1), bool)], axis=1)  # (B, S + 1)
        self.luck, self.t = draw[3], 0  # (B, 2 H)
        return self._observe()

    def step(self, action):
        action = self.check_action(action).T  # (B, N)
        row, cell, none = self.row, self.cell, self.shelf.shape[1] - 1
        loaded, shelf_at = self.carries < none, self._grid(self.shelf)
        target = cell + MOVES[self.direction]
        target = np.where((action == FORWARD) & INSIDE[target], target, cell)
        # A shelf stands if no robot that carries one is in its cell. A robot that carries does not enter
        # there.
        held = np.zeros((self.num_envs, CELLS + 1), bool)
        held[row, np.where(loaded, cell, CELLS)] = True
        blocked = loaded & (target != cell) & (shelf_at[row, target] < none) & ~held[row, target]
        target = np.where(blocked, cell, target)

        self.cell = np.where(may_move(cell, target), target, cell)
        self.direction = TURNS[action, self.direction]
        self.shelf[row, self.carries] = self.cell
        self.shelf[:, none] = CELLS
        lift = (action == TOGGLE) & ~loaded  # of the shelf below, if there is one
        drop = (action == TOGGLE) & loaded & ~self.highway[row, cell]
        self.carries = np.where(lift, shelf_at[row, cell], np.where(drop, none, self.carries))
        reward = self._deliver(none)
        return self._observe(), self.fresh(reward), *self.clock(), {}

    def _grid(self, cells):
        """Which of `cells` (B, n) is at each cell of the grid, (B, CELLS + 1); the last one, n - 1, also
        stands for none."""
        grid = np.full((self.num_envs, CELLS + 1), cells.shape[1] - 1)
        grid[self.row, cells] = np.arange(cells.shape[1])
        grid[:, CELLS] = cells.shape[1] - 1
        return grid

    def _deliver(self, none):
        """The rewards (B, N). The goals take turns, because the second one's new request must differ."""
        reward = np.zeros((self.num_envs, self.num_agents), np.float32)
        robot_at, shelf_at = self._grid(self.cell), self._grid(self.shelf)
        for k, goal in enumerate(GOALS):
            b = np.flatnonzero(self.requested[self.row[:, 0], shelf_at[:, goal]])
            if b.size:
                reward[b, robot_at[b, goal]] = 1
                others = (self.there[b] & ~self.requested[b, :none]).cumsum(1)  # (n, S): not on the list
                luck = self.luck[b, (len(GOALS) * self.t + k) % self.luck.shape[1]]
                pick = (luck * others[:, -1]).astype(int)
                self.requested[b, shelf_at[b, goal]] = False
                self.requested[b, (others > pick[:, None]).argmax(1)] = True
        self.t += 1
        return reward

    def _observe(self):
        row, cell, sheet = self.row, self.cell, self.sheet
        np.copyto(sheet, self.blank)
        sheet[row, cell, 0], sheet[row, cell, 1] = 1, 0
        sheet[row, cell, 1 + self.direction] = 1
        sheet[row, self.shelf, 5] = 1
        sheet[row, self.shelf, 6] = self.requested
        out = np.zeros((self.num_agents, self.num_envs, self.obs_dims[0]), np.float32)  # (N, B, O)
        own = out.swapaxes(0, 1)  # (B, N, O)
        own[..., 0], own[..., 1] = cell % WIDTH - SIGHT, cell // WIDTH - SIGHT
        own[..., 2] = self.carries < self.shelf.shape[1] - 1
        np.put_along_axis(own[..., 3:7], self.direction[..., None], 1, axis=2)
        own[..., 7] = self.highway[row, cell]
        around = ((CELLS + 1) * row + cell)[..., None] + WINDOW  # (B, N, 25): rows of the sheet laid out flat
        own[..., 8:] = sheet.reshape(-1, 7).take(around, axis=0).reshape(*cell.shape, -1)
        return self.fresh(out).unbind(0)

    def render(self, row=0, size=24):
        """(10 size, 10 size, 3) uint8: one row. Shelves are brown, requested shelves red, goals grey. Robots
        are blue, dark if they carry, with a white stripe in front."""
        frame = np.full((SIZE, size, SIZE, size, 3), 235, np.uint8)
        place = lambda cell: (cell // WIDTH - SIGHT, slice(None), cell % WIDTH - SIGHT)
        for goal in GOALS:
            frame[place(goal)] = 150
        for s in np.flatnonzero(self.there[row]):
            square = frame[place(self.shelf[row, s])]
            square[2:-2, 2:-2] = [210, 70, 60] if self.requested[row, s] else [180, 140, 100]
        inner, edge = slice(size // 4, -(size // 4)), slice(size // 8, size // 4)
        for i, cell in enumerate(self.cell[row]):
            square = frame[place(cell)]
            loaded = self.carries[row, i] < self.shelf.shape[1] - 1
            square[inner, inner] = [20, 40, 110] if loaded else [70, 120, 230]
            # up, down, left, right: the view is turned so that "front" is always its first rows
            front = [square, square[::-1], square.swapaxes(0, 1), square[:, ::-1].swapaxes(0, 1)]
            front[self.direction[row, i]][edge, inner] = 255
        return frame.reshape(SIZE * size, SIZE * size, 3)
