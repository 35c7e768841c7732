"""The run folder: what a run writes about itself, and the page made from it."""
