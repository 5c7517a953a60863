import numpy as np
import pytest
import torch
from rolling import trajectory, turn

from opd_agents.batch import pack
from opd_agents.errors import AlignmentError


def random_trajectories(seed=0, n=7):
    """Some turns start a segment; some actions were not sampled."""
    random = np.random.default_rng(seed)

    def ids(low, high):
        return random.integers(10, 99, random.integers(low, high)).tolist()

    def some_turn(index):
        action = ids(1, 6)
        sampled = tuple((-random.random(len(action))).tolist()) if random.random() < 0.8 else None
        starts = bool(random.random() < 0.3) or index == 0
        return turn(ids(1, 9), action, logprobs=sampled, starts_segment=starts)

    return [
        trajectory([some_turn(i) for i in range(random.integers(0 if k == 3 else 1, 6))], uid=str(k))
        for k in range(n)
    ]


def naive(trajectories):
    """(history before the token, token, log-prob or None, trajectory, turn), one action token at a time."""
    for number, one in enumerate(trajectories):
        history = []
        for index, step in enumerate(one.turns):
            history = (history if index and not step.starts_segment else []) + list(step.context_ids)
            for place, token in enumerate(step.action_ids):
                yield list(history), token, step.logprobs and step.logprobs[place], number, index
                history.append(token)


def test_every_action_token_stands_where_a_plain_loop_puts_it():
    trajectories = random_trajectories()
    packed, expected = pack(trajectories), list(naive(trajectories))
    assert len(packed.target) == len(expected) > 50
    for n, (history, token, logprob, episode, index) in enumerate(expected):
        row, position = packed.rows[packed.row[n]], int(packed.position[n])
        assert row[:position].tolist() == history and int(row[position]) == token == int(packed.target[n])
        assert (int(packed.episode[n]), packed.turns[packed.turn[n]]) == (episode, (episode, index))
        behaviour = float(packed.behaviour[n])
        assert np.isnan(behaviour) if logprob is None else behaviour == pytest.approx(logprob)
    assert packed.behaviour.isnan().any() and not packed.behaviour.isnan().all()
    assert packed.n_tokens == sum(
        len(t.context_ids) + len(t.action_ids) for one in trajectories for t in one.turns
    )


def test_a_row_is_a_segment():
    first, second, third = turn([1, 2], [3]), turn([4], [5, 6]), turn([1, 2, 9], [7], starts_segment=True)
    packed = pack([trajectory([first, second, third])])
    assert [row.tolist() for row in packed.rows] == [[1, 2, 3, 4, 5, 6], [1, 2, 9, 7]]
    assert packed.row.tolist() == [0, 0, 0, 1]
    assert packed.position.tolist() == [2, 4, 5, 3]
    assert packed.turns == ((0, 0), (0, 1), (0, 2))


def test_sums_per_turn():
    packed = pack(random_trajectories(1))
    values = torch.arange(len(packed.target), dtype=torch.float64)
    expected = [float(values[packed.turn == number].sum()) for number in range(len(packed.turns))]
    assert packed.per_turn(values).tolist() == expected


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 10_000])
def test_micro_batches_hold_every_token_once_at_the_state_that_predicts_it(max_tokens):
    packed = pack(random_trajectories(2))
    seen, longest = [], 0
    for micro in packed.micro_batches(max_tokens):
        rows, width = micro.ids.shape
        assert rows * width <= max_tokens or rows == 1
        assert width >= longest  # rows of similar length together: sorted by length
        longest = width
        lengths = {}
        for row, column, token in zip(micro.row, micro.column, micro.tokens, strict=True):
            source, position = packed.rows[packed.row[token]], int(packed.position[token])
            assert int(column) == position - 1  # the state before the token predicts it
            assert torch.equal(micro.ids[row, : len(source)], source)
            assert not micro.ids[row, len(source) :].any()
            lengths[int(row)] = len(source)
        assert sum(lengths.values()) == micro.n_tokens and set(lengths) == set(range(rows))
        seen += micro.tokens.tolist()
    assert sorted(seen) == list(range(len(packed.target)))


def test_only_needed_tokens_and_rows_are_batched():
    packed = pack(random_trajectories(3))
    keep = (packed.episode == 2) | (packed.target % 5 == 0)
    micros = list(packed.micro_batches(50, keep))
    assert (
        sorted(token for micro in micros for token in micro.tokens.tolist())
        == keep.nonzero().squeeze(1).tolist()
    )
    assert sum(len(micro.ids) for micro in micros) == len(set(packed.row[keep].tolist())) < len(packed.rows)
    assert list(packed.micro_batches(50, torch.zeros_like(keep))) == []


def test_nothing_to_pack():
    for nothing in ([], [trajectory([])]):
        packed = pack(nothing)
        assert (packed.rows, packed.n_tokens, packed.turns) == ((), 0, ())
        assert packed.target.dtype == torch.int64 and packed.behaviour.dtype == torch.float32
        assert list(packed.micro_batches(10)) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (turn([1], []), "no token ids"),
        (turn([], [1]), "no token ids"),
        (turn([1], [2, 3], logprobs=(-1.0,)), "1 log-probs for 2 ids"),
        (turn([1], [2], logprobs=(-1.0, -1.0)), "2 log-probs for 1 ids"),
    ],
)
def test_turns_that_do_not_fit_are_refused(bad, message):
    with pytest.raises(AlignmentError, match=f"t7, turn 1: {message}"):
        pack([trajectory([turn([1], [2]), bad], uid="t7")])
