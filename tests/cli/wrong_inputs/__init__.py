"""Wrong inputs and the one line that each gets: data for the tests and for docs/wrong-inputs.md."""
