"""Data by index: where it comes from, how it becomes batches, and in which order."""
