"""The command line, made of Typer commands. torch is imported only by commands that compute something."""
