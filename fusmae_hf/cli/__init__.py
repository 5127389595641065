"""The command `fusmae`, one file a command."""
