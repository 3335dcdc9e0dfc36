"""The wait for the first token and the rate of the others, by a clock of our own."""

from export_vq.pace import Pace


def pace_of(*seconds):
    """After tokens at these times; the clock starts at 10 s."""
    times = iter([10.0, *seconds])
    pace = Pace(lambda: next(times))
    assert list(pace.watch(iter(range(len(seconds))))) == list(range(len(seconds)))
    return str(pace)


def test_the_first_token_counts_as_a_wait_and_not_in_the_rate():
    assert pace_of(10.25, 10.5, 10.75, 11.25) == "4 tokens, the first after 0.250 s, then 3.0 tokens/s"


def test_without_a_second_token_there_is_no_rate():
    assert pace_of(10.125) == "1 token, the first after 0.125 s"
    assert pace_of() == "no tokens"


def test_tokens_of_several_batches_are_one_run():
    times = iter([0.0, 1.0, 2.0, 3.0])
    pace = Pace(lambda: next(times))
    assert [*pace.watch(iter("ab")), *pace.watch(iter("c"))] == ["a", "b", "c"]
    assert str(pace) == "3 tokens, the first after 1.000 s, then 1.0 tokens/s"
