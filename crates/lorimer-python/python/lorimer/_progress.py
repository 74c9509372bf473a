"""Progress: a bar of tqdm where it is installed (in notebooks its widget), else lines on stderr now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, Callable, Iterator, Union


class _Bar:
    def __init__(self, name: str) -> None:
        self._name, self._kind, self._bar, self._said = name, None, None, 0.0
        try:
            from tqdm.auto import tqdm
        except ImportError:
            tqdm = None
        self._tqdm = tqdm

    def __call__(self, event: dict) -> None:
        kind, step, total = event.get("kind"), event.get("step", 0), event.get("total")
        if kind == "evaluation":
            self._say(f"evaluation after step {step}: loss {event['loss']:.4f}")
            return
        what = {"calibrating": "looking at the data", "preparing": "computing the frozen layers once"}.get(kind, self._name)
        note = f"loss {event['loss']:.4f}" if isinstance(event.get("loss"), float) else ""
        if self._tqdm is not None:
            if self._bar is None or self._kind != what:
                self.close()
                self._bar, self._kind = self._tqdm(total=total, desc=what, leave=True), what
            self._bar.n = step
            self._bar.total = total
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.refresh()
        elif step == total or time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            self._say(f"{what}: {step} of {total} {note}".rstrip())

    def _say(self, text: str) -> None:
        if self._tqdm is not None:
            self._tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def listener(progress: Union[bool, Callable[[dict], Any]], name: str) -> Iterator[Union[None, Callable[[dict], Any]]]:
    """What hears of progress."""
    if callable(progress):
        yield progress
    elif progress:
        bar = _Bar(name)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield None
