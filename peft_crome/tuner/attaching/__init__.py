"""Everything that happens to a model when an adapter is attached: plan, checks, and the way back."""
