"""`python -m qcompiler`: the command line."""

from qcompiler.cli.main import main

main(prog_name="qcompiler")
