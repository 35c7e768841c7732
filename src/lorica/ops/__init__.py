"""Number-crunching functions: one signature with `Semantics:`, a torch reference, twins where they pay."""
