"""`ldm doctor`: what could spoil a run, checked in seconds before it starts."""
