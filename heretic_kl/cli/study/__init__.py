"""Commands on a study's trials, also during a search: list, show, save, report, bench."""
