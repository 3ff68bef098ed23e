"""The command line: dispatch and exit codes in `main.py`, one file a command."""
