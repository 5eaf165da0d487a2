"""The built-in tiny model: its data set, detector, transformer and training."""
