"""Worlds and benchmarks of other packages as environments: one file each, the package imported when used."""
