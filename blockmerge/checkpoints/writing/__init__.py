"""The writers that never leave a bad file or folder behind, and the locks and leftovers that both know of."""
