"""`python -m service.cli`: the command line without the installed program `warmscale`."""

from service.cli.main import main

if __name__ == "__main__":
    main()
