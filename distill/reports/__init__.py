"""Reports for users: the status of runs and tables of results. Does not import torch."""
