"""The coefficients of csrc/cpu/functions.h: q(t) = erfc(t / sqrt 2) / 2 as 2^P(-t), and 2^f on [-1/2, 1/2]; for results
that are rounded to bfloat16 q as P(-t)^16.

Least-maximum fits by Lawson's iteration (C. L. Lawson, 1961): weighted least squares, whose weights are multiplied by
the error of the fit before. The constant terms of the first two are fixed, -1 and 1: GELU is z / 2 near zero. Prints
what the header holds, and the largest errors after the coefficients are rounded to float32: of GELU over z, of 2^f and
of P^16 over themselves.
"""

from __future__ import annotations

import math

import numpy as np

TAIL = 9.0  # q is taken for 0 from here: GELU(-9) is -1e-18
END = 6.0  # and where it is rounded for constant: GELU(-6) is -6e-9


def main() -> None:
    t = TAIL * (1 - np.cos(np.linspace(0, np.pi, 3001))) / 2
    q = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in t])
    # d GELU / dP = -z q ln 2; beside it a little weight on the tail, so that it stays a tail.
    exponent = fit(-t, np.log2(q), math.log(2) * (q + 1e-4 * np.exp(-t)), degree=9, constant=-1.0)
    error = np.abs(np.exp2(evaluate(exponent, -t)) - q).max()
    print(f"log2 q, error of GELU / z {error:.2g}:")
    print(", ".join(f"{value:.9g}f" for value in exponent))

    f = np.cos(np.linspace(0, np.pi, 2001)) / 2
    power = fit(f, np.exp2(f), np.exp2(-f), degree=6, constant=1.0)
    error = np.abs(evaluate(power, f) / np.exp2(f) - 1).max()
    print(f"2^f, relative error {error:.2g}:")
    print(", ".join(f"{value:.9g}f" for value in power))

    t = END * (1 - np.cos(np.linspace(0, np.pi, 1001))) / 2
    q = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in t])
    root = fit(-t, q ** (1 / 16), q ** (-1 / 16), degree=6)
    error = np.abs(evaluate(root, -t) ** 16 / q - 1).max()
    print(f"16th root of q, relative error of q {error:.2g}:")
    print(", ".join(f"{value:.9g}f" for value in root))


def fit(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, degree: int, constant: float | None = None, rounds: int = 300
) -> np.ndarray:
    """Coefficients from the constant upwards, in float32, of least largest weighted error; ``constant``: that is it."""
    powers = np.stack([x**k for k in range(degree + 1)], 1)
    fixed = [] if constant is None else [constant]
    y, powers = y - sum(fixed), powers[:, len(fixed) :]
    lawson = np.full_like(x, 1 / len(x))
    for _ in range(rounds):
        scale = np.sqrt(lawson) * weight
        coefficients = np.linalg.lstsq(powers * scale[:, None], y * scale, rcond=None)[0]
        error = np.abs(weight * (powers @ coefficients - y))
        lawson *= error / error.max() + 1e-12
        lawson /= lawson.sum()
    return np.float32([*fixed, *coefficients])


def evaluate(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    return sum(float(value) * x**k for k, value in enumerate(coefficients))


if __name__ == "__main__":
    main()
