"""`python -m smalti` runs the console command `smalti`."""

from smalti.cli import main

raise SystemExit(main())
