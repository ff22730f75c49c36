"""Which visual tokens stay; one file per method."""
