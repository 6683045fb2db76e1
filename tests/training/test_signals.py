"""Signals set a flag, and an exception comes from code that looks at it."""

import signal
import threading

import pytest

from hf_gem.training.errors import Interrupted
from hf_gem.training.signals import Caught, catch_signals, check


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_and_check_raises(number):
    before = signal.getsignal(number)
    with catch_signals() as caught:
        check()
        assert not caught.requested
        signal.raise_signal(number)
        assert caught.number == number
        with pytest.raises(Interrupted, match="nothing was saved") as stopped:
            check("nothing was saved")
        assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    check()


def test_a_second_interrupt_acts_at_once_and_a_second_termination_does_not():
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert caught.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_guard_inside_another_is_the_same_guard():
    with catch_signals() as outer:
        signal.raise_signal(signal.SIGTERM)
        with catch_signals() as inner:
            assert inner is outer
        with pytest.raises(Interrupted):
            check()


def test_threads_see_the_flag_and_catch_nothing_themselves():
    found = []

    def work():
        with catch_signals() as caught:
            found.append(caught)
        try:
            check()
        except Interrupted as error:
            found.append(error)

    def run():
        found.clear()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    run()
    assert found == [Caught()]
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        run()
        assert found[0] is caught
        assert isinstance(found[1], Interrupted)


def test_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), catch_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before
