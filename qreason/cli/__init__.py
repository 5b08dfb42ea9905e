"""The command line: parse, call one stage, print. Nothing heavy is imported before a command needs it."""

from qreason.cli import judging, looking, publishing, running, serving
from qreason.cli.base import main

running.add_stage_commands()

__all__ = ["judging", "looking", "main", "publishing", "running", "serving"]
