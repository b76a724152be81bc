"""What a run would cost, said before it runs."""
