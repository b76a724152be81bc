"""`python -m distill`."""

from distill.cli.main import run

if __name__ == "__main__":
    run()
