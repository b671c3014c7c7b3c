"""Write the help text of every command to src/smalti/help/; a test compares them with the commands.

python tools/write_help.py
"""

from smalti.cli import COMMANDS, help_text, saved_help

for name in COMMANDS:
    saved_help(name).parent.mkdir(exist_ok=True)
    saved_help(name).write_text(help_text(name), encoding="utf-8")
