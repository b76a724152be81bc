"""Students: their initial networks, sampling, export and loading."""
