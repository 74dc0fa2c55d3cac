"""Networks over the columns of two rows: their definition in NumPy, and tables made ready."""

from __future__ import annotations

import numpy as np

from fastpair.kernels import Network, Plan


def features(left: np.ndarray, right: np.ndarray, form: str) -> list[np.ndarray]:
    """Return what the network sees of pairs of columns (m, k): one array, or one an order."""
    if form == "orders":
        return [np.concatenate(pair, axis=1) for pair in ((left, right), (right, left))]
    return [np.concatenate([left * right, np.abs(left - right), left + right], axis=1)]


def run(inputs: np.ndarray, network: Network) -> np.ndarray:
    """Return ``output . h + direct . inputs`` (m,) in the type of the inputs (m, f)."""
    hidden = inputs
    for matrix, bias in network.layers:
        hidden = np.maximum(hidden @ matrix.T + bias, 0)
    result = (hidden * network.output).sum(axis=1)
    if network.direct is not None:
        result = result + (inputs * network.direct).sum(axis=1)
    return result


def raw_scores(left: np.ndarray, right: np.ndarray, network: Network) -> np.ndarray:
    """Return raw scores (m,) without the constant, of columns (m, k), in their type."""
    parts = [run(inputs, network) for inputs in features(left, right, network.form)]
    return parts[0] if len(parts) == 1 else (parts[0] + parts[1]) * parts[0].dtype.type(0.5)


def magnitudes(left: np.ndarray, right: np.ndarray, network: Network) -> np.ndarray:
    """Return what float32 errors of `raw_scores` are relative to, (m,): sums of sizes."""
    sizes = []
    for inputs in features(left, right, network.form):
        hidden = np.abs(inputs)
        for matrix, bias in network.layers:
            hidden = hidden @ np.abs(matrix).T + np.abs(bias)
        size = hidden @ np.abs(network.output)
        if network.direct is not None:
            size = size + np.abs(inputs) @ np.abs(network.direct)
        sizes.append(size)
    return np.mean(sizes, axis=0)


class NetworkTables:
    """Two tables of a plan with a network, ready to be scored in any thread.

    Parameters
    ----------
    left_rows, right_rows : (n, row_bytes) uint8.
    plan : the plan of both; precision float32, link identity.
    """

    def __init__(self, left_rows: np.ndarray, right_rows: np.ndarray, plan: Plan) -> None:
        from fastpair.kernels import cpu  # Numba: only those who score wait for it

        if plan.network is None or plan.precision != "float32" or plan.link != "identity":
            raise ValueError("a network needs float32 columns and the link identity")
        self._kernel = cpu.score_network
        network = plan.network
        self._columns = [
            np.ascontiguousarray(rows).view(plan.layout.dtype)[:, 0]["product"]
            for rows in (left_rows, right_rows)
        ]
        inputs = network.layers[0][0].shape[1]
        direct = np.zeros(inputs) if network.direct is None else network.direct
        self._network = (
            tuple(cpu.pack_layer(matrix, bias) for matrix, bias in network.layers),
            np.array([inputs, *(len(bias) for _, bias in network.layers)], np.int64),
            network.output.astype(np.float32),
            direct.astype(np.float32),
            network.form == "orders",
            tuple(np.float32(number) for number in (plan.constant, plan.slope, plan.offset)),
        )

    def score(self, left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> None:
        """Fill `scores` (m,) float32 for pairs of row numbers `left` and `right`, (m,) integers."""
        self._kernel(*self._columns, self._network, left, right, scores)
