"""One thin entry point per stage; the console command `smalti` runs them."""
