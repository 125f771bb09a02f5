"""How the process of a command starts and ends."""
