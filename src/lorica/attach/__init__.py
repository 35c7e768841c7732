"""How adapters sit on a base: targets, sites, activation."""
