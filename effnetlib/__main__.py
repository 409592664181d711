"""`python -m effnetlib`: the command line, which `effnetlib/suites/command_line.py` defines."""

from effnetlib.suites.command_line import main

if __name__ == "__main__":
    main()
