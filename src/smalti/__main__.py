"""`python -m smalti` is the console command."""

from smalti.cli import main

raise SystemExit(main())
