"""`python -m service.cli`: the command line, where the program `warmscale` is not on the path."""

from service.cli.main import main

if __name__ == "__main__":
    main()
