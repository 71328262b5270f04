"""Hadamard matrices, whose rows are the orthogonal probes: signs with H H' = n I."""

from functools import cache

PALEY = (12, 20, 28, 36, 44, 60)  # orders from squares modulo a prime


@cache
def basis_size(inputs: int) -> int:
    """The order of the smallest Hadamard matrix for d inputs that is Sylvester's, or its product with Paley's."""
    return min(_size(inputs, order) for order in (1, *PALEY))


@cache
def basis_factors(size: int) -> tuple[int, int]:
    """The order of Paley's factor of a Hadamard matrix, 1 if it has none, and the power of two of Sylvester's."""
    order = next(order for order in (1, *PALEY) if _size(size, order) == size)
    return order, (size // order).bit_length() - 1


def _size(inputs: int, order: int) -> int:
    """``order`` times the least power of two that suffices; at least 32 with Paley's factor."""
    power = max(0, -(-inputs // order) - 1).bit_length()
    return order << (power if order == 1 else max(5, power))


@cache
def paley_rows(order: int) -> tuple[int, ...]:
    """The rows of Paley's matrix of this order as bits, set where an element is -1; (0,) for an order of 1.

    The order is q + 1 for a prime q that is 3 modulo 4, or 2 (q + 1) for one that is 1 modulo 4.

    Source: Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
    """
    if order == 1:
        return (0,)
    if order in (12, 20, 44, 60):
        core = _conference(order - 1, -1)
        matrix = [[x + (i == j) for j, x in enumerate(row)] for i, row in enumerate(core)]
    else:
        core = _conference(order // 2 - 1, 1)
        blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
        matrix = [[x for element in row for x in blocks[element][half]] for row in core for half in (0, 1)]
    return tuple(sum((x < 0) << j for j, x in enumerate(row)) for row in matrix)


def _conference(q: int, first: int) -> list[list[int]]:
    """A matrix C of order q + 1 with zeros on the diagonal, signs elsewhere and C C' = q I; ``first`` is its column."""
    squares = {i * i % q for i in range(1, q)}
    character = [0] + [1 if i in squares else -1 for i in range(1, q)]
    rows = [[first, *(character[(i - j) % q] for j in range(q))] for i in range(q)]
    return [[0] + q * [1], *rows]
