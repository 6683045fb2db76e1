"""Everything that inspects or changes a model that has already been built."""
