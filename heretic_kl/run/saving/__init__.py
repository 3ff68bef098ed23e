"""From a trial to a model: save it, say how it was made, rebuild it, upload it."""
