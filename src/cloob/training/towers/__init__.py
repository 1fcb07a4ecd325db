"""The towers as training needs them: built, started from trained weights, averaged, sharded."""
