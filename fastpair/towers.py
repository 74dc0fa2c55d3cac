"""Towers: maps that are applied to each embedding alone, forward and gradient.

A tower keeps its arrays alive: training updates what `parameters` gives in place. It computes in
the type of its arrays and rows: float32 in training, float64 in a model.
"""

# ruff: noqa: D102  (methods that a tower overrides are described once, in Tower)

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from fastpair.errors import ArgumentError
from fastpair.heads import unit_rows

Arrays = dict[str, np.ndarray]

STARTS = ("identity", "pca", "random")
"""Where a linear tower can begin to learn."""

EXTRA_ROWS = 0.1
"""Size of the random rows that a tower with more columns than its input has at its start."""


class Tower:
    """A map from prepared rows (N, n) to tower outputs (N, k); subclasses register by `kind`.

    Parameters
    ----------
    normalise : whether outputs are divided by their length; an output of zeros stays as it is.
    """

    kind: ClassVar[str]

    def __init__(self, *, normalise: bool = False) -> None:
        self.normalise = normalise

    @property
    def parameters(self) -> Arrays:
        """Everything that is learned, by name: the arrays themselves, no copies."""
        return {}

    @property
    def columns_out(self) -> int | None:
        """Columns of the output; None: as many as come in."""
        return None

    def check(self, columns_in: int | None) -> None:
        """Refuse arrays that do not fit each other or rows of `columns_in` columns (None: any)."""

    def forward(self, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        """Return the outputs (N, k) of rows (N, n), and what `backward` wants to see again."""
        z, cache = self._map(rows)
        if not self.normalise:
            return z, (cache, None)
        z, inverse = unit_rows(z)
        return z, (cache, (z, inverse))

    def backward(self, dz: np.ndarray, cache: Any) -> Arrays:
        """Turn the gradient by the outputs (N, k) into those by `parameters`, by name."""
        inner, normal = cache
        if normal is not None:
            z, inverse = normal
            dz = inverse * (dz - np.einsum("ij,ij->i", dz, z)[:, None] * z)
        return self._gradients(dz, inner)

    def _map(self, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        return rows, None

    def _gradients(self, dz: np.ndarray, cache: Any) -> Arrays:
        return {}

    def to_config(self) -> dict[str, Any]:
        """Return what JSON can hold of the tower; `parameters` are the rest."""
        return {"kind": self.kind, "normalise": self.normalise}

    @classmethod
    def from_config(cls, config: dict[str, Any], arrays: Arrays) -> Tower:
        """Return a tower from what `to_config` and `parameters` gave.

        Raises
        ------
        ArgumentError : the kind is unknown or the arrays are not those of its kind.
        """
        fields = dict(config)
        kind = fields.pop("kind")
        if kind not in TOWERS:
            raise ArgumentError(f"there is no tower {kind!r}: choose from {', '.join(TOWERS)}")
        return TOWERS[kind].from_arrays(arrays, **fields)

    @classmethod
    def from_arrays(cls, arrays: Arrays, **fields: Any) -> Tower:
        """Return a tower of this kind from its arrays by name and its other settings."""
        if arrays:
            raise ArgumentError(f"arrays {sorted(arrays)} do not fit a tower of kind {cls.kind}")
        return cls(**fields)

    def astype(self, dtype: np.typing.DTypeLike) -> Tower:
        """Return a copy whose arrays have this type."""
        arrays = {name: np.array(value, dtype) for name, value in self.parameters.items()}
        return Tower.from_config(self.to_config(), arrays)


class Identity(Tower):
    """``z = x``."""

    kind = "identity"


class Linear(Tower):
    """``z = projection x + bias``.

    Parameters
    ----------
    projection : (k, n) float.
    bias : (k,) float, or None.
    """

    kind = "linear"

    def __init__(
        self, projection: np.ndarray, bias: np.ndarray | None = None, *, normalise: bool = False
    ) -> None:
        super().__init__(normalise=normalise)
        self.projection, self.bias = projection, bias

    @property
    def parameters(self) -> Arrays:
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"projection": self.projection, **bias}

    @property
    def columns_out(self) -> int | None:
        return len(self.projection)

    def check(self, columns_in: int | None) -> None:
        _check_layer("the projection", self.projection, self.bias, columns_in)

    def _map(self, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        z = rows @ self.projection.T
        return (z if self.bias is None else z + self.bias), rows

    def _gradients(self, dz: np.ndarray, cache: Any) -> Arrays:
        bias = {} if self.bias is None else {"bias": dz.sum(axis=0)}
        return {"projection": dz.T @ cache, **bias}

    @classmethod
    def from_arrays(cls, arrays: Arrays, **fields: Any) -> Tower:
        if not {"projection"} <= set(arrays) <= {"projection", "bias"}:
            raise ArgumentError(f"arrays {sorted(arrays)} do not fit a tower of kind linear")
        return cls(arrays["projection"], arrays.get("bias"), **fields)


def _check_layer(
    name: str, matrix: np.ndarray, bias: np.ndarray | None, columns: int | None
) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.shape[1] != columns:
        raise ArgumentError(f"{name} has shape {matrix.shape}, expected (any, {columns})")
    if bias is not None and bias.shape != (len(matrix),):
        raise ArgumentError(f"the bias of {name} has shape {bias.shape}, expected {(len(matrix),)}")


class Mlp(Tower):
    """Layers ``h = activation(matrix h + bias)``, the last without activation.

    Parameters
    ----------
    layers : (matrix (k, n), bias (k,)) of each layer, at least two.
    activation : a name of `ACTIVATIONS`.
    residual : whether the input is added to the output, which then has as many columns.
    """

    kind = "mlp"

    def __init__(
        self,
        layers: list[tuple[np.ndarray, np.ndarray]],
        activation: str = "relu",
        residual: bool = False,
        *,
        normalise: bool = False,
    ) -> None:
        super().__init__(normalise=normalise)
        self.layers, self.activation, self.residual = layers, activation, residual

    @property
    def parameters(self) -> Arrays:
        named: Arrays = {}
        for number, (matrix, bias) in enumerate(self.layers):
            named[f"matrix_{number}"], named[f"bias_{number}"] = matrix, bias
        return named

    @property
    def columns_out(self) -> int | None:
        return len(self.layers[-1][0])

    def check(self, columns_in: int | None) -> None:
        find_activation(self.activation)
        if len(self.layers) < 2:
            raise ArgumentError(f"an mlp tower has {len(self.layers)} layers, expected 2 or more")
        columns = columns_in
        for number, (matrix, bias) in enumerate(self.layers):
            _check_layer(f"layer {number} of the tower", matrix, bias, columns)
            columns = len(matrix)
        if self.residual and columns != columns_in:
            raise ArgumentError(
                f"a residual tower gives {columns} columns, expected {columns_in} as in its input"
            )

    def _map(self, rows: np.ndarray) -> tuple[np.ndarray, Any]:
        function, _ = find_activation(self.activation)
        inputs, sums, h = [rows], [], rows
        for number, (matrix, bias) in enumerate(self.layers):
            h = h @ matrix.T + bias
            if number < len(self.layers) - 1:
                sums.append(h)
                h = function(h)
                inputs.append(h)
        return (h + rows if self.residual else h), (inputs, sums)

    def _gradients(self, dz: np.ndarray, cache: Any) -> Arrays:
        inputs, sums = cache
        _, slope = find_activation(self.activation)
        gradients: Arrays = {}
        for number in range(len(self.layers) - 1, -1, -1):
            gradients[f"matrix_{number}"] = dz.T @ inputs[number]
            gradients[f"bias_{number}"] = dz.sum(axis=0)
            if number:
                dz = (dz @ self.layers[number][0]) * slope(sums[number - 1])
        return gradients

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "activation": self.activation, "residual": self.residual}

    @classmethod
    def from_arrays(cls, arrays: Arrays, **fields: Any) -> Tower:
        count = len(arrays) // 2
        names = {f"{part}_{number}" for part in ("matrix", "bias") for number in range(count)}
        if set(arrays) != names or not count:
            raise ArgumentError(f"arrays {sorted(arrays)} do not fit a tower of kind mlp")
        layers = [(arrays[f"matrix_{n}"], arrays[f"bias_{n}"]) for n in range(count)]
        return cls(layers, **fields)


TOWERS: dict[str, type[Tower]] = {tower.kind: tower for tower in (Identity, Linear, Mlp)}
"""Every tower by its kind."""


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _relu_slope(x: np.ndarray) -> np.ndarray:
    return (x > 0).astype(x.dtype)


def _tanh_slope(x: np.ndarray) -> np.ndarray:
    return 1 - np.tanh(x) ** 2


def _normal_share(x: np.ndarray) -> np.ndarray:
    """Share of a normal distribution that lies below x, in the type of x."""
    from scipy.special import ndtr

    return ndtr(x)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * _normal_share(x)


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    density = np.exp(-0.5 * x * x) * x.dtype.type(1 / np.sqrt(2 * np.pi))
    return _normal_share(x) + x * density


_Function = Callable[[np.ndarray], np.ndarray]

ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "relu": (_relu, _relu_slope),
    "tanh": (np.tanh, _tanh_slope),
    "gelu": (_gelu, _gelu_slope),
}
"""Activations by name: the function and its derivative."""


