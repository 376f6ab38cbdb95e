"""The one console that programs print through."""

from rich.console import Console

console = Console()
