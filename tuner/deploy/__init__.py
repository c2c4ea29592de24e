"""From a measured trial to files that start the same deployment elsewhere."""
