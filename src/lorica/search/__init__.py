"""Search: many candidates on one base, the hopeless dropped early, and an answer with a reason."""
