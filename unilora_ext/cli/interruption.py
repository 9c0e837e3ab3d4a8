"""Ctrl-C that is not lost. Python drops an exception that a signal raises inside some of its own calls (a destructor,
``hasattr`` from C), and a KeyboardInterrupt with it: it is then raised again at the end of the step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback

__all__ = ["Interruption"]


class Interruption(TrainerCallback):
    """A context manager around a training, and a callback of it. Does nothing outside the main thread, or where SIGINT
    has a handler of the caller's."""

    def __init__(self) -> None:
        self.asked, self._mine = False, False

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        self._mine = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *signal_and_frame: Any) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
