"""The networks of students, and the modules that call them with the framework's conventions."""
