"""`python -m hopskip.cli`"""

from hopskip.cli import main

main()
