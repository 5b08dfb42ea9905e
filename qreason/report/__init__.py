"""What a run has shown: evaluations as numbers with intervals, and the gains between them."""
