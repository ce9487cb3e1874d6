from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from mtrl_cli.errors import Stopped
from mtrl_cli.machine import parent_watchdog
from mtrl_cli.runs.stop_signal import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_honoured_at_the_check(number, code):
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.exit_code == code


def test_an_interruptible_block_is_left_at_once_and_others_are_not():
    with StopRequest() as stop:
        went_on = False
        with pytest.raises(Stopped), stop.interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            went_on = True
        assert not went_on
        assert stop.received == signal.SIGTERM
        with pytest.raises(Stopped), stop.interruptible():
            raise AssertionError("the block began although a signal had arrived")


def test_a_swallowed_exception_is_raised_at_the_end_of_the_block():
    with StopRequest() as stop, pytest.raises(Stopped), stop.interruptible(), contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)  # suppressed as by a callback of a library


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_gets_no_handlers_and_no_error():
    seen = []

    def run():
        with StopRequest() as stop:
            seen.append(stop.received)
            stop.check()

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_signal_a_second_later_ends_the_process_at_once():
    program = """
import os, signal, time
from mtrl_cli.runs.stop_signal import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # of a key that was held down
    print("noted", stop.received, flush=True)
    time.sleep(1.1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout == "noted 2\n"


@pytest.mark.parametrize(("is_asked", "expected"), [(False, [signal.SIGTERM, signal.SIGKILL]), (True, [signal.SIGKILL])])
def test_who_is_saving_already_is_not_asked_again_when_its_parent_dies(is_asked, expected, monkeypatch):
    sent = []
    monkeypatch.setattr(parent_watchdog, "_is_stopping", False)
    monkeypatch.setattr(parent_watchdog, "SAVING_SECONDS", 0)
    with StopRequest():
        if is_asked:
            signal.raise_signal(signal.SIGTERM)
        read, write = os.pipe()
        os.close(write)
        monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
        parent_watchdog._follow(read)
        os.close(read)
    assert sent == expected
