"""`python -m medfast.profile`."""

from medfast.profile import main

if __name__ == "__main__":
    main()
