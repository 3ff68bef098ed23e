"""How a search goes, for those who watch: what a front dominates, what decides, notes."""
