"""Networks that distill builds and ships with students, and how each kind is called."""
