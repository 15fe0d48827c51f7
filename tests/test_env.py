"""Environments as the scripts see them: legal actions, frames, rewards, lives, ends, seeds; the games of an evaluation;
and Catch, which other tests learn from."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_env
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from finetune import Replay, log_video, start_games
from model import AtariGames
from pretrain_teacher import evaluate, legal_actions, log_evaluation, make_envs

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")  # Gymnasium takes Catch-v0 for an old Catch-v2

NUM_ACTIONS = {  # Table 5 of the paper
    "Alien": 18, "Amidar": 10, "Assault": 7, "BankHeist": 18, "BattleZone": 18, "Carnival": 6, "Centipede": 18,
    "DemonAttack": 6, "Hero": 18, "Krull": 18, "MsPacman": 9, "Phoenix": 8, "Pooyan": 6, "Riverraid": 18,
    "Seaquest": 18, "VideoPinball": 9, "WizardOfWor": 10, "YarsRevenge": 18,
}  # fmt: skip
ASSAULT = "AssaultNoFrameskip-v4"


def play(envs, seed, actions):
    """Frames [T, N, 96, 96, 3] and reward, terminated, truncated, lives, frame number [T, N] after each step."""
    envs.reset(seed=seed)
    rows = []
    for action in actions:
        obs, *rest, info = envs.step(action)
        rows.append((obs.reshape(envs.num_envs, 96, 96, 3), *rest, info["lives"], info["episode_frame_number"]))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def random_actions(steps, num_envs, num_actions=18):
    return np.random.default_rng(0).integers(0, num_actions, (steps, num_envs))


@pytest.mark.parametrize("game", NUM_ACTIONS)
def test_legal_actions_are_those_of_table_5(game):
    legal = legal_actions(f"{game}NoFrameskip-v4")
    assert legal.shape == (18,) and legal.dtype == bool and legal.sum() == NUM_ACTIONS[game]


@pytest.mark.parametrize("game, rom", [("Assault", "assault"), ("WizardOfWor", "wizard_of_wor")])
def test_an_ale_id_does_what_the_games_own_index_does(game, rom):
    env_id = f"{game}NoFrameskip-v4"
    index = random_actions(250, 2, NUM_ACTIONS[game])
    ids = np.flatnonzero(legal_actions(env_id))[index]
    frames, reward, *_ = play(make_envs(env_id, 2), 1, ids)
    options = {"img_height": 96, "img_width": 96, "grayscale": False, "stack_num": 1, "noop_max": 31}
    options |= {"reward_clipping": False, "use_fire_reset": False, "full_action_space": False}
    own_frames, own_reward, *_ = play(AtariVectorEnv(rom, 2, num_threads=1, **options), 1, index)
    assert (frames == own_frames).all() and (reward == own_reward).all()


def test_frames_are_96x96_rgb_and_rewards_are_raw():
    envs = make_envs("CarnivalNoFrameskip-v4", 2)
    obs, _ = envs.reset(seed=0)
    assert obs.dtype == np.uint8 and obs.size == 2 * 96 * 96 * 3 and envs.single_action_space.n == 18
    frames, reward, *_ = play(envs, 0, random_actions(400, 2))
    assert (frames[100] != frames[0]).any() and np.ptp(frames[-1, 0], axis=-1).max() > 50  # they move, in colour
    assert reward.max() > 1 and reward.min() < -1


def test_a_seed_fixes_the_games_and_their_0_to_30_no_ops_whatever_the_number_of_envs():
    actions = random_actions(150, 1).repeat(4, axis=1)
    four = play(make_envs(ASSAULT, 4), 5, actions)
    one = play(make_envs(ASSAULT, 1), 7, actions[:, :1])
    for x, y in zip(four, one, strict=True):
        assert (x[:, 2:3] == y).all()  # env 2 of seed 5 plays the games of seed 7
    no_ops = set((four[-1][0] - 4).tolist())
    assert no_ops <= set(range(31)) and len(no_ops) > 1


@pytest.fixture(scope="module")
def assault():
    """One env's frames, reward, terminated, truncated, lives, frame number [T, ...]."""
    return [column[:, 0] for column in play(make_envs(ASSAULT, 1), 0, random_actions(800, 1))]


