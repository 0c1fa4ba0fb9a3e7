"""`kilter demo`: the built-in recipe on the embedded world."""

from __future__ import annotations

from importlib import resources

from kilter.cli.align import run_file


def run(command: str, argv: list[str]) -> int:
    """Run the recipe that ships with the package; it takes the same options as `kilter align`."""
    with resources.as_file(resources.files("kilter.world") / "demo.yaml") as path:
        return run_file(f"kilter {command}", path, argv)
