"""What becomes of a process at a named point of its life: the callables that ends take as `reached`."""

import os
import signal
from dataclasses import dataclass, field
from typing import Literal

from shmcast._points import Point


class Struck(Exception):
    """What a fate raises."""


@dataclass
class Fate:
    """At the `nth` time that a process comes to `point`: killed, stopped, or an exception. Travels by pickle."""

    point: Point
    nth: int = 1
    how: Literal["kill", "raise", "stop"] = "kill"
    seen: int = field(default=0, compare=False)

    def __call__(self, point: Point) -> None:
        if point is not self.point:
            return
        self.seen += 1
        if self.seen == self.nth:
            if self.how == "raise":
                raise Struck(str(self))
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)

    def __str__(self) -> str:
        return f"{self.point.value}-{self.nth}" if self.nth > 1 else self.point.value


@dataclass
class Path:
    """Remembers every point that was come to."""

    points: list[Point] = field(default_factory=list)

    def __call__(self, point: Point) -> None:
        self.points.append(point)
