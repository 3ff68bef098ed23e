"""From settings to an open run: load, calibrate, find directions, open the study."""
