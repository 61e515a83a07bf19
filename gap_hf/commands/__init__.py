"""The commands of `gap-hf`: one file each, with `add` for its arguments and `run` for what it does."""
