"""The version, kept where both the build and the code can read it without loading anything."""

__version__ = "0.1.0"
