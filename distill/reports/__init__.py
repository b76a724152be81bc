"""For people: where runs stand, and tables of results. No tensors."""
