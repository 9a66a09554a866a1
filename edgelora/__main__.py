"""`python -m edgelora` is `edgelora`."""

from edgelora.cli.main import main

main()
