"""The oracle: the formula in plain float64 loops; it imports nothing of fastpair."""

import math


def terms(entity, other):
    """Signed terms of a pair of entities given as plain numbers.

    An entity is a dictionary: ``bias`` and lists of (sign, number), for ``mirrored`` of
    (sign, u, v).
    """
    for (sign, x), (_, y) in zip(entity["product"], other["product"], strict=True):
        yield sign * (x * y)
    for (sign, x), (_, y) in zip(entity["maximum"], other["maximum"], strict=True):
        yield sign * max(x, y)
    for (sign, u, v), (_, s, t) in zip(entity["mirrored"], other["mirrored"], strict=True):
        yield sign * max(u, t)
        yield sign * max(v, s)
    for (sign, x), (_, y) in zip(entity["absolute"], other["absolute"], strict=True):
        yield sign * abs(x - y)
    for (sign, x), (_, y) in zip(entity["squared"], other["squared"], strict=True):
        yield sign * (x - y) ** 2


def raw_score(entity, other, constant):
    return constant + (entity["bias"] + other["bias"]) + math.fsum(terms(entity, other))


def magnitude(entity, other, constant):
    """|c| + |b_i| + |b_j| + sum of |terms|."""
    size = abs(constant) + abs(entity["bias"]) + abs(other["bias"])
    return size + math.fsum(abs(term) for term in terms(entity, other))


def score(entity, other, constant, link="identity", slope=1.0, offset=0.0):
    raw = raw_score(entity, other, constant)
    below = min(raw, 0.0)
    value = {
        "identity": raw,
        "negative_root": -math.sqrt(-below),
        "exponential": math.exp(below),
        "negative_arcosh": -math.acosh(1 - below) if below < -1e-3 else -lorentz(-below),
    }[link]
    return offset + slope * value


def lorentz(v):
    """arcosh(1 + v) without the cancellation near 0."""
    return 2 * math.asinh(math.sqrt(v / 2))


def top_k(matrix, k, skip_diagonal):
    """Columns of the k best scores of each row: by score, then by lower column."""
    best = []
    for i, row in enumerate(matrix):
        columns = [j for j in range(len(row)) if not (skip_diagonal and i == j)]
        best.append(sorted(columns, key=lambda j: (-row[j], j))[:k])
    return best


def cosine(x, y):
    length = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / length if length else 0.0
