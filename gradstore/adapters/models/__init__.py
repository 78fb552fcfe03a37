"""Models: where they and their weights come from, what lies on top of them, and in what precision they run."""
