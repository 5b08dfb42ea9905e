"""The results of a run: evaluations as numbers with intervals, and the gains between them."""
