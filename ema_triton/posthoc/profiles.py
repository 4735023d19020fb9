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

MOST = 512  # snapshots to think of, which are solved in a second


def gram(momenta: Tensor, vectors: Sequence[tuple[int, int]]) -> Tensor:
    """The inner products of profiles, [vectors, vectors], exact for any momenta.

    Args:
        momenta: fp64 [events, averages], of each event and average.
        vectors: Of each profile, after how many events which average had it.

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
        if end > done:
            product, weights = _weigh(momenta[done:end])
            live = product[:, None] * product * live + weights.T @ weights
            frozen *= product
            done = end
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
    """The best combination of profiles for a target; its errors are those of `Reconstruction`."""

    coefficients: Tensor  # fp64, one per profile; their sum is 1
    profile_error: float
    noise_gain: float
    expected_error: float
    condition: float  # each profile normalised


def solve(matrix: Tensor, noise: Tensor) -> list[Solution]:
    """Combine profiles with coefficients of sum 1, for each target such that its error is least.

    It is the sum of the squares of the profile error and of the rounding that the snapshots' dtypes
    make, as a fraction of the weights: a ridge, as strong as the known noise. Directions that fp64
    cannot tell apart are left out.

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
        condition = float(values[-1] / values[0].abs())
        told_apart = values > values[-1] * profiles * torch.finfo(values.dtype).eps
        values, directions = values[told_apart], scale[:, None] * directions[:, told_apart]
        best, towards = (
            directions @ ((directions.T @ right) / values)
            for right in (products, torch.ones_like(products))
        )
        x = best + towards * ((1 - best.sum()) / towards.sum())
        error = max(float(x @ own @ x - 2 * (x @ products)) / square + 1, 0.0)
        expected = (error + float(((noise * x) ** 2).sum())) ** 0.5
        solutions.append(Solution(x, error**0.5, float(x.norm()), expected, condition))
    return solutions


def spacing_needed(
    momenta: Tensor,
    updates: Tensor,
    own: Sequence[tuple[int, int]],
    target: tuple[int, int],
    noise: Tensor,
    wanted: float,
) -> int | None:
    """Every how many updates it takes more snapshots for a profile error; None: no number does.

    Args:
        momenta: As of `gram`, as are the vectors of the snapshots that there are, and the target's.
        updates: Of each event, the number of updates up to it, int64 [events].
        own: The snapshots.
        target: The target.
        noise: As of `solve`, of one more snapshot.
        wanted: The profile error.
    """
    averages, at = sorted({average for _, average in own}), int(updates[target[0] - 1])
    parts = max(1, len(own) // len(averages))
    while (parts := 2 * parts) * len(averages) <= MOST and at // parts:
        indices = torch.arange(0, at + 1, at // parts)
        events = torch.searchsorted(updates, indices, right=True).tolist()
        vectors = [*own, *((event, average) for event in events for average in averages)]
        matrix = gram(momenta, [*vectors, target])
        if solve(matrix, noise.expand(len(vectors)))[0].profile_error <= wanted:
            return at // parts
    return None
