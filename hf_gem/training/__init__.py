"""The training toolkit that the recipes share."""
