"""Which tensors are averaged, and with which factor of the momentum: chosen by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import NamedTuple


class Selection(NamedTuple):
    """The arguments `include`, `exclude` and `momentum_scale` of `ModelEMA`.

    A pattern is a name or a glob (`*`, `?`, `[ab]`) of a tensor, or of a module and so of all
    tensors in it.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    momentum_scale: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str],
        momentum_scale: Mapping[str, float] | None,
    ) -> Selection:
        """Check the patterns and the factors, but not yet whether a pattern matches.

        Raises:
            TypeError: Patterns are not strings, or factors not numbers.
            ValueError: A factor is negative or not finite.
        """
        scales = momentum_scale or {}
        if not isinstance(scales, Mapping):
            raise TypeError(
                f"momentum_scale must map patterns to factors, but got {momentum_scale!r}. Give "
                "e.g. {'backbone': 0.1}."
            )
        _patterns("momentum_scale", [*scales])
        for pattern, factor in scales.items():
            if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
                raise TypeError(
                    f"momentum_scale of {pattern!r} must be a number, but got {factor!r}. The "
                    "momentum is multiplied by it."
                )
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"momentum_scale of {pattern!r} must be finite and not negative, but got "
                    f"{factor!r}. The momentum is multiplied by it, and has to stay in [0, 1]."
                )
        return cls(
            None if include is None else _patterns("include", include),
            _patterns("exclude", exclude),
            tuple((pattern, float(factor)) for pattern, factor in scales.items()),
        )

    def check(self, names: Sequence[str], averaged: Sequence[str]) -> None:
        """Raise ValueError if a pattern would do nothing, or if together they leave nothing.

        Args:
            names: Of all parameters and buffers.
            averaged: Of those that would be averaged without patterns.
        """
        prefixes = _prefixes(names)
        for argument, patterns in (
            ("include", self.include or ()),
            ("exclude", self.exclude),
            ("momentum_scale", dict(self.momentum_scale)),
        ):
            for pattern in patterns:
                if not _any_match(prefixes, [pattern]):
                    near = get_close_matches(pattern, prefixes, n=3) or names[:3] or ["none"]
                    raise ValueError(
                        f"{argument}: {pattern!r} matches no parameter, buffer or module of the "
                        f"model, so it would do nothing. Its names are, e.g., {', '.join(near)}."
                    )
        if self.include is not None and all(self.scale([name]) is None for name in averaged):
            raise ValueError(
                f"include={[*self.include]} leaves nothing to average: it matches no floating "
                "parameter (nor buffer, with handle_buffers='update'), or exclude takes all away. "
                "Give patterns of what is to be averaged."
            )

    def scale(self, names: Iterable[str]) -> float | None:
        """The momentum's factor for a tensor with these names; None if it is copied instead."""
        prefixes = _prefixes(names)
        if self.include is not None and not _any_match(prefixes, self.include):
            return None
        if _any_match(prefixes, self.exclude):
            return None
        for pattern, factor in self.momentum_scale:
            if _any_match(prefixes, [pattern]):
                return factor
        return 1.0


def _prefixes(names: Iterable[str]) -> set[str]:
    """The names, and those of the modules around them."""
    return {prefix for n in names for prefix in accumulate(n.split("."), "{}.{}".format)}


def _any_match(prefixes: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in patterns)


def _patterns(argument: str, given: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument} must be names or glob patterns of the model's tensors or modules, but got "
            f"{given!r}. Give e.g. 'head' or ['head', '*.bias']."
        )
    return tuple(patterns)
