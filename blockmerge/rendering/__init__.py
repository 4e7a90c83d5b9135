"""Results as people and programs read them: rich tables and drawings, and JSON. Computes nothing."""
