"""Commands on the trials of a study, searched or still searching: list, show, save."""
