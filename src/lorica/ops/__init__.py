"""Number-crunching functions: a signature with `Semantics:`, a torch reference, twins that pay."""
