"""Weights of multistep methods: how much each remembered value counts in the integral over a step."""

from __future__ import annotations

from collections.abc import Sequence


def quadrature(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Return the weights w with which sum_j w_j f(nodes_j) integrates all polynomials f of degree below len(nodes).

        sum_j w_j nodes_j^k = moments_k for k = 0 .. n - 1, the Vandermonde system, by Bjorck & Pereyra (1970),
        Mathematics of Computation 24, p. 893: no matrix, and exact to rounding for nodes close together

    Args:
        nodes: n different numbers.
        moments: the integrals of u^k, n numbers.
    """
    n, w = len(nodes), list(moments)
    for k in range(n - 1):
        for j in range(n - 1, k, -1):
            w[j] -= nodes[k] * w[j - 1]
    for k in range(n - 2, -1, -1):
        for j in range(k + 1, n):
            w[j] /= nodes[j] - nodes[j - k - 1]
        for j in range(k, n - 1):
            w[j] -= w[j + 1]
    return w