def find_activation(name: str) -> tuple[_Function, _Function]:
    """Return an activation and its derivative, or refuse with the names that there are."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"there is no activation {name!r}: choose from {known}")
    return ACTIVATIONS[name]


OPTIONS: dict[str, tuple[str, ...]] = {
    "identity": ("normalise",),
    "linear": ("bias", "normalise"),
    "mlp": ("hidden", "activation", "residual", "normalise"),
}
"""What `parse_tower` takes for each kind: settings of `start_tower`."""


def parse_tower(text: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of a tower and its settings: ``mlp(hidden=128x64,activation=gelu)``.

    Parameters
    ----------
    text : a name of `TOWERS`, with `OPTIONS` in brackets if wanted: ``hidden`` are widths joined
        by "x", ``activation`` is a name, all others are 0 or 1.

    Returns
    -------
    The kind and, by name, the settings of `start_tower` that are given.

    Raises
    ------
    ArgumentError : there is no such tower, or it does not have such an option.
    """
    match = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text)
    kind = match[1] if match else text
    if kind not in TOWERS:
        raise ArgumentError(f"tower is {kind!r}, expected one of {', '.join(TOWERS)}")
    settings: dict[str, Any] = {}
    for part in (match[2] if match and match[2] else "").split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if part.strip():
            settings[name] = _setting(kind, name, value)
    return kind, settings


