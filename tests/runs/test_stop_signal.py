"""Stop requests: recorded signals, interruptible blocks, and a second signal."""

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
def test_signal_is_recorded_and_raised_by_the_next_check(number, code):
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.exit_code == code


def test_signal_ends_an_interruptible_block_immediately():
    with StopRequest() as stop:
        continued = False
        with pytest.raises(Stopped), stop.interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            continued = True
        assert not continued
        assert stop.received == signal.SIGTERM
        with pytest.raises(Stopped), stop.interruptible():
            raise AssertionError("the block began although a signal had arrived")


def test_exception_that_a_library_suppressed_is_raised_at_the_end_of_the_block():
    with StopRequest() as stop, pytest.raises(Stopped), stop.interruptible(), contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)  # suppressed, as by a library that runs the block in a callback


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stop_request_in_another_thread_installs_no_handlers():
    received = []

    def run():
        with StopRequest() as stop:
            received.append(stop.received)
            stop.check()

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert received == [None]
    assert signal.getsignal(signal.SIGINT) == before


def test_second_signal_after_more_than_a_second_ends_the_process_immediately():
    program = """
import os, signal, time
from mtrl_cli.runs.stop_signal import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # repeated by a key that is held down
    print("received", stop.received, flush=True)
    time.sleep(1.1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout == "received 2\n"


@pytest.mark.parametrize(("is_stopping", "expected"), [(False, [signal.SIGTERM, signal.SIGKILL]), (True, [signal.SIGKILL])])
def test_process_that_is_already_stopping_gets_no_second_sigterm_when_its_parent_dies(is_stopping, expected, monkeypatch):
    sent = []
    monkeypatch.setattr(parent_watchdog, "_is_stopping", False)
    monkeypatch.setattr(parent_watchdog, "SAVING_SECONDS", 0)
    with StopRequest():
        if is_stopping:
            signal.raise_signal(signal.SIGTERM)
        read, write = os.pipe()
        os.close(write)
        monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
        parent_watchdog._follow(read)
        os.close(read)
    assert sent == expected
