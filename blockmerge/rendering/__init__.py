"""Results as people and programs read them: rich tables and drawings, JSON, CSV, HTML. Computes nothing."""
