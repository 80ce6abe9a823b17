"""How work that takes long says how far it is: with how much is done, how much there is, and what it is at."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
