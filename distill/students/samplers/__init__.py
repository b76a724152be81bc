"""Samplers of students: how a network is turned into images in N steps.

One file for each sampler. It is the only implementation: training, evaluation and `distill sample` call it, and the
`pipeline.py` of an exported student contains its text (students/shipped.py). So it imports only torch and the standard
library, and no function in it uses another name of the file: diffusers runs the code of all local folders in one
module, where a later one replaces the names of the first. It has:

SAMPLER: its name, the same as the file's.
num_fresh(N): how many noises it takes in addition to the first one.
sample(network, noise, t_grid, cond, *fresh): t_grid [N+1] decreases from 1 to 0, and the first call is at t = 1.

Its record in `kinds.SAMPLERS` has what code that does not import torch must know: for which kind of student it is, how
often it calls the network, its description in the model card. A sampler has no other parts.

The network is a student of one of these kinds: a velocity is called as network(x_t, t, cond), a flow map
as network(x_t, t, s, cond), a velocity with its acceleration as network(x_t, t, v, cond).
"""
