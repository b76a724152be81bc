"""For people: where runs stand, tables of results, charts, the report. No tensors."""