def test_game_over_is_terminated_and_a_lost_life_is_not(assault):
    _, reward, terminated, truncated, lives, number = assault
    lost = 1 + np.flatnonzero((lives[1:] < lives[:-1]) & (lives[1:] > 0))
    over = np.flatnonzero(terminated)
    assert len(lost) >= 3 and len(over) >= 1 and not truncated.any() and not terminated[lost].any()
    assert (lives[over] == 0).all() and (number[lost + 1] == number[lost] + 4).all()
    assert (number[over + 1] <= 30).all() and (lives[over + 1] == 4).all() and (reward[over + 1] == 0).all()


@pytest.mark.parametrize("after, ignored", [("game over", True), ("lost life", False)])
def test_the_action_after_game_over_is_ignored_and_the_one_after_a_lost_life_is_not(assault, after, ignored):
    _, _, terminated, _, lives, _ = assault
    first = np.flatnonzero(terminated if ignored else np.append(False, np.diff(lives) == -1) & ~terminated)[0]
    actions = random_actions(800, 1)[: first + 40]
    frames = []
    for other in (3, 4):  # RIGHT, LEFT
        actions[first + 1] = other
        frames.append(play(make_envs(ASSAULT, 1), 0, actions)[0])
    assert (frames[0] == frames[1]).all() == ignored


def test_the_time_limit_is_truncation(monkeypatch):
    def short(*args, **kwargs):
        assert kwargs["max_num_frames_per_episode"] == 108_000
        return AtariGames(*args, **kwargs | {"max_num_frames_per_episode": 40})

    monkeypatch.setattr("model.AtariGames", short)
    envs = make_envs("MsPacmanNoFrameskip-v4", 2)
    _, reward, terminated, truncated, lives, number = play(envs, 0, np.zeros((12, 2), int))
    assert not terminated.any() and (lives > 0).all()
    assert (np.flatnonzero(truncated[:, 0]) == [9]).all()  # 10 steps of 4 frames; the no-ops of the start do not count
    assert (number[10] <= 30).all() and (reward[10] == 0).all()


@pytest.mark.parametrize("game", ["CombatNoFrameskip-v4", "toy_env:WrongShape-v0", "toy_env:TooManyActions-v0"])
def test_a_game_that_the_networks_cannot_play_is_refused(game):  # Combat has two players: it would end the process
    with pytest.raises(SystemExit, match=f"error: --env-id {game}"):
        legal_actions(game)


class Player:
    """Stands for a `mcts.Search`: `choose` says what to do [n] at the frames [n, 12, 96, 96], which are kept."""

    capacity, net = 3, torch.nn.Linear(1, 1)  # games; what tells the device

    def __init__(self, choose):
        self.choose, self.seen = choose, []

    def __call__(self, obs, legal, rng, noise):
        assert legal.shape == (18,) and not noise
        self.seen.append(obs)
        return SimpleNamespace(policy=np.eye(18)[self.choose(obs)])


def below_the_block(obs):  # of Catch-v0, as its newest frame shows it above the paddle's row
    return np.where((obs[:, 9:, :72, :48] == 255).flatten(1).any(1).numpy(), 0, 17)


def test_an_evaluation_stacks_the_last_four_frames_and_sums_the_rewards():
    player, movie = Player(below_the_block), []
    returns, lengths = evaluate(player, "toy_env:Catch-v0", 108_000, movie)
    assert returns.tolist() == [8, 8, 8] and lengths.tolist() == [16, 16, 16]  # 8 drops of 2 steps
    assert len(player.seen) == len(movie) - 1 == 16 and movie[-1][1] == 8  # the last frame and score are in it
    for t, obs in enumerate(player.seen):
        expected = np.concatenate([movie[max(0, t - back)][0] for back in (3, 2, 1, 0)], axis=2)
        assert (obs[0].permute(1, 2, 0).numpy() == expected).all()


