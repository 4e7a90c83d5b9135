"""The command line: one file per command. Parses, calls the library, renders, turns errors into one line."""
