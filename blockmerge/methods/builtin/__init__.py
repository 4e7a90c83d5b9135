"""The built-in methods: a file for each, or for each kin, with a line for each in `registry`."""
