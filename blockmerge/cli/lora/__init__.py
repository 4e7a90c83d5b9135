"""One file per command of `blockmerge lora`, and the group that they are in."""
