"""The maths of averages as weights over sources: Gram matrices, and the best combination.

The sources are what an average can consist of: the initial weights (source 0), and one per event,
which are the online weights of an update or a sync, or the weights of a load. An event moves an
average's profile w to (1 - λ) w, and gives the event's own source λ. All in fp64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Events at a time: with 4 averages a matrix of 2 MB.
STRETCH = 1 << 16

# Snapshots to think of; 512 are solved in a second.
MOST = 512


def gram(momenta: Tensor, vectors: Sequence[tuple[int, int]]) -> Tensor:
    """The inner products of profiles, exact for any momenta.

    Args:
        momenta: fp64 [events, averages], of each event and average.
        vectors: Of each profile, after how many events which average had it.

    Returns:
        fp64 [vectors, vectors].

    Examples:
        >>> momenta = torch.tensor([[0.5], [0.5]], dtype=torch.float64)
        >>> gram(momenta, [(1, 0), (2, 0)])  # profiles 1/2, 1/2 and 1/4, 1/4, 1/2
        tensor([[0.5000, 0.2500],
                [0.2500, 0.3750]], dtype=torch.float64)
    """
    averages, done = momenta.shape[1], 0
    live = momenta.new_ones(averages, averages)  # of the averages as they are after `done` events
    frozen = momenta.new_zeros(len(vectors), averages)  # of the vectors with these averages
    found, known = momenta.new_zeros(len(vectors), len(vectors)), list[int]()
    for number in sorted(range(len(vectors)), key=lambda number: vectors[number]):
        end, average = vectors[number]
        for begin in range(done, end, STRETCH):
            product, weights = _weigh(momenta[begin : min(end, begin + STRETCH)])
            live = product[:, None] * product * live + weights.T @ weights
            frozen *= product
        done = max(done, end)
        frozen[number] = live[average]
        known.append(number)
        found[number, known] = found[known, number] = frozen[known, average]
    return found


def profile(momenta: Tensor) -> Tensor:
    """One average's weights over the sources, fp64 [1 + events], from its momenta [events].

    Examples:
        >>> profile(torch.tensor([0.5, 0.5], dtype=torch.float64))
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """
    if not len(momenta):
        return momenta.new_ones(1)
    product, weights = _weigh(momenta[:, None])
    return torch.cat([product, weights[:, 0]])


def _weigh(momenta: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of earlier weights after these events, and the weight of each of them."""
    kept = (1 - momenta).flip(0).cumprod(0).flip(0)
    later = torch.cat([kept[1:], torch.ones_like(kept[:1])])
    return kept[0], momenta * later


def momenta_of(weights: Tensor) -> Tensor:
    """The momenta that give weights over the updates, fp64 and not negative, known in advance.

    Examples:
        >>> momenta_of(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        tensor([0.0000, 1.0000, 0.5000], dtype=torch.float64)
    """
    return torch.where(weights > 0, weights / weights.cumsum(0), 0.0)


class Solution(NamedTuple):
    """The best combination of profiles for a target.

    Attributes:
        coefficients: fp64, one per profile; their sum is 1.
        profile_error: How far the combination's profile is from the target's, as a fraction of
            that one's norm. Below 1e-8 fp64 tells no difference from 0.
        noise_gain: The coefficients' 2-norm, by which the snapshots' rounding grows.
        expected_error: Of profile and rounding together, as a fraction of the weights.
        condition: Of the equations that were solved, each profile normalised.
        rank: How many directions fp64 could tell apart; with fewer than there are profiles, it
            has come to its end, and the others were left out.
    """

    coefficients: Tensor
    profile_error: float
    noise_gain: float
    expected_error: float
    condition: float
    rank: int


def solve(matrix: Tensor, noise: Tensor) -> list[Solution]:
    """Combine profiles with coefficients of sum 1, for each target such that its error is least.

    It is the sum of the squares of the profile error and of the rounding that the snapshots' dtypes
    make, as a fraction of the weights: a ridge, as strong as the known noise.

    Args:
        matrix: The Gram matrix of the profiles, and after them the targets', fp64.
        noise: The relative rounding error of each profile's snapshot, fp64 [profiles].
    """
    profiles, solutions = len(noise), list[Solution]()
    own = matrix[:profiles, :profiles]
    for column in range(profiles, len(matrix)):
        products, square = matrix[:profiles, column], float(matrix[column, column])
        ridged = own + torch.diag(square * noise**2)
        scale = ridged.diagonal().rsqrt()
        values, directions = torch.linalg.eigh(scale[:, None] * ridged * scale)
        told_apart = values > values[-1] * profiles * torch.finfo(values.dtype).eps
        values, directions = values[told_apart], scale[:, None] * directions[:, told_apart]
        best, towards = (
            directions @ ((directions.T @ right) / values)
            for right in (products, torch.ones_like(products))
        )
        x = best + towards * ((1 - best.sum()) / towards.sum())
        error = float(x @ own @ x - 2 * (x @ products)) / square + 1
        rounding = float(((noise * x) ** 2).sum())
        solutions.append(
            Solution(
                coefficients=x,
                profile_error=max(error, 0.0) ** 0.5,
                noise_gain=float(x.norm()),
                expected_error=(max(error, 0.0) + rounding) ** 0.5,
                condition=float(values[-1] / values[0]),
                rank=len(values),
            )
        )
    return solutions


def spacing_needed(
    momenta: Tensor,
    updates: Tensor,
    ends: Sequence[tuple[int, int]],
    target: int,
    noise: Tensor,
    at: int,
    wanted: float,
) -> int | None:
    """Every how many updates, from 0 on, it takes snapshots for a profile error; None: no number.

    Args:
        momenta: As of `gram`.
        updates: Of each event, the number of updates up to it, int64 [events].
        ends: The vectors of the snapshots, then of the targets.
        target: The target's number among the targets.
        noise: As of `solve`.
        at: After which update the target is wanted.
        wanted: The profile error.
    """
    own, averages = [*ends[: len(noise)]], {average for _, average in ends[: len(noise)]}
    parts = max(1, len(own) // len(averages))
    while (parts := 2 * parts) * len(averages) <= MOST and at // parts:
        every = at // parts
        indices = torch.arange(0, at + 1, every)
        events = torch.searchsorted(updates, indices, right=True).tolist()
        more = [(end, average) for end in events for average in sorted(averages)]
        vectors = [*own, *more, ends[len(own) + target]]
        solution = solve(gram(momenta, vectors), noise[-1].expand(len(vectors) - 1))[0]
        if solution.profile_error <= wanted:
            return every
    return None
