"""`python -m hopskip`"""

from hopskip.cli import main

main()
