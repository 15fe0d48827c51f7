"""Catch: a toy pixel game, and the example of an environment of your own.

Blocks fall one after the other; put the paddle on the bottom row under them: +1 for a catch, -1 for a miss. When a
block hangs above the paddle's row, what that frame shows decides, so the paddle must be there one step earlier. A game
is 8 drops, so its return lies in [-8, 8]: the perfect player gets 8, a random one 0 on average.

The module registers the game when it is imported, which Gymnasium does for an id of the form `module:Env-v0`:

    PYTHONPATH=tests python finetune.py --env-id toy_env:Catch-v0

Any environment works that has 96x96x3 uint8 observations and Discrete(n) actions with n <= 18. Catch-v1 to Catch-v3
are the same game in other colours, some with other action ids or a slower fall: tasks to transfer between.
"""

import warnings

import gymnasium as gym
import numpy as np

COLUMNS, ROWS = 2, 4  # cells of 48 x 24 pixels
VARIANTS = {  # `fall` in rows per step; of the 18 actions those below `left` and from `right` on move, the others stay
    "Catch-v0": dict(background=(0, 0, 0), block=(255, 255, 255), paddle=(60, 200, 60), fall=2, left=9, right=9),
    "Catch-v1": dict(background=(40, 60, 120), block=(250, 220, 40), paddle=(230, 90, 60), fall=2, left=7, right=9),
    "Catch-v2": dict(background=(70, 20, 50), block=(250, 190, 220), paddle=(60, 190, 220), fall=2, left=9, right=11),
    "Catch-v3": dict(background=(150, 150, 140), block=(160, 20, 40), paddle=(20, 40, 90), fall=1, left=6, right=12),
}


class Catch(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(18)

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
    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)


for env_id, variant in VARIANTS.items():
    gym.register(env_id, entry_point=Catch, kwargs=variant)
gym.register("NoReward-v0", entry_point=NoReward)
gym.register("TooManyActions-v0", entry_point=TooManyActions, kwargs=VARIANTS["Catch-v0"])
gym.register("WrongShape-v0", entry_point=WrongShape, kwargs=VARIANTS["Catch-v0"])
# Gymnasium takes Catch-v0 for an old version of Catch-v2 and says so on each use
warnings.filterwarnings("ignore", ".*Catch-v. is out of date")
