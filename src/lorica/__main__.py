"""`python -m lorica` is `lorica`; torchrun starts it so."""

from lorica.cli import main

if __name__ == "__main__":
    main()
