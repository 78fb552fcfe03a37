"""The steps of a run, one file and one command each; they meet in the store and never call each other."""
