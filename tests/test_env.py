"""Environments as the scripts see them: legal actions, frames, raw rewards, lives, ends, error messages, and Catch;
and the games of an evaluation."""

from functools import partial
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import toy_env
from ale_py.vector_env import AtariVectorEnv

import pretrain_teacher
from pretrain_teacher import evaluate, legal_actions, log_evaluation, make_envs

NUM_ACTIONS = {  # Table 5 of the paper
    "Alien": 18, "Amidar": 10, "Assault": 7, "BankHeist": 18, "BattleZone": 18, "Carnival": 6, "Centipede": 18,
    "DemonAttack": 6, "Hero": 18, "Krull": 18, "MsPacman": 9, "Phoenix": 8, "Pooyan": 6, "Riverraid": 18,
    "Seaquest": 18, "VideoPinball": 9, "WizardOfWor": 10, "YarsRevenge": 18,
}  # fmt: skip
ACTION_IDS = {
    "Amidar": [0, 1, 2, 3, 4, 5, 10, 11, 12, 13],
    "Assault": [0, 1, 2, 3, 4, 11, 12],
    "Carnival": [0, 1, 3, 4, 11, 12],
    "Pooyan": [0, 1, 2, 5, 10, 13],
    "Phoenix": [0, 1, 3, 4, 5, 11, 12, 13],
}


def lives_of(info, num_envs):
    return info.get("lives", np.zeros(num_envs))


def play(envs, seed, actions):
    """Frames [T, N, 96, 96, 3] and reward, terminated, truncated, lives, frame number [T, N] after each step."""
    obs, info = envs.reset(seed=seed)
    rows = []
    for action in actions:
        obs, reward, terminated, truncated, info = envs.step(action)
        lives, number = lives_of(info, envs.num_envs), info["episode_frame_number"]
        rows.append((obs.reshape(envs.num_envs, 96, 96, 3), reward, terminated, truncated, lives, number))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def random_actions(steps, num_envs, num_actions=18):
    return np.random.default_rng(0).integers(0, num_actions, (steps, num_envs))


# ---- Atari: actions and frames


@pytest.mark.parametrize("game", NUM_ACTIONS)
def test_legal_actions_are_those_of_table_5(game):
    mask = legal_actions(f"{game}NoFrameskip-v4")
    assert mask.shape == (18,) and mask.dtype == bool and mask.sum() == NUM_ACTIONS[game]
    if game in ACTION_IDS:
        assert np.flatnonzero(mask).tolist() == ACTION_IDS[game]


@pytest.mark.parametrize("game, rom", [("Assault", "assault"), ("WizardOfWor", "wizard_of_wor")])
def test_an_ale_id_does_what_the_games_own_index_does(game, rom):
    env_id = f"{game}NoFrameskip-v4"
    index = random_actions(250, 2, NUM_ACTIONS[game])
    ids = np.flatnonzero(legal_actions(env_id))[index]
    frames, reward, *_ = play(make_envs(env_id, 2, life_loss_ends=True), 1, ids)
    own = AtariVectorEnv(
        rom, 2, num_threads=1, img_height=96, img_width=96, grayscale=False, stack_num=1, noop_max=31,
        reward_clipping=False, use_fire_reset=False, full_action_space=False,
    )  # fmt: skip
    own_frames, own_reward, *_ = play(own, 1, index)
    assert own.single_action_space.n == NUM_ACTIONS[game]
    assert (frames == own_frames).all() and (reward == own_reward).all()


def test_frames_are_96x96_rgb_and_rewards_are_raw():
    envs = make_envs("MsPacmanNoFrameskip-v4", 3, life_loss_ends=True)
    obs, _ = envs.reset(seed=0)
    assert obs.dtype == np.uint8 and obs.reshape(3, 96, 96, 3).shape == (3, 96, 96, 3)
    assert envs.single_action_space.n == 18
    frames, reward, *_ = play(envs, 0, np.full((200, 3), 3))  # 3 = RIGHT
    assert reward.max() == 10  # a dot
    assert (frames[100] != frames[0]).any() and np.ptp(frames[-1, 0], axis=-1).max() > 50  # they move, in colour


