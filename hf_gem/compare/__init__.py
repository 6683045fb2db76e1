"""Comparing activations by a frozen plan: runs, statistics, reports."""
