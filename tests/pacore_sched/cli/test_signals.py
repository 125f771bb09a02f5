"""Signals during `batch` and `sample`."""

import os
import signal

import pytest

from pacore_sched.cli.jobs import Stopped, _stop_signals


def test_ignored_signals_stay_ignored():
    """A night's run under nohup, or in the background of a script, that another job's Ctrl-C
    stops."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _stop_signals() as check_stop:
            os.kill(os.getpid(), signal.SIGINT)
            check_stop()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped):
                check_stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
