"""The mathematics: paths between noise and data, times, ODE solvers, random numbers, distances."""
