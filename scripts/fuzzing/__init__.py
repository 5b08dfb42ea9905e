"""The surfaces of scripts/fuzz: what goes in, and who reads it."""
