"""Small pixel games with a known best player: for the quickstart, the learning bench and tests, and as examples of
environments of your own.

The module registers the games when it is imported, which Gymnasium does for an id of the form `module:Env-v0`:

    PYTHONPATH=tests python finetune.py --env-id toy_env:Catch-v0

Any environment works that has uint8 images and Discrete(n) actions with n <= 18; these have 96x96x3. Each tests one
thing:

| game | what it tests | a round |
|---|---|---|
| Catch-v0 to -v3 | a reward some steps ahead | a block falls, +1 with the paddle under it, else -1 |
| Match-v0 | a reward one step ahead | a block in one of 3 columns; +1 for naming the column |
| Delay-v0 | value and value prefix over more than 5 steps | a choice of 2 sides, +1 or -1 for it 7 steps later |
| Rare-v0 | actions that seldom matter | one of 4 steps shows a light on one of 2 sides, +1 or -1 for naming it |
| Dodge-v0 | terminal states | two of 3 columns fall, +1 for standing in the third, else the game is over |
| Gather-v0 | sparse rewards | a pellet on a 3x3 board, +1 for walking there |
| Keys-v0 | 18 actions of which few matter | one of 2 lights, +1 for the one key that belongs to it |
| Follow-v0 | a time limit that no frame shows | +1 for each step on the side that is lit; it changes at random |
| Lives-v0 | a count of misses | Catch without negative rewards; the third miss ends the game |
| Toll-v0 | negative rewards | -1 a step on a corridor until its marked end is reached |
| Corridor-v0 | credit over more steps than the model unrolls | +1 for walking to the end of a corridor, 8 steps long |
| Fruit-v0 | a game to transfer from | a fruit falls on one of 2 sides: +1 for standing there, else -1 |
| Rocks-v0 | another one | a rock falls on one of 2 sides: +1 for standing on the other, else -1 |
| Storm-v0 | a game to transfer to | fruit, rocks, and hail, +1 for staying, else -1; wind moves the player |

The 18 actions are divided evenly among the moves of a game, in this order: `move(action, 3)` is 0 for 0 to 5.
`best_moves()` says which moves are best in the present state, `best_actions()` which of the 18 actions: the perfect
player of `benchmark/bench.py` and `benchmark/report.py`.

Fruit, Rocks and Storm are the paper's setting in miniature: who knows the first two knows two thirds of Storm, but
has never seen hail, nor a game in which it matters on which side the player is, nor wind. Who plays fruit and rocks
right and, in hail, without a look at the player, gets two thirds of what perfect play gets, in the mean.
"""

import warnings

import gymnasium as gym
import numpy as np


def move(action, moves):
    """Which of `moves` equal groups of the 18 actions an action belongs to."""
    return int(action) * moves // 18


