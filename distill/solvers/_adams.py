"""Shared by the Adams-Bashforth solvers: the velocity between t and t_next is extrapolated by a polynomial in t."""

from distill.solvers import Step, Tensor


def extrapolated(x: Tensor, v: Tensor, at: Step) -> Tensor:
    """x at t_next, if the velocity is the polynomial through (t, v) and the earlier velocities, of degree 0, 1 or 2.

    With h = t_next - t and the divided differences d1 = (v - v1)/(t - t1), d2 = (d1 - d1')/(t - t2), it is
    x + h v + h^2/2 d1 + (h^3/3 + h^2/2 (t - t1)) d2.
    """
    h, t = at.t_next - at.t, at.t
    x_next = x + h * v
    if not at.past:
        return x_next
    v1, t1 = at.past[0]
    slope = (v - v1) / (t - t1)
    x_next = x_next + h**2 / 2 * slope
    if len(at.past) < 2:
        return x_next
    v2, t2 = at.past[1]
    bend = (slope - (v1 - v2) / (t1 - t2)) / (t - t2)
    return x_next + (h**3 / 3 + h**2 / 2 * (t - t1)) * bend
