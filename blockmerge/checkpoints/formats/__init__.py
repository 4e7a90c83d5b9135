"""The files and folders that checkpoints come in, each read strictly and lazily."""
