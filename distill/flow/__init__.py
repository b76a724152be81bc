"""The mathematics: paths between noise and data, times, solvers, draws, distances."""
