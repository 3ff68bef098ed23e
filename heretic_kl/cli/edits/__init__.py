"""Commands on edits that exist already, whoever made them: reproduce, evaluate, upload."""
