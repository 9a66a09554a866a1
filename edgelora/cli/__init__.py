"""The command line: parses, opens, calls the library, shows."""
