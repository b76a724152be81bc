"""The networks of students, and wrappers that give them distill's interface."""
