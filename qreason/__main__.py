"""python -m qreason"""

from qreason.cli import main

if __name__ == "__main__":
    main()
