"""Students: networks as velocity fields of the linear path, and where their weights come from."""
