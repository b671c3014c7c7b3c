"""One thin entry point per command; the console command `smalti` runs them."""