def test_an_evaluation_plays_whole_games_of_seeds_0_1_2_and_leaves_each_where_it_ends_or_is_cut():
    player = Player(lambda obs: np.full(len(obs), 2))
    returns, lengths = evaluate(player, ASSAULT, max_frames=1403)
    _, reward, over, *_ = play(make_envs(ASSAULT, 3), 0, np.full((350, 3), 2))
    ends = np.where(over.any(axis=0), over.argmax(axis=0) + 1, 350)  # 1,403 frames are 350 steps and a rest
    assert lengths.tolist() == ends.tolist() and min(ends) < max(ends) == 350
    assert returns.tolist() == [reward[:end, i].sum() for i, end in enumerate(ends)]
    assert [len(obs) for obs in player.seen] == [(lengths > t).sum() for t in range(350)]


def test_an_evaluation_is_logged_as_means_and_one_line_per_game(capsys):
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    text = log_evaluation(writer, "A", 30, 20, np.array([10.0, 0.1 + 0.2]), np.array([7, 12]), "/A")
    assert text == "30,20,0,10.0,7,A\n30,20,1,0.30000000000000004,12,A\n"  # all digits
    assert scalars == [("eval/episodic_return/A", 5.15, 20), ("eval/episodic_length/A", 9.5, 20)]
    assert capsys.readouterr().out == "update 20: A, return 5.2 (std 4.8 of 2 games)\n"


@pytest.mark.parametrize("env_id", toy_env.VARIANTS)
def test_catch_is_served_like_a_game_and_a_seed_fixes_it(env_id):
    pair = [make_envs(f"toy_env:{env_id}", 4) for _ in range(2)]
    first, second = (envs.reset(seed=3)[0] for envs in pair)
    assert first.shape == (4, 96, 96, 3) and first.dtype == np.uint8 and legal_actions(f"toy_env:{env_id}").all()
    drop = 1 - -(toy_env.ROWS - 2) // toy_env.VARIANTS[env_id]["fall"]  # steps: the fall, then the verdict
    for t, action in enumerate(random_actions(8 * drop + 1, 4), start=1):
        assert (first == second).all()
        (first, reward, terminated, *_), (second, *_) = (envs.step(action) for envs in pair)
        assert (np.abs(reward) == (t % drop == 0 and t <= 8 * drop)).all()  # the last step only resets
        assert (terminated == (t == 8 * drop)).all()


@pytest.mark.parametrize("env_id", toy_env.VARIANTS)
def test_skill_pays_in_catch(env_id):
    env, rng = gym.make(f"toy_env:{env_id}").unwrapped, np.random.default_rng(0)

    def mean_score(choose, games=300, total=0):
        for seed in range(games):
            env.reset(seed=seed)
            while env.drops_left:
                total += env.step(choose())[1]
        return total / games

    assert mean_score(lambda: 17 * env.column) == 8
    assert abs(mean_score(lambda: rng.integers(18))) < 0.6  # 8 fair coins of +-1: std 2.8, of the mean 0.16


def test_catch_variants_differ_in_colours_and_action_ids():
    games = [gym.make(f"toy_env:{env_id}").unwrapped for env_id in toy_env.VARIANTS]
    assert len({tuple(colour) for game in games for colour in game.colours.tolist()}) == 3 * len(games)
    assert len({(game.left, game.right) for game in games}) == len(games)


