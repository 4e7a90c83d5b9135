"""`blockmerge presets` and its commands, one file each."""
