"""Samplers of students: how a network is turned into images in N calls.

Each file imports torch and nothing else, because exported students carry it along, and has
`sample(network, noise, t_grid, cond, ...)`, with t_grid [N+1] decreasing from 1 to 0: N calls, the first at t = 1; by
`accelerated` N + 1.
"""
