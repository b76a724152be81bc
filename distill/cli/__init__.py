"""The command line: Typer commands over the control plane; torch is imported only where something is computed."""