def test_rewards_are_not_clipped_in_either_direction():
    rewards = play(make_envs("CarnivalNoFrameskip-v4", 2, life_loss_ends=True), 0, random_actions(400, 2))[1]
    assert rewards.max() > 1 and rewards.min() < -1


def test_a_seed_fixes_the_games_whatever_the_number_of_envs():
    env_id, actions = "AssaultNoFrameskip-v4", random_actions(150, 1).repeat(4, axis=1)
    four = play(make_envs(env_id, 4, life_loss_ends=True), 5, actions)
    again = play(make_envs(env_id, 4, life_loss_ends=True), 5, actions)
    one = play(make_envs(env_id, 1, life_loss_ends=True), 7, actions[:, :1])
    for x, y, z in zip(four, again, one, strict=True):
        assert (x == y).all() and (x[:, 2:3] == z).all()  # env 2 of seed 5 plays the games of seed 7
    assert (four[0][:, 0] != four[0][:, 1]).any()  # other no-ops, so other games


def test_games_start_with_0_to_30_no_ops():
    _, info = make_envs("MsPacmanNoFrameskip-v4", 12, life_loss_ends=True).reset(seed=0)
    starts = set(info["episode_frame_number"].tolist())
    assert starts <= set(range(31)) and len(starts) > 8


# ---- Atari: lives and ends


STEPS = 800  # more than one game of random play


@pytest.fixture(scope="module")
def assault():
    """One env's frames, reward, terminated, truncated, lives, frame number [T, ...] under each `life_loss_ends`."""
    envs = {flag: make_envs("AssaultNoFrameskip-v4", 1, life_loss_ends=flag) for flag in (True, False)}
    return {flag: [column[:, 0] for column in play(envs[flag], 0, random_actions(STEPS, 1))] for flag in envs}


def test_a_lost_life_ends_an_episode_but_not_the_game(assault):
    _, _, terminated, truncated, lives, number = assault[True]
    lost = np.flatnonzero(terminated & (lives > 0))
    assert len(lost) >= 3 and not truncated.any()
    assert (number[lost + 1] == number[lost] + 4).all() and (lives[lost + 1] == lives[lost]).all()


def test_game_over_is_terminated_without_lives_and_the_next_step_restarts(assault):
    _, reward, terminated, truncated, lives, number = assault[True]
    over = np.flatnonzero(truncated | (terminated & (lives == 0)))
    assert len(over) >= 1
    assert (reward[over + 1] == 0).all() and not terminated[over + 1].any()
    assert (lives[over + 1] == 4).all() and (number[over + 1] <= 30).all()


def test_without_life_loss_ends_only_game_over_ends_and_the_game_is_the_same(assault):
    frames, reward, terminated, truncated, lives, number = assault[False]
    assert terminated.any() and (lives[terminated] == 0).all()
    for x, y in zip((frames, reward, lives, number), (assault[True][i] for i in (0, 1, 4, 5)), strict=True):
        assert (x == y).all()
    assert (terminated == (assault[True][2] & (lives == 0))).all()


@pytest.mark.parametrize("after, ignored", [("game over", True), ("lost life", False)])
def test_the_action_after_game_over_is_ignored_and_the_one_after_a_lost_life_is_not(assault, after, ignored):
    _, _, terminated, _, lives, _ = assault[True]
    ends = np.flatnonzero(terminated & ((lives == 0) if after == "game over" else (lives > 0)))
    actions = random_actions(STEPS, 1)[: ends[0] + 40]
    frames = []
    for other in (3, 4):  # RIGHT, LEFT
        actions[ends[0] + 1] = other
        frames.append(play(make_envs("AssaultNoFrameskip-v4", 1, life_loss_ends=True), 0, actions)[0])
    assert (frames[0] == frames[1]).all() == ignored


