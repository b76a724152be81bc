"""For people: the progress of runs, and tables of results. No tensors."""
