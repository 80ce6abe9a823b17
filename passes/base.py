"""What a pass is: a named rewrite of a graph in place, valid before and after, that says how many places it changed.

Knows no graph library: `passes.fx` and `passes.onnx` each give `Pass` a graph and a way to validate it.
"""

import inspect
import logging
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

logger = logging.getLogger(__name__)
G = TypeVar("G")


class PassError(Exception):
    """A pass refused a graph, or left one that is not valid. Names the pass, and the passes that ran before it."""

    def __init__(self, name: str, reason: str, before: tuple[str, ...] = ()) -> None:
        self.name, self.reason, self.before = name, reason, before
        place = f"{name} (after {', '.join(before)})" if before else name
        super().__init__(f"{place}: {reason}")


@dataclass(frozen=True)
class Step:
    """One pass of a run."""

    name: str
    rewrites: int
    seconds: float


@dataclass(frozen=True)
class PassResult(Generic[G]):
    """The graph that was given, rewritten, and what each pass did to it."""

    graph: G
    steps: tuple[Step, ...]

    @property
    def rewrites(self) -> int:
        return sum(step.rewrites for step in self.steps)


class Pass(ABC, Generic[G]):
    """Rewrites a graph in place. Valid before and after, never promised valid within."""

    name: ClassVar[str]  # kebab-case, its spelling on the command line

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not inspect.isabstract(cls) and not re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", getattr(cls, "name", "")):
            raise TypeError(f"{cls.__name__} needs a `name` in kebab-case, such as `fold-batchnorm`")

    def __call__(self, graph: G) -> PassResult[G]:
        start = time.perf_counter()
        self.requires(graph)
        rewrites = self.rewrite(graph)
        self.validate(graph)
        self.ensures(graph)
        step = Step(self.name, rewrites, time.perf_counter() - start)
        logger.info("%s: %d rewrites in %.1f ms", step.name, step.rewrites, step.seconds * 1e3)
        return PassResult(graph, (step,))

    def requires(self, graph: G) -> None:
        """Raises PassError where the graph is not one this pass can work on."""

    @abstractmethod
    def rewrite(self, graph: G) -> int:
        """Rewrites, and returns in how many places."""

    @abstractmethod
    def validate(self, graph: G) -> None:
        """Raises PassError where the graph is no longer valid: the same check for every pass over this kind of graph."""

    def ensures(self, graph: G) -> None:
        """Raises PassError where the graph is not what this pass promises."""


class Pipeline(Generic[G]):
    """Passes in the order they run."""

    def __init__(self, *passes: Pass[G]) -> None:
        self.passes = passes

    def __call__(self, graph: G) -> PassResult[G]:
        steps: tuple[Step, ...] = ()
        for each in self.passes:
            try:
                steps += each(graph).steps
            except PassError as error:
                raise PassError(each.name, error.reason, tuple(step.name for step in steps)) from error
            except Exception as error:
                error.add_note(f"in the pass {each.name}, after {', '.join(step.name for step in steps) or 'none'}")
                raise
        return PassResult(graph, steps)
