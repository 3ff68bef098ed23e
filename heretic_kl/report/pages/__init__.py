"""Pages of HTML: which sections they have, and how they are rendered. Measures nothing."""
