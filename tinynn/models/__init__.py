"""The published architectures, one file per source."""
