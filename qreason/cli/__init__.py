"""The command line: parse, call one stage, print. Nothing heavy is imported before a command needs it."""

from qreason.cli import exporting, judging, looking, publishing, running, talking
from qreason.cli.base import main

running.add_stage_commands()

__all__ = ["exporting", "judging", "looking", "main", "publishing", "running", "talking"]
