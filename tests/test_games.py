"""Every game of ale-py, as self-play stores it, beside an emulator of its own for each environment.

`make test` plays each game for some steps, and those longer that end in ways of their own; `make faults` all of them.
"""

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

import finetune
import model
from finetune import GAME_OVER, LIFE_LOST, Replay, atari_rom, legal_actions, make_envs, play_step, start_games

GAMES = [name[4:-3] for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")]
ODD = ["Adventure", "BankHeist", "Frogger"]  # over with a life left, or on without one


class Recorder(model.AtariGames):
    """Environments that keep what they told last."""

    def __init__(self, envs):
        self.envs = envs

    def reset(self, **options):
        frames, self.info = self.envs.reset(**options)
        return frames, self.info

    def step(self, action):
        *result, self.info = self.envs.step(action)
        return *result, self.info


class Emulator(ale_py.ALEInterface):
    """One game without any of the vector environment's code: what an environment step does, by its definition."""

    def __init__(self, env_id, seed):
        super().__init__()
        self.setFloat("repeat_action_probability", 0.0)
        self.setInt("random_seed", seed)
        self.loadROM(ale_py.roms.get_rom_path(atari_rom(env_id)))

    def restart(self, frame):
        """A new game, and no-ops until it is at the frame of this number."""
        self.reset_game()
        assert 0 <= frame - self.getEpisodeFrameNumber() <= 30
        while self.getEpisodeFrameNumber() < frame:
            self.act(0)

    def step(self, action):
        """Four frames of an action -> reward, how it ended (as in `Replay.end`), the brighter of the last two frames or
        None if there were fewer."""
        lives, reward, shown = self.lives(), 0, []
        for _ in range(4):
            if not self.game_over():
                reward += self.act(int(action))
                shown.append(self.getScreenRGB())
        lost_life = 0 < self.lives() < lives
        end = GAME_OVER if self.game_over() else LIFE_LOST if lost_life else 0
        return reward, end, np.maximum(*shown[-2:]) if len(shown) == 4 else None


def check(game, steps, num_envs, monkeypatch):
    """Plays at random -> how many games were over. Every row of the replay is what the emulators show."""
    env_id = f"{game}NoFrameskip-v4"
    envs = Recorder(make_envs(env_id, num_envs))
    monkeypatch.setattr(finetune, "make_envs", lambda *_: envs)
    replay = Replay(num_envs * (steps + 1))
    streams = np.arange(num_envs) * (steps + 1)
    play = start_games(env_id, replay, streams, seed=7)
    emulators = [Emulator(env_id, 7 + e) for e in range(num_envs)]
    for e, emulator in enumerate(emulators):
        emulator.restart(int(envs.info["episode_frame_number"][e]))
    legal = np.sort([action.value for action in emulators[0].getMinimalActionSet()])
    if steps > 100:  # takes as long as 40 steps
        assert np.flatnonzero(legal_actions(env_id)).tolist() == legal.tolist()
    rng, age, games = np.random.default_rng(0), [0] * num_envs, 0
    for t in range(steps):
        action = rng.choice(legal, num_envs)
        over = play.over
        play_step(play, replay, action, t * num_envs)
        for e, emulator in enumerate(emulators):
            row = streams[e] + t
            assert replay.age[row] == age[e] and replay.acted[row] == (not over[e])
            if over[e]:
                emulator.restart(int(envs.info["episode_frame_number"][e]))
                age[e], games = 0, games + 1
                continue
            reward, end, screen = emulator.step(action[e])
            assert (replay.reward[row], replay.end[row]) == (reward, end), (t, e)
            assert envs.info["episode_frame_number"][e] == emulator.getEpisodeFrameNumber()
            age[e] = 0 if end == LIFE_LOST else age[e] + 1
            assert play.over[e] == (end == GAME_OVER)
            if t % 10 == 0 and screen is not None:
                expected = np.asarray(Image.fromarray(screen).resize((96, 96), Image.BOX)).astype(int)
                found = replay.frames[row + 1].permute(1, 2, 0).numpy()
                assert np.abs(expected - found).mean() < 10  # another way to resize
    return games


@pytest.mark.parametrize("game", GAMES)
def test_a_game_is_stored_as_the_emulator_plays_it(game, monkeypatch):
    check(game, 40, 1, monkeypatch)


@pytest.mark.parametrize("game", ODD)
def test_games_with_their_own_idea_of_lives(game, monkeypatch):
    assert check(game, 420, 4, monkeypatch) > 0


@pytest.mark.faults
def test_every_game_for_longer(monkeypatch):
    games = {game: check(game, 600, 4, monkeypatch) for game in GAMES}
    print(f"\n{len(games)} games, {sum(games.values())} times over in 2,400 steps each")
    assert len(games) >= 104
