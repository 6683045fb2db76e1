"""Signals set a flag, and an exception comes from code that looks at it."""

import signal
import threading
from types import SimpleNamespace

import pytest

from hf_gem.training.errors import ConfigError, Interrupted
from hf_gem.training.signals import Caught, agreed_stop, catch_signals, check, run_recipe, wait_for


@pytest.fixture(autouse=True)
def _own_handlers():
    """Those of a Python in a terminal: in the background of a shell SIGINT is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_and_check_raises(number):
    before = signal.getsignal(number)
    with catch_signals() as caught:
        check()
        assert caught.number is None
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


def test_a_call_that_blocks_is_waited_for_and_left_behind():
    assert wait_for(lambda: 3, "") == 3
    over = threading.Event()
    with catch_signals():
        assert wait_for(lambda: 3, "") == 3
        with pytest.raises(TimeoutError, match="its own"):
            wait_for(lambda: raise_(TimeoutError("its own")), "")
        thread = threading.Timer(0.01, signal.raise_signal, [signal.SIGTERM])
        thread.start()
        with pytest.raises(Interrupted, match="nothing is lost"):
            wait_for(over.wait, "nothing is lost")
    over.set()


def raise_(error):
    raise error


def test_a_file_stands_for_a_signal(tmp_path, monkeypatch):
    file = tmp_path / "stop"
    alone = SimpleNamespace(num_processes=1, is_main_process=True)
    assert agreed_stop(alone) is None
    monkeypatch.setenv("HF_GEM_STOP_FILE", str(file))
    assert agreed_stop(alone) is None
    file.touch()
    assert agreed_stop(alone) == signal.SIGTERM
    with catch_signals():
        signal.raise_signal(signal.SIGINT)
        assert agreed_stop(alone) == signal.SIGINT


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_processes_agree(stops, others):
    reduced = []

    def reduce(flag, how):
        reduced.append(flag.item())
        return flag + others

    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, device="cpu", reduce=reduce)
    with catch_signals() as caught:
        caught.number = signal.SIGINT if stops else None
        expected = signal.SIGINT if stops else signal.SIGTERM if others else None
        assert agreed_stop(accelerator) == expected
    assert reduced == [stops]


def test_a_recipe_ends_with_one_line_and_a_status(capfd):
    def main():
        signal.raise_signal(signal.SIGTERM)
        check("it was saved;\nthe same command goes on")

    with pytest.raises(SystemExit) as stopped:
        run_recipe(main)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "it was saved; the same command goes on\n"
    with pytest.raises(SystemExit) as stopped:
        run_recipe(lambda: raise_(ConfigError("it cannot be")))
    assert stopped.value.code == 1
    assert capfd.readouterr().err == "error: it cannot be\n"
    run_recipe(lambda: None)