def test_the_time_limit_is_truncation(monkeypatch):
    def short(*args, **kwargs):
        assert kwargs["max_num_frames_per_episode"] == 108_000
        return AtariVectorEnv(*args, **kwargs | {"max_num_frames_per_episode": 40})

    monkeypatch.setattr("pretrain_teacher.AtariVectorEnv", short)
    envs = make_envs("MsPacmanNoFrameskip-v4", 2, life_loss_ends=True)
    _, reward, terminated, truncated, lives, frame = play(envs, 0, np.zeros((12, 2), int))
    assert not terminated.any() and (lives > 0).all()
    assert (np.flatnonzero(truncated[:, 0]) == [9]).all()  # 10 steps of 4 frames; the no-ops of the start do not count
    assert (frame[10] <= 30).all() and (reward[10] == 0).all()


# ---- Gymnasium ids


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("ALE/MsPacman-v5", ["Atari 100k", "use --env-id MsPacmanNoFrameskip-v4"]),
        ("MsPackmanNoFrameskip-v4", ["no game MsPackman"]),
        ("CombatNoFrameskip-v4", ["no game Combat"]),  # two players: creating it would end the process
        ("MsPacman-v4", ["(210, 160, 3)", "expected Box(0, 255, (96, 96, 3), uint8)"]),
        ("NoSuchGame-v0", ["NoSuchGame", "expected <Game>NoFrameskip-v4", "module:Env-v0"]),
        ("no_such_module:Catch-v0", ["No module named 'no_such_module'", "PYTHONPATH"]),
        ("toy_env:Catch-v99", ["`v99`", "`v0`, `v1`, `v2`"]),
        ("not an id", ["expected <Game>NoFrameskip-v4"]),
        ("CartPole-v1", ["(4,), float32)", "Discrete(2)", "expected Box(0, 255, (96, 96, 3), uint8)"]),
        ("toy_env:WrongShape-v0", ["(84, 84, 1)", "expected Box(0, 255, (96, 96, 3), uint8)"]),
        ("toy_env:TooManyActions-v0", ["Discrete(19)", "n <= 18"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [legal_actions, partial(make_envs, num_envs=1, life_loss_ends=True)])
def test_a_bad_id_is_one_clear_line(function, env_id, words):
    with pytest.raises(SystemExit) as stop:
        function(env_id)
    message = str(stop.value)
    assert f"--env-id {env_id}" in message and "\n" not in message
    assert all(word in message for word in words), message


# ---- Catch


def scores(env_id, games, policy):
    env = gym.make(f"toy_env:{env_id}")
    rng = np.random.default_rng(0)
    returns = np.zeros(games)
    for game in range(games):
        env.reset(seed=game)
        over = False
        while not over:
            _, reward, over, _, _ = env.step(policy(env.unwrapped, rng))
            returns[game] += reward
    return returns


def random_player(game, rng):
    return int(rng.integers(18))


def perfect_player(game, rng):
    return 17 * game.column


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("env_id", toy_env.VARIANTS)
class TestCatch:
    def test_served_like_a_game(self, env_id):
        envs = make_envs(f"toy_env:{env_id}", 4, life_loss_ends=True)
        obs, info = envs.reset(seed=3)
        assert obs.shape == (4, 96, 96, 3) and obs.dtype == np.uint8
        assert np.flatnonzero(legal_actions(f"toy_env:{env_id}")).tolist() == list(range(18))
        drop = 1 - -(toy_env.ROWS - 2) // toy_env.VARIANTS[env_id]["fall"]  # steps: the fall, then the verdict
        for t in range(1, 8 * drop + 1):
            obs, reward, terminated, truncated, info = envs.step(np.zeros(4, int))
            assert (np.abs(reward) == (t % drop == 0)).all()
        over = truncated | (terminated & (lives_of(info, 4) == 0))
        assert over.all()
        _, reward, terminated, truncated, _ = envs.step(np.zeros(4, int))
        assert not (reward.any() or terminated.any() or truncated.any())

    def test_skill_pays(self, env_id):
        assert (scores(env_id, 100, perfect_player) == 8).all()
        assert abs(scores(env_id, 300, random_player).mean()) < 0.6  # 8 fair coins of +-1: std 2.8, of the mean 0.16

    def test_a_seed_fixes_the_game(self, env_id):
        envs = [make_envs(f"toy_env:{env_id}", 2, life_loss_ends=True) for _ in range(2)]
        first, second = (env.reset(seed=9)[0] for env in envs)
        for action in random_actions(60, 2, 18):
            assert (first == second).all()
            first, second = (env.step(action)[0] for env in envs)


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_catch_variants_differ_in_colours_and_action_ids():
    games = [gym.make(f"toy_env:{env_id}").unwrapped for env_id in toy_env.VARIANTS]
    palettes = [frozenset(map(tuple, game.reset(seed=0)[0].reshape(-1, 3).tolist())) for game in games]
    assert len(set().union(*palettes)) == 3 * len(games)
    assert len({(game.left, game.right) for game in games}) == len(games)
    assert {game.fall for game in games} == {1, 2}


def test_ale_py_is_a_version_with_sound_emulation():
    assert tuple(map(int, ale_py.__version__.split(".")[:2])) >= (0, 12)


# ---- evaluation


class Player:
    """Stands for `run_search`: catches every block, as it sees in the newest frame; counts its steps."""

    def __init__(self, monkeypatch, env_id):
        self.env_id, self.obs = env_id, []
        monkeypatch.setattr(pretrain_teacher, "run_search", self)

    def __call__(self, net, env_id, obs, legal, num_simulations, rng, noise):
        assert (env_id, num_simulations, noise) == (self.env_id, 4, False) and legal.shape == (len(obs), 18)
        self.obs.append(obs)
        block = (obs[:, 9:, :72, :48] == 255).flatten(1).any(1).numpy()  # in the left column, above the paddle's row
        visits = np.zeros((len(obs), 18), np.int32)
        visits[np.arange(len(obs)), np.where(block, 0, 17)] = 4
        return SimpleNamespace(visits=visits), np.zeros(len(obs))


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_an_evaluation_plays_whole_games(monkeypatch):
    player, movie = Player(monkeypatch, "toy_env:Catch-v0"), []
    returns, lengths = evaluate(None, "toy_env:Catch-v0", 3, 108_000, 4, "cpu", movie)
    assert returns.tolist() == [8, 8, 8] and lengths.tolist() == [16, 16, 16]  # 8 drops of 2 steps
    assert len(player.obs) == len(movie) == 16
    for t, obs in enumerate(player.obs):  # the newest frame is the last of the stack
        assert obs.shape == (3, 12, 96, 96) and (obs[0, 9:].permute(1, 2, 0).numpy() == movie[t]).all()
        assert (obs[0, :3].permute(1, 2, 0).numpy() == movie[max(0, t - 3)]).all()


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_an_evaluation_is_cut_at_its_length(monkeypatch):
    Player(monkeypatch, "toy_env:Catch-v0")
    returns, lengths = evaluate(None, "toy_env:Catch-v0", 2, 27, 4, "cpu")
    assert lengths.tolist() == [6, 6] and returns.tolist() == [3, 3]  # 27 frames are 6 steps and a rest


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_interrupted_evaluation_stops_after_the_step_it_is_in(monkeypatch, steps):
    player = Player(monkeypatch, "toy_env:Catch-v0")

    class Interrupted(list):
        def __bool__(self):  # a signal while that many steps have been played
            return len(player.obs) >= steps

    _, lengths = evaluate(None, "toy_env:Catch-v0", 2, 108_000, 4, "cpu", None, Interrupted())
    assert len(player.obs) == steps and lengths.tolist() == [steps, steps]


def test_an_evaluation_is_logged_as_means_and_one_line_per_game(capsys):
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    returns, lengths = np.array([10.0, 0.1 + 0.2]), np.array([7, 12])
    text = log_evaluation(writer, "A", 30, 20, returns, lengths, "/A")
    assert text == "30,20,0,10.0,7,A\n30,20,1,0.30000000000000004,12,A\n"  # all digits
    assert scalars == [("eval/episodic_return/A", 5.15, 20), ("eval/episodic_length/A", 9.5, 20)]
    assert capsys.readouterr().out == "updates=20, env_id=A, evaluation return=5.2 (std 4.8)\n"
