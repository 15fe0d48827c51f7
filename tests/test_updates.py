"""An update is the same in all scripts, every state has an answer, and no preference comes from nowhere."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_losses import PAPER, some_batch, tiny_net
from test_targets import random_stream, replay_of

import distill
import mcts
import model
import pretrain_teacher
from finetune import combine_losses, gradient_cosines, play_step, start_games, transfer_learn, unroll_loss
from pretrain_teacher import Game, Replay, make_targets, reanalyze, sample, stack_frames, stalest, take_batch

ROOT = Path(__file__).resolve().parent.parent


def test_an_update_is_the_same_in_all_three_scripts():
    alone = functools.partial(transfer_learn, eta=torch.ones(0), sizes=[4], paper_loss=False)
    results = []
    for update in (pretrain_teacher.learn, distill.learn, alone):
        net = tiny_net().train()
        loss, terms, priority, *_ = update(net, unroll_loss, some_batch(B=4), coefficients=PAPER)
        results.append([loss, priority, *terms.values(), *[parameter.grad for parameter in net.parameters()]])
    for result in zip(*results, strict=True):
        assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("paper_loss", [False, True])
def test_the_update_of_a_mixed_batch_is_that_of_the_combined_losses(paper_loss, measure):
    net, batch, eta, sizes = tiny_net().train(), some_batch(B=8), torch.tensor([0.3, 0.9]), [4, 2, 2]
    total = unroll_loss(net, batch, PAPER)[0]  # one pass: batch norm sees the mixture
    target, *tasks = [part.mean() for part in (batch.weight * total).split(sizes)]
    loss = combine_losses(target, torch.stack(tasks), eta, paper_loss)
    parameters = list(net.parameters())
    cosines = gradient_cosines(target / 3, [task / 3 for task in tasks], parameters)  # K = 3: before the clamp
    gradients = torch.autograd.grad(loss / 3, parameters)
    settings = {"coefficients": PAPER, "sizes": sizes, "paper_loss": paper_loss, "measure": measure}
    result = transfer_learn(net, unroll_loss, batch, eta, **settings)
    torch.testing.assert_close(result[0], loss.detach())
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(gradients))
    torch.testing.assert_close(result[3], cosines if measure else torch.zeros(2))


def test_a_cycle_is_e_updates_each_with_a_batch_of_its_own():
    E, B, K = 3, 4, 2
    rng = np.random.default_rng(0)
    replay = replay_of(rng.integers(-1, 2, 60), np.zeros(60), np.arange(60) < 59)
    replay.priority[:50] = rng.random(50)  # none near the end: there actions are random
    rows, weight = sample(replay, [Game("A", slice(0, 60), None)], [B], E, 0.6, 0.4, rng)
    td_steps = rng.integers(1, 6, (E, B))

    def cycle_of(part):
        batches = make_targets(replay, rows[part], td_steps[part], K, 0.99, True, rng) | {"weight": weight[part]}
        return {name: torch.from_numpy(x) for name, x in batches.items()}

    def train(draws):
        net, generator = tiny_net().train(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for batches, i in draws:
            batch = take_batch(replay, {name: x[i] for name, x in batches.items()}, generator)
            losses.append(pretrain_teacher.learn(net, unroll_loss, batch, coefficients=PAPER)[0])
            optimizer.step()
        return [*losses, *net.parameters()]

    whole, singles = cycle_of(slice(0, E)), [cycle_of(slice(i, i + 1)) for i in range(E)]
    results = train([(whole, i) for i in range(E)]), train([(single, 0) for single in singles])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert len({loss.item() for loss in results[0][:E]}) == E


def test_the_answer_stored_for_a_state_is_that_of_a_search_by_hand():
    replay, net, legal = random_stream(40, seed=0), tiny_net(), np.arange(18) % 3 > 0
    rows = np.array([31, 4, 17, 9, 22])
    replay.uses[:] = 7
    search = mcts.Search(model.inference_copy(net), 6, capacity=2)
    reanalyze(search, replay, rows, legal, np.random.default_rng(5), noise=True)
    rng = np.random.default_rng(5)
    for block in ([31, 4], [17, 9], [22]):
        obs = stack_frames(replay, np.array(block))
        result = mcts.Search(model.inference_copy(net), 6, capacity=7)(obs, legal, rng, noise=True)
        np.testing.assert_array_equal(replay.policy[block], result.policy)
        with torch.no_grad():
            value = model.support_to_scalar(net.initial_inference(obs)[2])
        np.testing.assert_allclose(replay.value[block], value, rtol=1e-3, atol=1e-4)
    assert not replay.policy[rows][:, ~legal].any()
    searched, before = np.isin(np.arange(40), rows), random_stream(40, seed=0)
    assert (replay.turn == searched).all() and (replay.uses == 7 * ~searched).all()
    np.testing.assert_array_equal(replay.policy[~searched], before.policy[~searched])  # an offline game's, say
    np.testing.assert_array_equal(replay.value[~searched], before.value[~searched])


class Answer:
    """Stands for a search that always says the same: all visits to one action, whose id is the value."""

    def __init__(self, action):
        self.action, self.capacity, self.net = action, 1000, torch.nn.Linear(1, 1)

    def __call__(self, obs, legal, rng, noise):
        value = np.full(len(obs), self.action, np.float32)
        return mcts.SearchResult(np.eye(18, dtype=np.float32)[value.astype(int)], value, value, None)


def test_the_stalest_are_those_never_searched_then_the_oldest():
    replay, rows = Replay(6), np.arange(6)
    replay.turn[:] = 3, 0, 2, 0, 1, 2
    assert [stalest(replay, rows, n, reuse=4).tolist() for n in (1, 2, 4)] == [[1, 3], [1, 3], [1, 3, 4, 2]]
    assert stalest(replay, rows[4:], 9, reuse=4).tolist() == [4, 5]


def test_before_the_oldest_come_those_used_more_often_than_they_should_be():
    replay, rows = Replay(6), np.arange(6)
    replay.turn[:] = 1, 2, 3, 4, 5, 0
    replay.uses[:] = 4, 0, 5, 3, 9, 0
    assert stalest(replay, rows, 4, reuse=4).tolist() == [5, 4, 2, 0]
    assert stalest(replay, rows, 6, reuse=1).tolist() == [5, 4, 2, 0, 3, 1]


@pytest.mark.parametrize("seed", range(20))
def test_the_stalest_are_the_first_of_all_in_order(seed):
    rng, replay = np.random.default_rng(seed), Replay(60)
    replay.turn[:] = rng.integers(seed % 2, rng.integers(2, 9), 60)
    replay.uses[:] = rng.integers(0, rng.integers(1, 12), 60)
    rows = rng.permutation(60)[:50]
    order = sorted(rows, key=lambda row: (replay.turn[row] > 0, -max(0, replay.uses[row] - 4), replay.turn[row]))
    never = (replay.turn[rows] == 0).sum()
    for n in (0, 1, 17, 49, 50, 70):
        assert stalest(replay, rows, n, reuse=4).tolist() == order[: max(n, never)]


def test_every_state_gets_its_turn():
    replay, rows = Replay(25), np.arange(2, 25)
    reanalyze(Answer(1), replay, rows, None, None, True)
    for action in (2, 3):
        for _ in range(5):  # 5 of 23 rows each
            reanalyze(Answer(action), replay, stalest(replay, rows, 5, reuse=4), None, None, True)
        assert (replay.value[rows] == action).all()


def test_a_new_state_keeps_the_players_answer_until_all_older_ones_were_searched():
    replay, player, target = Replay(16), Answer(3), Answer(7)
    play = start_games("toy_env:NoReward-v0", replay, np.array([0, 8]), seed=0)
    for _ in range(3):
        play_step(play, replay, np.zeros(2, int), 0)
    reanalyze(target, replay, np.flatnonzero(replay.acted), None, None, True)
    reanalyze(player, replay, play.newest, None, None, True)
    new, values = play.newest, []
    play_step(play, replay, replay.policy[new].argmax(1), 6)
    for _ in range(3):  # 3 of 8 rows each
        values.append(replay.value[new].tolist())
        reanalyze(target, replay, stalest(replay, np.flatnonzero(replay.acted), 3, reuse=4), None, None, True)
    assert replay.action[new].tolist() == [3, 3] and values == 3 * [[3, 3]]
    assert replay.value[new].tolist() == [7, 7] and replay.policy[new].argmax(1).tolist() == [7, 7]


def test_without_rewards_the_policy_stays_uniform(tmp_path):
    """Learning one search of a state too often teaches the noise of that search, which the next one starts from."""
    flags = "--env-id toy_env:NoReward-v0 --channels 8 --batch-size 32 --unroll-steps 1 --learning-rate 0.1"
    flags += " --num-envs 8 --learning-starts 128 --total-timesteps 128 --eval-episodes 1 --eval-max-frames 4"
    flags += f" --save-dataset {tmp_path}/states.npz --run-dir {tmp_path}/run"
    paths = {
        "PYTHONPATH": f"{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "finetune.py"), *flags.split()]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data = model.read_dataset(f"{tmp_path}/states.npz")
    replay, _ = pretrain_teacher.make_replay([data], 0, torch.device("cpu"))
    net, _ = model.load_model(f"{tmp_path}/run/model.pt")
    with torch.no_grad():
        policy = net.initial_inference(stack_frames(replay, np.flatnonzero(replay.acted)))[1].softmax(-1)
    entropy = -(policy * policy.log()).sum(-1).mean().item()
    assert entropy > 0.997 * np.log(18)