class Game(gym.Env):
    """Cells of colours on a board. A game defines `start` and `play(action) -> reward`, and `cells()` to be drawn.

    It is over when `play` sets `self.over`, and after `steps` steps: truncated, if nothing shows the time.
    """

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(18)
    colours = np.array([(0, 0, 0), (255, 255, 255), (60, 200, 60), (220, 60, 60), (70, 90, 230)], np.uint8)
    moves = 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random
        self.over = False
        self.steps_taken = 0
        self.start()
        return self.frame(), {}

    def step(self, action):
        reward = float(self.play(move(action, self.moves)))
        self.steps_taken += 1
        return self.frame(), reward, self.over, self.steps_taken == self.steps and not self.over, {}

    def best_actions(self):
        return [action for action in range(18) if move(action, self.moves) in self.best_moves()]

    def draw(self, n):
        return int(self.np_random.integers(n))

    def frame(self):
        cells = self.cells()
        return self.colours[cells].repeat(96 // cells.shape[0], axis=0).repeat(96 // cells.shape[1], axis=1)


class Match(Game):
    steps, moves = 16, 3

    def start(self):
        self.column = self.draw(3)

    def play(self, move):
        reward = move == self.column
        self.column = self.draw(3)
        return reward

    def best_moves(self):
        return [self.column]

    def cells(self):
        cells = np.zeros((3, 3), np.uint8)
        cells[1, self.column] = 1
        return cells


class Delay(Game):
    steps, wait = 32, 8

    def start(self):
        self.side = self.draw(2)
        self.t = 0
        self.choice = None

    def play(self, move):
        self.choice = move if self.t == 0 else self.choice
        self.t += 1
        if self.t < self.wait:
            return 0
        reward = 1 if self.choice == self.side else -1
        self.start()
        return reward

    def best_moves(self):
        return [self.side] if self.t == 0 else [0, 1]

    def cells(self):
        cells = np.zeros((4, 8), np.uint8)
        cells[0, 4 * self.side : 4 * self.side + 4] = 1
        if self.choice is not None:
            cells[2, 4 * self.choice : 4 * self.choice + 4] = 2
        cells[3, : self.t] = 4
        return cells


class Rare(Game):
    steps = 32

    def start(self):
        self.t, self.when, self.side = 0, self.draw(4), self.draw(2)

    def play(self, move):
        reward = (1 if move == self.side else -1) if self.t == self.when else 0
        self.t += 1
        if self.t == 4:
            self.start()
        return reward

    def best_moves(self):
        return [self.side] if self.t == self.when else [0, 1]

    def cells(self):
        cells = np.zeros((4, 4), np.uint8)
        if self.t == self.when:
            cells[:2, 2 * self.side : 2 * self.side + 2] = 1
        cells[3, : self.t] = 4
        return cells


class Dodge(Game):
    steps, moves = 32, 3

    def start(self):
        self.player = self.draw(3)
        self.row, self.gap = 0, self.draw(3)

    def play(self, move):
        reward = 0
        if self.row == 2:  # just above the player's row: where it stands decides, not this move
            self.over = self.player != self.gap
            if self.over:
                self.row = 3  # where no other frame has them
                return 0
            reward = 1
            self.row, self.gap = 0, self.draw(3)
        else:
            self.row = 2
        self.player = move
        return reward

    def best_moves(self):
        return [self.gap] if self.row == 0 else [0, 1, 2]

    def cells(self):
        cells = np.zeros((4, 3), np.uint8)
        cells[self.row] = 3
        cells[self.row, self.gap] = 0
        cells[3, self.player] = 2
        return cells


class Gather(Game):
    steps, moves = 24, 4
    MOVES = ((-1, 0), (0, -1), (0, 1), (1, 0))  # up, left, right, down

    def start(self):
        self.player = (self.draw(3), self.draw(3))
        self.new_pellet()

    def new_pellet(self):
        self.pellet = self.player
        while self.pellet == self.player:
            self.pellet = (self.draw(3), self.draw(3))

    def play(self, move):
        self.player = tuple(min(2, max(0, x + step)) for x, step in zip(self.player, self.MOVES[move], strict=True))
        if self.player != self.pellet:
            return 0
        self.new_pellet()
        return 1

    def best_moves(self):
        apart = [there - here for here, there in zip(self.player, self.pellet, strict=True)]
        return [i for i, step in enumerate(self.MOVES) if np.dot(apart, step) > 0]

    def cells(self):
        cells = np.zeros((3, 3), np.uint8)
        cells[self.pellet] = 1
        cells[self.player] = 2
        return cells


class Keys(Game):
    steps, moves = 16, 18
    KEYS = 4, 13

    def start(self):
        self.light = self.draw(2)

    def play(self, move):
        reward = move == self.KEYS[self.light]
        self.light = self.draw(2)
        return reward

    def best_moves(self):
        return [self.KEYS[self.light]]

    def cells(self):
        cells = np.zeros((2, 2), np.uint8)
        cells[:, self.light] = 1
        return cells


class Follow(Game):
    steps = 24

    def start(self):
        self.player, self.side = self.draw(2), self.draw(2)

    def play(self, move):
        self.player = move
        reward = move == self.side
        self.side = self.side if self.draw(3) else 1 - self.side
        return reward

    def best_moves(self):
        return [self.side]

    def cells(self):
        cells = np.zeros((3, 2), np.uint8)
        cells[0, self.side] = 1
        cells[2, self.player] = 2
        return cells


class Lives(Game):
    steps = 32

    def start(self):
        self.lives, self.player = 3, self.draw(2)
        self.row, self.column = 0, self.draw(2)

    def play(self, move):
        reward = 0
        if self.row == 2:  # as in Dodge
            reward = self.player == self.column
            self.lives -= not reward
            self.over = self.lives == 0
            self.row, self.column = 0, self.draw(2)
        else:
            self.row = 2
        self.player = move
        return reward

    def best_moves(self):
        return [self.column] if self.row == 0 else [0, 1]

    def cells(self):
        cells = np.zeros((6, 6), np.uint8)
        cells[self.row : self.row + 2, 3 * self.column : 3 * self.column + 3] = 1
        cells[4, 3 * self.player : 3 * self.player + 3] = 2
        cells[5, : self.lives] = 3
        return cells


class Toll(Game):
    steps = 24

    def start(self):
        self.end = 5 * self.draw(2)
        self.player = abs(self.end - 1 - self.draw(5))  # 1 to 5 cells from the end

    def play(self, move):
        self.player = min(5, max(0, self.player + 2 * move - 1))
        self.over = self.player == self.end
        return -1

    def best_moves(self):
        return [int(self.end > self.player)]

    def cells(self):
        cells = np.zeros((3, 6), np.uint8)
        cells[:, self.end] = 1
        cells[1, self.player] = 2
        return cells


class Corridor(Game):
    steps, length = 40, 8

    def start(self):
        self.player = 0

    def play(self, move):
        self.player = max(0, self.player + 2 * move - 1)
        if self.player < self.length:
            return 0
        self.player = 0
        return 1

    def best_moves(self):
        return [1]

    def cells(self):
        cells = np.zeros((3, 8), np.uint8)
        cells[1, self.player] = 2
        cells[:, 7] += 1
        return cells


class Falling(Game):
    """Something falls: a fruit to be caught, a rock to be dodged, or hail on both sides, in which one stays put. If
    it is windy, the player is blown to a side at random before each round."""

    steps = 16

    def __init__(self, things, windy):
        self.things, self.windy = things, windy  # things are drawn evenly

    def start(self):
        self.player = self.draw(2)
        self.new_thing()

    def new_thing(self):
        self.thing, self.side = self.things[self.draw(len(self.things))], self.draw(2)
        self.player = self.draw(2) if self.windy else self.player

    def play(self, move):
        reward = 1 if move in self.best_moves() else -1
        self.player = move
        self.new_thing()
        return reward

    def best_moves(self):
        return [{"fruit": self.side, "rock": 1 - self.side, "hail": self.player}[self.thing]]

    def cells(self):
        cells = np.zeros((4, 2), np.uint8)
        if self.thing == "hail":
            cells[1] = 4
        else:
            cells[1, self.side] = 1 if self.thing == "fruit" else 3
        cells[3, self.player] = 2
        return cells


COLUMNS, ROWS = 2, 4  # cells of 48 x 24 pixels
VARIANTS = {  # `fall` in rows per step; of the 18 actions those below `left` and from `right` on move, the others stay
    "Catch-v0": dict(background=(0, 0, 0), block=(255, 255, 255), paddle=(60, 200, 60), fall=2, left=9, right=9),
    "Catch-v1": dict(background=(40, 60, 120), block=(250, 220, 40), paddle=(230, 90, 60), fall=2, left=7, right=9),
    "Catch-v2": dict(background=(70, 20, 50), block=(250, 190, 220), paddle=(60, 190, 220), fall=2, left=9, right=11),
    "Catch-v3": dict(background=(150, 150, 140), block=(160, 20, 40), paddle=(20, 40, 90), fall=1, left=6, right=12),
}


class Catch(gym.Env):
    """A block falls; the paddle on the bottom row gets +1 under it and -1 elsewhere. A game is 8 drops.

    When a block hangs above the paddle's row, what that frame shows decides: the paddle must be there one step before.
    The variants are tasks to transfer between: other colours, some with other keys or a slower fall.
    """

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(18)
    moves = 18  # as far as `best_moves` is concerned
    best_actions = Game.best_actions

    def __init__(self, background, block, paddle, fall, left, right, drops=8):
        self.colours = np.array([background, block, paddle], np.uint8)
        self.fall, self.left, self.right, self.drops = fall, left, right, drops

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random
        self.drops_left = self.drops
        self.paddle = int(self.np_random.integers(COLUMNS))
        self._new_block()
        return self._frame(), {}

    def step(self, action):
        reward = 0.0
        if self.row == ROWS - 2:  # just above the paddle's row: what the last frame showed decides, not this action
            reward = 1.0 if self.paddle == self.column else -1.0
            self.drops_left -= 1
            self._new_block()
        else:
            self.row = min(self.row + self.fall, ROWS - 2)
        self.paddle = 0 if action < self.left else 1 if action >= self.right else self.paddle
        return self._frame(), reward, self.drops_left == 0, False, {}

    def best_moves(self):
        decides = self.row < ROWS - 2 <= self.row + self.fall
        sides = [0 if a < self.left else 1 if a >= self.right else self.paddle for a in range(18)]
        return [a for a in range(18) if not decides or sides[a] == self.column]

    def _new_block(self):
        self.row, self.column = 0, int(self.np_random.integers(COLUMNS))

    def _frame(self):
        cells = np.zeros((ROWS, COLUMNS), np.uint8)  # 0 background, 1 block, 2 paddle
        cells[-1, self.paddle] = 2
        cells[self.row, self.column] = 1
        return self.colours[cells].repeat(96 // ROWS, axis=0).repeat(96 // COLUMNS, axis=1)  # (96, 96, 3)


class NoReward(gym.Env):
    """Every frame is new and nothing ever pays: whatever a policy prefers here, it made up."""

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(18)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps_left = 32
        return self._frame(), {}

    def step(self, action):
        self.steps_left -= 1
        return self._frame(), 0.0, self.steps_left == 0, False, {}

    def _frame(self):
        cells = self.np_random.integers(256, size=(3, 3, 3), dtype=np.uint8)
        return cells.repeat(32, axis=0).repeat(32, axis=1)


class TooManyActions(Catch):
    """Refused: for the tests of the error messages, like the next one."""

    action_space = gym.spaces.Discrete(19)


class WrongShape(Catch):
    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)  # stacked already


for game in (Match, Delay, Rare, Dodge, Gather, Keys, Follow, Lives, Toll, Corridor):
    gym.register(f"{game.__name__}-v0", entry_point=game)
for env_id, things in {"Fruit-v0": "fruit", "Rocks-v0": "rock"}.items():
    gym.register(env_id, entry_point=Falling, kwargs={"things": [things], "windy": False})
storm = {"things": ["fruit", "rock", "hail"], "windy": True}
gym.register("Storm-v0", entry_point=Falling, kwargs=storm)
for env_id, variant in VARIANTS.items():
    gym.register(env_id, entry_point=Catch, kwargs=variant)
gym.register("NoReward-v0", entry_point=NoReward)
gym.register("TooManyActions-v0", entry_point=TooManyActions, kwargs=VARIANTS["Catch-v0"])
gym.register("WrongShape-v0", entry_point=WrongShape, kwargs=VARIANTS["Catch-v0"])
# Gymnasium takes Catch-v0 for an old version of Catch-v2 and says so on each use
warnings.filterwarnings("ignore", ".*Catch-v. is out of date")