class Pixels(gym.Env):
    """Each frame is one image; for the tests of how other images are made to fit."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, image):
        self.image = image
        self.observation_space = gym.spaces.Box(0, 255, image.shape, image.dtype.type)

    def reset(self, *, seed=None, options=None):
        return self.image, {}

    def step(self, action):
        return self.image, 0.0, False, False, {}


def halves(height, width):
    """An image [height, width], black on the left and 200 on the right."""
    return np.where(np.arange(width) < width // 2, 0, 200).astype(np.uint8)[None].repeat(height, axis=0)


@pytest.mark.parametrize(
    "image",
    [
        halves(96, 96),
        halves(84, 84)[..., None],
        halves(64, 64)[None],
        halves(210, 160)[..., None].repeat(3, axis=-1),
        halves(64, 64)[None].repeat(3, axis=0),
    ],
    ids=["gray", "gray 84", "gray, channel first", "another size", "channel first"],
)
def test_other_images_are_resized_and_get_three_channels(image, capsys):
    gym.register("Pixels-v0", entry_point=Pixels, kwargs={"image": image})
    envs = make_envs("Pixels-v0", 2)
    del gym.registry["Pixels-v0"]
    for obs in (envs.reset(seed=0)[0], envs.step(np.zeros(2, int))[0]):
        assert obs.shape == (2, 96, 96, 3) and obs.dtype == np.uint8
        assert (obs[:, :, :40] == 0).all() and (obs[:, :, 56:] == 200).all()  # the edge between is smoothed
    said = capsys.readouterr().out  # once for all copies
    assert said.count("\n") == 1 and f": images {image.shape} are made (96, 96, 3)" in said


def test_an_image_that_fits_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    gym.register("Pixels-v0", entry_point=Pixels, kwargs={"image": image})
    assert (make_envs("Pixels-v0", 1).reset(seed=0)[0][0] == image).all()
    del gym.registry["Pixels-v0"]


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_images_that_are_not_uint8_are_refused(dtype):
    image = halves(96, 96)[..., None].repeat(3, axis=-1).astype(dtype)
    gym.register("Pixels-v0", entry_point=Pixels, kwargs={"image": image})
    with pytest.raises(SystemExit, match="expected uint8 images"):
        make_envs("Pixels-v0", 1)
    del gym.registry["Pixels-v0"]


class Own(gym.Env):
    """Games of 9 steps; what is wrong with them in the tests below is in the subclasses."""

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(4)
    paid = 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def show(self):
        return np.full((96, 96, 3), self.t, np.uint8)

    def step(self, action):
        self.t += 1
        return self.show(), self.paid if self.t == 5 else 0.0, self.t == 9, False, {}


class NeedsArgument(Own):
    def __init__(self, level):
        pass


class NoSeed(Own):
    def reset(self):
        return Own.reset(self)


class OldReset(Own):
    def reset(self, *, seed=None, options=None):
        return Own.reset(self)[0]


class OldStep(Own):
    def step(self, action):
        return Own.step(self, action)[:4]


class Floats(Own):
    def show(self):
        return Own.show(self) / 255


class Smaller(Own):
    def show(self):
        return Own.show(self)[:84, :84]


class Grows(Own):
    def show(self):
        return np.zeros((97 if self.t == 5 else 96, 96, 3), np.uint8)


class ShowsNothingAtTheEnd(Own):
    def show(self):
        return None if self.t == 9 else Own.show(self)


class Odd(Own):
    """Nothing is wrong with it: frames in one buffer, infos of all kinds, rewards of all types of numbers."""

    buffer = np.zeros((96, 96, 3), np.uint8)

    def show(self):
        self.buffer[:] = self.t
        return self.buffer

    def step(self, action):
        frame, _, *ends, _ = Own.step(self, action)
        rewards = [np.float64(1), np.int64(2), True, np.array(3.0), 4, -1e38, np.float32(0), False, 0.5]
        return frame, rewards[self.t - 1], *ends, {"lives": None, f"key {self.t}": "x"}


def register(cls, **attributes):
    """A new class with these attributes, as an environment -> its id."""
    name = f"{cls.__name__}{len(gym.registry)}-v0"
    gym.register(name, entry_point=type(cls.__name__, (cls,), attributes))
    return name


@pytest.mark.parametrize("cls", [NeedsArgument, NoSeed, OldReset, OldStep, Floats, Smaller])
def test_an_environment_that_cannot_be_made_reset_and_stepped_is_refused_at_once(cls):
    name = register(cls)
    with pytest.raises(SystemExit, match=f"error: .*{name}.*; (expected|mend)"):
        make_envs(name, 2)


@pytest.mark.parametrize("paid", [np.nan, np.inf, -np.inf, 1e39, None, "1", np.ones(1), 1j])
def test_a_reward_that_is_no_finite_number_ends_the_run_at_its_step(paid):
    name = register(Own, paid=paid)
    envs = make_envs(name, 2)
    envs.reset(seed=0)
    for _ in range(4):
        envs.step(np.zeros(2, int))
    with pytest.raises(SystemExit, match=f"^error: {name} pays .* at step 5 of a game"):
        envs.step(np.zeros(2, int))


@pytest.mark.parametrize("cls, step", [(Grows, 5), (ShowsNothingAtTheEnd, 9)])
def test_a_frame_that_its_space_does_not_have_ends_the_run_at_its_step(cls, step):
    name = register(cls)
    envs = make_envs(name, 2)
    envs.reset(seed=0)
    with pytest.raises(SystemExit, match=f"^error: {name} shows .* at step {step} of a game"):
        for _ in range(9):
            envs.step(np.zeros(2, int))


def test_what_is_odd_but_right_is_played(capsys):
    envs = make_envs(register(Odd), 2)
    frames = [envs.reset(seed=0)[0]]
    rewards = []
    for _ in range(9):
        obs, reward, *_ = envs.step(np.zeros(2, int))
        frames.append(obs)
        rewards.append(reward.tolist())
    assert [frame[0, 0, 0, 0] for frame in frames] == list(range(10))
    assert rewards == [[x, x] for x in (1, 2, 1, 3, 4, -1e38, 0, 0, 0.5)]


class Unseeded(Own):
    def show(self):
        return np.random.default_rng().integers(0, 256, (96, 96, 3), np.uint8)


class UnseededLater(Own):
    def show(self):
        return Own.show(self) if self.t == 0 else Unseeded.show(self)


@pytest.mark.parametrize("cls, warned", [(Unseeded, True), (UnseededLater, True), (Own, False)])
def test_a_game_that_does_not_follow_its_seed_is_told_at_the_start(cls, warned, capsys):
    name = register(cls)
    start_games(name, Replay(2), np.arange(2), seed=1)
    assert (f"warning: {name} is not fixed by its seed" in capsys.readouterr().out) == warned


def test_a_long_video_leaves_frames_out_but_not_the_last(tmp_path):
    movie = [(np.full((96, 96, 3), i % 256, np.uint8), 0) for i in range(2100)]
    writer = SummaryWriter(tmp_path)
    log_video(writer, f"{tmp_path}/video.gif", "toy_env:Catch-v0", movie, 7)
    writer.close()
    video = Image.open(tmp_path / "video.gif")
    assert video.n_frames == 1051  # every second, and the last
    video.seek(1050)
    assert (np.asarray(video.convert("RGB"))[16:] == 2099 % 256).all()


@pytest.mark.parametrize("env_id, size", [("PhoenixNoFrameskip-v4", (320, 256)), ("toy_env:Catch-v0", (288, 304))])
def test_a_video_shows_every_frame_on_a_console_screen_and_comes_to_tensorboard(tmp_path, env_id, size):
    frames = [np.full((96, 96, 3), 50 * i, np.uint8) for i in range(4)]
    writer = SummaryWriter(tmp_path)
    log_video(writer, f"{tmp_path}/video.gif", env_id, [(frame, 1.5 * i) for i, frame in enumerate(frames)], 7)
    writer.close()
    video = Image.open(tmp_path / "video.gif")
    assert video.size == size and video.n_frames == 4
    for i in range(4):
        video.seek(i)
        pixels = np.asarray(video.convert("RGB"))
        assert (pixels[16:] == 50 * i).all() and pixels[:16].any()  # the picture, and its score above it
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("eval/video")
    assert image.step == 7 and image.encoded_image_string == (tmp_path / "video.gif").read_bytes()
