"""Stage 1 as a pipeline: what runs ahead, how far, what comes of failures; and how much of the work is hidden."""

import threading
import time
from collections.abc import Iterator

import pytest

from offline_kd.support.overlap import Abandoned, ahead, behind


def counted(limit: int, made: list[int]) -> Iterator[int]:
    for number in range(limit):
        made.append(number)
        yield number


def test_items_that_are_made_ahead_come_in_order_and_no_more_than_was_said():
    made: list[int] = []
    with ahead(counted(20, made), 3) as items:
        for number, item in enumerate(items):
            assert item == number
            time.sleep(0.002)
            assert len(made) - (number + 1) <= 3
    assert made == list(range(20))


def test_whoever_stops_early_leaves_no_thread_and_makes_nothing_more():
    made: list[int] = []
    with ahead(counted(1000, made), 2) as items:
        assert next(items) == 0
    after = len(made)
    assert after <= 3
    assert not [thread for thread in threading.enumerate() if thread.name in ("ahead", "behind")]
    time.sleep(0.01)
    assert len(made) == after


def test_what_fails_ahead_is_raised_where_it_is_wanted():
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    with ahead(failing(), 5) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="the second"):
            next(items)


def test_what_is_consumed_behind_is_all_consumed_when_the_with_ends():
    seen: list[int] = []

    def slowly(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.002)
            seen.append(item)

    with behind(slowly, 2) as put:
        for number in range(10):
            put(number)
            assert number - len(seen) <= 3  # two on their way, one being consumed
    assert seen == list(range(10))


def test_what_fails_behind_is_raised_at_the_next_item_or_at_the_end():
    def failing(items: Iterator[int]) -> None:
        raise ValueError(f"at {next(items)}")

    def put_all(numbers: list[int]) -> None:
        with behind(failing, 1) as put:
            for number in numbers:
                put(number)

    with pytest.raises(ValueError, match="at 0"):
        put_all(list(range(100)))
    with pytest.raises(ValueError, match="at 7"):
        put_all([7])


def test_what_was_handed_over_before_a_failure_is_consumed_and_then_nothing():
    seen: list[object] = []

    def consume(items: Iterator[int]) -> None:
        try:
            seen.extend(items)
        except Abandoned as error:
            seen.append(type(error))
            raise

    def interrupted() -> None:
        with behind(consume, 4) as put:
            put(1)
            put(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [1, 2, Abandoned]
