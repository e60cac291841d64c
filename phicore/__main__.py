"""`python -m phicore` is the command `phicore`."""

from phicore.cli import main

if __name__ == "__main__":
    main()