def _setting(kind: str, name: str, value: str) -> Any:
    """Turn the text of one of a tower's options into its value."""
    if name not in OPTIONS[kind]:
        known = ", ".join(OPTIONS[kind])
        raise ArgumentError(f"the tower {kind} has no option {name!r}, it has {known}")
    if name == "activation":
        find_activation(value)
        return value
    if name == "hidden":
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", value):
            raise ArgumentError(
                f"hidden is {value!r} in the tower {kind}, expected widths such as 128 or 128x64"
            )
        return tuple(int(width) for width in value.split("x"))
    if value not in ("0", "1"):
        raise ArgumentError(f"{name} is {value!r} in the tower {kind}, expected 0 or 1")
    return value == "1"


def start_tower(
    kind: str,
    rows: np.ndarray,
    dim: int | None = None,
    *,
    start: str | None = None,
    bias: bool = False,
    hidden: tuple[int, ...] = (),
    activation: str = "relu",
    residual: bool = False,
    normalise: bool = False,
    rng: np.random.Generator,
) -> Tower:
    """Return a tower in float32 at the start of its learning.

    Parameters
    ----------
    kind : a name of `TOWERS`.
    rows : (N, n) prepared rows; "pca" looks at them.
    dim : columns of the output; default n.
    start : a name of `STARTS`; default the identity, with fewer columns the leading principal
        directions, in mlp towers the random one. A residual tower starts as the identity.
    bias : whether a linear tower has a bias; it starts at 0.
    hidden : widths of the hidden layers of an mlp; default one of n.
    activation, residual : see `Mlp`.
    normalise : see `Tower`.
    rng : source of chance.

    Raises
    ------
    ArgumentError : an unknown name, or settings that do not go together.
    """
    columns = rows.shape[1]
    dim = dim or columns
    if kind not in TOWERS:
        raise ArgumentError(f"there is no tower {kind!r}: choose from {', '.join(TOWERS)}")
    if kind == "identity":
        if dim != columns:
            raise ArgumentError(f"dim is {dim} but an identity tower keeps all {columns} columns")
        return Identity(normalise=normalise)
    if kind == "linear":
        projection = _start_projection(start, rows, dim, rng)
        return Linear(projection, np.zeros(dim, np.float32) if bias else None, normalise=normalise)
    if start not in (None, "random"):
        raise ArgumentError(f"start is {start!r} but an mlp tower starts at random")
    widths = (columns, *(hidden or (columns,)), dim)
    gain = 2.0 if activation == "relu" else 1.0
    layers = []
    for before, after in pairwise(widths):
        matrix = rng.normal(size=(after, before)) * (gain / before) ** 0.5
        layers.append((matrix.astype(np.float32), np.zeros(after, np.float32)))
    if residual:
        layers[-1][0][:] = 0  # learning then begins at what the embeddings know
    tower = Mlp(layers, activation, residual, normalise=normalise)
    tower.check(columns)
    return tower


def _start_projection(
    start: str | None, rows: np.ndarray, dim: int, rng: np.random.Generator
) -> np.ndarray:
    columns = rows.shape[1]
    start = start or ("pca" if dim < columns else "identity")
    if start not in STARTS:
        raise ArgumentError(f"start is {start!r}, expected one of {', '.join(STARTS)}")
    if start == "pca" and dim > columns:
        raise ArgumentError(f"dim is {dim} but there are only {columns} principal directions")
    projection = rng.normal(size=(dim, columns)) / columns**0.5
    if start == "pca":
        projection = principal_directions(rows, dim)
    elif start == "identity":
        projection *= EXTRA_ROWS  # a row of zeros would have no gradient
        projection[:columns] = np.eye(dim, columns)[:columns]
    return np.ascontiguousarray(projection, np.float32)


def principal_directions(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the leading principal directions of rows (N, n), (count, n) float64.

    They are those of the second moment, not centred: they keep the cosine best.
    """
    moment = rows.T @ rows
    _, vectors = np.linalg.eigh(moment.astype(np.float64))
    return vectors[:, ::-1][:, :count].T
